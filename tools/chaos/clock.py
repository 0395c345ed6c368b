"""A wall clock for the processes of a cluster that can be set while they run."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

_SOURCE: Final = Path(__file__).with_name("clock_step.c")
_ENVIRONMENT: Final = "TRIPTYCH_CHAOS_CLOCK"


class Clock:
    """The offset of the wall clock of a cluster from that of this process.

    A small library that is preloaded into the cluster's processes adds an offset to what `clock_gettime`,
    `gettimeofday` and `time` say of the wall clock; monotonic clocks are left alone, as where somebody sets the clock
    of a host.

    Attributes:
        offset_s: seconds ahead.
    """

    def __init__(self, folder: Path) -> None:
        self.offset_s = 0
        self._library = folder / "clock_step.so"
        self._file = folder / "clock_offset"
        self.step(0)
        command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(self._library), str(_SOURCE), "-ldl"]
        subprocess.run(command, check=True)  # noqa: S603 - our own command

    @staticmethod
    def why_unsupported() -> str:
        """Say why the clock of a cluster cannot be set here; "" if it can."""
        return "" if shutil.which("cc") else "there is no C compiler (install gcc)"

    def step(self, seconds: int) -> None:
        """Step the clock forward or back, at once for all processes."""
        self.offset_s += seconds
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("=q", self.offset_s))

    def environment(self) -> dict[str, str]:
        """Return the variables with which a process has this clock."""
        return {"LD_PRELOAD": str(self._library), _ENVIRONMENT: str(self._file)}

    @contextmanager
    def preloaded(self) -> Iterator[Self]:
        """Let processes that are started in the block use this clock."""
        own = self.environment()
        before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        try:
            yield self
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
