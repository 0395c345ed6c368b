"""Hold the weights of linear layers in eight bits, as torchao does; they are computed with in the serving dtype.

Source of the methods: torchao's weight-only quantization, symmetric, with one scale for each output channel.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import torch
from diffusers.models.autoencoders.vae import AutoencoderMixin

from triptych.engines.stages import ModelError


class Quantization(StrEnum):
    """What the weights of linear layers are held as."""

    NONE = "none"
    """As they are computed with."""
    INT8 = "int8"
    FLOAT8 = "float8"
    """`torch.float8_e4m3fn`."""


_PACKAGES: Final = {
    "bitsandbytes": ("bitsandbytes", "pip install bitsandbytes"),
    "bitsandbytes_4bit": ("bitsandbytes", "pip install bitsandbytes"),
    "bitsandbytes_8bit": ("bitsandbytes", "pip install bitsandbytes"),
    "torchao": ("torchao", 'pip install "triptych[quantization]"'),
    "quanto": ("optimum", "pip install optimum-quanto"),
}
"""Package, and how to install it, by the method that a configuration names."""
# They are small, have few linear layers, and errors of theirs are seen as such.
_LEFT_ALONE: Final = ("vae", "vocoder", "movq", "safety_checker", "watermark")


def quantize(name: str, module: Any, quantization: Quantization, device: torch.device) -> None:
    """Quantize a component in place, and put what was quantized on a device.

    Args:
        name: What the pipeline calls it. Autoencoders and vocoders are left as they are.
        module: A `torch.nn.Module`, of diffusers or transformers.
        quantization: What to.
        device: Layers are put there one by one, so that it never holds all of the larger weights.

    Raises:
        ModelError: torchao is not installed, or cannot quantize this.
    """
    if quantization is Quantization.NONE or not can_be_quantized(name, module):
        return
    quantize_, config = _torchao(quantization)
    try:
        with torch.no_grad():
            quantize_(module, config, device=device)
    except torch.OutOfMemoryError:
        raise
    # What torchao makes of a layout or a device that it has no kernel for: the user gets one sentence.
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        raise ModelError(f'The {name} cannot be quantized to "{quantization}": {error}') from error


def can_be_quantized(name: str, module: object) -> bool:
    """Whether a component is one that `quantize` changes: no autoencoder, and none that was read in fewer bits."""
    if getattr(module, "hf_quantizer", None) is not None:
        return False
    return not isinstance(module, AutoencoderMixin) and not any(word in name for word in _LEFT_ALONE)


def quantized_as(folder: Path) -> str:
    """What the weights in the folder of a component were quantized with, as its configuration says; "" for nothing.

    Raises:
        OSError: There is no such configuration.
        ValueError: It cannot be read.
    """
    config = json.loads((folder / "config.json").read_bytes())
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return str(found.get("quant_method") or "bitsandbytes") if isinstance(found, dict) else ""


def problem_with(method: str, device_type: str, *, installed: Callable[[str], bool]) -> str:
    """Say why weights that were quantized cannot be used here, as the rest of a sentence; "" if they can. Pure.

    Args:
        method: From `quantized_as`.
        device_type: Of the device that computes with them, "cpu" or "cuda".
        installed: Whether there is a package of that name.
    """
    package = _PACKAGES.get(method)
    if package is None:
        return "" if method in ("", "gguf", "fp8") else f'was quantized with "{method}", which is not supported'
    module, command = package
    if method.startswith("bitsandbytes") and device_type != "cuda":
        return f"was quantized with bitsandbytes, which computes on a CUDA device and not on {device_type}"
    if not installed(module):
        return f"was quantized with {method}, which is not installed: {command}"
    return ""


def nbytes(module: torch.nn.Module) -> int:
    """Bytes that the parameters and buffers of a module take."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(_nbytes(tensor) for tensor in tensors.values())


def _nbytes(tensor: torch.Tensor) -> int:
    # A quantized tensor says that it is of the type that it is computed with; inside it has others.
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_nbytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def _torchao(quantization: Quantization) -> tuple[Any, Any]:
    # Here, because to import it takes a while, and most roles go without it.
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ModelError(
            f'quantization = "{quantization}" needs torchao: pip install "triptych[quantization]".'
        ) from error
    return quantize_, {Quantization.INT8: Int8WeightOnlyConfig, Quantization.FLOAT8: Float8WeightOnlyConfig}[
        quantization
    ]()
