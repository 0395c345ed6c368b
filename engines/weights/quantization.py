"""Quantize the weights of linear layers to eight bits with torchao; they compute in the serving dtype.

The methods are torchao's weight-only quantization: symmetric, with one scale for each output channel.
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
    """The format of the weights of linear layers."""

    NONE = "none"
    """The serving dtype."""
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
"""The package of a quantization method, and how to install it."""
# Components that are small, have few linear layers, and whose errors would be visible.
_LEFT_ALONE: Final = ("vae", "vocoder", "movq", "safety_checker", "watermark")


def quantize(name: str, module: Any, quantization: Quantization, device: torch.device) -> None:
    """Quantize a component in place, and move the quantized weights to a device.

    Args:
        name: The name of the component in the pipeline. Autoencoders and vocoders are not quantized.
        module: A `torch.nn.Module` of diffusers or transformers.
        quantization: The format.
        device: The device, to which layers are moved one by one, so that it never holds all unquantized weights.

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
    # torchao raises these for a layout or a device without a kernel; report it as one sentence.
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        raise ModelError(f'The {name} cannot be quantized to "{quantization}": {error}') from error


def can_be_quantized(name: str, module: object) -> bool:
    """Whether `quantize` changes a component: not an autoencoder, and not one that is quantized already."""
    if getattr(module, "hf_quantizer", None) is not None:
        return False
    return not isinstance(module, AutoencoderMixin) and not any(word in name for word in _LEFT_ALONE)


def quantization_method(folder: Path) -> str:
    """Return the quantization method of a component, from the configuration in its folder; "" for none.

    Raises:
        OSError: There is no configuration.
        ValueError: It cannot be parsed.
    """
    config = json.loads((folder / "config.json").read_bytes())
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return str(found.get("quant_method") or "bitsandbytes") if isinstance(found, dict) else ""


def method_problem(method: str, device_type: str, *, installed: Callable[[str], bool]) -> str:
    """Say why quantized weights cannot be used here, as the rest of a sentence; "" if they can. Pure.

    Args:
        method: The method, from `quantization_method`.
        device_type: The type of the device that computes, "cpu" or "cuda".
        installed: Whether a package of that name is installed.
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
    """Return the bytes of the parameters and buffers of a module."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(_nbytes(tensor) for tensor in tensors.values())


def _nbytes(tensor: torch.Tensor) -> int:
    # A quantized tensor has the dtype that it computes in; the tensors inside of it have others.
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_nbytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def _torchao(quantization: Quantization) -> tuple[Any, Any]:
    # Import it here, since that is slow and most roles do not need it.
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ModelError(
            f'quantization = "{quantization}" needs torchao: pip install "triptych[quantization]".'
        ) from error
    return quantize_, {Quantization.INT8: Int8WeightOnlyConfig, Quantization.FLOAT8: Float8WeightOnlyConfig}[
        quantization
    ]()
