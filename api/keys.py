"""The keys of the HTTP API: a file with a line `name:key` for each."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from pathlib import Path
from typing import Final

MIN_LENGTH: Final = 16
ADVICE: Final = 'python -c "import secrets; print(secrets.token_urlsafe(32))"'
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_KEY: Final = re.compile(rf"[\x21-\x7e]{{{MIN_LENGTH},256}}")


class ApiKeysError(Exception):
    """A file of keys that cannot be used: `problem` says what is wrong with it, `fix` what to do."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(f"{problem}: {fix}")
        self.problem = problem
        self.fix = fix


class ApiKeys:
    """Who may use the API. Several keys may have one name, for the time in which one replaces another."""

    def __init__(self, keys: dict[str, str]) -> None:
        self.keys = keys
        """Name by key."""
        self._names = {_digest(key): name for key, name in keys.items()}

    def name_of(self, key: str) -> str | None:
        """Return the name of a key, None where there is no such key; takes as long for the one as for the other."""
        given, found = _digest(key), None
        for digest, name in self._names.items():
            if hmac.compare_digest(digest, given):
                found = name
        return found


def load_api_keys(path: Path) -> ApiKeys:
    """Read a file of keys; empty lines and lines that start with # are ignored.

    Raises:
        ApiKeysError: It cannot be read, others may read it, or a line of it is no `name:key`.
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
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, colon, key = (part.strip() for part in text.partition(":"))
        if not colon or not _NAME.fullmatch(name):
            raise ApiKeysError(f"has no name:key in line {number}", "name it with letters, digits, _, . and -")
        if not _KEY.fullmatch(key):
            problem = f"has no key of {MIN_LENGTH} to 256 visible ASCII characters in line {number}"
            raise ApiKeysError(problem, f"make one with {ADVICE}")
        if key in keys:
            raise ApiKeysError(f"has the key of {keys[key]} again in line {number}", "give each name a key of its own")
        keys[key] = name
    if not keys:
        raise ApiKeysError("holds no key", f"write a line name:key, with a key from {ADVICE}")
    return ApiKeys(keys)


def read_client_key(path: Path) -> str:
    """Read the key that a client sends: a file has the key alone, or `name:key` lines, of which the first counts.

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
    key = key if colon and _NAME.fullmatch(name) else line
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ApiKeysError("has no key", "write the key alone into it, or a line name:key")
    return key


def _digest(key: str) -> bytes:
    # Of equal length, so that a comparison says nothing of how long a key is.
    return hashlib.sha256(key.encode()).digest()
