from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import gc
import threading
import traceback
import weakref

import pytest
import torch
from PIL import Image

from triptych.engines.codec.checksum import ChecksumMismatchError, checksum
from triptych.engines.codec.codec import CodecError, pack
from triptych.engines.memory import streams
from triptych.engines.memory.arena import Arena
from triptych.engines.memory.streams import DeviceStream, StreamEvent, iter_tensors

CPU = torch.device("cpu")
WAIT_S = 20


def use(stream, loaded):
    """Return the values of a loaded payload for use on another stream."""
    stream.wait(loaded.event, loaded.values)
    return loaded.values


@pytest.fixture(params=[streams.SHORT, 0], ids=["short copies at once", "all on its thread"])
def stream(request, monkeypatch):
    monkeypatch.setattr(streams, "SHORT", request.param)
    stream = DeviceStream(CPU, "test.transfer")
    yield stream
    stream.close()


@pytest.fixture
def arena():
    arena = Arena.create(1 << 20)
    yield arena
    arena.close()


def state() -> dict[str, object]:
    generator = torch.Generator().manual_seed(7)
    return {
        "latents": torch.randn(2, 3, 5, generator=generator),
        "prompt_embeds": torch.randn(1, 7, 3, generator=generator).to(torch.bfloat16),
        "strided": torch.arange(12).reshape(3, 4).t(),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "nothing": torch.empty(0, 4),
        "names": ["a", ("b", 1)],
        "generator": generator,
    }


def same(left: object, right: object) -> bool:
    if isinstance(left, torch.Generator):
        return isinstance(right, torch.Generator) and torch.equal(left.get_state(), right.get_state())
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    return left == right


def test_a_payload_goes_through_a_block_whole(stream, arena):
    values = state()
    packed = pack(values)
    # What an earlier request left in the block must neither travel nor change the checksum.
    arena.tensor(0, arena.nbytes).fill_(0xEE)

    async def hop():
        value = await stream.store(packed, arena.tensor(4096, packed.nbytes + 100))
        loaded = await stream.load(packed.manifest, arena.tensor(4096, packed.nbytes), value)
        return value, use(stream, loaded)

    value, arrived = asyncio.run(hop())
    assert value == checksum(arena.view(4096, packed.nbytes))
    assert arrived.keys() == values.keys()
    assert all(same(values[name], arrived[name]) for name in values)
    end = 0
    for offset, tensor in zip(packed.offsets, packed.tensors, strict=True):
        assert not any(arena.view(4096 + end, offset - end)), "a gap carries bytes of an earlier request"
        end = offset + tensor.numel()


def test_the_loaded_values_do_not_live_in_the_block(stream, arena):
    packed = pack({"latents": torch.ones(1000)})
    block = arena.tensor(0, packed.nbytes)

    async def hop():
        loaded = await stream.load(packed.manifest, block, await stream.store(packed, block))
        block.zero_()
        return loaded.values

    assert torch.equal(asyncio.run(hop())["latents"], torch.ones(1000))


@pytest.mark.parametrize("place", [0, 1999, 3999])
def test_damaged_bytes_are_never_loaded(stream, arena, place):
    packed = pack({"latents": torch.ones(1000)})
    block = arena.tensor(0, packed.nbytes)

    async def hop():
        value = await stream.store(packed, block)
        block[place] ^= 1
        await stream.load(packed.manifest, block, value)

    with pytest.raises(ChecksumMismatchError, match="damaged"):
        asyncio.run(hop())


def test_damage_that_also_breaks_the_values_is_told_as_damage(stream, arena):
    packed = pack({"prompt": "é" * 5000})
    block = arena.tensor(0, packed.nbytes)

    async def hop(*, damaged: bool):
        value = await stream.store(packed, block)
        block[1] = 0xFF
        await stream.load(packed.manifest, block, value if damaged else checksum(block.numpy()))

    with pytest.raises(ChecksumMismatchError):
        asyncio.run(hop(damaged=True))
    with pytest.raises(CodecError, match="UTF-8"):
        asyncio.run(hop(damaged=False))


