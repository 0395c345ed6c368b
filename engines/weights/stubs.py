"""Stubs for the components that another stage owns: their configuration, without their weights.

Most pipelines compute geometry from components that the running block does not declare: the size of latents from
the VAE, their channels from the transformer. Where such a component is absent they fall back to constants, and the
image is wrong without an error. So each stage gets a stub of every component that it does not load. Statistics
to normalize with are part of it: they are buffers, or parameters of the component itself, and small.
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
    """A block tried to compute with a component that another stage owns."""


class Stub:
    """Forwards reads of attributes to a component without weights; reports the dtype and device that it has elsewhere.

    It is no `torch.nn.Module`, because a pipeline takes the device of the first module it finds as its own, and that
    of a component without weights is "meta".
    """

    def __init__(self, name: str, component: object, dtype: torch.dtype, device: torch.device) -> None:
        self._name = name
        self._component = component
        self.dtype = dtype
        self.device = device

    def __getattr__(self, attribute: str) -> Any:
        if attribute in COMPUTE_METHODS:
            raise StubError(f"`{self._name}.{attribute}` was called where only its configuration is loaded.")
        # Some geometry has private names. A copy asks for attributes before there are any.
        if attribute.startswith("__") or "_component" not in vars(self):
            raise AttributeError(attribute)
        return getattr(self._component, attribute)


class _ConfigOnly:
    """A transformers model of which just the configuration is read."""

    def __init__(self, config: object) -> None:
        self.config = config


def make_stub(
    name: str, cls: Any, folder: Path, dtype: torch.dtype, device: torch.device, options: ModelOptions = DEFAULTS
) -> object | None:
    """Make the stub of a component.

    Args:
        name: What the pipeline calls it.
        cls: Its class.
        folder: Where its files are.
        dtype: What it is served with.
        device: Where it would be on this stage.
        options: How the model is read.

    Returns:
        A `Stub` for a model; the thing itself for what has no weights (schedulers, guiders); None for the rest
        (tokenizers, processors), which no pipeline reads from outside.
    """
    if not isinstance(cls, type):
        return None
    known: Any = cls
    if issubclass(cls, ConfigMixin):
        config = known.load_config(str(folder))
        if not issubclass(cls, torch.nn.Module):
            made: object = known.from_config(config)
            return made
        # Not `torch.device("meta")`: tables computed when a model is made (rotary embeddings) must be real.
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
    """Names of the buffers whose values are in the weights file alone."""
    return set(module.state_dict()) - {name for name, _ in module.named_parameters()}


def _own_parameters(module: torch.nn.Module) -> set[str]:
    """Names of the parameters that are in none of its layers; among them are statistics to normalize with."""
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
    """Whether the component of a class is several models, each in a folder of its own, as several ControlNets are."""
    return isinstance(cls, type) and issubclass(cls, ModelMixin) and not issubclass(cls, ConfigMixin)


def model_folders(folder: Path) -> Iterator[Path]:
    """Those of the models of such a component: its own, then the same name with _1, _2 and so on."""
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
        if not path.is_file():  # a stage that does not compute with it may go without its weights
            continue
        with safe_open(path, framework="pt") as file:
            for name in missing & set(file.keys()):
                _set_value(module, name, file.get_tensor(name).to(device), dtype)
                missing = missing - {name}
