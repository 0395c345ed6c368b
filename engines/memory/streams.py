"""A thread with a CUDA stream for one kind of work on a device; the event loop waits for neither.

A role has two: one computes, the other stores and loads payloads. So a request is loaded while the one before computes,
and the compute stream waits for the end of the load on the device, not on the host. On the CPU the same code runs with
events that have always passed.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

import torch

from triptych.engines.codec.checksum import RunningChecksum, verify
from triptych.engines.codec.codec import CodecError, Packed, pack, unpack
from triptych.engines.memory.host_memory_pool import HostMemoryPool

P = ParamSpec("P")
T = TypeVar("T")

SHORT = 256 << 10
"""Bytes that are copied and hashed sooner, in some 50 us, than an idle thread wakes: 150 us on a virtual machine."""
PIECE = 8 << 20
"""Bytes of one copy from the device: one is on the bus while another is hashed; 8 MiB take 0.3 ms on PCIe 4 x16."""

_BYTES_PER_VALUE: Final = 16
"""About what a value takes in a manifest."""
_SMALL: Final = (bool, int, float, complex, slice, type(None), torch.dtype, torch.device, torch.Generator)
"""Other types of values that are packed without a copy of note."""


class StreamEvent:
    """A point in the work of a stream; on the CPU, where calls return with their work done, it has always passed."""

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
    """The values of a payload that is being copied to the device.

    Attributes:
        values: The values by name. Call `DeviceStream.wait` before another stream uses them.
        event: The end of the copy; the block may be reused when it has passed.
    """

    values: dict[str, object]
    event: StreamEvent


class DeviceStream:
    """A thread without gradients and, on CUDA, with its own current stream. Calls run one at a time, in order.

    A CUDA device that cannot be used makes the first call raise RuntimeError.

    Args:
        device: A "cpu" or "cuda" device.
        name: The name of the thread.

    Raises:
        ValueError: The device is of another type.
    """

    def __init__(self, device: torch.device, name: str) -> None:
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f'a stream runs on "cpu" or "cuda", not on "{device}"')
        # Without an index, "cuda" is the current device of whichever thread uses it.
        self.device = torch.device("cuda", device.index or 0) if device.type == "cuda" else device
        self.name = name
        self._memory = HostMemoryPool()
        self._bounce: tuple[torch.Tensor, torch.Tensor] | None = None
        self._calls: deque[tuple[Callable[[], Any], asyncio.Future[Any], asyncio.AbstractEventLoop]] = deque()
        self._busy = False
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._ready: Future[torch.cuda.Stream | None] = self._executor.submit(self._prepare)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` on the thread of the stream, and return or raise what it does.

        A cancelled caller drops a call that has not begun; one that has begun runs to its end.

        Raises:
            RuntimeError: The stream is closed.
        """
        # A future of the loop alone: `wrap_future` has two, with locks, and takes 30 us more of a thread that was idle.
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        call = partial(contextvars.copy_context().run, function, *args, **kwargs)
        self._calls.append((call, result, loop))
        self._executor.submit(self._call_next)
        try:
            return await result
        finally:
            del result, call  # an error has this frame in its traceback, and would keep alive what the frame refers to

    async def _run_copy(self, nbytes: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `run`, but where a copy is short and nothing else is under way, make it here."""
        if self._calls or self._busy or nbytes > SHORT or self.device.type != "cpu":
            return await self.run(function, *args, **kwargs)
        return function(*args, **kwargs)

    async def store(self, packed: Packed, block: torch.Tensor, after: StreamEvent | None = None) -> int:
        """Copy a packed payload into a block.

        Args:
            packed: The payload.
            block: The block: uint8, shape [at least packed.nbytes], on the CPU.
            after: The end of the work that made the payload, on another stream.

        Returns:
            The checksum of the first `packed.nbytes` bytes of the block.

        Raises:
            ValueError: The block is too small.
        """
        return await self._run_copy(packed.nbytes, self._store, packed, block, after)

    async def pack(
        self, values: dict[str, object], block: torch.Tensor | None = None, after: StreamEvent | None = None
    ) -> tuple[Packed, int | None]:
        """Pack a payload, and copy it into a block if that has just as many bytes.

        Args:
            values: The values by name, for `codec.pack`.
            block: The block: uint8, shape [nbytes], on the CPU.
            after: The end of the work that made the values, on another stream.

        Returns:
            The packed payload, and the checksum of the block; None if nothing was copied.

        Raises:
            CodecError: A value cannot be packed.
        """
        return await self._run_copy(_bytes_to_pack(values), self._pack, values, block, after)

    async def load(self, manifest: bytes, block: torch.Tensor, checksum: int, *, pulled: bool = False) -> LoadedPayload:
        """Copy the payload in a block to the device and verify its checksum.

        Args:
            manifest: The manifest of the payload.
            block: The block: uint8, shape [the nbytes that were stored], on the CPU.
            checksum: The checksum of the block.
            pulled: Whether the block came over the network. If it is pinned, it is hashed after the copy to the
                device, so that a late write of the network is found. Otherwise it is hashed during the copy, since
                nobody writes to a sealed block.

        Raises:
            ChecksumMismatchError: The bytes are damaged; nothing is loaded.
            CodecError: The bytes are intact but do not fit the manifest.
        """
        return await self._run_copy(block.numel(), self._load, manifest, block, checksum, pulled)

    def record(self) -> StreamEvent:
        """Return an event that passes when all work given to this stream so far is done. For any thread."""
        stream = self._ready.result()
        if stream is None:
            return StreamEvent()
        # Without `blocking`, a thread that waits for the event keeps a core busy.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return StreamEvent(event)

    def wait(self, event: StreamEvent, *values: object) -> None:
        """Make later work of this stream wait for an event, on the device. For any thread.

        Args:
            event: An event of another stream.
            values: The tensors, or containers of them, of the other stream that this one will use. The allocator is
                told, so that it does not reuse their memory while this stream reads it.
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

    def close(self) -> None:
        """Refuse further calls; running and queued ones still finish. Does not wait for them."""
        self._executor.shutdown(wait=False)

    def _prepare(self) -> torch.cuda.Stream | None:
        # Gradient mode, device and current stream are set per thread, so this holds for all later calls.
        torch.set_grad_enabled(False)
        if self.device.type == "cpu":
            return None
        if not torch.cuda.is_available():
            raise RuntimeError(f"the role has device {self.device}, but torch finds no CUDA device on this host")
        torch.cuda.set_device(self.device)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(stream)
        return stream

    def _call_next(self) -> None:
        # The calls are in a queue of their own, since an error that is kept also keeps what was submitted.
        self._busy = True  # before the queue can be empty, for `_run_copy`
        call, result, loop = self._calls.popleft()
        if result.cancelled():
            self._busy = False
            return
        try:
            try:
                self._ready.result()
                value = call()
            finally:
                self._busy = False  # before whoever waits for it goes on
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
            loop.call_soon_threadsafe(_set, result.set_exception, result, error)
        else:
            loop.call_soon_threadsafe(_set, result.set_result, result, value)
        finally:
            del result, call  # as in `run`

    def _pack(
        self, values: dict[str, object], block: torch.Tensor | None, after: StreamEvent | None
    ) -> tuple[Packed, int | None]:
        if after is not None:  # to pack may copy on this stream
            self.wait(after, values)
        packed = pack(values)
        if block is None or block.numel() != packed.nbytes:
            return packed, None
        return packed, self._store(packed, block, None)

    def _store(self, packed: Packed, block: torch.Tensor, after: StreamEvent | None) -> int:
        if block.numel() < packed.nbytes:
            raise ValueError(f"the payload takes {packed.nbytes} bytes, but the block has {block.numel()}")
        if after is not None:
            self.wait(after, packed.tensors)
        running, memory, end = RunningChecksum(), block.numpy(), 0
        for offset, tensor in zip(packed.offsets, packed.tensors, strict=True):
            if gap := offset - end:  # it is hashed, and must not take bytes of an earlier request to another process
                memory[end:offset] = 0
                running.update(memory[end:offset])
            end += gap + tensor.numel()
            if tensor.is_cpu:
                running.copy(memory[offset:end], tensor.numpy())
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
        if self.device.type == "cuda" and block.is_pinned():
            return self._load_from_pinned(manifest, block, checksum, pulled)
        # On CUDA, the allocator reuses pinned memory only after the copies from it have ended.
        memory = _pinned(block.numel()) if self.device.type == "cuda" else self._memory.take(block.numel())
        running = RunningChecksum()
        running.copy_checked(memory.numpy(), block.numpy())
        running.expect(checksum)
        return LoadedPayload(unpack(manifest, memory, self.device, owned=True), self.record())

    def _load_from_pinned(self, manifest: bytes, block: torch.Tensor, checksum: int, pulled: bool) -> LoadedPayload:
        try:
            loaded = LoadedPayload(unpack(manifest, block, self.device), self.record())
        except CodecError:
            # Check the bytes first: damaged ones can look like a wrong manifest.
            verify(block.numpy(), checksum)
            raise
        if pulled:
            loaded.event.synchronize()
        # Otherwise the host hashes while the device copies.
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


def _bytes_to_pack(values: Mapping[str, object]) -> int:
    """Estimate the bytes of a payload; images and arrays, which are copied, count as more than `SHORT`."""
    nbytes, left = 0, list[object](values.values())
    while left and nbytes <= SHORT:
        value = left.pop()
        nbytes += _BYTES_PER_VALUE  # so that a container that holds itself ends the loop
        if isinstance(value, torch.Tensor):
            nbytes += value.numel() * value.element_size()
        elif isinstance(value, (str, bytes)):
            nbytes += len(value)
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, (list, tuple)):
            left += value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            left += (getattr(value, field.name) for field in dataclasses.fields(value))
        elif not isinstance(value, _SMALL):
            return SHORT + 1
    return nbytes


def _set(setter: Callable[[T], None], result: asyncio.Future[Any], value: T) -> None:
    if not result.done():
        setter(value)


def _pinned(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _land(event: StreamEvent, host: torch.Tensor, target: torch.Tensor, running: RunningChecksum) -> None:
    event.synchronize()
    if host is target:
        running.update(target.numpy())
    else:
        running.copy(target.numpy(), host.numpy())
