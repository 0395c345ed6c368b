from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.roles.head.head_harness import fail_the_next_sync
from triptych.actors.topology import ModelIdentity
from triptych.engines.stages import Stage
from triptych.roles.head.job import Job, Request, State, StoredOutput
from triptych.roles.head.journal import (
    SCHEMA_VERSION,
    Journal,
    JournalError,
    PendingWebhook,
    decode_job,
    encode_job,
    prune,
)
from triptych.roles.media.retention import StoreBounds
from triptych.roles.messages.common import (
    Artifact,
    Images,
    Json,
    LeaseRef,
    Numbers,
    Options,
    Output,
    StoredPayload,
    Tensors,
    Upload,
)
from triptych.roles.messages.requests import Transition


def a_request(id_: str = "r1", *, key: str = "", created_at: float = 1.0) -> Request:
    jobs = [Job(f"{id_}/{k}", id_, k, 2**62 + k, 99.0) for k in range(2)]
    return Request(
        id_, {"prompt": "ä", "height": 64, "guidance_scale": 3.5}, Output("png"), created_at, 99.0, jobs, key, "d"
    )


def test_what_was_accepted_and_saved_comes_back_whole(tmp_path: Path) -> None:
    request = a_request(key="k")
    request.output = Output("jpeg", 0.0, 90, metadata=False)
    request.owner = "alice"
    request.priority, request.deadline_s, request.steps = 7, 2.5, 28
    request.remixed_from = "r0"
    journal = Journal(tmp_path / "j.sqlite")
    journal.accept(request)
    job = request.jobs[1]
    job.bucket = 8
    job.state, job.attempt, job.instance = State.DENOISING_RUNNING, 2, "denoiser-1"
    job.history.append(Transition("DENOISING_RUNNING", 4.0, "again"))
    job.stored = StoredOutput(
        Stage.ENCODER, StoredPayload(LeaseRef("pool", 3, 4, 4096, 64), b"\x00manifest", 2**64 - 1, 64)
    )
    job.causes.append("denoiser-0: its process ended")
    job.uses_cached_prompt = True
    journal.save([request], [job])
    journal.close()
    assert Journal(tmp_path / "j.sqlite").active() == [request]


