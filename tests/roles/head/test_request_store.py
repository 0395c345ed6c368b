"""Requests in the journal: durable before they are answered, resumed after a restart, listed and deleted."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import pytest

from tests.roles.head.head_harness import (
    BOUND_S,
    PNG,
    SIGNATURE,
    HeadHarness,
    Pool,
    fail_the_next_sync,
    run_scenario,
    running_head,
    stored,
)
from triptych.actors import ActorCrashedError, AddressBook, Topology, load_topology
from triptych.actors.runtime.actor import current_sender
from triptych.actors.runtime.system_messages import (
    Inspect,
    Inspection,
)
from triptych.bus import BusError, Outbox, RemoteError, Sender
from triptych.engines.parameters.lora import PARAMETERS
from triptych.engines.parameters.schema import Parameter, ParameterKind, Signature
from triptych.engines.stages import Stage
from triptych.roles.head.effect_runner import EffectRunner
from triptych.roles.head.job import Job, Request
from triptych.roles.head.journal import Journal, JournalError, decode_job, encode_job
from triptych.roles.media.artifacts import ARTIFACTS, ArtifactStore
from triptych.roles.media.files import LocalFiles
from triptych.roles.media.uploads import UPLOADS, UploadStore
from triptych.roles.messages import requests, stages
from triptych.roles.messages.common import (
    Attempt,
    Images,
)


def test_a_client_is_answered_when_the_journal_is_on_the_disk(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    syncing, go_on, sync = threading.Event(), threading.Event(), Journal.sync

    def held(journal: Journal) -> None:
        syncing.set()
        assert go_on.wait(BOUND_S)
        sync(journal)

    async def scenario() -> None:
        async with running_head(topology()) as harness:

            def cancel() -> Coroutine[Any, Any, requests.RequestView]:
                return harness.head.ask(requests.CancelRequest("r"), requests.RequestView, timeout_s=BOUND_S)

            def wait() -> Coroutine[Any, Any, requests.RequestView]:
                return harness.head.ask(requests.WaitRequest("r", BOUND_S), requests.RequestView, timeout_s=BOUND_S)

            monkeypatch.setattr(Journal, "sync", held)
            for promises in ([harness.submit], [wait, cancel, harness.view]):
                syncing.clear()
                go_on.clear()
                asked = [asyncio.create_task(promise()) for promise in promises]
                assert await asyncio.to_thread(syncing.wait, BOUND_S)
                # The head goes on meanwhile.
                await harness.head.ask(requests.DescribeModel(), requests.ModelDescription, timeout_s=BOUND_S)
                assert not any(task.done() for task in asked)
                go_on.set()
                answers = await asyncio.gather(*asked)
            assert {answer.state for answer in answers} == {"CANCELLED"}

    run_scenario(scenario())


def test_a_head_that_cannot_write_accepts_nothing_reports_no_end_and_recovers_by_itself(
    topology: Callable[..., Topology],
) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            journal = harness.topology.state_dir / "journal.sqlite"

            async def unwritten() -> bool:
                cluster = await harness.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
                return any(str(journal) in reason for reason in cluster.reasons)

            async def cancel() -> requests.RequestView:
                return await harness.head.ask(requests.CancelRequest("r"), requests.RequestView, timeout_s=BOUND_S)

            await harness.submit()
            for idle in (True, False):
                with sqlite3.connect(journal) as other:
                    other.execute("ALTER TABLE units RENAME TO elsewhere")
                if idle:
                    rejected = await harness.submit("late")
                    assert rejected.code == "unavailable"
                    assert str(journal) in rejected.message
                else:
                    for ask in (cancel, harness.view):
                        with pytest.raises(RemoteError, match="r has ended, but that is not on the disk") as refused:
                            await ask()
                        assert refused.value.code == "unavailable"
                assert await unwritten()
                with sqlite3.connect(journal) as other:
                    other.execute("ALTER TABLE elsewhere RENAME TO units")
                async with asyncio.timeout(BOUND_S):
                    while await unwritten():
                        pass
            assert (await harness.view()).state == "CANCELLED"

    run_scenario(scenario())


def test_a_report_is_acknowledged_once_it_is_in_the_journal(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            encoded = await harness.first_attempt()
            report = stored(encoded, Stage.ENCODER, 1)
            with sqlite3.connect(harness.topology.state_dir / "journal.sqlite") as other:
                other.execute("ALTER TABLE units RENAME TO elsewhere")
            reporting = asyncio.create_task(harness.report(report))
            while not harness.actor.requests.journal_problem:
                await harness.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
            assert not reporting.done()
            with sqlite3.connect(harness.topology.state_dir / "journal.sqlite") as other:
                other.execute("ALTER TABLE elsewhere RENAME TO units")
            await reporting

    run_scenario(scenario())


def test_a_head_whose_disk_has_lost_what_was_written_promises_nothing_and_ends(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        with pytest.raises(ActorCrashedError, match="the head opens it anew"):  # noqa: PT012  it ends meanwhile
            async with running_head(topology()) as harness:
                fail_the_next_sync(monkeypatch)
                assert (await harness.submit()).code == "unavailable"
                with pytest.raises(ActorCrashedError):
                    await asyncio.wait_for(harness.ended(), BOUND_S)
        async with running_head(topology(), generation=2) as harness:
            assert (await harness.view()).state == "CANCELLED"

    run_scenario(scenario())


def test_a_large_journal_is_read_while_the_head_lives_and_old_keys_count_at_once(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on, active = threading.Event(), threading.Event(), Journal.active

    def held(journal: Journal) -> list[Request]:
        reading.set()
        assert go_on.wait(BOUND_S)
        return active(journal)

    async def scenario() -> None:
        async with running_head(topology()) as harness:
            await harness.submit(key="k")
            await harness.head.ask(requests.CancelRequest("r"), requests.RequestView, timeout_s=BOUND_S)
        with sqlite3.connect(harness.topology.state_dir / "journal.sqlite") as db:
            db.execute("UPDATE requests SET finished_at = 1.0")  # so long ago that it is the first to be pruned
        monkeypatch.setattr("triptych.roles.head.request_store.prune", lambda *_, **__: (0, set()))
        monkeypatch.setattr(Journal, "active", held)
        second = asyncio.create_task(after_the_start())
        assert await asyncio.to_thread(reading.wait, BOUND_S)
        outbox = Outbox("asker", options=AddressBook(harness.topology).socket_options)
        head = outbox.reference("head", AddressBook(harness.topology).address("head"))
        assert (await head.ask(Inspect(), Inspection, timeout_s=BOUND_S)).actors[0].state == "loading"
        outbox.close()
        go_on.set()
        await second

    async def after_the_start() -> None:
        async with running_head(topology(), generation=2) as harness:
            assert (await harness.submit("again", key="k")).request_id == "r"
            assert (await harness.submit("again", key="k", height=64)).code == "conflict"

    run_scenario(scenario())


def test_a_restarted_head_repeats_what_no_instance_runs(
    topology: Callable[..., Topology],
) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            await harness.register("encoder-0")
            await harness.submit("kept", prompt="a")
            await harness.submit("lost", prompt="b")
            attempts = [await harness.next_attempt("encoder-0"), await harness.next_attempt("encoder-0")]
            kept = next(attempt for attempt in attempts if attempt.job_id == "kept/0")
            await harness.report(stages.StageStarted(kept, "encoder"))
        async with running_head(topology(), generation=2) as harness:
            assert {(await harness.view(id_)).state for id_ in ("kept", "lost")} == {
                "ENCODER_RUNNING",
                "ENCODER_WAITING",
            }
            welcome = await harness.register("encoder-0", running=(kept, Attempt("other/0", 1)))
            assert welcome.unknown == (Attempt("other/0", 1),)
            await harness.report(stages.StageCancelled(Attempt("other/0", 1), 3), "encoder-0", 2)
            assert await harness.next_attempt("encoder-0") == Attempt("lost/0", 2)
            await harness.report(stored(kept, "encoder", 1), generation=2)
            assert (await harness.view("kept")).state == "DENOISING_WAITING"

    run_scenario(scenario())


def test_after_a_change_of_the_topology_pending_requests_are_repeated_or_fail_with_a_sentence(
    topology: Callable[..., Topology],
) -> None:
    """Other pools, other names, an adapter less; one request is past its time, and held by nobody known any more."""
    lora = '[[model.lora]]\nname = "ink"\npath = "x"\n'
    inks = Signature(tuple(sorted((*SIGNATURE.parameters, *PARAMETERS), key=lambda parameter: parameter.name)))

    async def scenario() -> None:
        async with running_head(topology(lora=lora, supervision="")) as harness:
            for name in harness.workers:
                await harness.register(name, signature=inks)
            await harness.submit("kept")
            attempt = await harness.next_attempt("encoder-0")
            await harness.report(stored(attempt, "encoder", 1))
            await harness.next_attempt("denoiser-0")
            await harness.submit("inked", lora="ink")
            await harness.submit("late")
        path = harness.topology.path
        text = path.read_text().replace(lora, "").replace('kind = "denoiser"', 'kind = "denoiser"\nname = "big"')
        path.write_text(text + '[transfer]\nengine = "mooncake"\ntrusted_network = true\n')
        with sqlite3.connect(harness.topology.state_dir / "journal.sqlite") as db:
            (body,) = db.execute("SELECT body FROM units WHERE id = 'late/0'").fetchone()
            job = decode_job(body)
            job.expires_at, job.instance = 0.0, "gone-0"
            db.execute("UPDATE units SET body = ? WHERE id = 'late/0'", (encode_job(job),))
        async with running_head(load_topology(path), generation=2, pool=Pool("pool-encoder")) as harness:
            view = await harness.view("inked")
            assert view.state == "FAILED"
            assert "it has no adapters" in view.units[0].history[-1].reason
            kept = await harness.view("kept")
            assert (kept.state, kept.units[0].causes) == ("ENCODER_WAITING", ("the topology has changed",))
            waited = await harness.head.ask(
                requests.WaitRequest("late", BOUND_S), requests.RequestView, timeout_s=BOUND_S
            )
            assert waited.state == "TIMED_OUT"
            await harness.register("encoder-0")
            assert await harness.next_attempt("encoder-0") == Attempt("kept/0", 2)
            await harness.report(stored(Attempt("kept/0", 2), "encoder", 7))  # in a pool that is not there
            await harness.head.ask(requests.CancelRequest("kept"), requests.RequestView, timeout_s=BOUND_S)
            with pytest.raises(RemoteError, match="denoiser-0 is no component of this topology"):
                await harness.register("denoiser-0")

    run_scenario(scenario())


def test_a_request_accepted_for_another_model_fails_with_a_sentence_and_an_ended_one_stays(
    topology: Callable[..., Topology],
) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            await harness.submit("done")
            await harness.head.ask(requests.CancelRequest("done"), requests.RequestView, timeout_s=BOUND_S)
            await harness.submit("waiting", n=2)
        serving_config = topology().models[0].path / "triptych.json"
        serving_config.write_text(serving_config.read_text().replace('"height": 96', '"height": 128'))
        async with running_head(topology(), generation=2) as harness:
            assert (await harness.view("waiting")).state == "ENCODER_WAITING", "other defaults are no other model"
        (topology().models[0].path / "model_index.json").write_text(
            '{"_class_name": "FluxPipeline", "vae": ["a", "b"]}'
        )
        for generation in (3, 4):
            async with running_head(topology(), generation=generation) as harness:
                waiting = await harness.view("waiting")
                assert waiting.state == "FAILED"
                assert all("accepted for another model" in job.history[-1].reason for job in waiting.units)
                assert (await harness.view("done")).state == "CANCELLED"
                await harness.register("encoder-0")
                if generation == 3:
                    await harness.submit("new")
                assert (await harness.next_attempt("encoder-0")).job_id == "new/0"

    run_scenario(scenario())


def test_a_request_is_found_by_its_owner_alone_also_after_a_restart(topology: Callable[..., Topology]) -> None:
    async def ask(harness: HeadHarness, message: Any) -> Any:
        return await harness.head.ask(message, requests.RequestView, timeout_s=BOUND_S)

    async def scenario() -> None:
        async with running_head(topology()) as harness:
            assert (await harness.submit("a", key="k", owner="alice")).request_id == "a"
            assert (await harness.submit("b", key="k", owner="bob")).request_id == "b"
        async with running_head(topology(), generation=2) as harness:
            assert (await harness.submit("c", key="k", owner="alice")).request_id == "a"
            for kind in (requests.QueryRequest, requests.CancelRequest):
                with pytest.raises(RemoteError, match="there is no request a"):
                    await ask(harness, kind("a", owner="bob"))
            with pytest.raises(RemoteError, match="there is no request a"):
                await ask(harness, requests.WaitRequest("a", 0.0, "bob"))
            assert (await ask(harness, requests.CancelRequest("a", owner="alice"))).state == "CANCELLED"
            for owner, existed in (("bob", False), ("alice", True)):
                message = requests.DeleteRequest("a", owner)
                answer = await harness.head.ask(message, requests.RequestDeleted, timeout_s=BOUND_S)
                assert answer.existed is existed
            assert (await harness.view("b")).state == "ENCODER_WAITING", "who names no owner sees all"

    run_scenario(scenario())


def test_requests_are_listed_by_owner_and_page(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            for id_, owner in (("a", "alice"), ("b", "bob"), ("c", "alice"), ("d", "alice")):
                await harness.submit(id_, owner=owner)
            # An ended one is listed with the others.
            await harness.head.ask(requests.CancelRequest("c"), requests.RequestView, timeout_s=BOUND_S)

            async def listed(owner: str = "alice", **query: Any) -> tuple[tuple[str, ...], bool]:
                message = requests.ListRequests(owner, **query)
                found = await harness.head.ask(message, requests.RequestList, timeout_s=BOUND_S)
                return found.request_ids, found.has_more

            assert await listed() == (("d", "c", "a"), False)
            assert await listed("") == (("d", "c", "b", "a"), False)
            assert await listed("carol") == ((), False)
            assert await listed(limit=2) == (("d", "c"), True)
            assert await listed(active=True) == (("d", "a"), False)
            assert await listed("", active=False) == (("c",), False)
            assert await listed(after="c") == (("a",), False)
            assert await listed(after="a", newest_first=False) == (("c", "d"), False)
            with pytest.raises(RemoteError, match="there is no request b"):
                await listed(after="b")

    run_scenario(scenario())


def test_a_deleted_request_leaves_nothing_behind(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            artifacts = ArtifactStore(LocalFiles(harness.topology.state_dir / ARTIFACTS))
            uploads = UploadStore(LocalFiles(harness.topology.state_dir / UPLOADS))
            own, shared = uploads.save(b"own", "png"), uploads.save(b"shared", "png")

            async def delete(id_: str) -> bool:
                answer = await harness.head.ask(requests.DeleteRequest(id_), requests.RequestDeleted, timeout_s=BOUND_S)
                return answer.existed

            images = Parameter("image", ParameterKind.IMAGES)
            await harness.register("encoder-0", signature=Signature((images, *SIGNATURE.parameters)))
            await harness.submit("r", key="k", image=Images((own, shared)))
            await harness.submit("other", image=Images((shared,)))
            attempt = await harness.next_attempt("encoder-0")
            artifacts.save("r/0", "png", b"image")
            artifacts.save("other/0", "png", b"image")
            assert await delete("r"), "an active one is cancelled first"
            assert await asyncio.wait_for(harness.workers["encoder-0"].cancelled.get(), BOUND_S) == attempt
            artifacts.save("r/0", "png", b"image")  # by an instance that was about to write it
            await harness.report(stages.StageCancelled(attempt, 3), "encoder-0")
            async with asyncio.timeout(BOUND_S):
                while artifacts.path("r_0.png").exists():  # noqa: ASYNC110  a file tells nobody that it goes
                    await asyncio.sleep(0)
            assert sorted(path.name for path in artifacts.files.folder.iterdir()) == ["other_0.png"]
            assert [path.name for path in uploads.files.folder.iterdir()] == [shared.name]
            with pytest.raises(RemoteError, match="there is no request r"):
                await harness.view("r")
            assert not await delete("r")
            assert (await harness.submit("again", key="k")).request_id == "again"
        async with running_head(topology(), generation=2) as harness:
            with pytest.raises(RemoteError, match="there is no request r"):
                await harness.view("r")

    run_scenario(scenario())


def test_what_comes_together_is_accepted_in_one_transaction_and_refused_together(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[list[str]] = []
    accept = Journal.accept
    broken = JournalError("the disk is full")

    def counted(journal: Journal, *accepted: Request) -> None:
        written.append([request.id for request in accepted])
        if "r3" in written[-1]:
            raise broken
        accept(journal, *accepted)

    async def scenario() -> None:
        async with running_head(topology()) as harness:
            monkeypatch.setattr(Journal, "accept", counted)
            await harness.register("encoder-0")

            async def submit_together(*ids: str) -> list[Any]:
                messages = [requests.SubmitRequest(id_, {"prompt": "x"}, 7, 1, PNG, f"key {id_[0]}") for id_ in ids]
                replies = [await harness.actor.submit(message) for message in messages]
                harness.actor.caught_up()
                return await asyncio.gather(*(reply.coroutine for reply in replies))

            answers = await submit_together("a1", "b1", "a1", "a2")
            assert written == [["a1", "b1"]]
            assert [answer.request_id for answer in answers] == ["a1", "b1", "a1", "a1"], "the same keys"
            assert (await harness.view("b1")).state == "ENCODER_WAITING"
            refused = await submit_together("r3", "c1")
            assert [answer.code for answer in refused] == ["unavailable", "unavailable"]
            assert list(harness.actor.models.requests) == ["a1", "b1"]

    run_scenario(scenario())


def test_reports_that_come_together_are_written_in_one_transaction(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    save = Journal.save

    def counted(journal: Journal, changed: Iterable[Request], jobs: Iterable[Job]) -> None:
        written.append(len(saved := list(jobs)))
        save(journal, changed, saved)

    async def scenario() -> None:
        async with running_head(topology()) as harness:
            await harness.register("encoder-0")
            for id_ in ("a", "b"):
                await harness.submit(id_, prompt=id_)
            attempts = [await harness.next_attempt("encoder-0") for _ in range(2)]
            monkeypatch.setattr(Journal, "save", counted)
            current_sender.set(Sender("encoder-0", 1))
            reports = [stored(attempt, Stage.ENCODER, number) for number, attempt in enumerate(attempts, start=1)]
            replies = [await harness.actor.stage_outputs_stored(report) for report in reports]
            assert written == []
            harness.actor.caught_up()
            assert len(await asyncio.gather(*(reply.coroutine for reply in replies))) == 2
            assert written == [2]

    run_scenario(scenario())


def test_who_asks_for_a_request_while_its_end_is_written_is_told_the_end(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            attempt = await harness.first_attempt()
            current_sender.set(Sender("encoder-0", 1))
            report = await harness.actor.stage_failed(stages.StageFailed(attempt, Stage.ENCODER, "no", False, 3))
            asked = asyncio.create_task((await harness.actor.query(requests.QueryRequest("r"))).coroutine)
            harness.actor.caught_up()
            assert (await asked).state == "FAILED"
            await report.coroutine

    run_scenario(scenario())


def test_an_assignment_is_sent_before_it_is_written_and_a_head_that_does_not_know_it_has_it_dropped(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    ask = EffectRunner._ask

    def asked(runner: EffectRunner, scheduler: Any, instance: str, *what: Any) -> Any:
        done.append(instance)
        return ask(runner, scheduler, instance, *what)

    def unwritten(*_: Any) -> None:
        done.append("journal")
        raise JournalError("the disk is full")

    async def scenario() -> None:
        with monkeypatch.context() as patches:
            async with running_head(topology()) as harness:
                attempt = await harness.first_attempt()
                await harness.register("denoiser-0")
                patches.setattr(EffectRunner, "_ask", asked)
                patches.setattr(Journal, "save", unwritten)
                report = asyncio.create_task(harness.report(stored(attempt, "encoder", 1)))
                assert await harness.next_attempt("denoiser-0") == attempt
                assert done[:2] == ["denoiser-0", "journal"]
        assert isinstance((await asyncio.gather(report, return_exceptions=True))[0], BusError)
        async with running_head(topology(), generation=2) as harness:
            assert (await harness.register("denoiser-0", generation=2, running=(attempt,))).unknown == (attempt,)
            assert (await harness.register("encoder-0", generation=2, running=(attempt,))).unknown == ()
            await harness.report(stored(attempt, "encoder", 1), generation=2)
            assert await harness.next_attempt("denoiser-0") == attempt

    run_scenario(scenario())


def test_who_follows_a_request_is_told_its_inputs_and_runs_when_it_has_ended(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:

            async def wait(revision: str, timeout_s: float = BOUND_S) -> requests.RequestView:
                message = requests.WaitRequest("r", timeout_s, revision=revision)
                return await harness.head.ask(message, requests.RequestView, timeout_s=2 * BOUND_S)

            attempt = await harness.first_attempt()
            before = await harness.view()
            changed, _ = await asyncio.gather(
                wait(before.revision), harness.report(stages.StageStarted(attempt, "encoder"), "encoder-0")
            )
            assert (changed.state, changed.inputs, changed.units[0].runs) == ("ENCODER_RUNNING", {}, ())
            assert len(changed.units[0].history) == len(before.units[0].history) + 1
            whole = await wait("", 0.0)
            assert (whole.inputs, len(whole.units[0].runs)) == (before.inputs, 1)
            await harness.head.ask(requests.CancelRequest("r"), requests.RequestView, timeout_s=BOUND_S)
            assert (await wait(whole.revision)).inputs == before.inputs

    run_scenario(scenario())