def test_a_late_write_of_the_network_during_the_copy_is_found(stream, arena, monkeypatch):
    packed = pack({"latents": torch.zeros(64)})
    block = arena.tensor(0, packed.nbytes)
    value = asyncio.run(stream.store(packed, block))
    # The device is given what is there before the host has waited for it.
    monkeypatch.setattr(StreamEvent, "synchronize", lambda _self: block.fill_(1))
    stream._load_from_pinned(packed.manifest, block, value, False)
    with pytest.raises(ChecksumMismatchError):
        stream._load_from_pinned(packed.manifest, block, value, True)


def test_a_block_that_is_too_small_is_refused(stream, arena):
    with pytest.raises(ValueError, match="the block has 3999"):
        asyncio.run(stream.store(pack({"latents": torch.ones(1000)}), arena.tensor(0, 3999)))


def test_work_runs_in_order_on_one_thread_without_gradients(stream):
    seen = []

    def work(number: int) -> None:
        seen.append((number, threading.current_thread().name, torch.is_grad_enabled()))

    async def calls():
        await asyncio.gather(*(stream.run(work, number) for number in range(20)))

    asyncio.run(calls())
    assert [number for number, _, _ in seen] == list(range(20))
    assert {(name, grad) for _, name, grad in seen} == {("test.transfer_0", False)}
    assert torch.is_grad_enabled(), "the mode of other threads is not touched"


def test_the_loop_runs_on_while_the_stream_works(stream):
    async def calls():
        gate = threading.Event()
        blocked = asyncio.create_task(stream.run(gate.wait, WAIT_S))
        # Only the loop, free to run, can open the gate.
        asyncio.get_running_loop().call_soon(gate.set)
        return await blocked

    assert asyncio.run(calls()) is True


def test_loading_goes_on_while_another_stream_computes(stream, arena):
    compute = DeviceStream(CPU, "test.compute")
    packed = pack({"latents": torch.ones(1000)})
    block = arena.tensor(0, packed.nbytes)

    async def calls():
        gate = threading.Event()
        computing = asyncio.create_task(compute.run(gate.wait, WAIT_S))
        loaded = await stream.load(packed.manifest, block, await stream.store(packed, block))
        assert not computing.done()
        gate.set()
        assert await computing
        return await compute.run(lambda: use(compute, loaded)["latents"].sum().item())

    assert asyncio.run(calls()) == 1000
    compute.close()


def test_an_error_reaches_the_caller_and_the_stream_lives_on(stream):
    def fail() -> None:
        raise LookupError("no such component")

    async def calls():
        with pytest.raises(LookupError, match="no such component"):
            await stream.run(fail)
        return await stream.run(lambda: 5)

    assert asyncio.run(calls()) == 5


def test_an_error_that_was_handled_keeps_nothing_alive(stream):
    def fail(tensor: torch.Tensor) -> None:
        raise MemoryError(f"{tensor.numel()} elements are too many")

    async def calls():
        tensor = torch.zeros(8)
        held = weakref.ref(tensor)
        try:
            await stream.run(fail, tensor)
        except MemoryError as error:
            traceback.clear_frames(error.__traceback__)
        del tensor
        await stream.run(int)  # the thread has let go of the call before
        return held()

    gc.disable()
    try:
        assert asyncio.run(calls()) is None
    finally:
        gc.enable()


def test_a_call_that_was_cancelled_before_it_began_never_runs(stream):
    ran = []

    async def calls():
        gate = threading.Event()
        first = asyncio.create_task(stream.run(gate.wait, WAIT_S))
        second = asyncio.create_task(stream.run(ran.append, 1))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([second])
        gate.set()
        await first
        await stream.run(ran.append, 2)

    asyncio.run(calls())
    assert ran == [2]


