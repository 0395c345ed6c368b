"""Rows `hop` and `overlap`: how tensors move from device to device, as the transfer actor of a role moves them."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from triptych.engines.memory.streams import DeviceStream
from triptych.tools.gpu_report.row_context import RowContext, RowFailedError
from triptych.tools.transfer_pair import TransferPair

SIZES: Final = {"4 MiB": 4 << 20, "64 MiB": 64 << 20, "512 MiB": 512 << 20}
TINY_SIZES: Final = {"4 MiB": 4 << 20, "16 MiB": 16 << 20}
ROUNDS: Final = 5
LOAD: Final = "64 MiB"


@contextmanager
def _transfer_pair(context: RowContext, nbytes: int) -> Iterator[TransferPair]:
    pair = TransferPair(context.device, nbytes)
    try:
        yield pair
    finally:
        pair.close()


def hop(context: RowContext) -> None:
    """Measure device to pool to device against plain copies of the same bytes over the same bus."""
    sizes = SIZES if context.cuda else TINY_SIZES
    with _transfer_pair(context, max(sizes.values())) as pair:
        asyncio.run(_hop(context, pair, sizes))


async def _hop(context: RowContext, pair: TransferPair, sizes: dict[str, int]) -> None:
    seconds = await pair.pin()
    pinned = "yes" if pair.arena.pinned else f"no: {pair.arena.pin_failure}"
    context.value("pool pinned", pinned, note=f"{seconds:.2f} s for {pair.arena.nbytes >> 20} MiB")
    for label, nbytes in sizes.items():
        values = pair.values(nbytes)
        taken = [await _one_hop(pair, values, nbytes) for _ in range(ROUNDS + 1)][1:]
        stored, loaded = (statistics.median(times) for times in zip(*taken, strict=True))
        down, up = _plain_copies(context, nbytes)
        for what, ours, plain in (("device to pool", stored, down), ("pool to device", loaded, up)):
            context.value(f"{what}, {label}", nbytes / ours / 1e9, "GB/s", "with its checksum")
            context.value(f"plain copy for {what}, {label}", nbytes / plain / 1e9, "GB/s", "pinned memory, no checksum")
        context.value(f"hop, {label}", 1e3 * (stored + loaded), "ms", f"two plain copies: {1e3 * (down + up):.3g} ms")


async def _one_hop(pair: TransferPair, values: dict[str, object], nbytes: int) -> tuple[float, float]:
    begun = time.perf_counter()
    stored = await pair.store(values)
    between = time.perf_counter()
    loaded = await pair.load(stored)
    ended = time.perf_counter()
    sent, arrived = values["latents"], loaded.values["latents"]
    if not (isinstance(sent, torch.Tensor) and isinstance(arrived, torch.Tensor) and torch.equal(sent, arrived)):
        raise RowFailedError(f"What arrived is not what was sent, of {nbytes} bytes.")
    return between - begun, ended - between


def _plain_copies(context: RowContext, nbytes: int) -> tuple[float, float]:
    """Return the seconds of a copy from the device to the host, and of one back."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=context.cuda)
    device = torch.zeros(nbytes, dtype=torch.uint8, device=context.device)
    down = context.median(lambda: host.copy_(device, non_blocking=True), ROUNDS)
    return down, context.median(lambda: device.copy_(host, non_blocking=True), ROUNDS)


def overlap(context: RowContext) -> None:
    """Measure whether the load of the next request hides behind the compute of the present one."""
    nbytes = SIZES[LOAD]
    with _transfer_pair(context, nbytes) as pair:
        asyncio.run(_overlap(context, pair, nbytes))


async def _overlap(context: RowContext, pair: TransferPair, nbytes: int) -> None:
    await pair.pin()
    compute = DeviceStream(context.device, "compute")
    try:
        stored = await pair.store(pair.values(nbytes))
        await pair.load(stored)  # The first load takes memory from the driver, which may wait for the whole device.
        side = 4096 if context.cuda else 256
        matrix = torch.randn(side, side, device=context.device, dtype=torch.bfloat16)
        context.synchronize()

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
            await pair.load(stored)
            return time.perf_counter() - begun

        alone = statistics.median([await loading() for _ in range(ROUNDS)])
        await computing(10)
        times = max(1, round(3 * alone / (await computing(20) / 20)))
        busy = statistics.median([await computing(times) for _ in range(ROUNDS)])
        context.value(f"load of {LOAD} alone", 1e3 * alone, "ms")
        context.value("compute alone", 1e3 * busy, "ms", f"{times} matrix products of {side} x {side}")
        if not context.cuda:
            context.value("both at once", 1e3 * (alone + busy), "ms", "no streams on this device: one after the other")
            return
        both, ended_first = [], 0
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            await compute.run(multiply, times)
            end = compute.record()
            await pair.load(stored)
            ended_first += not end.passed
            await compute.run(end.synchronize)
            both.append(time.perf_counter() - begun)
        together = statistics.median(both)
        context.value("both at once", 1e3 * together, "ms")
        context.value("share of the load that is hidden", 100 * (alone + busy - together) / alone, "%")
        context.value("loads that ended before the compute did", f"{ended_first} of {ROUNDS}", note="by CUDA events")
    finally:
        compute.close()