def test_requests_are_named_by_owner_and_age_whether_they_have_ended_or_not(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite")
    for k, owner in enumerate(("alice", "bob", "alice", "alice")):
        request = a_request(f"r{k}", created_at=float(k // 2))
        request.owner = owner
        request.output = Output("mp4" if k in (0, 3) else "png")
        journal.accept(request)
    request.finished_at = 5.0
    journal.save([request], [])

    def ids(
        owner: str = "alice", after: str = "", limit: int = 9, *, newest_first: bool = True, output_format: str = ""
    ) -> list[str]:
        found = journal.find(after) if after else None
        return journal.ids(owner, after=found, limit=limit, newest_first=newest_first, output_format=output_format)

    assert ids() == ["r3", "r2", "r0"]
    assert ids("") == ["r3", "r2", "r1", "r0"]
    assert ids("carol") == []
    assert ids(limit=2) == ["r3", "r2"]
    assert ids(after="r3") == ["r2", "r0"]
    assert ids(after="r0", newest_first=False) == ["r2", "r3"]
    assert ids(output_format="mp4") == ["r3", "r0"]
    assert ids(output_format="mp4", after="r3", limit=1) == ["r0"], "what is between them does not count"
    journal.close()


# Rows of a request in flight, every field with a value of its own, as they were written before words and
# folders were renamed. The fields on disk keep their names: where this fails, an upgrade loses accepted requests.
OLD_REQUEST = (
    b"\x98\x88\xa6prompt\xa2\xc3\xa4\xa6height@\xaeguidance_scale\xcb@\x0c\x00\x00\x00\x00\x00\x00\xa5image\x92\xa8Pictures"
    b"\x91\x93\xa5a.png\x08@\xa6sigmas\x92\xa7Numbers\x92\xcb?\xf0\x00\x00\x00\x00\x00\x00\xcb?\xe0\x00\x00\x00\x00\x00\x00"
    b"\xa7options\x92\xa7Options\x82\xa1a\x01\xa1b\x92\x01\xcb?\xe0\x00\x00\x00\x00\x00\x00\xafnegative_prompt"
    b'\x92\xa4Json\xac["x", ["y"]]'
    b"\xa7latents\x93\xa7Tensors\x93\xadb.safetensors\t\x00\x91\xa7latents\xa3png\xcb@X\xc0\x00\x00\x00\x00\x00\xa6digest"
    b"\xcb@8\x00\x00\x00\x00\x00\x00Z\x83\xa4path\xa9/models/m\xa5index\xa5index\xa7content\xa7content\xa1m"
)
OLD_UNITS = (
    b"\xde\x00\x18\xa2id\xa5old/0\xaarequest_id\xa3old\xa5index\x00\xa4seed\xcf@\x00\x00\x00\x00\x00\x00\x00\xa6left_s\xcb@X\xe0"
    b"\x00\x00\x00\x00\x00\xa5state\xb1DENOISING_RUNNING\xa7stage_s\xcb?\xf8\x00\x00\x00\x00\x00\x00\xa7attempt\x02\xa7history\x92"
    b"\x93\xafENCODER_WAITING\xcb@\x00\x00\x00\x00\x00\x00\x00\xa0\x93\xb1DENOISING_RUNNING\xcb@\x10\x00\x00\x00\x00\x00\x00"
    b"\xa5again\xa6staged\x81\xa7encoder\x94\x95\xa4pool\x03\x04\xcd\x10\x00@\xc4\t\x00manifest\xcf\xff\xff\xff\xff\xff\xff\xff\xff<"
    b"\xa8instance\xaadenoiser-0\xa9instances\x82\xa7encoder\xa9encoder-0\xa8denoiser\xaadenoiser-0\xadstage_seconds"
    b"\x81\xa7encoder"
    b"\xcb?\xd0\x00\x00\x00\x00\x00\x00\xa6causes\x91\xbddenoiser-1: its process ended\xa8failures\x01"
    b"\xaetransfers_lost\x02"
    b"\xa6deaths\x01\xa6stalls\x03\xa4step\x04\xabtotal_steps\x14\xa8artifact\xc0\xa7borrows\xc3\xa5model\xa7weights\xa8at_fault\xc2",
    b"\xde\x00\x18\xa2id\xa5old/1\xaarequest_id\xa3old\xa5index\x01\xa4seed\xcf@\x00\x00\x00\x00\x00\x00\x01\xa6left_s\xcb@X\xa0"
    b"\x00\x00\x00\x00\x00\xa5state\xa6FAILED\xa7stage_s\xcb?\xe0\x00\x00\x00\x00\x00\x00\xa7attempt\x01\xa7history\x91\x93"
    b"\xa6FAILED\xcb@\x14\x00\x00\x00\x00\x00\x00\xa3why\xa6staged\x80\xa8instance\xa0\xa9instances\x80\xadstage_seconds\x80\xa6causes"
    b"\x90\xa8failures\x00\xaetransfers_lost\x00\xa6deaths\x00\xa6stalls\x00\xa4step\x00\xabtotal_steps\x00\xa8artifact\x94"
    b"\xa9old_1.png\xa9image/png\x03\xc2\xa7borrows\xc2\xa5model\xa0\xa8at_fault\xc3",
)


def test_a_request_in_flight_that_an_earlier_version_wrote_comes_back_with_every_field(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    Journal(path).close()
    with sqlite3.connect(path) as db:
        columns = "id, idempotency_key, created_at, finished_at, body, owner"
        row = ("old", "alice/k", 1.0, 0.0, OLD_REQUEST, "alice")
        db.execute(f"INSERT INTO requests ({columns}) VALUES (?, ?, ?, ?, ?, ?)", row)
        db.executemany("INSERT INTO units VALUES (?, 'old', ?)", [(f"old/{k}", row) for k, row in enumerate(OLD_UNITS)])
    journal = Journal(path)
    (found,) = journal.active()
    jobs = [
        Job(
            id="old/0",
            request_id="old",
            index=0,
            seed=2**62,
            expires_at=99.5,
            state=State.DENOISING_RUNNING,
            entered_at=-1.5,
            attempt=2,
            history=[Transition("ENCODER_WAITING", 2.0), Transition("DENOISING_RUNNING", 4.0, "again")],
            stored=StoredOutput(
                Stage.ENCODER, StoredPayload(LeaseRef("pool", 3, 4, 4096, 64), b"\x00manifest", 2**64 - 1, 60)
            ),
            instance="denoiser-0",
            instances={"encoder": "encoder-0", "denoiser": "denoiser-0"},
            stage_seconds={"encoder": 0.25},
            causes=["denoiser-1: its process ended"],
            failures=1,
            transfers_lost=2,
            deaths=1,
            stalls=3,
            step=4,
            total_steps=20,
            uses_cached_prompt=True,
            model="weights",
        ),
        Job(
            id="old/1",
            request_id="old",
            index=1,
            seed=2**62 + 1,
            expires_at=98.5,
            state=State.FAILED,
            entered_at=-0.5,
            attempt=1,
            history=[Transition("FAILED", 5.0, "why")],
            artifact=Artifact("old_1.png", "image/png", 3, nsfw_content_detected=False),
            invalid_request=True,
        ),
    ]
    inputs = {
        "prompt": "ä",
        "height": 64,
        "guidance_scale": 3.5,
        "image": Images((Upload("a.png", 8, 64),)),
        "sigmas": Numbers((1.0, 0.5)),
        "options": Options({"a": 1, "b": (1, 0.5)}),
        "negative_prompt": Json('["x", ["y"]]'),
        "latents": Tensors(Upload("b.safetensors", 9), ("latents",)),
    }
    served = ModelIdentity("/models/m", "index", "content")
    output = Output("png", 24.0, 90)
    assert found == Request(
        "old", inputs, output, 1.0, 99.0, jobs, "alice/k", "digest", 0.0, "alice", served=served, model="m"
    )
    assert journal.damaged == 0
    journal.save([found], found.jobs)  # and that version can read what is written today
    journal.close()
    with sqlite3.connect(path) as db:
        written = [msgspec.msgpack.decode(body) for (body,) in db.execute("SELECT body FROM units ORDER BY id")]
    new = {"bucket": 0, "previews": [], "checkpoint": None, "resumed_from": 0, "steps_lost_at": 0, "steps_redone": 0}
    new |= {"parked": 0, "shared_deaths": 0, "runs": [], "moves_left_out": 0}
    assert [row | new for row in map(msgspec.msgpack.decode, OLD_UNITS)] == written


def test_a_job_that_an_earlier_version_wrote_shares_no_outputs_and_has_time_left() -> None:
    fields = msgspec.msgpack.decode(encode_job(a_request().jobs[0]))
    del fields["borrows"], fields["left_s"]
    fields["deadline"] = 1e9
    job = decode_job(msgspec.msgpack.encode(fields))
    assert not job.uses_cached_prompt
    assert job.left_s == 600.0


def ended(journal: Journal, id_: str, at: float, **fields: str) -> Request:
    request = a_request(id_, **fields)  # type: ignore[arg-type]
    journal.accept(request)
    request.finished_at = at
    request.jobs[0].artifact = Artifact(f"{id_}_0.png", "image/png", 3)
    journal.save([request], request.jobs)
    return request


def test_ended_requests_are_found_by_id_and_key_and_not_among_the_active(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite")
    done = ended(journal, "done", 10.0, key="k")
    journal.accept(active := a_request("active"))
    assert journal.active() == [active]
    assert journal.find("done") == journal.find_key("k") == done
    assert journal.find("active") == active
    assert journal.find("none") is journal.find_key("none") is None


@pytest.mark.parametrize(
    ("bounds", "left"),
    [
        (StoreBounds(1000.0, 1000, 1 << 30), {f"r{k}" for k in range(20, 150)}),
        (StoreBounds(1e9, 60, 1 << 30), {f"r{k}" for k in range(90, 150)}),
        (StoreBounds(1e9, 1000, 1), set()),
    ],
    ids=["age", "count", "bytes"],
)
def test_the_oldest_go_in_small_batches_and_the_file_shrinks(
    tmp_path: Path, bounds: StoreBounds, left: set[str]
) -> None:
    journal = Journal(path := tmp_path / "j.sqlite")
    for k in range(150):
        ended(journal, f"r{k}", 1000.0 + k * 10.0)
    active = a_request("active")
    active.inputs["prompt"] = "x" * 600_000
    journal.accept(active)
    journal.save([active], [])
    journal.delete("active")
    journal.accept(a_request("active"))
    gone, awaited = prune(path, bounds, now=2200.0)
    assert gone == 150 - len(left)
    assert {f"r{k}" for k in range(150) if journal.find(f"r{k}")} == left
    assert awaited == {"active", *(f"r{k}" for k in range(115, 150))} & ({"active"} | left)
    assert [request.id for request in journal.active()] == ["active"]
    assert path.stat().st_size < 600_000


def test_a_damaged_request_is_set_aside_and_the_rest_is_served(tmp_path: Path) -> None:
    path, damage = tmp_path / "j.sqlite", list[str]()
    journal = Journal(path)
    for id_ in ("text", "short", "unitless", "fine"):
        journal.accept(a_request(id_, key=f"key of {id_}"))
    done = ended(journal, "done", 10.0, key="key of done")
    journal.close()
    with sqlite3.connect(path) as db:
        (body,) = db.execute("SELECT body FROM units WHERE id = 'text/1'").fetchone()
        db.execute("UPDATE units SET body = ? WHERE id = 'text/1'", (body.replace(b"PENDING", b"P\xffNDING"),))
        db.execute("UPDATE requests SET body = X'93' WHERE id = 'short'")
        db.execute("DELETE FROM units WHERE request_id = 'unitless'")
        db.execute("UPDATE requests SET body = CAST(X'ff' AS TEXT) WHERE id = 'done'")
    journal = Journal(path, damage.append)
    assert [request.id for request in journal.active()] == ["fine"]
    assert journal.find("done") is None
    assert journal.damaged == len(damage) == 4
    assert all("cannot be read" in complaint and "`damaged`" in complaint for complaint in damage)
    assert journal.is_quarantined("done")
    assert not journal.is_quarantined("fine")
    journal.accept(a_request("new", key=done.idempotency_key))
    journal.close()
    assert Journal(path).damaged == 4
    with sqlite3.connect(path) as db:
        kept = db.execute(
            "SELECT unit_id, body FROM damaged WHERE request_id = X'74657874' ORDER BY unit_id"
        ).fetchall()
    assert [job for job, _ in kept] == [None, b"text/0", b"text/1"]
    assert b"P\xffNDING" in kept[2][1]


def test_a_journal_of_the_version_before_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    journal = Journal(path)
    request = ended(journal, "r", 10.0, key="k")
    journal.close()
    with sqlite3.connect(path) as db:
        db.executescript(
            "DROP TABLE damaged; DROP INDEX by_owner; DROP INDEX by_age; ALTER TABLE requests DROP COLUMN owner; "
            "DROP INDEX by_format; ALTER TABLE requests DROP COLUMN output_format; DROP TABLE webhooks; "
            "PRAGMA user_version=1; PRAGMA auto_vacuum=NONE;"
        )
        db.execute("VACUUM")
    journal = Journal(path)
    assert journal.find_key("k") == request
    for output_format, found in (("png", ["r"]), ("mp4", [])):
        assert journal.ids("", after=None, limit=9, newest_first=True, output_format=output_format) == found
    assert journal.damaged == 0
    (mode,) = journal._db.execute("PRAGMA auto_vacuum").fetchone()
    assert mode == 2


def test_an_accept_is_on_the_disk_when_the_process_is_killed_right_after(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from triptych.roles.head.journal import Journal;"
        "from tests.roles.head.test_journal import a_request;"
        "Journal(Path(sys.argv[1])).accept(a_request()); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[3]
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "j.sqlite")], cwd=root, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert [r.id for r in Journal(tmp_path / "j.sqlite").active()] == ["r1"]


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
        with pytest.raises(JournalError, match=r"is damaged .*move it away"):
            Journal(path)
    else:
        Journal(path).accept(a_request())


def test_a_full_disk_is_an_error_and_the_journal_goes_on_once_there_is_space(tmp_path: Path) -> None:
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
    assert {r.id for r in journal.active()} == {"first", "second"}


def test_the_same_key_cannot_be_accepted_twice(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite")
    journal.accept(a_request("a", key="k"))
    with pytest.raises(JournalError):
        journal.accept(a_request("b", key="k"))


def test_webhooks_that_are_due_are_found_by_an_index_without_those_of_active_requests(tmp_path: Path) -> None:
    journal = Journal(path := tmp_path / "j.sqlite")
    for id_ in ("active", "new", "tried"):
        request = a_request(id_)
        request.webhook_url = "https://a/"
        journal.accept(request)
        if id_ != "active":
            request.finished_at = 10.0
            journal.save([request], [])
    journal.retry_webhook("tried", 1, 77.0)
    journal.save([request], [])  # a second time, after an attempt
    due = [PendingWebhook("new", "", 0, 10.0, 0.0), PendingWebhook("tried", "", 1, 10.0, 77.0)]
    assert journal.webhooks(9) == due
    asked: list[str] = []
    journal._db.set_trace_callback(asked.append)
    journal.webhooks(9)
    journal._db.set_trace_callback(None)
    plan = b"; ".join(row[-1] for row in journal._db.execute(f"EXPLAIN QUERY PLAN {asked[-1]}"))
    assert b"SEARCH w USING INDEX webhooks_due" in plan
    assert b"SCAN" not in plan
    assert b"TEMP B-TREE" not in plan
    journal.close()
    with sqlite3.connect(path) as db:  # as an earlier version wrote them
        db.executescript(
            "DROP INDEX webhooks_due; UPDATE webhooks SET next_at = 0 WHERE attempts = 0; PRAGMA user_version=5;"
        )
    journal = Journal(path)
    assert journal.webhooks(9) == due
    assert journal.webhook("active") is None
    (active,) = journal.active()
    active.finished_at = 99.0
    journal.save([active], [])
    assert journal.webhook("active") == PendingWebhook("active", "", 0, 99.0, 0.0)


def test_after_a_sync_has_failed_only_a_journal_that_is_opened_anew_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path := tmp_path / "j.sqlite")
    fail_the_next_sync(monkeypatch)
    journal.accept(a_request())
    for _ in range(2):
        with pytest.raises(JournalError, match=r"cannot be put on the disk .*Input/output error"):
            journal.sync()
    log = Path(f"{path}-wal")
    assert log.stat().st_size
    again = Journal(path)
    assert not log.stat().st_size, "all that was in it is in the file, which is synced"
    again.sync()
    assert [request.id for request in again.active()] == ["r1"]