def test_context_travels_to_the_thread(stream):
    variable = contextvars.ContextVar("variable", default="unset")

    async def calls():
        variable.set("trace")
        return await stream.run(variable.get)

    assert asyncio.run(calls()) == "trace"


def test_a_closed_stream_takes_no_calls(stream):
    stream.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        asyncio.run(stream.run(int))


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="meta"):
        DeviceStream(torch.device("meta"), "x")


def test_a_device_that_is_not_there_shows_with_the_first_call():
    if torch.cuda.is_available():
        pytest.skip("this host has CUDA")
    stream = DeviceStream(torch.device("cuda:0"), "x")
    with pytest.raises(RuntimeError, match="no CUDA device"):
        asyncio.run(stream.run(int))
    stream.close()


def test_events_on_the_cpu_have_passed(stream):
    event = stream.record()
    assert event.passed
    event.synchronize()
    stream.wait(event, torch.ones(1))
    assert StreamEvent().passed


def test_tensors_are_found_wherever_values_can_hold_them():
    @dataclasses.dataclass
    class Output:
        sample: torch.Tensor
        name: str

    tensors = [torch.full((), float(number)) for number in range(4)]
    values = {"a": tensors[0], "b": [tensors[1], (tensors[2], "x")], "c": Output(tensors[3], "y"), "d": Output}
    assert [tensor.item() for tensor in iter_tensors(values)] == [0, 1, 2, 3]


def test_a_short_copy_is_made_at_once_unless_the_thread_has_something_to_do(monkeypatch):
    threads = []
    monkeypatch.setattr(DeviceStream, "_store", lambda *_: threads.append(threading.get_ident()))
    stream = DeviceStream(torch.device("cpu"), "test")
    packed, block = pack({"latents": torch.ones(10)}), torch.empty(100, dtype=torch.uint8)
    begun, go_on = threading.Event(), threading.Event()

    def work():
        begun.set()
        assert go_on.wait(10)

    async def scenario():
        await stream.store(packed, block)
        busy = asyncio.create_task(stream.run(work))
        await asyncio.to_thread(begun.wait)
        waits = asyncio.create_task(stream.store(packed, block))
        await asyncio.sleep(0)
        assert len(threads) == 1
        go_on.set()
        await asyncio.gather(busy, waits)
        await stream.store(packed, block)

    asyncio.run(scenario())
    here = threading.get_ident()
    assert [thread == here for thread in threads] == [True, False, True]
    stream.close()


@pytest.mark.parametrize(
    ("values", "at_once"),
    [
        ({"latents": torch.ones(8, 8).t(), "names": ["a", ("b", None)], "generator": torch.Generator()}, True),
        ({"latents": torch.ones(1 << 10, 1 << 11).t()}, False),
        ({"more": [{"latents": torch.ones(1 << 17)}]}, False),
        ({"image": Image.new("RGB", (4, 4))}, False),
        ({"prompt": "x" * (streams.SHORT + 1)}, False),
    ],
    ids=["small", "transposed", "nested", "image", "text"],
)
def test_it_is_the_values_that_decide_whether_a_payload_is_packed_at_once(monkeypatch, values, at_once):
    threads = []
    monkeypatch.setattr(streams, "pack", lambda given: threads.append(threading.get_ident()) or pack(given))
    stream = DeviceStream(CPU, "test")

    async def scenario():
        await stream.run(int)  # its thread has begun, and does nothing
        for block in (torch.empty(4096, dtype=torch.uint8), None):
            await stream.pack(values, block)

    asyncio.run(scenario())
    assert [thread == threading.get_ident() for thread in threads] == [at_once, at_once]
    stream.close()


def test_a_payload_that_holds_itself_is_refused(stream):
    values = {"names": []}
    values["names"].append(values)
    with pytest.raises(CodecError, match="nested deeper"):
        asyncio.run(stream.pack(values))
