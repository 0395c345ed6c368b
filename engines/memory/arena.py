"""The memory of a pool: one memfd, mapped by its owner and, through `/proc/PID/fd`, by the roles of the host.

A memfd has no name, so nothing can be left behind: the memory goes when the last process that maps it goes.
The pool itself needs no torch; it is imported where a tensor or CUDA is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import mmap
import os
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
    """Memory that cannot be had, mapped or viewed; the sentence says why."""


class ArenaAddress(msgspec.Struct, frozen=True):
    """Where the processes of the host find an arena; rides in messages, or as text."""

    pid: int  # of the process that created it
    start_time: int  # of that process, clock ticks since boot: tells it from a later process with its pid
    fd: int  # the memfd in that process
    inode: int  # of the memfd: tells it from another file under the same number
    nbytes: int  # its size

    def __str__(self) -> str:
        return f"{_PREFIX}:{self.pid}:{self.start_time}:{self.fd}:{self.inode}:{self.nbytes}"

    @classmethod
    def parse(cls, text: str) -> ArenaAddress:
        """Read what `str` wrote. Raises ArenaError for anything else."""
        prefix, *numbers = text.split(":")
        if prefix != _PREFIX or len(numbers) != len(cls.__struct_fields__):
            raise ArenaError(f"{text!r} is not the address of an arena")
        if not all(number.isascii() and number.isdigit() for number in numbers):
            raise ArenaError(f"{text!r} is not the address of an arena")
        return cls(*map(int, numbers))


class Arena:
    """A shared stretch of bytes. Make one with `create` or `attach`.

    `address` says how others attach it; `base` is where its first byte is mapped in this process. Views and
    tensors keep the mapping alive, also after `close`.
    """

    def __init__(self, fd: int, address: ArenaAddress, *, owner: bool) -> None:
        self.address = address
        self.owner = owner
        self._fd = fd if owner else -1
        # Populated now, so that the first copy into each block does not pay for its page faults.
        self._map: mmap.mmap | None = mmap.mmap(fd, address.nbytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._bytes: Bytes = np.frombuffer(self._map, dtype=np.uint8)
        self.base = int(self._bytes.ctypes.data)
        self.pinned = False
        self.pin_failure = ""

    @classmethod
    def create(cls, nbytes: int) -> Arena:
        """Take `nbytes` bytes of zeroed memory.

        Raises ArenaError if there is not as much, or for a size of none.
        """
        if nbytes <= 0:
            raise ArenaError(f"an arena needs a size, not {nbytes} bytes")
        available = available_memory()
        if nbytes > available:
            raise ArenaError(f"a pool of {nbytes} bytes is more than the {available} bytes of memory available")
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Reserved now: memory that is missing shows at the start, not as SIGBUS in a request.
            os.posix_fallocate(fd, 0, nbytes)
            # Nobody can shrink it under a process that has it mapped.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_IS_FIXED | fcntl.F_SEAL_SEAL)
            pid = os.getpid()
            address = ArenaAddress(pid, _start_time(pid), fd, os.fstat(fd).st_ino, nbytes)
            return cls(fd, address, owner=True)
        except OSError as error:
            os.close(fd)
            raise ArenaError(f"cannot take {nbytes} bytes of memory for a pool: {error.strerror}") from error

    @classmethod
    def attach(cls, address: ArenaAddress) -> Arena:
        """Map the arena of another process of this host.

        Raises ArenaError when that process is gone, belongs to another user, or what it has there is not
        this arena.
        """
        link = Path(f"/proc/{address.pid}/fd/{address.fd}")
        try:
            fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ArenaError(f"cannot open the arena of process {address.pid}: {error.strerror}") from error
        try:
            _check_file(fd, address)
            return cls(fd, address, owner=False)
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
        """Whether the process that created the arena is gone: what it leased there means nothing any more."""
        started = _start_time(self.address.pid)
        return started == 0 or started != self.address.start_time

    async def until_stale(self) -> None:
        """Wait until the process that created the arena has ended."""
        try:
            process = os.pidfd_open(self.address.pid)
        except ProcessLookupError:
            return
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(process, ended.set)
        try:
            if not self.stale:  # else its number may be another process's by now
                await ended.wait()
        finally:
            loop.remove_reader(process)
            os.close(process)

    def array(self, offset: int, nbytes: int) -> Bytes:
        """View bytes as a numpy array, uint8, shape [nbytes].

        Raises ArenaError outside the arena or after `close`.
        """
        if self._map is None:
            raise ArenaError("the arena is closed")
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ArenaError(f"bytes {offset} to {offset + nbytes} are outside an arena of {self.nbytes} bytes")
        return self._bytes[offset : offset + nbytes]

    def view(self, offset: int, nbytes: int) -> memoryview:
        """View bytes as a writable memoryview of format "B". Raises ArenaError as `array` does."""
        return self.array(offset, nbytes).data

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """View bytes as a tensor on the CPU, uint8, shape [nbytes]. Raises ArenaError as `array` does."""
        import torch

        return torch.from_numpy(self.array(offset, nbytes))

    def pin(self) -> bool:
        """Register the mapping with CUDA, so that device copies from and to it are asynchronous.

        Returns `pinned`. Where CUDA is missing or refuses (then `pin_failure` says why) copies take a
        pinned buffer between, which is slower and nothing else. Takes about 0.3 s per GiB: call it off the
        event loop.
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
        """Let go of the mapping (and, for its owner, of the memfd); once no view is left it is unmapped.

        A pinned mapping is unregistered first: no device copy may be under way. Safe to call twice.
        """
        if self._map is None:
            return
        if self.pinned:
            _cudart().cudaHostUnregister(self.base)
            self.pinned = False
        self._map = None
        self._bytes = np.empty(0, dtype=np.uint8)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Count the bytes that can be taken before anything is killed for them: of the host, of every cgroup around."""
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
    """Bytes that a cgroup has left; what it has read of files and not used lately is given back on demand."""
    limit, current = cgroup / "memory.max", cgroup / "memory.current"
    try:
        text = limit.read_text().strip()
        if text == "max":
            return unlimited
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return int(text) - int(current.read_text()) + int(stat.get("inactive_file", 0))
    except FileNotFoundError:  # the root has no limit, and a container may not see what is around it
        return unlimited


def _cudart() -> Any:
    import torch

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _clear_last_error() -> None:
    """Take the error of a call that torch does not check away, or the thread's next launch would raise it."""
    import torch

    with contextlib.suppress(torch.AcceleratorError):
        torch.cuda._sleep(1)  # type: ignore[no-untyped-call]


def _check_file(fd: int, address: ArenaAddress) -> None:
    found = os.fstat(fd)
    if _start_time(address.pid) != address.start_time:
        raise ArenaError(f"process {address.pid} is not the one that created the arena")
    if found.st_ino != address.inode or found.st_size != address.nbytes:
        raise ArenaError(f"descriptor {address.fd} of process {address.pid} is not the arena that was announced")
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SIZE_IS_FIXED != _SIZE_IS_FIXED:
        raise ArenaError(f"the arena of process {address.pid} could be shrunk while it is mapped")


def _start_time(pid: int) -> int:
    """When a living process started, in clock ticks since boot; 0 when there is none, zombies included."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The name in field 2 may hold spaces and parentheses; field 3 is the state, field 22 the start.
    state, *rest = text.rpartition(")")[2].split()
    return 0 if state in ("Z", "X") else int(rest[18])
