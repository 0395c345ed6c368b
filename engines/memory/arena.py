"""The memory of a pool: one memfd, mapped by its owner and, through `/proc/PID/fd`, by the roles of the host.

A memfd has no name, so its memory is freed when the last process that maps it ends. Torch is imported only by the
functions that need it, since a pool needs none.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import mmap
import os
import select
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from triptych.engines.codec.checksum import Bytes

if TYPE_CHECKING:
    import torch

_NAME = "triptych-arena"
_SIZE_IS_FIXED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_PREFIX = "memfd"


class ArenaError(Exception):
    """Memory cannot be allocated, mapped or viewed; the message says why."""


class ArenaAddress(msgspec.Struct, frozen=True):
    """The address of an arena for processes of the same host; sent in messages, or as text."""

    pid: int  # of the process that created it
    start_time: int  # of that process, clock ticks since boot; distinguishes it from a later process with its pid
    fd: int  # the memfd in that process
    inode: int  # of the memfd; distinguishes it from another file of the same number
    nbytes: int  # its size

    def __str__(self) -> str:
        return f"{_PREFIX}:{self.pid}:{self.start_time}:{self.fd}:{self.inode}:{self.nbytes}"

    @classmethod
    def parse(cls, text: str) -> ArenaAddress:
        """Parse the text that `str` makes.

        Raises:
            ArenaError: The text is not the address of an arena.
        """
        prefix, *numbers = text.split(":")
        if prefix != _PREFIX or len(numbers) != len(cls.__struct_fields__):
            raise ArenaError(f"{text!r} is not the address of an arena")
        if not all(number.isascii() and number.isdigit() for number in numbers):
            raise ArenaError(f"{text!r} is not the address of an arena")
        return cls(*map(int, numbers))


class Arena:
    """A shared range of bytes, made with `create` or `attach`.

    Views and tensors keep the mapping alive, also after `close`.

    Attributes:
        address: The address with which other processes attach it.
        owner: Whether this process has created it.
        base: The address of its first byte in this process.
        pinned: Whether it is registered with CUDA.
        pin_failure: Why `pin` has failed; "" otherwise.
    """

    def __init__(self, fd: int, address: ArenaAddress, *, process: int = -1) -> None:
        self.address = address
        self.owner = process < 0
        self._fd = fd if self.owner else -1
        self._process = process
        """The pidfd of the process that created the arena; -1 in that process."""
        # Populate it now, so that the first copy into each block has no page faults.
        self._map: mmap.mmap | None = mmap.mmap(fd, address.nbytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._bytes: Bytes = np.frombuffer(self._map, dtype=np.uint8)
        self.base = int(self._bytes.ctypes.data)
        self.pinned = False
        self.pin_failure = ""

    @classmethod
    def create(cls, nbytes: int) -> Arena:
        """Allocate an arena of `nbytes` zeroed bytes.

        Raises:
            ArenaError: Less memory is available, or `nbytes` is not positive.
        """
        if nbytes <= 0:
            raise ArenaError(f"the size of an arena must be positive, not {nbytes} bytes")
        available = available_memory()
        if nbytes > available:
            raise ArenaError(f"a pool of {nbytes} bytes is more than the {available} bytes of memory available")
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Reserve it now, so that missing memory is an error at the start and not a SIGBUS in a request.
            os.posix_fallocate(fd, 0, nbytes)
            # Seal its size, so that nobody can shrink it while a process has it mapped.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_IS_FIXED | fcntl.F_SEAL_SEAL)
            pid = os.getpid()
            address = ArenaAddress(pid, _start_time(pid), fd, os.fstat(fd).st_ino, nbytes)
            return cls(fd, address)
        except OSError as error:
            os.close(fd)
            raise ArenaError(f"cannot allocate {nbytes} bytes of memory for a pool: {error.strerror}") from error

    @classmethod
    def attach(cls, address: ArenaAddress) -> Arena:
        """Map the arena of another process of this host.

        Raises:
            ArenaError: The process has ended, belongs to another user, or has no such arena.
        """
        link = Path(f"/proc/{address.pid}/fd/{address.fd}")
        try:
            fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ArenaError(f"cannot open the arena of process {address.pid}: {error.strerror}") from error
        try:
            process = os.pidfd_open(address.pid)
            try:
                _check_file(fd, address)
                return cls(fd, address, process=process)
            except BaseException:
                os.close(process)
                raise
        except OSError as error:
            raise ArenaError(f"cannot map the arena of process {address.pid}: {error.strerror}") from error
        finally:
            os.close(fd)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.address.nbytes

    @property
    def stale(self) -> bool:
        """Whether the process that created the arena has ended, so that its leases are void; or it is closed here."""
        if self._process < 0:
            return not self.owner
        ended = select.poll()  # a microsecond, where reading /proc takes two hundred: it is asked for each block
        ended.register(self._process, select.POLLIN)
        return bool(ended.poll(0))

    async def until_stale(self) -> None:
        """Wait until the process that created the arena, another one, has ended; return at once if it is closed."""
        if self._process < 0:
            return
        process = os.dup(self._process)  # which `close` does not close meanwhile
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(process, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(process)
            os.close(process)

    def array(self, offset: int, nbytes: int) -> Bytes:
        """Return a view of bytes as a numpy array: uint8, shape [nbytes].

        Raises:
            ArenaError: The range is outside the arena, or the arena is closed.
        """
        if self._map is None:
            raise ArenaError("the arena is closed")
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ArenaError(f"bytes {offset} to {offset + nbytes} are outside an arena of {self.nbytes} bytes")
        return self._bytes[offset : offset + nbytes]

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return a writable memoryview of bytes, format "B"; raises as `array` does."""
        return self.array(offset, nbytes).data

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return a view of bytes as a tensor on the CPU: uint8, shape [nbytes]; raises as `array` does."""
        import torch

        return torch.from_numpy(self.array(offset, nbytes))

    def pin(self) -> bool:
        """Register the mapping with CUDA, so that copies between it and a device are asynchronous.

        If that fails, `pin_failure` says why, and copies go through a pinned buffer, which is slower. Blocks for about
        0.3 s per GiB; call it off the event loop.

        Returns:
            Whether the mapping is pinned.

        Raises:
            ArenaError: The arena is closed.
        """
        import torch

        if self._map is None:
            raise ArenaError("the arena is closed")
        if self.pinned:
            return True
        if not torch.cuda.is_available():
            self.pin_failure = "no CUDA device"
            return False
        code = _cudart().cudaHostRegister(self.base, self.nbytes, 0)
        self.pinned = int(code) == 0
        self.pin_failure = "" if self.pinned else f"cudaHostRegister: {code}"
        if not self.pinned:
            _clear_last_error()
        return self.pinned

    def close(self) -> None:
        """Release the mapping and its descriptors; it is unmapped when no view of it is left.

        Unregisters a pinned mapping first, so no copy to or from a device may be under way. May be called twice.
        """
        if self._map is None:
            return
        if self.pinned:
            _cudart().cudaHostUnregister(self.base)
            self.pinned = False
        self._map = None
        self._bytes = np.empty(0, dtype=np.uint8)
        for fd in (self._fd, self._process):
            if fd >= 0:
                os.close(fd)
        self._fd = self._process = -1


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of memory that can be allocated before anything is killed, by the host and all cgroups."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        number, _, path = line.split(":", 2)
        if number != "0":  # of version 1
            continue
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            available = min(available, _left_in(cgroups / folder, available))
    return max(0, available)


def _left_in(cgroup: Path, unlimited: int) -> int:
    """Return the bytes that a cgroup has left; its inactive file cache counts as free."""
    limit, current = cgroup / "memory.max", cgroup / "memory.current"
    try:
        text = limit.read_text().strip()
        if text == "max":
            return unlimited
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return int(text) - int(current.read_text()) + int(stat.get("inactive_file", 0))
    except FileNotFoundError:  # the root has no limit, and a container may not see the groups above it
        return unlimited


def _cudart() -> Any:
    import torch

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _clear_last_error() -> None:
    """Clear the error of a CUDA call that torch does not check; else the next kernel launch of the thread raises it."""
    import torch

    with contextlib.suppress(torch.AcceleratorError):
        torch.cuda._sleep(1)  # type: ignore[no-untyped-call]


def _check_file(fd: int, address: ArenaAddress) -> None:
    found = os.fstat(fd)
    if _start_time(address.pid) != address.start_time:
        raise ArenaError(f"process {address.pid} is not the one that created the arena")
    if found.st_ino != address.inode or found.st_size != address.nbytes:
        raise ArenaError(f"file descriptor {address.fd} of process {address.pid} is not the arena of this address")
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SIZE_IS_FIXED != _SIZE_IS_FIXED:
        raise ArenaError(f"the size of the arena of process {address.pid} is not sealed")


def _start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 if it has ended, zombies included."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # Field 2, the name, may have spaces and parentheses; field 3 is the state, field 22 the start.
    state, *rest = text.rpartition(")")[2].split()
    return 0 if state in ("Z", "X") else int(rest[18])
