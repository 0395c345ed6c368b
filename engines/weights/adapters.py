"""LoRA adapters in the components of a process, activated for one request at a time.

All requests share the components that adapters are loaded into. So before each call that computes for a request, its
adapters are activated. A layer without an active adapter computes the same bits as without any adapter.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
import xxhash
from diffusers.configuration_utils import FrozenDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from triptych.engines.parameters.lora import LoraChoice, LoraFile
from triptych.engines.parameters.serving_config import load_index
from triptych.engines.stages import ModelError, one_line

SUFFIX: Final = ".safetensors"
_LIBRARIES: Final = ("diffusers", "transformers")
_DOWN: Final = (".lora_A", ".lora_down", ".lora.down", "_lora.down", ".lora_linear_layer.down")
_SECOND: Final = "transformer_2"
_DENOISE: Final = ("transformer", "unet")


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA file, in the format of diffusers.

    Attributes:
        file: The path, for messages.
        tensors: The tensors by name; each name begins with that of a component.
        alphas: The network alphas by name, or None.
        metadata: The metadata of the file, or None.
    """

    file: Path
    tensors: Mapping[str, torch.Tensor]
    alphas: Mapping[str, object] | None
    metadata: Mapping[str, object] | None

    def of(self, component: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a component."""
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(f"{component}.")}

    @property
    def components(self) -> frozenset[str]:
        """The names of its components."""
        return frozenset(name.partition(".")[0] for name in self.tensors)


@dataclass(frozen=True)
class AdaptedComponent:
    """A component with adapters.

    Attributes:
        layers: The layers with adapters, found once, since a transformer has thousands of modules.
        weights: The weights of the model with `requires_grad`. For some layouts, `torch.matmul` rounds differently by
            that flag, even without gradients, and diffusers clears it when it adds an adapter.
    """

    layers: tuple[Any, ...]
    weights: tuple[torch.nn.Parameter, ...]

    def switch(self, scales: Mapping[str, float]) -> None:
        """Activate adapters in this order, each with its scale, and deactivate all others."""
        for weight in self.weights:
            weight.requires_grad_(not scales)
        for layer in self.layers:
            if scales:
                layer.set_adapter(list(scales))
            for name, scale in scales.items():
                layer.set_scale(name, scale)
            layer.enable_adapters(enabled=bool(scales))


class Adapters:
    """The adapters of a process. Not thread-safe, as a pipeline.

    Attributes:
        files: The configured adapters.
        encodes: Whether some of them change the outputs of an encoder.
    """

    def __init__(self, files: tuple[LoraFile, ...] = (), weights: Mapping[str, tuple[LoraWeights, ...]] | None = None):
        self.files = files
        self._weights = weights or {}
        self._mixin: Any = None
        self._components: dict[str, AdaptedComponent] = {}
        self._holders: dict[str, set[str]] = {file.name: set() for file in files}
        # Use names of our own: libraries search for them inside the names of tensors, and they must not have dots.
        self._inner = {file.name: f"adapter_{number}_" for number, file in enumerate(files)}
        self._active: tuple[LoraChoice, ...] = ()
        self._is_known = True
        # Text encoders, and in some families their connectors (LTX-2), run before the denoiser.
        self.encodes = any(not name.startswith(_DENOISE) for each in self._each() for name in each.components)

    @classmethod
    def read(cls, model: Path, files: tuple[LoraFile, ...], mixin: Any | None) -> Adapters:
        """Read the files of adapters.

        Args:
            model: The folder of their model.
            files: The adapters, of distinct names.
            mixin: The pipeline class that knows the LoRA formats of the model; None if there is none.

        Raises:
            ModelError: A file is missing, broken or not for this model, or the pipeline takes no adapters.
        """
        if not files:
            return cls()
        index = load_index(model)
        if mixin is None:
            raise ModelError(f"diffusers loads no LoRA into a {index['_class_name']}: leave out [[model.lora]].")
        weights = {file.name: tuple(_read(mixin, model, file)) for file in files}
        for each in (one for parts in weights.values() for one in parts):
            others = sorted(name for name in each.components if not isinstance(index.get(name), list))
            if others:
                raise ModelError(
                    f"The LoRA {each.file} has weights for {', '.join(others)}, which {model} does not have."
                )
        made = cls(files, weights)
        made._mixin = mixin
        return made

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Return the shapes of all tensors by component and by name inside of the component."""
        return {
            component: {
                name.removeprefix(f"{component}."): tuple(tensor.shape)
                for weights in self._each()
                for name, tensor in weights.of(component).items()
            }
            for component in {name for weights in self._each() for name in weights.components}
        }

    def attach(self, component: str, module: Any) -> None:
        """Load the adapters into a component, inactive.

        Raises:
            ModelError: A tensor of a file does not fit.
        """
        wanted = tuple(weight for weight in module.parameters() if weight.requires_grad)
        for name, parts in self._weights.items():
            for weights in parts:
                if tensors := weights.of(component):
                    _load(self._mixin, component, module, self._inner[name], weights, tensors)
                    self._holders[name].add(component)
        if layers := tuple(layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)):
            self._components[component] = AdaptedComponent(layers, wanted)
            self._components[component].switch({})

    def release(self) -> None:
        """Free the tensors of the files, after all components have theirs."""
        self._weights = {}

    def activate(self, choices: tuple[LoraChoice, ...]) -> None:
        """Activate adapters in all components; () for none.

        Raises:
            ValueError: This process does not have an adapter.
        """
        if self._is_known and choices == self._active:
            return
        for choice in choices:
            if choice.name not in self._holders:
                here = ", ".join(self._holders) or "none"
                raise ValueError(f"There is no adapter {choice.name!r} here, only: {here}.")
        # If this fails in the middle, the next call must not assume that anything is active.
        self._is_known = False
        for component, adapted in self._components.items():
            held = [choice for choice in choices if component in self._holders[choice.name]]
            adapted.switch({self._inner[choice.name]: choice.scale for choice in held})
        self._active, self._is_known = choices, True

    def _each(self) -> Iterator[LoraWeights]:
        return (weights for parts in self._weights.values() for weights in parts)


