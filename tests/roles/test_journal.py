from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from engines.panels import Panel
from roles.journal import SCHEMA_VERSION, Journal, JournalError
from roles.messages.requests import Move
from roles.messages.work import Artifact, LeaseRef, Output, Staged
from roles.request import Request, State, Unit


def a_request(id_: str = "r1", *, key: str = "", created_at: float = 1.0) -> Request:
    units = [Unit(f"{id_}/{k}", id_, k, 2**62 + k, 99.0) for k in range(2)]
    return Request(
        id_, {"prompt": "ä", "height": 64, "guidance_scale": 3.5}, Output("png"), created_at, 99.0, units, key, "d"
    )


def test_what_was_accepted_and_saved_comes_back_whole(tmp_path: Path) -> None:
    request = a_request(key="k")
    request.owner = "alice"
    journal = Journal(tmp_path / "j.sqlite")
    journal.accept(request)
    unit = request.units[1]
    unit.state, unit.attempt, unit.instance = State.DENOISING_RUNNING, 2, "denoiser-1"
    unit.history.append(Move("DENOISING_RUNNING", 4.0, "again"))
    unit.staged[Panel.ENCODER] = Staged(LeaseRef("pool", 3, 4, 4096, 64), b"\x00manifest", 2**64 - 1, 64)
    unit.causes.append("denoiser-0: its process ended")
    unit.borrows = True
    journal.save([request], [unit])
    journal.close()
    assert Journal(tmp_path / "j.sqlite").load(0.0) == [request]


def test_a_unit_that_an_earlier_version_wrote_borrows_nothing_and_has_time() -> None:
    fields = msgspec.to_builtins(a_request().units[0])
    del fields["borrows"], fields["left_s"]
    fields["deadline"] = 1e9
    unit = msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=Unit)
    assert not unit.borrows
    assert unit.left_s == 600.0


def test_ended_requests_are_read_back_for_a_while_and_then_pruned(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite")
    old, new, active = a_request("old"), a_request("new"), a_request("active")
    for request in (old, new, active):
        journal.accept(request)
    old.finished_at, new.finished_at = 10.0, 20.0
    new.units[0].artifact = Artifact("new-0.png", "image/png", 3)
    journal.save([old, new], new.units)
    assert {r.id for r in journal.load(15.0)} == {"new", "active"}
    assert journal.prune(15.0) == 1
    assert {r.id for r in journal.load(0.0)} == {"new", "active"}


def test_an_accept_is_on_the_disk_when_the_process_is_killed_right_after(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from roles.journal import Journal;"
        "from tests.roles.test_journal import a_request;"
        "Journal(Path(sys.argv[1])).accept(a_request()); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "j.sqlite")], cwd=root, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert [r.id for r in Journal(tmp_path / "j.sqlite").load(0.0)] == ["r1"]


def test_a_newer_journal_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    Journal(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    with pytest.raises(JournalError, match=r"newer Triptych .*upgrade"):
        Journal(path)


@pytest.mark.parametrize("damage", [b"not a database at all" * 100, b""])
def test_a_corrupt_journal_is_refused_in_words_and_an_empty_file_is_a_new_one(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "j.sqlite"
    path.write_bytes(damage)
    if damage:
        with pytest.raises(JournalError, match="move the file away"):
            Journal(path)
    else:
        Journal(path).accept(a_request())


def test_a_full_disk_is_an_error_and_the_journal_goes_on_once_there_is_room(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite")
    journal.accept(a_request("first"))
    (pages,) = journal._db.execute("PRAGMA page_count").fetchone()
    journal._db.execute(f"PRAGMA max_page_count={pages}")
    large = a_request("large")
    large.inputs["prompt"] = "x" * 200_000
    with pytest.raises(JournalError, match="full"):
        journal.accept(large)
    journal._db.execute("PRAGMA max_page_count=100000")
    journal.accept(a_request("second"))
    assert {r.id for r in journal.load(0.0)} == {"first", "second"}


def test_the_same_key_cannot_be_accepted_twice(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite")
    journal.accept(a_request("a", key="k"))
    with pytest.raises(JournalError):
        journal.accept(a_request("b", key="k"))
