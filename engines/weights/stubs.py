"""Stubs for the components that another stage owns: their configuration without their weights.

Most pipelines compute geometry from components that the running block does not declare: the size of latents from the
VAE, their channels from the transformer. Without such a component they use constants, and the image is wrong without an
error. So each stage has a stub for every component that it does not load. A stub includes the statistics for
normalization, which are buffers or parameters of the component itself, and small.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from safetensors import safe_open
from transformers import PreTrainedModel

from triptych.engines.model_options import DEFAULTS, ModelOptions
from triptych.engines.weights.files import WeightFormat, component_files
from triptych.engines.weights.single_files import read_single_file

COMPUTE_METHODS: Final = frozenset({"forward", "encode", "decode", "tiled_decode", "tiled_encode", "generate", "step"})


class StubError(RuntimeError):
    """A pipeline has called a component that another stage owns."""


class Stub:
    """Forwards attributes to a component without weights, and has the dtype and device that it has where it is loaded.

    It is not a `torch.nn.Module`, because a pipeline uses the device of the first module that it finds, and that of a
    component without weights is "meta".
    """

    def __init__(self, name: str, component: object, dtype: torch.dtype, device: torch.device) -> None:
        self._name = name
        self._component = component
        self.dtype = dtype
        self.device = device

    def __getattr__(self, attribute: str) -> Any:
        if attribute in COMPUTE_METHODS:
            raise StubError(f"`{self._name}.{attribute}` was called where only its configuration is loaded.")
        # Forward private names, too: some geometry has them. A copy reads attributes before there are any.
        if attribute.startswith("__") or "_component" not in vars(self):
            raise AttributeError(attribute)
        return getattr(self._component, attribute)


class _ConfigOnly:
    """The stub of a transformers model: only its configuration."""

    def __init__(self, config: object) -> None:
        self.config = config


def make_stub(
    name: str, cls: Any, folder: Path, dtype: torch.dtype, device: torch.device, options: ModelOptions = DEFAULTS
) -> object | None:
    """Make the stub of a component.

    Args:
        name: The name of the component in the pipeline.
        cls: Its class.
        folder: Its folder.
        dtype: The dtype that it is served with.
        device: The device of this stage.
        options: The options of the topology.

    Returns:
        A `Stub` for a model; the component itself if it has no weights (schedulers, guiders); None for others
        (tokenizers, processors), whose attributes pipelines do not read.
    """
    if not isinstance(cls, type):
        return None
    known: Any = cls
    if issubclass(cls, ConfigMixin):
        config = known.load_config(str(folder))
        if not issubclass(cls, torch.nn.Module):
            made: object = known.from_config(config)
            return made
        # `torch.device("meta")` would make no real tables that are computed with the model (rotary embeddings).
        with init_empty_weights():
            module = known.from_config(config)
        files = component_files(name, folder, options)
        if files.form is WeightFormat.FOLDER:
            _read_values(module, files.files, dtype, device)
        elif _missing_buffers(module):
            _copy_buffers(module, read_single_file(name, cls, files.files[0], folder, torch.float32), dtype, device)
        return Stub(name, module, dtype, device)
    if is_multi_model(cls):
        with init_empty_weights():
            several = known([_configured(each) for each in model_folders(folder)])
        return Stub(name, several, dtype, device)
    if issubclass(cls, PreTrainedModel):
        return Stub(name, _ConfigOnly(known.config_class.from_pretrained(str(folder))), dtype, device)
    return None


def _missing_buffers(module: torch.nn.Module) -> set[str]:
    """Return the names of the buffers whose values are only in the weight files."""
    return set(module.state_dict()) - {name for name, _ in module.named_parameters()}


def _own_parameters(module: torch.nn.Module) -> set[str]:
    """Return the names of the parameters outside of layers, such as statistics for normalization."""
    return {name for name, _ in module.named_parameters(recurse=False)}


def _copy_buffers(module: torch.nn.Module, read: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    there = dict(read.named_buffers())
    for name in _missing_buffers(module) & there.keys():
        _set_value(module, name, there[name].to(device), dtype)


def _set_value(module: torch.nn.Module, name: str, value: torch.Tensor, dtype: torch.dtype) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    value = value.to(dtype) if value.is_floating_point() else value
    if leaf in dict(owner.named_parameters(recurse=False)):
        owner.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=False))
    else:
        owner.register_buffer(leaf, value)


def is_multi_model(cls: object) -> bool:
    """Whether a component of a class is several models, each in its own folder, such as several ControlNets."""
    return isinstance(cls, type) and issubclass(cls, ModelMixin) and not issubclass(cls, ConfigMixin)


def model_folders(folder: Path) -> Iterator[Path]:
    """Yield the folders of the models of such a component: its own, then the same name with _1, _2 and so on."""
    names = itertools.chain([folder], (folder.with_name(f"{folder.name}_{number}") for number in itertools.count(1)))
    return itertools.takewhile(Path.is_dir, names)


def _configured(folder: Path) -> Any:
    name = json.loads((folder / "config.json").read_bytes())["_class_name"]
    cls = getattr(diffusers, name)
    return cls.from_config(cls.load_config(str(folder)))


def _read_values(module: torch.nn.Module, files: Iterable[Path], dtype: torch.dtype, device: torch.device) -> None:
    missing = _missing_buffers(module) | _own_parameters(module)  # statistics of latents can be either
    for path in files:
        if not missing:
            return
        if not path.is_file():  # a stage that does not compute with it need not have its weights
            continue
        with safe_open(path, framework="pt") as file:
            for name in missing & set(file.keys()):
                _set_value(module, name, file.get_tensor(name).to(device), dtype)
                missing = missing - {name}
