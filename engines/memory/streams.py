"""One thread and one CUDA stream for one kind of work on a device; the event loop never waits for either.

A role has two: one that computes, one that stores and loads. The load of a request then runs behind the
compute of the one before, and the compute stream waits on the device, not on the host, for the event that
ends the load. On the CPU the same code runs with events that have always passed.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

import torch

from triptych.engines.codec.checksum import RunningChecksum, verify
from triptych.engines.codec.codec import CodecError, Packed, unpack
from triptych.engines.memory.host_memory_pool import HostMemoryPool

P = ParamSpec("P")
T = TypeVar("T")

# Two pieces are under way at a time: one on the bus, one in the hash. 8 MiB take 0.3 ms on PCIe 4 x16.
PIECE = 8 << 20


class StreamEvent:
    """A point in the work of a stream; on the CPU, where a call returns with its work done, always passed."""

    def __init__(self, cuda: torch.cuda.Event | None = None) -> None:
        self.cuda = cuda

    @property
    def passed(self) -> bool:
        """Whether the work before this point is done."""
        return self.cuda is None or bool(self.cuda.query())  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        """Block the calling thread until the work before this point is done."""
        if self.cuda is not None:
            self.cuda.synchronize()


@dataclasses.dataclass(frozen=True)
class LoadedPayload:
    """Values on their way to the device: `DeviceStream.adopt` makes them safe to use on another stream.

    The block they come from may be reused once `event` has passed.
    """

    values: dict[str, object]
    event: StreamEvent


class DeviceStream:
    """A thread with gradients off, and on CUDA a stream that is the current one there.

    `device` is a "cpu" or "cuda" device (ValueError otherwise); `name` is that of the thread. A CUDA device
    that cannot be used shows as the RuntimeError of the first call. Calls run one at a time, in order.
    """

    def __init__(self, device: torch.device, name: str) -> None:
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f'a stream runs on "cpu" or "cuda", not on "{device}"')
        # Without a number "cuda" is whatever device is current on the thread that asks.
        self.device = torch.device("cuda", device.index or 0) if device.type == "cuda" else device
        self.name = name
        self._memory = HostMemoryPool()
        self._bounce: tuple[torch.Tensor, torch.Tensor] | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._ready: Future[torch.cuda.Stream | None] = self._executor.submit(self._prepare)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` on the stream's thread and return what it returns, or raise what it raises.

        Cancelling the caller drops the call if it has not begun; one that has begun goes on to its end.
        Raises RuntimeError after `close`.
        """
        context = contextvars.copy_context()
        call = partial(self._call, partial(function, *args, **kwargs))
        return await asyncio.wrap_future(self._executor.submit(context.run, call))

    async def store(self, packed: Packed, block: torch.Tensor, after: StreamEvent | None = None) -> int:
        """Copy a packed payload into a block and return the checksum of its first `packed.nbytes` bytes.

        `block` is uint8, shape [at least packed.nbytes], on the CPU; `after` is the end of the work that
        made the payload. Raises ValueError for a block that is too small.
        """
        return await self.run(self._store, packed, block, after)

    async def load(self, manifest: bytes, block: torch.Tensor, checksum: int, *, pulled: bool = False) -> LoadedPayload:
        """Copy the payload in a block to the device and verify its bytes.

        `block` is uint8, shape [the nbytes that were stored], on the CPU. Raises ChecksumMismatchError, then
        nothing was loaded, and CodecError when bytes that are intact are not what the manifest says.

        Out of pinned memory the device copies while the host hashes, each on its own: that is sound as long as
        nobody writes to the block, as with one that was sealed. One that was `pulled` is hashed when it has been
        copied: a late write of the network that reached the device is then found.
        """
        return await self.run(self._load, manifest, block, checksum, pulled)

    def record(self) -> StreamEvent:
        """Mark the end of the work given to this stream so far. May be called on any thread."""
        stream = self._ready.result()
        if stream is None:
            return StreamEvent()
        # By default a thread that waits for an event keeps a core busy.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return StreamEvent(event)

    def wait(self, event: StreamEvent, *values: object) -> None:
        """Make later work of this stream wait for `event`, on the device. May be called on any thread.

        `values` (tensors, or containers of them) were made on the other stream and are about to be used on
        this one: the allocator is told, or it could hand their memory out again while this stream still
        reads it.
        """
        stream = self._ready.result()
        if stream is None:
            event.synchronize()
            return
        if event.cuda is not None:
            stream.wait_event(event.cuda)
        for tensor in iter_tensors(values):
            if tensor.is_cuda:
                tensor.record_stream(stream)

    def adopt(self, loaded: LoadedPayload) -> dict[str, object]:
        """Take values that another stream loaded: work given to this stream from here on may use them."""
        self.wait(loaded.event, loaded.values)
        return loaded.values

    def close(self) -> None:
        """Take no more calls; those under way and queued still finish. Does not wait for them."""
        self._executor.shutdown(wait=False)

    def _prepare(self) -> torch.cuda.Stream | None:
        # Gradient mode, device and current stream belong to a thread: set here, they hold for each later
        # call.
        torch.set_grad_enabled(False)
        if self.device.type == "cpu":
            return None
        if not torch.cuda.is_available():
            raise RuntimeError(f"{self.device} was asked for, but torch finds no CUDA device on this host")
        torch.cuda.set_device(self.device)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(stream)
        return stream

    def _call(self, function: Callable[[], T]) -> T:
        self._ready.result()
        return function()

    def _store(self, packed: Packed, block: torch.Tensor, after: StreamEvent | None) -> int:
        if block.numel() < packed.nbytes:
            raise ValueError(f"the payload takes {packed.nbytes} bytes, the block has {block.numel()}")
        if after is not None:
            self.wait(after, packed.tensors)
        running = RunningChecksum()
        end = 0
        for offset, tensor in zip(packed.offsets, packed.tensors, strict=True):
            # Gaps are part of what is hashed, and must not carry bytes of an earlier request to another
            # process.
            running.update(block[end:offset].zero_().numpy())
            end = offset + tensor.numel()
            if tensor.device.type == "cpu":
                running.copy(block[offset:end].numpy(), tensor.numpy())
            else:
                self._copy_from_device(tensor, block[offset:end], running)
        return running.value

    def _copy_from_device(self, source: torch.Tensor, block: torch.Tensor, running: RunningChecksum) -> None:
        under_way: deque[tuple[StreamEvent, torch.Tensor, torch.Tensor]] = deque()
        bounce = None if block.is_pinned() else self._bounce_buffers()
        for index, start in enumerate(range(0, source.numel(), PIECE)):
            piece, target = source[start : start + PIECE], block[start : start + PIECE]
            host = target if bounce is None else bounce[index % 2][: target.numel()]
            host.copy_(piece, non_blocking=True)
            under_way.append((self.record(), host, target))
            if len(under_way) == 2:
                _land(*under_way.popleft(), running)
        for piece_under_way in under_way:
            _land(*piece_under_way, running)

    def _bounce_buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._bounce is None:
            self._bounce = (_pinned(PIECE), _pinned(PIECE))
        return self._bounce

    def _load(self, manifest: bytes, block: torch.Tensor, checksum: int, pulled: bool) -> LoadedPayload:
        if block.is_pinned():
            return self._load_from_pinned(manifest, block, checksum, pulled)
        # On CUDA the allocator of pinned memory takes it back only when the copies out of it have ended.
        memory = _pinned(block.numel()) if self.device.type == "cuda" else self._memory.take(block.numel())
        running = RunningChecksum()
        running.copy_checked(memory.numpy(), block.numpy())
        running.expect(checksum)
        return LoadedPayload(unpack(manifest, memory, self.device, owned=True), self.record())

    def _load_from_pinned(self, manifest: bytes, block: torch.Tensor, checksum: int, pulled: bool) -> LoadedPayload:
        try:
            loaded = LoadedPayload(unpack(manifest, block, self.device), self.record())
        except CodecError:
            # Damaged bytes can look like a wrong manifest.
            verify(block.numpy(), checksum)
            raise
        if pulled:
            loaded.event.synchronize()
        # Else the hash runs while the device copies.
        verify(block.numpy(), checksum)
        return loaded


def iter_tensors(value: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested dicts, lists, tuples and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from iter_tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from iter_tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from iter_tensors(getattr(value, field.name))


def _pinned(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _land(event: StreamEvent, host: torch.Tensor, target: torch.Tensor, running: RunningChecksum) -> None:
    event.synchronize()
    if host is target:
        running.update(target.numpy())
    else:
        running.copy(target.numpy(), host.numpy())