def safetensors_file(path: Path) -> Path:
    """Return the file of an adapter.

    Args:
        path: The file, or a folder with exactly one.

    Raises:
        ModelError: There is no such file, or not exactly one.
    """
    if path.is_dir():
        found = sorted(path.glob(f"*{SUFFIX}"))
        if len(found) != 1:
            raise ModelError(f"The LoRA folder {path} must have exactly one {SUFFIX} file, and has {len(found)}.")
        return found[0]
    if not path.is_file():
        raise ModelError(f"There is no LoRA file {path}: check its path in [[model.lora]].")
    if path.suffix != SUFFIX:
        raise ModelError(f"The LoRA {path} is not a {SUFFIX} file; others are not read, since they can run code.")
    return path


def _read(mixin: Any, model: Path, file: LoraFile) -> Iterator[LoraWeights]:
    yield _convert(mixin, model, safetensors_file(file.path))
    if file.path_2 is not None:
        second = _convert(mixin, model, safetensors_file(file.path_2))
        # Each of the two files has the names of a model with one transformer.
        tensors = {_to_second(name): tensor for name, tensor in second.tensors.items()}
        metadata = second.metadata and {_to_second(name): value for name, value in second.metadata.items()}
        yield LoraWeights(second.file, tensors, second.alphas, metadata)


def _to_second(name: str) -> str:
    return f"{_SECOND}.{name.removeprefix('transformer.')}" if name.startswith("transformer.") else name


