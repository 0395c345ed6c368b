"""Store accepted requests and their results on disk, so that a restart of the head loses none.

SQLite in WAL mode. A write that has returned survives the end of this process; after `sync`, all earlier writes survive
a crash of the machine too. So one wait for the disk, in a thread, covers many writes. docs/adr/0022 says what is kept
for how long.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from triptych.actors.topology import ModelIdentity
from triptych.engines.stages import Stage
from triptych.roles.head.job import Checkpoint, Job, Request, State, StoredOutput
from triptych.roles.media.files import sync_folder
from triptych.roles.media.retention import StoreBounds
from triptych.roles.messages.common import Artifact, Input, Output, StoredPayload
from triptych.roles.messages.requests import PreviewView, RunView, Transition

BATCH: Final = 50
"""Requests removed by one transaction, which blocks a writer for about a millisecond."""
PAUSE_S: Final = 0.005
"""Seconds between two batches, in which others can write."""
CHECKPOINT_BYTES: Final = 4 << 20
"""Size of the write-ahead log from which on `sync` checkpoints it."""

RECENT_S: Final = 60.0
"""Seconds after the end of a request in which its artifacts are kept, for clients that wait for it."""

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
# Unreadable rows, unchanged, for an operator to inspect.
_DAMAGED = """
CREATE TABLE damaged (
    found_at REAL NOT NULL,
    error TEXT NOT NULL,
    request_id BLOB NOT NULL,
    unit_id BLOB,
    idempotency_key BLOB,
    created_at,
    finished_at,
    body
);
CREATE INDEX damaged_requests ON damaged(request_id);
"""
_OWNERS = """
ALTER TABLE requests ADD COLUMN owner TEXT NOT NULL DEFAULT '';
CREATE INDEX by_owner ON requests(owner, created_at, id);
CREATE INDEX by_age ON requests(created_at, id);
"""
_FORMATS = """
ALTER TABLE requests ADD COLUMN output_format TEXT NOT NULL DEFAULT '';
UPDATE requests SET output_format = format_of(body);
CREATE INDEX by_format ON requests(output_format, created_at, id);
"""
# Webhooks that have not arrived, of active requests too.
_WEBHOOKS = """
CREATE TABLE webhooks (
    request_id TEXT PRIMARY KEY REFERENCES requests(id) ON DELETE CASCADE,
    attempts INTEGER NOT NULL,
    next_at REAL NOT NULL
) WITHOUT ROWID;
"""
# What is due is found without a look at the webhooks of active requests, which are due never: 9e999 is infinity.
_WEBHOOKS_DUE = """
UPDATE webhooks SET next_at = 9e999 WHERE request_id IN (SELECT id FROM requests WHERE finished_at = 0);
CREATE INDEX webhooks_due ON webhooks(next_at);
"""
_STEPS: Final = (_SCHEMA, _DAMAGED, _OWNERS, _FORMATS, _WEBHOOKS, _WEBHOOKS_DUE)
"""The step from each schema version to the next."""
SCHEMA_VERSION: Final = len(_STEPS)
_INCREMENTAL: Final = 2
_COLUMNS = "id, idempotency_key, created_at, finished_at, body, owner"


class JournalError(Exception):
    """The journal cannot be read or written; the message names the file and what to do."""

    @property
    def transient(self) -> bool:
        """Whether the file itself is sound: it is locked, or the disk is full or missing."""
        return isinstance(self.__cause__, (OSError, sqlite3.OperationalError))


class _Body(msgspec.Struct, frozen=True, array_like=True):
    """The fields of a request that no query searches by."""

    inputs: dict[str, Input]
    output_format: str
    deadline: float
    """`Request.times_out_at`."""
    digest: str
    fps: float = 0.0
    quality: int = 0
    served: ModelIdentity | None = None
    model: str = ""
    priority: int = 0
    deadline_s: float = 0.0
    steps: int = 0
    partial_images: int = 0
    remixed_from: str = ""
    webhook_url: str = ""
    metadata: bool | None = None


class _JobRow(msgspec.Struct):
    """A job on disk: a map of these names in this order.

    Renaming a field here silently loses what earlier versions wrote; a new field needs a default that is right for
    their rows.
    """

    id: str
    request_id: str
    index: int
    seed: int
    left_s: float = 600.0
    """The default is for rows of earlier versions, which did not write it."""
    state: State = State.PENDING
    stage_s: float = 0.0
    attempt: int = 0
    history: list[Transition] = msgspec.field(default_factory=list)
    staged: dict[Stage, StoredPayload] = msgspec.field(default_factory=dict)
    """`Job.stored`; at most one entry."""
    instance: str = ""
    instances: dict[str, str] = msgspec.field(default_factory=dict)
    stage_seconds: dict[str, float] = msgspec.field(default_factory=dict)
    causes: list[str] = msgspec.field(default_factory=list)
    failures: int = 0
    transfers_lost: int = 0
    deaths: int = 0
    stalls: int = 0
    step: int = 0
    total_steps: int = 0
    artifact: Artifact | None = None
    borrows: bool = False
    """`Job.uses_cached_prompt`."""
    model: str = ""
    at_fault: bool = False
    """`Job.invalid_request`."""
    bucket: int = 0
    previews: list[PreviewView] = msgspec.field(default_factory=list)
    checkpoint: Checkpoint | None = None
    resumed_from: int = 0
    steps_lost_at: int = 0
    steps_redone: int = 0
    parked: int = 0
    shared_deaths: int = 0
    runs: list[RunView] = msgspec.field(default_factory=list)
    moves_left_out: int = 0


_RENAMED: Final = frozenset({"left_s", "stage_s", "staged", "borrows", "at_fault"})
_SAME: Final = tuple(name for name in _JobRow.__struct_fields__ if name not in _RENAMED)
_body = msgspec.msgpack.Decoder(_Body)
_job_row = msgspec.msgpack.Decoder(_JobRow)


def encode_job(job: Job) -> bytes:
    """Encode a job for its row."""
    fields = {name: getattr(job, name) for name in _SAME}
    staged = {job.stored.stage: job.stored.payload} if job.stored else {}
    row = _JobRow(
        **fields,
        left_s=job.left_s,
        stage_s=job.stage_s,
        staged=staged,
        borrows=job.uses_cached_prompt,
        at_fault=job.invalid_request,
    )
    return msgspec.msgpack.encode(row)


def decode_job(body: bytes) -> Job:
    """Decode the job of a row; raises ValueError if it is invalid."""
    row = _job_row.decode(body)
    stored = [StoredOutput(stage, payload) for stage, payload in row.staged.items()]
    fields = {name: getattr(row, name) for name in _SAME}
    job = Job(**fields, expires_at=row.left_s, entered_at=-row.stage_s)
    job.stored = stored[-1] if stored else None
    job.uses_cached_prompt, job.invalid_request = row.borrows, row.at_fault
    return job


class PendingWebhook(NamedTuple):
    """A webhook of an ended request that has not arrived."""

    request_id: str
    owner: str
    attempts: int
    """Those that have failed."""
    ended_at: float
    """Unix seconds."""
    next_at: float
    """Unix seconds; 0 before the first attempt."""


class Journal:
    """The head's database of requests. Call its methods from any thread, one at a time; `sync` beside the others.

    Args:
        path: The file; created if it does not exist.
        on_damage: Called with a sentence for each request that cannot be read and is quarantined.

    Raises:
        JournalError: On opening, when the file is damaged as a whole or written by a newer version; on every call,
            when the disk fails.
    """

    def __init__(self, path: Path, on_damage: Callable[[str], None] = lambda _: None) -> None:
        self.path = path
        self.damaged = 0
        """Requests quarantined so far, by this and earlier processes."""
        self.unsynced = ""
        """Why a `sync` has failed, a sentence; "" if none has."""
        self._on_damage = on_damage
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = _connect(path)
            self._prepare()
            self.probe()
            # A process before may have failed to sync the log: what is read from it is written, and synced, elsewhere.
            _checkpoint(self._db, "TRUNCATE")
            # Keep the log open, so that `sync` needs no lock of the database.
            self._log = os.open(f"{path}-wal", os.O_RDONLY)
            self.sync()
            sync_folder(path.parent)
        except sqlite3.OperationalError as error:
            raise JournalError(
                f"the journal {path} cannot be opened ({error}): free some space, see that this user may write there, "
                "or move the file away to start without the requests that it holds"
            ) from error
        except sqlite3.DatabaseError as error:
            raise JournalError(
                f"the journal {path} is damaged ({error}): move it away, with the files beside it that begin with its "
                "name, to start without the requests that it holds; `sqlite3 FILE .recover` may bring some of them back"
            ) from error
        except OSError as error:
            raise JournalError(f"the journal {path} cannot be opened ({error}): make that folder usable") from error

    def _prepare(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise JournalError(
                f"the journal {self.path} was written by a newer Triptych (its version is {version}, this one "
                f"knows {SCHEMA_VERSION}): upgrade, or move the file away"
            )
        (verdict,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if _text(verdict) != "ok":
            raise sqlite3.DatabaseError(_text(verdict))
        # Free the space of deleted rows in small steps: see `prune`. A file with tables needs a VACUUM to allow that.
        self._db.execute("PRAGMA auto_vacuum=INCREMENTAL")
        if version < SCHEMA_VERSION:
            self._db.create_function("format_of", 1, _format_of)
            self._db.executescript(f"BEGIN;{''.join(_STEPS[version:])}PRAGMA user_version={SCHEMA_VERSION};COMMIT;")
        if _pragma(self._db, "auto_vacuum") != _INCREMENTAL:
            with contextlib.suppress(sqlite3.OperationalError):  # too little space: retried at the next start
                self._db.execute("VACUUM")
        self._db.execute("PRAGMA journal_mode=WAL")
        (self.damaged,) = self._db.execute("SELECT COUNT(DISTINCT request_id) FROM damaged").fetchone()

    # -- writing

    def accept(self, *requests: Request) -> None:
        """Write new requests, all or none.

        Raises:
            JournalError: The disk fails, or there is a request of such an id or key.
        """
        with self._writing():
            rows = [_request_row(request) for request in requests]
            self._db.executemany("INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            self._write_jobs(job for request in requests for job in request.jobs)
            called = [(request.id,) for request in requests if request.webhook_url]
            self._db.executemany("INSERT INTO webhooks VALUES (?, 0, 9e999)", called)

    def save(self, requests: Iterable[Request], jobs: Iterable[Job]) -> None:
        """Write changed requests and jobs; of a request only its end changes, with which its webhook is due."""
        ended = [request for request in requests if request.finished_at]
        with self._writing():
            self._db.executemany(
                "UPDATE requests SET finished_at = ? WHERE id = ?",
                [(request.finished_at, request.id) for request in ended],
            )
            self._db.executemany(
                "UPDATE webhooks SET next_at = 0 WHERE request_id = ? AND next_at = 9e999",
                [(request.id,) for request in ended if request.webhook_url],
            )
            self._write_jobs(jobs)

    def delete(self, request_id: str) -> None:
        """Remove a request and its jobs."""
        with self._writing():
            self._db.execute("DELETE FROM requests WHERE id = ?", (request_id,))
            self._db.execute("DELETE FROM damaged WHERE request_id = CAST(? AS BLOB)", (request_id,))

    def retry_webhook(self, request_id: str, attempts: int, next_at: float) -> None:
        """Write how many attempts of a webhook have failed, and when the next one is due (unix seconds)."""
        with self._writing():
            self._db.execute(
                "UPDATE webhooks SET attempts = ?, next_at = ? WHERE request_id = ?", (attempts, next_at, request_id)
            )

    def forget_webhook(self, request_id: str) -> None:
        """Remove a webhook that has arrived, or is given up."""
        with self._writing():
            self._db.execute("DELETE FROM webhooks WHERE request_id = ?", (request_id,))

    def probe(self) -> None:
        """Check that the journal can be written: write a request and remove it."""
        request = Request(" probe", {}, Output(), 0.0, 0.0, [Job(" probe/0", " probe", 0, 0, 0.0)])
        with self._writing():
            self._db.execute("INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?)", _request_row(request))
            self._write_jobs(request.jobs)
            self._db.execute("DELETE FROM requests WHERE id = ?", (request.id,))

    def sync(self) -> None:
        """Return when all writes so far are on the disk. It blocks, and may run beside other calls.

        Raises:
            JournalError: The disk fails, or did at an earlier call: the kernel says only once that bytes were lost, so
                that a journal has to be opened anew to know which it has.
        """
        if self.unsynced:
            raise JournalError(self.unsynced)
        try:
            os.fdatasync(self._log)
        except OSError as error:
            self.unsynced = f"the journal {self.path} cannot be put on the disk ({error}): the head opens it anew"
            raise JournalError(self.unsynced) from error
        if os.fstat(self._log).st_size > CHECKPOINT_BYTES:
            with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(_connect(self.path)) as db:
                _checkpoint(db, "PASSIVE")  # if it is locked, a later call does it

    def _write_jobs(self, jobs: Iterable[Job]) -> None:
        self._db.executemany(
            "INSERT INTO units VALUES (?, ?, ?) ON CONFLICT(id) DO UPDATE SET body = excluded.body",
            [(job.id, job.request_id, encode_job(job)) for job in jobs],
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with _transaction(self._db):
                yield
        except sqlite3.Error as error:
            raise JournalError(f"the journal {self.path} cannot be written ({error})") from error

    # -- reading

    def active(self) -> list[Request]:
        """Return every request that has not ended, oldest first."""
        return self._read("WHERE finished_at = 0 ORDER BY created_at, id", ())

    def find(self, request_id: str) -> Request | None:
        """Return the request of that id, or None."""
        return next(iter(self._read("WHERE id = ?", (request_id,))), None)

    def find_key(self, idempotency_key: str) -> Request | None:
        """Return the request of that idempotency key, or None."""
        return next(iter(self._read("WHERE idempotency_key = ?", (idempotency_key,))), None)

    def ids(
        self,
        owner: str,
        *,
        after: Request | None,
        limit: int,
        newest_first: bool,
        active: bool | None = None,
        output_format: str = "",
    ) -> list[str]:
        """Return at most `limit` ids of an owner's requests ("" for all owners), by age, after the request `after`.

        `active` selects those that have not ended, or that have; `output_format` those that asked for this format.
        """
        order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
        conditions, values = ["TRUE"], list[str | float]()
        if owner:
            conditions.append("owner = ?")
            values.append(owner)
        if output_format:
            conditions.append("output_format = ?")
            values.append(output_format)
        if active is not None:
            conditions.append("finished_at = 0" if active else "finished_at > 0")
        if after:
            conditions.append(f"(created_at, id) {beyond} (?, ?)")
            values += [after.created_at, after.id]
        # The query is made of constants here; values are bound.
        where = f"{' AND '.join(conditions)} ORDER BY created_at {order}, id {order}"
        query = f"SELECT id FROM requests WHERE {where} LIMIT ?"  # noqa: S608
        try:
            return [_text(row[0]) for row in self._db.execute(query, (*values, limit)).fetchall()]
        except sqlite3.Error as error:
            raise self._unreadable(error) from error

    def webhooks(self, limit: int) -> list[PendingWebhook]:
        """Return the webhooks of ended requests that have not arrived, at most `limit`, the next one due first."""
        return self._webhooks("TRUE ORDER BY w.next_at LIMIT ?", limit)

    def webhook(self, request_id: str) -> PendingWebhook | None:
        """Return the webhook of an ended request; None if it has arrived, is given up, or never was."""
        return next(iter(self._webhooks("w.request_id = ?", request_id)), None)

    def _webhooks(self, where: str, value: str | int) -> list[PendingWebhook]:
        query = (
            "SELECT w.request_id, r.owner, w.attempts, r.finished_at, w.next_at FROM webhooks w "  # noqa: S608
            f"JOIN requests r ON r.id = w.request_id WHERE w.next_at < 9e999 AND {where}"
        )
        try:
            rows = self._db.execute(query, (value,)).fetchall()
        except sqlite3.Error as error:
            raise self._unreadable(error) from error
        return [PendingWebhook(_text(id_), _text(owner), *rest) for id_, owner, *rest in rows]

    def is_quarantined(self, request_id: str) -> bool:
        """Return whether a request of that id was quarantined."""
        try:
            found = self._db.execute(
                "SELECT 1 FROM damaged WHERE request_id = CAST(? AS BLOB) LIMIT 1", (request_id,)
            ).fetchone()
        except sqlite3.Error as error:
            raise self._unreadable(error) from error
        return found is not None

    def _read(self, where: str, values: tuple[str, ...]) -> list[Request]:
        try:
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM requests {where}", values).fetchall()  # noqa: S608
            read = [(row, self._decoded(row)) for row in rows]
        except sqlite3.Error as error:
            raise self._unreadable(error) from error
        for row, request in read:
            if isinstance(request, str):
                self._quarantine(row[0], request)
        return [request for _, request in read if isinstance(request, Request)]

    def _decoded(self, row: tuple[bytes, bytes | None, float, float, bytes, bytes]) -> Request | str:
        """Decode a request from its row and those of its jobs; if that is impossible, return why."""
        id_, key, created_at, finished_at, body, owner = row
        rows = self._db.execute("SELECT body FROM units WHERE request_id = CAST(? AS TEXT)", (id_,)).fetchall()
        try:
            held = _body.decode(body)
            jobs = sorted((decode_job(row[0]) for row in rows), key=lambda job: job.index)
            request = Request(
                id=id_.decode(),
                inputs=held.inputs,
                output=Output(held.output_format, held.fps, held.quality, held.metadata),
                created_at=float(created_at),
                times_out_at=held.deadline,
                jobs=jobs,
                idempotency_key=(key or b"").decode(),
                digest=held.digest,
                finished_at=float(finished_at),
                owner=owner.decode(),
                served=held.served,
                model=held.model,
                priority=held.priority,
                deadline_s=held.deadline_s,
                steps=held.steps,
                partial_images=held.partial_images,
                remixed_from=held.remixed_from,
                webhook_url=held.webhook_url,
            )
        except (ValueError, TypeError) as error:  # msgspec and the codecs raise subclasses of these
            return str(error)
        if [job.id for job in jobs] != [f"{request.id}/{k}" for k in range(len(jobs))] or not jobs:
            return "the rows of its jobs do not belong to the request"
        return request

    def _quarantine(self, id_: bytes, error: str) -> None:
        name = id_.decode(errors="replace")
        try:
            self._move_to_quarantine(id_, error)
        except JournalError as refusal:
            self._on_damage(f"{name} cannot be read ({error}), nor quarantined: {refusal}")
        else:
            self.damaged += 1
            self._on_damage(f"{name} cannot be read ({error}): its rows are now in the table `damaged` of {self.path}")

    def _move_to_quarantine(self, id_: bytes, error: str) -> None:
        with self._writing():
            self._db.execute(
                "INSERT INTO damaged SELECT ?, ?, CAST(id AS BLOB), NULL, CAST(idempotency_key AS BLOB), created_at, "
                "finished_at, body FROM requests WHERE id = CAST(? AS TEXT)",
                (time.time(), error, id_),
            )
            self._db.execute(
                "INSERT INTO damaged SELECT ?, ?, ?, CAST(id AS BLOB), NULL, NULL, NULL, body FROM units "
                "WHERE request_id = CAST(? AS TEXT)",
                (time.time(), error, id_, id_),
            )
            self._db.execute("DELETE FROM requests WHERE id = CAST(? AS TEXT)", (id_,))

    def _unreadable(self, error: sqlite3.Error) -> JournalError:
        return JournalError(f"the journal {self.path} cannot be read ({error}): move it away to start without it")

    def close(self) -> None:
        """Checkpoint the write-ahead log and close the file."""
        os.close(self._log)
        self._log = -1
        self._db.close()


def prune(path: Path, bounds: StoreBounds, *, now: float) -> tuple[int, set[str]]:
    """Remove ended requests that are too old or too many, and free their space. It blocks for seconds.

    It uses a separate connection and small transactions, so that others can write meanwhile.

    Args:
        path: An open journal.
        bounds: `max_bytes` bounds the part of the file that is in use.
        now: Unix seconds.

    Returns:
        How many were removed, and the ids of those whose artifacts clients may still wait for: the active ones, and
        those that ended within the last minute.

    Raises:
        JournalError: The disk fails.
    """
    try:
        with contextlib.closing(_connect(path)) as db:
            gone, many = 0, _too_many(db, bounds, now)
            while (batch := min(BATCH, many - gone)) > 0 or _used(db) > bounds.max_bytes:
                removed = _remove_oldest(db, batch if batch > 0 else BATCH)
                if not removed:
                    break
                gone += removed
                _yield_lock(db, path)
            while _pragma(db, "freelist_count") > max(BATCH, _pragma(db, "page_count") // 4):
                db.executescript(f"PRAGMA incremental_vacuum({BATCH})")  # `execute` would free one page
                _yield_lock(db, path)
            _checkpoint(db, "PASSIVE")
            _checkpoint(db, "TRUNCATE")  # blocks writers, but only briefly after the first
            recent = db.execute(
                "SELECT id FROM requests WHERE finished_at = 0 OR finished_at > ?", (now - RECENT_S,)
            ).fetchall()
    except (sqlite3.Error, OSError) as error:
        raise JournalError(f"the journal {path} cannot be pruned ({error})") from error
    return gone, {_text(row[0]) for row in recent}


def _too_many(db: sqlite3.Connection, bounds: StoreBounds, now: float) -> int:
    """Return how many ended requests are too old or too many."""
    (ended,) = db.execute("SELECT COUNT(*) FROM requests WHERE finished_at > 0").fetchone()
    (old,) = db.execute(
        "SELECT COUNT(*) FROM requests WHERE finished_at > 0 AND finished_at < ?", (now - bounds.max_age_s,)
    ).fetchone()
    return int(max(old, ended - bounds.max_count))


def _yield_lock(db: sqlite3.Connection, path: Path) -> None:
    """Keep the write-ahead log short and let others write, between two batches."""
    if Path(f"{path}-wal").stat().st_size > CHECKPOINT_BYTES:
        _checkpoint(db, "PASSIVE")
    time.sleep(PAUSE_S)


def _checkpoint(db: sqlite3.Connection, how: str) -> None:
    """Checkpoint the write-ahead log: what is possible at once (PASSIVE), or all of it (TRUNCATE)."""
    db.execute(f"PRAGMA wal_checkpoint({how})").fetchall()


def _used(db: sqlite3.Connection) -> int:
    """Return the bytes of the file that are in use."""
    return (_pragma(db, "page_count") - _pragma(db, "freelist_count")) * _pragma(db, "page_size")


def _remove_oldest(db: sqlite3.Connection, many: int) -> int:
    with _transaction(db):
        return db.execute(
            "DELETE FROM requests WHERE id IN "
            "(SELECT id FROM requests WHERE finished_at > 0 ORDER BY finished_at LIMIT ?)",
            (many,),
        ).rowcount


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.text_factory = bytes  # so that a damaged text fails one row, not the query
    # Overwrite what is deleted, because prompts may be private.
    db.executescript(
        "PRAGMA synchronous=NORMAL;PRAGMA foreign_keys=ON;PRAGMA secure_delete=ON;PRAGMA wal_autocheckpoint=0;"
        f"PRAGMA journal_size_limit={CHECKPOINT_BYTES // 4}"
    )
    return db


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _pragma(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _format_of(body: bytes) -> str:
    """Return the output format of a request that an earlier version wrote; "" where its row is damaged."""
    try:
        return _body.decode(body).output_format
    except (ValueError, TypeError):  # as in `Journal._decoded`, which sets the request aside when it is read
        return ""


def _request_row(request: Request) -> tuple[str, str | None, float, float, bytes, str, str]:
    output = request.output
    body = _Body(
        request.inputs,
        output.format,
        request.times_out_at,
        request.digest,
        output.fps,
        output.quality,
        request.served,
        request.model,
        request.priority,
        request.deadline_s,
        request.steps,
        request.partial_images,
        request.remixed_from,
        request.webhook_url,
        output.metadata,
    )
    return (
        request.id,
        request.idempotency_key or None,
        request.created_at,
        request.finished_at,
        msgspec.msgpack.encode(body),
        request.owner,
        output.format,
    )
