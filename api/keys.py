"""The keys of the HTTP API: a file with a line `name:key` for each, or `name:key max_priority=N`."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from triptych.roles.messages.common import MAX_PRIORITY

MIN_LENGTH: Final = 16
ADVICE: Final = 'python -c "import secrets; print(secrets.token_urlsafe(32))"'
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_KEY: Final = re.compile(rf"[\x21-\x7e]{{{MIN_LENGTH},256}}")
_MAX_PRIORITY: Final = re.compile(r"max_priority=(-?[0-9]{1,3})")


class ApiKeysError(Exception):
    """A file of keys that cannot be used: `problem` says what is wrong with it, `fix` what to do."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(f"{problem}: {fix}")
        self.problem = problem
        self.fix = fix


@dataclass(frozen=True, slots=True)
class ApiClient:
    """Who has a key, and what it allows."""

    name: str
    """Its requests are seen by this name alone; "" without keys."""
    max_priority: int = 0
    """The highest priority of its requests. It is 0 unless the file gives another, because a higher one delays all
    other clients."""


class ApiKeys:
    """Who may use the API. Several keys may have one name, for the time in which one replaces another."""

    def __init__(self, keys: Mapping[str, ApiClient]) -> None:
        self.keys = keys
        """Client by key."""
        self._clients = {_digest(key): client for key, client in keys.items()}

    def find(self, key: str) -> ApiClient | None:
        """Return the client of a key, None where there is no such key; takes as long for the one as for the other."""
        given, found = _digest(key), None
        for digest, client in self._clients.items():
            if hmac.compare_digest(digest, given):
                found = client
        return found


def load_api_keys(path: Path) -> ApiKeys:
    """Read a file of keys; empty lines and lines that start with # are ignored.

    Raises:
        ApiKeysError: It cannot be read, others may read it, or a line of it is no `name:key`, or has a limit that is
            none.
    """
    keys: dict[str, ApiClient] = {}
    for number, text in read_secret_lines(path):
        name, colon, rest = (part.strip() for part in text.partition(":"))
        key, _, limit = (part.strip() for part in rest.partition(" "))
        if not colon or not _NAME.fullmatch(name):
            raise ApiKeysError(f"has no name:key in line {number}", "name it with letters, digits, _, . and -")
        if not _KEY.fullmatch(key):
            problem = f"has no key of {MIN_LENGTH} to 256 visible ASCII characters in line {number}"
            raise ApiKeysError(problem, f"make one with {ADVICE}")
        if key in keys:
            problem = f"has the key of {keys[key].name} again in line {number}"
            raise ApiKeysError(problem, "give each name a key of its own")
        given = _MAX_PRIORITY.fullmatch(limit) if limit else None
        max_priority = int(given[1]) if given else 0
        if (limit and not given) or abs(max_priority) > MAX_PRIORITY:
            fix = f"write max_priority=N with N from {-MAX_PRIORITY} to {MAX_PRIORITY}, or nothing"
            raise ApiKeysError(f"has no limit after the key in line {number}", fix)
        keys[key] = ApiClient(name, max_priority)
    if not keys:
        raise ApiKeysError("holds no key", f"write a line name:key, with a key from {ADVICE}")
    return ApiKeys(keys)


def read_secret_lines(path: Path) -> list[tuple[int, str]]:
    """Read a file that nobody else may read: its lines with their numbers, without comments and empty ones.

    Raises:
        ApiKeysError: It cannot be read, or others may read it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ApiKeysError(f"can be read by others (its mode is {mode:04o})", f"chmod 600 {path}")
            lines = file.read().decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "") or str(error)
        raise ApiKeysError(f"cannot be read ({reason})", "give the path of a text file of mode 0600") from error
    texts = enumerate(map(str.strip, lines), start=1)
    return [(number, text) for number, text in texts if text and not text.startswith("#")]


def read_client_key(path: Path) -> str:
    """Read the key that a client sends: a file has the key alone, or lines of `load_api_keys`; the first counts.

    A key that itself has a colon is read as `name:key`: write a name before it.

    Raises:
        ApiKeysError: The file cannot be read, or has no key.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "") or str(error)
        raise ApiKeysError(f"cannot be read ({reason})", "give a text file") from error
    line = next((text for text in map(str.strip, lines) if text and not text.startswith("#")), "")
    name, colon, key = (part.strip() for part in line.partition(":"))
    key = key.partition(" ")[0] if colon and _NAME.fullmatch(name) else line
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ApiKeysError("has no key", "write the key alone into it, or a line name:key")
    return key


def _digest(key: str) -> bytes:
    # Of equal length, so that a comparison says nothing of how long a key is.
    return hashlib.sha256(key.encode()).digest()
