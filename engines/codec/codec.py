"""Pack the values that cross between stages into one block of bytes and a manifest, and back, without pickle.

What crosses is a dict of tensors, numbers, text, bytes, slices, images, arrays, generators and containers of those.
Anything else is refused by name and type: a value that stayed behind would make a wrong image and no error.
Of an image only the pixels cross, of a tensor neither its gradient nor its aliases.
"""

from __future__ import annotations

import dataclasses

import torch

from triptych.engines.codec import manifest as m
from triptych.engines.codec.allowed_types import register_dataclass
from triptych.engines.codec.manifest import ALIGNMENT, CodecError
from triptych.engines.codec.packing import Packer
from triptych.engines.codec.unpacking import Unpacker

__all__ = ["ALIGNMENT", "CodecError", "Packed", "pack", "register_dataclass", "unpack"]


@dataclasses.dataclass(frozen=True)
class Packed:
    """A payload that is ready to be laid into a block.

    Attributes:
        manifest: What the block will hold, msgpack; `unpack` reads it.
        tensors: The bytes of each span: 1-D uint8 tensors on their own devices, views of dense sources.
        offsets: Where each of them goes, in bytes from the start of the block; ascending, of `ALIGNMENT`.
        nbytes: Bytes of the block in use.

    """

    manifest: bytes
    tensors: tuple[torch.Tensor, ...]
    offsets: tuple[int, ...]
    nbytes: int

    def copy_to(self, memory: torch.Tensor, *, non_blocking: bool = False) -> None:
        """Lay the payload into a block; gaps between spans are zeroed, so that no older bytes travel along.

        Args:
            memory: uint8, shape [at least `nbytes`], on the CPU.
            non_blocking: Copy asynchronously from a device to pinned memory; the caller waits for the stream.

        Raises:
            CodecError: The block is too small, or is no dense uint8 memory on the CPU.

        """
        _check_memory(memory)
        if memory.numel() < self.nbytes:
            raise CodecError(f"The payload takes {self.nbytes} bytes, the block has {memory.numel()}.")
        end = 0
        for offset, tensor in zip(self.offsets, self.tensors, strict=True):
            memory[end:offset].zero_()
            end = offset + tensor.numel()
            memory[offset:end].copy_(tensor, non_blocking=non_blocking)


def pack(values: dict[str, object]) -> Packed:
    """Describe a payload and collect its bytes; tensors that are already dense are not copied.

    Args:
        values: Names and values; see the module for what can cross.

    Raises:
        CodecError: A value cannot cross; the message names its path and its type.

    """
    packer = Packer()
    root = packer.payload(values)
    manifest = m.encode(m.Manifest(m.VERSION, packer.nbytes, root))
    return Packed(manifest, tuple(packer.tensors), tuple(packer.offsets), packer.nbytes)


def unpack(manifest: bytes, memory: torch.Tensor, device: torch.device, *, owned: bool = False) -> dict[str, object]:
    """Read a payload back; everything returned owns its memory, so the block may be reused afterwards.

    Args:
        manifest: From `Packed.manifest`, or anything else: it is not trusted.
        memory: The block, uint8, shape [bytes], on the CPU. Where it is pinned and `device` is an accelerator,
            copies are asynchronous on the current stream: release the block when that stream has passed them.
        device: Where the tensors go. Arrays, images and CPU generators stay on the CPU.
        owned: `memory` is for these values alone, so tensors on the CPU are views of it.

    Raises:
        CodecError: The manifest is garbage, or does not fit the block.

    """
    _check_memory(memory)
    content = m.decode(manifest)
    if content.nbytes > memory.numel():
        raise CodecError(f"The manifest speaks of {content.nbytes} bytes, the block has {memory.numel()}.")
    return Unpacker(memory[: content.nbytes], torch.device(device), owned=owned).payload(content.values)


def _check_memory(memory: torch.Tensor) -> None:
    flat = memory.dtype is torch.uint8 and memory.dim() == 1 and memory.is_contiguous()
    if not flat or memory.device.type != "cpu":
        raise CodecError(f"A block is a dense uint8 tensor [bytes] on the CPU, not {memory.dtype}.")
