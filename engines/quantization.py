"""Hold the weights of linear layers in eight bits, as torchao does; they are computed with in the serving dtype.

Source of the methods: torchao's weight-only quantization, symmetric, with one scale for each output channel.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

import torch
from diffusers.models.autoencoders.vae import AutoencoderMixin

from engines.panels import ModelError


class Quantization(StrEnum):
    """What the weights of linear layers are held as."""

    NONE = "none"
    """As they are computed with."""
    INT8 = "int8"
    FLOAT8 = "float8"
    """`torch.float8_e4m3fn`."""


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
    """Whether a component is one that `quantize` changes."""
    return not isinstance(module, AutoencoderMixin) and not any(word in name for word in _LEFT_ALONE)


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
