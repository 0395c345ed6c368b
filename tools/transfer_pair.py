"""Two ends of a transfer through pool memory, without the actors around them."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from triptych.engines.codec.codec import pack
from triptych.engines.memory.arena import Arena
from triptych.engines.memory.streams import DeviceStream, LoadedPayload


class StoredBytes(NamedTuple):
    """A payload in a block of the pool."""

    manifest: bytes
    block: torch.Tensor
    checksum: int


class TransferPair:
    """The streams of a sender and a receiver on one device, and a pool of at least `nbytes` bytes between them."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.device = device
        self.arena = Arena.create(nbytes + (1 << 20))
        self.sender, self.receiver = DeviceStream(device, "sender"), DeviceStream(device, "receiver")

    async def pin(self) -> float:
        """Register the pool with the device as roles do; returns the seconds."""
        begun = time.perf_counter()
        await self.sender.run(self.arena.pin)
        return time.perf_counter() - begun

    def values(self, nbytes: int) -> dict[str, object]:
        """Make a payload of some bytes on the device."""
        values = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=self.device)
        self._synchronize()  # They were made on another stream than the sender's.
        return {"latents": values}

    async def store(self, values: dict[str, object]) -> StoredBytes:
        """Copy a payload into the pool, hashing on the way."""
        packed = await self.sender.run(pack, values)
        block = self.arena.tensor(0, packed.nbytes)
        return StoredBytes(packed.manifest, block, await self.sender.store(packed, block, self.sender.record()))

    async def load(self, stored: StoredBytes) -> LoadedPayload:
        """Copy it out of the pool, hashing again; returns when it is on the device."""
        loaded = await self.receiver.load(*stored)
        await self.receiver.run(loaded.event.synchronize)
        return loaded

    def close(self) -> None:
        """Close the streams and the pool."""
        for stream in (self.sender, self.receiver):
            stream.close()
        self._synchronize()
        self.arena.close()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
