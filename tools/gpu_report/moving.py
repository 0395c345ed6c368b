"""Rows `hop` and `overlap`: how tensors move from device to device, as the transfer actor of a role moves them."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch

from triptych.engines.arena import Arena
from triptych.engines.codec import pack
from triptych.engines.streams import DeviceStream, Loaded
from triptych.tools.gpu_report.bench import Bench, RowFailedError

SIZES: Final = {"4 MiB": 4 << 20, "64 MiB": 64 << 20, "512 MiB": 512 << 20}
TINY_SIZES: Final = {"4 MiB": 4 << 20, "16 MiB": 16 << 20}
ROUNDS: Final = 5
LOAD: Final = "64 MiB"


class Staged(NamedTuple):
    """A state in a slot of the pool."""

    manifest: bytes
    slot: torch.Tensor
    checksum: int


class Rig:
    """The streams of a sender and a receiver, and a pool that both have mapped."""

    def __init__(self, bench: Bench, nbytes: int) -> None:
        self.bench = bench
        self.arena = Arena.create(nbytes + (1 << 20))
        self.sender = DeviceStream(bench.device, "sender")
        self.receiver = DeviceStream(bench.device, "receiver")

    async def pin(self) -> float:
        """Register the pool with the device as roles do; returns the seconds."""
        begun = time.perf_counter()
        await self.sender.run(self.arena.pin)
        return time.perf_counter() - begun

    def values(self, nbytes: int) -> dict[str, object]:
        """Make a state of some bytes on the device."""
        values = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=self.bench.device)
        self.bench.synchronize()  # They were made on another stream than the sender's.
        return {"latents": values}

    async def store(self, values: dict[str, object]) -> Staged:
        """Copy a state into the pool, hashing on the way."""
        packed = await self.sender.run(pack, values)
        slot = self.arena.tensor(0, packed.nbytes)
        return Staged(packed.manifest, slot, await self.sender.stage(packed, slot, self.sender.record()))

    async def load(self, staged: Staged) -> Loaded:
        """Copy it out of the pool, hashing again; returns when it is on the device."""
        loaded = await self.receiver.load(*staged)
        await self.receiver.run(loaded.event.synchronize)
        return loaded

    def close(self) -> None:
        """Let go of everything."""
        for stream in (self.sender, self.receiver):
            stream.close()
        self.bench.synchronize()
        self.arena.close()


@contextmanager
def _rig(bench: Bench, nbytes: int) -> Iterator[Rig]:
    rig = Rig(bench, nbytes)
    try:
        yield rig
    finally:
        rig.close()


def hop(bench: Bench) -> None:
    """Measure device to pool to device against plain copies of the same bytes over the same bus."""
    sizes = SIZES if bench.cuda else TINY_SIZES
    with _rig(bench, max(sizes.values())) as rig:
        asyncio.run(_hop(rig, sizes))


async def _hop(rig: Rig, sizes: dict[str, int]) -> None:
    bench = rig.bench
    seconds = await rig.pin()
    pinned = "yes" if rig.arena.pinned else f"no: {rig.arena.pin_failure}"
    bench.value("pool pinned", pinned, note=f"{seconds:.2f} s for {rig.arena.nbytes >> 20} MiB")
    for label, nbytes in sizes.items():
        values = rig.values(nbytes)
        taken = [await _once(rig, values, nbytes) for _ in range(ROUNDS + 1)][1:]
        stored, loaded = (statistics.median(times) for times in zip(*taken, strict=True))
        down, up = _plain_copies(bench, nbytes)
        for what, ours, plain in (("device to pool", stored, down), ("pool to device", loaded, up)):
            bench.value(f"{what}, {label}", nbytes / ours / 1e9, "GB/s", "with its checksum")
            bench.value(f"plain copy for {what}, {label}", nbytes / plain / 1e9, "GB/s", "pinned memory, no checksum")
        bench.value(f"hop, {label}", 1e3 * (stored + loaded), "ms", f"two plain copies: {1e3 * (down + up):.3g} ms")


async def _once(rig: Rig, values: dict[str, object], nbytes: int) -> tuple[float, float]:
    begun = time.perf_counter()
    staged = await rig.store(values)
    between = time.perf_counter()
    loaded = await rig.load(staged)
    ended = time.perf_counter()
    sent, arrived = values["latents"], loaded.values["latents"]
    if not (isinstance(sent, torch.Tensor) and isinstance(arrived, torch.Tensor) and torch.equal(sent, arrived)):
        raise RowFailedError(f"What arrived is not what was sent, of {nbytes} bytes.")
    return between - begun, ended - between


def _plain_copies(bench: Bench, nbytes: int) -> tuple[float, float]:
    """Return the seconds of a copy from the device to the host, and of one back."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=bench.cuda)
    device = torch.zeros(nbytes, dtype=torch.uint8, device=bench.device)
    down = bench.median(lambda: host.copy_(device, non_blocking=True), ROUNDS)
    return down, bench.median(lambda: device.copy_(host, non_blocking=True), ROUNDS)


def overlap(bench: Bench) -> None:
    """Measure whether the load of the next request hides behind the compute of the present one."""
    nbytes = SIZES[LOAD]
    with _rig(bench, nbytes) as rig:
        asyncio.run(_overlap(rig, nbytes))


async def _overlap(rig: Rig, nbytes: int) -> None:
    bench = rig.bench
    await rig.pin()
    compute = DeviceStream(bench.device, "compute")
    try:
        staged = await rig.store(rig.values(nbytes))
        await rig.load(staged)  # The first load takes memory from the driver, which may wait for the whole device.
        side = 4096 if bench.cuda else 256
        matrix = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
        bench.synchronize()

        def multiply(times: int) -> None:
            for _ in range(times):
                torch.mm(matrix, matrix)

        async def computing(times: int) -> float:
            begun = time.perf_counter()
            await compute.run(multiply, times)
            await compute.run(compute.record().synchronize)
            return time.perf_counter() - begun

        async def loading() -> float:
            begun = time.perf_counter()
            await rig.load(staged)
            return time.perf_counter() - begun

        alone = statistics.median([await loading() for _ in range(ROUNDS)])
        await computing(10)
        times = max(1, round(3 * alone / (await computing(20) / 20)))
        busy = statistics.median([await computing(times) for _ in range(ROUNDS)])
        bench.value(f"load of {LOAD} alone", 1e3 * alone, "ms")
        bench.value("compute alone", 1e3 * busy, "ms", f"{times} matrix products of {side} x {side}")
        if not bench.cuda:
            bench.value("both at once", 1e3 * (alone + busy), "ms", "no streams on this device: one after the other")
            return
        both, ended_first = [], 0
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            await compute.run(multiply, times)
            end = compute.record()
            await rig.load(staged)
            ended_first += not end.passed
            await compute.run(end.synchronize)
            both.append(time.perf_counter() - begun)
        together = statistics.median(both)
        bench.value("both at once", 1e3 * together, "ms")
        bench.value("share of the load that is hidden", 100 * (alone + busy - together) / alone, "%")
        bench.value("loads that ended before the compute did", f"{ended_first} of {ROUNDS}", note="by CUDA events")
    finally:
        compute.close()
