"""Pack the values that cross between panels into one slot of bytes and a manifest, and back, without pickle.

What crosses is a dict of tensors, numbers, text, bytes, slices, images, arrays, generators and containers of those.
Anything else is refused by name and type: a value that stayed behind would make a wrong picture and no error.
Of an image only the pixels cross, of a tensor neither its gradient nor its aliases.
"""

from __future__ import annotations

import dataclasses

import torch

from triptych.engines import manifest as m
from triptych.engines.carriers import register_dataclass
from triptych.engines.manifest import ALIGNMENT, CodecError
from triptych.engines.packing import Packer
from triptych.engines.unpacking import Unpacker

__all__ = ["ALIGNMENT", "CodecError", "Packed", "pack", "register_dataclass", "unpack"]


@dataclasses.dataclass(frozen=True)
class Packed:
    """A state that is ready to be laid into a slot.

    Attributes:
        manifest: What the slot will hold, msgpack; `unpack` reads it.
        tensors: The bytes of each span: 1-D uint8 tensors on their own devices, views of dense sources.
        offsets: Where each of them goes, in bytes from the start of the slot; ascending, of `ALIGNMENT`.
        nbytes: Bytes of the slot in use.

    """

    manifest: bytes
    tensors: tuple[torch.Tensor, ...]
    offsets: tuple[int, ...]
    nbytes: int

    def copy_to(self, memory: torch.Tensor, *, non_blocking: bool = False) -> None:
        """Lay the state into a slot; gaps between spans are zeroed, so that no older bytes travel along.

        Args:
            memory: uint8, shape [at least `nbytes`], on the CPU.
            non_blocking: Copy asynchronously from a device to pinned memory; the caller waits for the stream.

        Raises:
            CodecError: The slot is too small, or is no dense uint8 memory on the CPU.

        """
        _check_memory(memory)
        if memory.numel() < self.nbytes:
            raise CodecError(f"The state takes {self.nbytes} bytes, the slot has {memory.numel()}.")
        end = 0
        for offset, tensor in zip(self.offsets, self.tensors, strict=True):
            memory[end:offset].zero_()
            end = offset + tensor.numel()
            memory[offset:end].copy_(tensor, non_blocking=non_blocking)


def pack(values: dict[str, object]) -> Packed:
    """Describe a state and collect its bytes; tensors that are already dense are not copied.

    Args:
        values: Names and values; see the module for what can cross.

    Raises:
        CodecError: A value cannot cross; the message names its path and its type.

    """
    packer = Packer()
    root = packer.state(values)
    manifest = m.encode(m.Manifest(m.VERSION, packer.nbytes, root))
    return Packed(manifest, tuple(packer.tensors), tuple(packer.offsets), packer.nbytes)


def unpack(manifest: bytes, memory: torch.Tensor, device: torch.device, *, owned: bool = False) -> dict[str, object]:
    """Read a state back; everything returned owns its memory, so the slot may be reused afterwards.

    Args:
        manifest: From `Packed.manifest`, or anything else: it is not trusted.
        memory: The slot, uint8, shape [bytes], on the CPU. Where it is pinned and `device` is an accelerator,
            copies are asynchronous on the current stream: release the slot when that stream has passed them.
        device: Where the tensors go. Arrays, images and CPU generators stay on the CPU.
        owned: `memory` is for these values alone, so tensors on the CPU are views of it.

    Raises:
        CodecError: The manifest is garbage, or does not fit the slot.

    """
    _check_memory(memory)
    content = m.decode(manifest)
    if content.nbytes > memory.numel():
        raise CodecError(f"The manifest speaks of {content.nbytes} bytes, the slot has {memory.numel()}.")
    return Unpacker(memory[: content.nbytes], torch.device(device), owned=owned).state(content.values)


def _check_memory(memory: torch.Tensor) -> None:
    flat = memory.dtype is torch.uint8 and memory.dim() == 1 and memory.is_contiguous()
    if not flat or memory.device.type != "cpu":
        raise CodecError(f"A slot is a dense uint8 tensor [bytes] on the CPU, not {memory.dtype}.")
