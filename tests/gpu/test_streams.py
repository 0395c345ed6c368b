"""What only a CUDA device can show: pinned memory, copies behind compute, and memory that two streams share."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.requirements import require

require()

from triptych.engines.codec.checksum import ChecksumMismatchError, checksum
from triptych.engines.codec.codec import pack
from triptych.engines.memory.arena import Arena
from triptych.engines.memory.streams import PIECE, DeviceStream

pytestmark = pytest.mark.usefixtures("gpu")
ROOT = Path(__file__).parents[2]

CUDA = torch.device("cuda:0")
# About 0.1 s of a kernel that only waits; long beside anything else here.
LONG = 200_000_000


def use(stream, loaded):
    """Return the values of a loaded payload for use on another stream."""
    stream.wait(loaded.event, loaded.values)
    return loaded.values


@pytest.fixture(params=["pinned", "pageable"])
def arena(request):
    arena = Arena.create(96 << 20)
    if request.param == "pinned":
        assert arena.pin()
    yield arena
    torch.cuda.synchronize()
    arena.close()


@pytest.fixture
def pinned():
    arena = Arena.create(96 << 20)
    assert arena.pin()
    yield arena
    torch.cuda.synchronize()
    arena.close()


@pytest.fixture
def transfer():
    stream = DeviceStream(CUDA, "test.transfer")
    yield stream
    stream.close()


@pytest.fixture
def compute():
    stream = DeviceStream(CUDA, "test.compute")
    yield stream
    stream.close()


def state(nbytes: int, value: int) -> dict[str, object]:
    return {
        "latents": torch.full((nbytes,), value, dtype=torch.uint8, device=CUDA),
        "prompt_embeds": torch.arange(1000, device=CUDA).to(torch.bfloat16),
        "timesteps": torch.arange(7.0),
    }


async def store_once(transfer: DeviceStream, arena: Arena, offset: int, nbytes: int, value: int):
    """A state in a block: its manifest, the block and its checksum."""
    packed = pack(state(nbytes, value))
    block = arena.tensor(offset, packed.nbytes)
    torch.cuda.synchronize()
    return packed.manifest, block, await transfer.store(packed, block)


def test_pinning_is_told_truthfully(pinned):
    assert pinned.pinned
    assert pinned.tensor(4096, 100).is_pinned()
    assert pinned.pin(), "pinning twice is fine"
    pinned.close()
    assert not pinned.pinned


@pytest.mark.parametrize("nbytes", [1, PIECE - 1, PIECE, 3 * PIECE + 17])
def test_a_payload_goes_from_device_to_device_whole(arena, transfer, nbytes):
    async def hop():
        manifest, block, value = await store_once(transfer, arena, 4096, nbytes, 200)
        assert value == checksum(block.numpy())
        return use(transfer, await transfer.load(manifest, block, value))

    values = asyncio.run(hop())
    torch.cuda.synchronize()
    expected = state(nbytes, 200)
    for name, tensor in expected.items():
        assert values[name].device == CUDA, name
        assert torch.equal(values[name].cpu(), tensor.cpu()), name


def test_damaged_bytes_are_never_loaded(arena, transfer):
    async def hop():
        manifest, block, value = await store_once(transfer, arena, 0, 2 * PIECE + 5, 1)
        block[PIECE + 3] ^= 4
        await transfer.load(manifest, block, value)

    with pytest.raises(ChecksumMismatchError):
        asyncio.run(hop())


def test_a_load_ends_behind_compute_that_is_still_running(arena, transfer, compute):
    async def calls():
        stored = await store_once(transfer, arena, 0, 4 * PIECE, 3)
        # The first load takes memory from the driver, which may wait for the whole device.
        await transfer.load(*stored)
        await compute.run(torch.cuda._sleep, 1000)
        torch.cuda.synchronize()

        await compute.run(torch.cuda._sleep, 5 * LONG)
        computed = compute.record()
        loaded = await transfer.load(*stored)
        loaded.event.synchronize()
        overlapped = not computed.passed
        total = await compute.run(lambda: use(compute, loaded)["latents"].sum())
        return overlapped, total.item()

    overlapped, total = asyncio.run(calls())
    assert overlapped, "the load waited for the compute of another request"
    assert total == 3 * 4 * PIECE


def test_compute_waits_on_the_device_for_a_load_that_is_under_way(pinned, transfer, compute):
    async def calls():
        stored = await store_once(transfer, pinned, 0, PIECE, 3)
        await transfer.load(*stored)
        torch.cuda.synchronize()

        await transfer.run(torch.cuda._sleep, LONG)
        loaded = await transfer.load(*stored)
        under_way = not loaded.event.passed
        total = await compute.run(lambda: use(compute, loaded)["latents"].sum())
        return under_way, total.item()

    under_way, total = asyncio.run(calls())
    assert under_way, "the host waited for the copy"
    assert total == 3 * PIECE


def test_memory_of_loaded_values_is_not_handed_out_while_compute_reads_it(pinned, transfer, compute):
    async def calls():
        first = await store_once(transfer, pinned, 0, PIECE, 3)
        second = await store_once(transfer, pinned, 48 << 20, PIECE, 9)

        def late_sum(loaded) -> torch.Tensor:
            values = use(compute, loaded)
            torch.cuda._sleep(LONG)
            return values["latents"].sum()

        total = await compute.run(late_sum, await transfer.load(*first))
        # Nothing names the first values any more: without a record of the stream these would take their memory.
        again = await transfer.load(*second)
        again.event.synchronize()
        return total.item()

    assert asyncio.run(calls()) == 3 * PIECE


def test_storing_waits_for_the_kernels_that_make_the_payload(arena, transfer, compute):
    latents = torch.zeros(2 * PIECE, dtype=torch.uint8, device=CUDA)
    packed = pack({"latents": latents})
    block = arena.tensor(0, packed.nbytes)
    torch.cuda.synchronize()

    def attempt() -> None:
        torch.cuda._sleep(LONG)
        latents.fill_(7)

    async def calls():
        await compute.run(attempt)
        return await transfer.store(packed, block, after=compute.record())

    value = asyncio.run(calls())
    assert value == checksum(bytes([7]) * (2 * PIECE))


def test_each_stream_has_a_stream_of_its_own_current_on_its_thread(transfer, compute):
    async def current(stream: DeviceStream) -> int:
        return await stream.run(lambda: torch.cuda.current_stream(CUDA).cuda_stream)

    ours = {asyncio.run(current(stream)) for stream in (transfer, compute)}
    assert len(ours | {torch.cuda.default_stream(CUDA).cuda_stream}) == 3


def test_a_thread_that_waits_leaves_its_core_to_others(compute):
    async def waited() -> float:
        await compute.run(torch.cuda._sleep, 10 * LONG)
        end = compute.record()

        def wait() -> float:
            before = os.times()
            end.synchronize()
            after = os.times()
            return (after.user + after.system - before.user - before.system) / (after.elapsed - before.elapsed)

        return await compute.run(wait)

    assert asyncio.run(waited()) < 0.5


ATTACH = """
import sys
import torch
from triptych.engines.memory.arena import Arena, ArenaAddress
arena = Arena.attach(ArenaAddress.parse(sys.argv[1]))
assert arena.pin(), arena.pin_failure
block = arena.tensor(4096, 1 << 20)
there = block.to("cuda:0", non_blocking=True)
block.copy_((there + 1), non_blocking=True)
torch.cuda.synchronize()
arena.close()
"""


def test_two_processes_pin_the_same_memory(pinned):
    pinned.tensor(4096, 1 << 20).fill_(5)
    done = subprocess.run(
        [sys.executable, "-c", ATTACH, str(pinned.address)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    there = pinned.tensor(4096, 1 << 20).to(CUDA, non_blocking=True)
    assert there.eq(6).all()


def test_a_refused_pin_does_not_meet_the_next_launch(pinned):
    # What is registered already is refused.
    again = Arena.attach(pinned.address)
    again.base = pinned.base
    assert again.pin() is False
    assert "cudaHostRegister" in again.pin_failure
    assert torch.ones(3, device=CUDA).sum() == 3
    again.close()
