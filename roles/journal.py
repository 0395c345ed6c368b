"""Accepted requests on disk, so that a restart of the head loses none.

SQLite in WAL mode. An accept is one transaction with `synchronous=FULL`: it returns when the request is on the disk.
Later moves are written with `synchronous=NORMAL`, which survives the death of the process, though not always that
of the machine: losing one only means that a stage is run again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

import msgspec

from roles.messages.work import Input, Output
from roles.request import Request, Unit

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE requests (
    id TEXT PRIMARY KEY,
    idempotency_key TEXT UNIQUE,
    created_at REAL NOT NULL,
    finished_at REAL NOT NULL,
    body BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE units (
    id TEXT PRIMARY KEY,
    request_id TEXT NOT NULL REFERENCES requests(id) ON DELETE CASCADE,
    body BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX units_of_request ON units(request_id);
CREATE INDEX by_end ON requests(finished_at);
"""


class JournalError(Exception):
    """The journal cannot be read or written; says which file and what to do."""

    @property
    def may_pass(self) -> bool:
        """Whether nothing is wrong with the file: it is locked, or the disk is full or away."""
        return isinstance(self.__cause__, (OSError, sqlite3.OperationalError))


class _Body(msgspec.Struct, frozen=True, array_like=True):
    """The columns of a request that nobody searches by."""

    inputs: dict[str, Input]
    output_format: str
    deadline: float
    digest: str
    fps: float = 0.0
    owner: str = ""
    quality: int = 0


_body = msgspec.msgpack.Decoder(_Body)
_unit = msgspec.msgpack.Decoder(Unit)


class Journal:
    """The head's memory.

    Raises:
        JournalError: on opening, when the file is corrupt or written by a newer version; on every call, when the
            disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None)
            self._prepare()
        except (sqlite3.Error, OSError) as error:
            raise JournalError(
                f"the journal {path} cannot be opened ({error}): free some space, or move the file away to start "
                "without the requests that it holds"
            ) from error

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA foreign_keys=ON")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise JournalError(
                f"the journal {self.path} was written by a newer Triptych (its version is {version}, this one "
                f"knows {SCHEMA_VERSION}): upgrade, or move the file away"
            )
        if version == 0:
            self._db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version={SCHEMA_VERSION};COMMIT;")
        (verdict,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)

    def accept(self, request: Request) -> None:
        """Write a new request; when this returns it is on the disk."""
        self._write([request], request.units, durable=True)

    def save(self, requests: Iterable[Request], units: Iterable[Unit]) -> None:
        """Write what became of requests and units."""
        self._write(requests, units, durable=False)

    def _write(self, requests: Iterable[Request], units: Iterable[Unit], *, durable: bool) -> None:
        try:
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany(
                    "INSERT INTO requests VALUES (?, ?, ?, ?, ?) "
                    "ON CONFLICT(id) DO UPDATE SET finished_at = excluded.finished_at",
                    [_request_row(request) for request in requests],
                )
                self._db.executemany(
                    "INSERT INTO units VALUES (?, ?, ?) ON CONFLICT(id) DO UPDATE SET body = excluded.body",
                    [(unit.id, unit.request_id, msgspec.msgpack.encode(unit)) for unit in units],
                )
                self._db.execute("COMMIT")
            except sqlite3.Error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise JournalError(f"the journal {self.path} cannot be written ({error})") from error

    def load(self, terminal_since: float) -> list[Request]:
        """Every active request, and the ones that ended after `terminal_since` (unix seconds), oldest first."""
        try:
            rows = self._db.execute(
                "SELECT id, idempotency_key, created_at, finished_at, body FROM requests "
                "WHERE finished_at = 0 OR finished_at >= ? ORDER BY created_at, id",
                (terminal_since,),
            ).fetchall()
            return [self._request(*row) for row in rows]
        except (sqlite3.Error, msgspec.DecodeError) as error:
            raise JournalError(
                f"the journal {self.path} cannot be read ({error}): move it away to start without its requests"
            ) from error

    def _request(self, id_: str, key: str | None, created_at: float, finished_at: float, body: bytes) -> Request:
        held = _body.decode(body)
        rows = self._db.execute("SELECT body FROM units WHERE request_id = ?", (id_,))
        units = sorted((_unit.decode(row[0]) for row in rows), key=lambda unit: unit.index)
        return Request(
            id=id_,
            inputs=held.inputs,
            output=Output(held.output_format, held.fps, held.quality),
            created_at=created_at,
            deadline=held.deadline,
            units=units,
            idempotency_key=key or "",
            digest=held.digest,
            finished_at=finished_at,
            owner=held.owner,
        )

    def prune(self, ended_before: float) -> int:
        """Delete requests that ended before a time (unix seconds); returns how many."""
        try:
            return self._db.execute(
                "DELETE FROM requests WHERE finished_at > 0 AND finished_at < ?", (ended_before,)
            ).rowcount
        except sqlite3.Error as error:
            raise JournalError(f"the journal {self.path} cannot be pruned ({error})") from error

    def delete(self, request_id: str) -> None:
        """Remove a request and its units; when this returns a restart does not bring them back."""
        try:
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("DELETE FROM requests WHERE id = ?", (request_id,))
        except sqlite3.Error as error:
            raise JournalError(f"the journal {self.path} cannot be written ({error})") from error

    def close(self) -> None:
        """Fold the write-ahead log into the file and let go of it."""
        self._db.close()


def _request_row(request: Request) -> tuple[str, str | None, float, float, bytes]:
    output = request.output
    body = _Body(
        request.inputs, output.format, request.deadline, request.digest, output.fps, request.owner, output.quality
    )
    return (
        request.id,
        request.idempotency_key or None,
        request.created_at,
        request.finished_at,
        msgspec.msgpack.encode(body),
    )
