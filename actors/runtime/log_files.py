"""The last lines that each process of a system has logged, in files that are there when it has died.

A process appends JSON lines to `logs/NAME.log` in the state folder. When that is large it becomes `NAME.log.1`, in
place of the one before, and a new file begins.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import zlib
from typing import TYPE_CHECKING, Final, NamedTuple

from triptych.actors.runtime.system_messages import LogPart

if TYPE_CHECKING:
    from pathlib import Path

MOST_BYTES: Final = 1 << 18
"""About how many bytes of one log are read at a time, and sent in one message."""
_SUFFIX: Final = ".log"
_EARLIER: Final = ".1"
_POSITION: Final = re.compile(r"([0-9]{1,10}):([0-9]{1,18})")


class LogHandler(logging.Handler):
    """Appends to the log of this process, which only this user may read. Raises OSError if there can be none."""

    def __init__(self, folder: Path, name: str, nbytes: int) -> None:
        super().__init__()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = log_path(folder, name)
        self._most = nbytes // 2
        self._descriptor = self._open()
        self._size = os.fstat(self._descriptor).st_size

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line at once, as one piece."""
        data = f"{self.format(record)}\n".encode(errors="replace")
        if self._size and self._size + len(data) > self._most:
            with contextlib.suppress(OSError):  # the lines go on in the old file until there can be a new one
                self._begin_anew()
        try:
            self._size += os.write(self._descriptor, data)
        except OSError:  # the disk is full: stderr has the line, and the process goes on
            return

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
        super().close()

    def _begin_anew(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # renamed before, when no new file could be opened
            self._file.rename(earlier(self._file))
        anew = self._open()
        os.close(self._descriptor)
        self._descriptor, self._size = anew, 0

    def _open(self) -> int:
        return os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def log_path(folder: Path, name: str) -> Path:
    """Return the file with the newest lines of a process."""
    return folder / f"{name}{_SUFFIX}"


def earlier(file: Path) -> Path:
    """Return the file with the lines before those of a log."""
    return file.with_name(file.name + _EARLIER)


def logged_names(folder: Path) -> list[str]:
    """Return the names of the processes that have a log in a folder."""
    return sorted(file.name.removesuffix(_SUFFIX) for file in folder.glob(f"*{_SUFFIX}"))


class _Chunk(NamedTuple):
    """What was read of a file, known by its first line: its name changes, and its inode may come again."""

    file: int
    offset: int
    data: bytes


def read_part(file: Path, position: str = "") -> LogPart:
    """Return whole lines of a log: the last ones, or the first ones after a position.

    Args:
        file: As `log_path` returns it; it need not be there.
        position: Of the part before, "" for none. Lines after it that are not kept any more are left out.
    """
    at = _POSITION.fullmatch(position)
    known, offset = (int(at[1]), int(at[2])) if at else (-1, 0)
    current = _read(file, known, offset)
    chunks = [current] if current else []
    if not (current and current.file == known):
        before = _read(earlier(file), known, offset)
        if before and not (current and current.file == before.file):  # renamed just now
            chunks = [before, *chunks]
    text, first = b"", at is None
    for chunk in chunks:
        whole = chunk.data[: chunk.data.rfind(b"\n") + 1]
        if not first and len(text) + len(whole) > MOST_BYTES:
            whole = whole[: whole.find(b"\n", max(0, MOST_BYTES - len(text))) + 1]
        text += whole
        position = f"{chunk.file}:{chunk.offset + len(whole)}"
        if not first and len(text) > MOST_BYTES:
            break  # the rest comes with the next part
    if first and len(text) > MOST_BYTES:
        text = text[text.find(b"\n", len(text) - MOST_BYTES - 1) + 1 :]
    return LogPart(text.decode(errors="replace"), position)


def _read(path: Path, known: int, offset: int) -> _Chunk | None:
    """Read a file, from the offset if it is the known one, else from its beginning; None where there is no line."""
    try:
        with path.open("rb") as opened:
            first = opened.readline()
            if not first.endswith(b"\n"):
                return None
            file = zlib.crc32(first)
            begin = offset if file == known else 0
            opened.seek(begin)
            return _Chunk(file, begin, opened.read())
    except FileNotFoundError:
        return None