def _convert(mixin: Any, model: Path, path: Path) -> LoraWeights:
    """Convert a file to the format of diffusers."""
    try:
        with safe_open(path, framework="pt") as opened:
            names = list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"The LoRA {path} cannot be read: {one_line(error)}") from error
    if any("dora_scale" in name for name in names):
        raise ModelError(f"The LoRA {path} is a DoRA, whose magnitudes diffusers drops: it cannot be served.")
    options: dict[str, object] = {"return_lora_metadata": True, "use_safetensors": True, "local_files_only": True}
    if (model / "unet").is_dir():
        options["unet_config"] = FrozenDict(diffusers.UNet2DConditionModel.load_config(str(model / "unet")))
    try:
        with captured_warnings() as messages:
            tensors, *alphas, metadata = _state_dict(mixin, path, options)
    except Exception as error:  # the conversion may raise anything for another format; report it as one sentence
        raise ModelError(f"The LoRA {path} is not for {mixin.__name__}: {one_line(error)}") from error
    if messages:
        raise ModelError(f"The LoRA {path} cannot be loaded completely: {messages[0]}")
    others = sorted(name for name in tensors if "lora" not in name and "lokr" not in name)
    if others or not tensors:
        raise ModelError(f"The LoRA {path} has {others[0] if others else 'nothing'}, which is not a weight of a LoRA.")
    if (less := _downs(names) - _downs(tensors)) > 0:
        raise ModelError(f"The LoRA {path} has {less} matrices that diffusers drops for {mixin.__name__}.")
    return LoraWeights(path, tensors, alphas[0] if alphas else None, metadata)


def _state_dict(mixin: Any, path: Path, options: dict[str, object]) -> Any:
    if "return_alphas" in inspect.signature(mixin.lora_state_dict).parameters:
        options = {**options, "return_alphas": True}
    return mixin.lora_state_dict(str(path.parent), weight_name=path.name, **options)


def _downs(names: Any) -> int:
    return sum(any(f"{mark}." in name for mark in _DOWN) for name in names)


def _load(
    mixin: Any, component: str, module: Any, name: str, weights: LoraWeights, tensors: dict[str, torch.Tensor]
) -> None:
    options = {"network_alphas": weights.alphas, "metadata": weights.metadata, "low_cpu_mem_usage": True}
    try:
        # Both libraries skip tensors that do not fit, and warn of many that do; compare what has been loaded instead.
        with captured_warnings(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(module, diffusers.ModelMixin):
                module.load_lora_adapter(tensors, prefix=component, adapter_name=name, **options)
            else:
                mixin.load_lora_into_text_encoder(
                    tensors, text_encoder=module, prefix=component, adapter_name=name, **options
                )
    except Exception as error:  # three libraries may raise anything for weights that do not fit
        raise ModelError(f"The LoRA {weights.file} does not fit the {component}: {one_line(error)}") from error
    held = get_peft_model_state_dict(module, adapter_name=name) if name in getattr(module, "peft_config", ()) else {}
    if problem := _difference(tensors, held):
        raise ModelError(f"The LoRA {weights.file} does not fit the {component}: {problem}.")


def _difference(given: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> str:
    """Say how the tensors of a file differ from those in a component, whatever their names; "" if they do not."""
    inside = collections.Counter(_fingerprint(tensor, tensor.dtype) for tensor in held.values())
    dtype = next((tensor.dtype for tensor in held.values()), torch.float32)
    lost = []
    for name, tensor in given.items():
        mark = _fingerprint(tensor, dtype)
        if inside[mark]:
            inside[mark] -= 1
        elif "alpha" not in name:
            lost.append(name)
    if lost:
        return f"{len(lost)} of its {len(given)} tensors do not fit, such as {lost[0]}"
    return "it lacks some of its tensors" if inside.total() else ""


def _fingerprint(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[tuple[int, ...], str]:
    dense = tensor.detach().to("cpu", dtype).contiguous().view(torch.uint8)
    return tuple(tensor.shape), xxhash.xxh3_64_hexdigest(dense.numpy().data)


class _WarningCollector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(" ".join(record.getMessage().split()))


@contextlib.contextmanager
def captured_warnings() -> Iterator[list[str]]:
    """Collect the warnings of diffusers and transformers in the yielded list instead of their logs.

    They only warn of weights that are missing or that fit nowhere.
    """
    collector = _WarningCollector()
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    try:
        for logger in loggers:
            # A server silences the warnings of these libraries; here they are needed.
            logger.handlers, logger.propagate = [collector], False
            logger.setLevel(logging.WARNING)
        yield collector.messages
    finally:
        for logger, handlers, level, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
