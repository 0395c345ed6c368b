"""The head as an actor: a real bus, a real journal, and instances that a test scripts."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from triptych.actors import Actor, AddressBook, Incarnation, Topology, load_topology
from triptych.actors.runtime.bus_keys import make_bus_keys
from triptych.actors.runtime.runtime import Runtime
from triptych.actors.runtime.system_messages import (
    ChildReport,
    Inspect,
    Inspection,
    SupervisorQuery,
    SupervisorReport,
)
from triptych.bus import Outbox, Reference, RefusedError, RemoteError
from triptych.engines.parameters.lora import PARAMETERS
from triptych.engines.parameters.schema import Parameter, ParameterKind, Signature
from triptych.engines.parameters.validation import ParameterError
from triptych.roles.head import effect_runner, monitor
from triptych.roles.head.admission import limits_of, make_request, seeds_of
from triptych.roles.head.head import TICK_S, Head
from triptych.roles.head.job import Request
from triptych.roles.head.journal import Journal, decode_job, encode_job
from triptych.roles.media.artifacts import ARTIFACTS, ArtifactStore
from triptych.roles.media.uploads import UPLOADS, UploadStore
from triptych.roles.messages import pool as pools
from triptych.roles.messages import requests, stages
from triptych.roles.messages.common import (
    MAX_SEED,
    Artifact,
    Attempt,
    Images,
    LeaseRef,
    Numbers,
    Output,
    StoredPayload,
    Upload,
)
from triptych.roles.messages.weights import Reloading, ReloadModel

BOUND_S = 10.0

PNG = Output("png")
SIGNATURE = Signature(
    (
        Parameter("height", ParameterKind.INTEGER, 512),
        Parameter("mask_image", ParameterKind.IMAGE),
        Parameter("prompt", ParameterKind.TEXT, required=True),
        Parameter("sigmas", ParameterKind.NUMBERS),
    ),
    encodes=("prompt",),
)
IMAGE = Upload("a.png", 8)


class Pool(Actor):
    """Answers for the pool: nothing is ever stored in it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.refuses = 0
        self.silent = False
        self.asked_for_leases = asyncio.Event()
        self.held: tuple[pools.LeaseView, ...] = ()
        self.released: asyncio.Queue[tuple[LeaseRef, ...]] = asyncio.Queue()

    async def describe(self, _: pools.PoolQuery) -> pools.PoolDescription:
        if self.refuses:
            self.refuses -= 1
            raise RefusedError("not_ready", "it opens")
        return pools.PoolDescription(self.name, 1, 64, 64, 0, "", 0, "none")

    async def leases(self, _: pools.LeaseQuery) -> pools.LeaseReport:
        self.asked_for_leases.set()
        if self.silent:
            await asyncio.Event().wait()
        return pools.LeaseReport(self.held)

    async def release(self, message: pools.ReleaseBlocks) -> pools.BlocksReleased:
        self.released.put_nowait(message.leases)
        return pools.BlocksReleased(len(message.leases))


class Worker(Actor):
    """An instance's mailbox: what the head sends it waits for the test."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.attempt: asyncio.Queue[Attempt] = asyncio.Queue()
        self.cancelled: asyncio.Queue[Attempt] = asyncio.Queue()
        self.taken: set[Attempt] = set()
        self.running = asyncio.Event()
        self.running.set()

    async def assign(self, message: stages.StageAssign) -> stages.StageTaken:
        await self.running.wait()
        if message.attempt not in self.taken:  # as the real one does
            self.taken.add(message.attempt)
            self.attempt.put_nowait(message.attempt)
        return stages.StageTaken(message.attempt)

    async def push(self, message: stages.TransferPush) -> stages.StageTaken:
        self.attempt.put_nowait(message.attempt)
        return stages.StageTaken(message.attempt)

    async def cancel(self, message: stages.StageCancel) -> None:
        self.cancelled.put_nowait(message.attempt)

    async def assigned(self, message: stages.AttemptQuery) -> stages.AttemptsAssigned:
        return stages.AttemptsAssigned(tuple(attempt for attempt in message.attempts if attempt in self.taken))


@pytest.fixture
def topology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Topology]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (model / "triptych.json").write_text(
        '{"name": "tiny", "defaults": {"height": 96}, "ranges": {"height": [64, 128, 8]}}'
    )

    def make(
        head: str = "",
        lora: str = "",
        bus: str = "",
        state: str = "state",
        supervision: str = "heartbeat_timeout_s = 1",
    ) -> Topology:
        roles = "\n".join(f'[[roles]]\nkind = "{kind}"' for kind in ("encoder", "denoiser", "decoder"))
        path = tmp_path / "t.toml"
        path.write_text(
            f'[model]\npath = "model"\n{lora}\n[state]\npath = "{state}"\n[head]\n{head}\n[bus]\n{bus}\n'
            f"[supervision]\n{supervision}\n{roles}\n"
        )
        return load_topology(path)

    return make


class HeadHarness:
    """A head under test and the other ends of its wires."""

    def __init__(self, actor: Head, head: Reference, pool: Pool, workers: dict[str, Worker]) -> None:
        self.actor, self.head, self.pool, self.workers = actor, head, pool, workers
        self.topology = actor.topology
        self.outboxes: dict[tuple[str, int], Outbox] = {}
        self.kill_pool: Callable[[], Coroutine[Any, Any, None]]

    async def submit(
        self, id_: str = "r", *, key: str = "", n: int = 1, output: Output = PNG, owner: str = "", **inputs: Any
    ) -> Any:
        message = requests.SubmitRequest(id_, {"prompt": "x", **inputs}, 7, n, output, key, owner)
        return await self.head.ask(message, requests.RequestAccepted, requests.RequestRejected, timeout_s=BOUND_S)

    async def view(self, id_: str = "r") -> requests.RequestView:
        return await self.head.ask(requests.QueryRequest(id_), requests.RequestView, timeout_s=BOUND_S)

    async def register(
        self, name: str, *, generation: int = 1, running: tuple[Attempt, ...] = (), signature: Signature = SIGNATURE
    ) -> stages.InstanceRegistered:
        registration = stages.RegisterInstance(
            name, name.partition("-")[0], generation, 1, 2, 2, len(running), "pool", signature, running
        )
        return await self.head.ask(registration, stages.InstanceRegistered, timeout_s=BOUND_S)

    def head_as(self, instance: str, generation: int = 1) -> Reference:
        """The head, as one incarnation of an instance reaches it."""
        sender = instance, generation
        if sender not in self.outboxes:
            self.outboxes[sender] = Outbox(*sender, options=self.actor.address_book.socket_options)
        return self.outboxes[sender].reference("head", self.head.address)

    async def report(self, message: Any, instance: str = "", generation: int = 1) -> None:
        head = self.head_as(instance or f"{message.stage}-0", generation)
        await head.ask(message, stages.Acknowledged, timeout_s=BOUND_S)

    async def next_attempt(self, name: str) -> Attempt:
        return await asyncio.wait_for(self.workers[name].attempt.get(), BOUND_S)


@asynccontextmanager
async def running_head(
    topology: Topology, *, generation: int = 1, pool: Pool | None = None
) -> AsyncIterator[HeadHarness]:
    address_book = AddressBook(topology)
    names = [c.name for c in topology.components if c.kind in ("encoder", "denoiser", "decoder")]
    workers = {name: Worker(name) for name in names}
    make_bus_keys(topology)
    outbox = Outbox("test", options=address_book.socket_options)
    pool = pool or Pool("pool")
    head = Head(topology)
    async with (
        Runtime([pool], Incarnation(address_book, generation)) as pools_process,
        Runtime(list(workers.values()), Incarnation(address_book, generation)),
        Runtime([head], Incarnation(address_book, generation)),
    ):
        harness = HeadHarness(head, outbox.reference("head", address_book.address("head")), pool, workers)
        harness.kill_pool = pools_process._close
        yield harness
        for each in (outbox, *harness.outboxes.values()):
            each.close()


def run_scenario(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def finished(attempt: Attempt) -> stages.StageFinished:
    return stages.StageFinished(attempt, "decoder", Artifact("r_0.png", "image/png", 1), 0.1, 3)


def stored(attempt: Attempt, harness: str, number: int) -> stages.StageOutputsStored:
    block = StoredPayload(LeaseRef("pool", 1, number, 0, 64), b"", 0, 64)
    return stages.StageOutputsStored(attempt, harness, block, 0.1, 3)


def test_a_request_goes_from_hand_to_hand_and_whoever_waits_is_told(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            for name in harness.workers:
                await harness.register(name)
            assert isinstance(await harness.submit(), requests.RequestAccepted)
            waiting = asyncio.create_task(
                harness.head.ask(requests.WaitRequest("r", BOUND_S), requests.RequestView, timeout_s=2 * BOUND_S)
            )
            attempt = await harness.next_attempt("encoder-0")
            await harness.report(stages.StageStarted(attempt, "encoder"))
            await harness.report(stored(attempt, "encoder", 1))
            attempt = await harness.next_attempt("denoiser-0")
            await harness.report(stages.StageStarted(attempt, "denoiser"))
            await harness.report(stored(attempt, "denoiser", 2))
            attempt = await harness.next_attempt("decoder-0")
            assert not waiting.done()
            await harness.report(finished(attempt))
            assert (await waiting).state == "DONE"
            early = await harness.head.ask(requests.WaitRequest("r", 0.0), requests.RequestView, timeout_s=BOUND_S)
            assert early.terminal

    run_scenario(scenario())


def test_what_is_not_accepted_says_why(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology("max_pending = 2")) as harness:
            await harness.register("encoder-0")
            rejected = await harness.submit("a", height=100)
            assert (rejected.code, rejected.param) == ("invalid", "height")
            rejected = await harness.submit("a", hieght=64)
            assert (rejected.code, rejected.param) == ("invalid", "hieght")
            rejected = await harness.submit("../etc/passwd")
            assert (rejected.code, rejected.param) == ("invalid", "request_id")
            assert (await harness.submit("a", key="k")).request_id == "a"
            assert (await harness.submit("b", key="k")).request_id == "a"
            assert (await harness.submit("b", key="k", height=64)).code == "conflict"
            last_seed = requests.SubmitRequest("c", {"prompt": "x"}, MAX_SEED, 2)
            rejected = await harness.head.ask(last_seed, requests.RequestRejected, timeout_s=BOUND_S)
            assert (rejected.code, rejected.param) == ("invalid", "seed")
            rejected = await harness.submit("c", n=2)
            assert rejected.code == "full"
            assert rejected.retry_after_s > 0
            with pytest.raises(RemoteError, match="there is no request c"):
                await harness.view("c")

    run_scenario(scenario())


def test_inputs_are_checked_by_what_the_pipeline_takes(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            # Nobody knows yet whether there is such a parameter: the encoder will.
            assert isinstance(await harness.submit("early", negative_prompt="grey"), requests.RequestAccepted)
            assert (await harness.submit("early2", mask_image="ship.png")).param == "mask_image"
            needs = msgspec.structs.replace(SIGNATURE.parameters[1], name="image", required=True)
            await harness.register("encoder-0", signature=Signature((*SIGNATURE.parameters, needs)))
            for inputs, param in (
                ({"negative_prompt": "grey"}, "negative_prompt"),
                ({"mask_image": "ship.png"}, "mask_image"),
                ({"mask_image": Images((IMAGE, IMAGE))}, "mask_image"),
                ({"sigmas": 0.5}, "sigmas"),
                ({"height": Images((IMAGE,))}, "height"),
                ({}, "image"),
            ):
                rejected = await harness.submit("late", **({"image": Images((IMAGE,))} if inputs else {}), **inputs)
                assert (rejected.code, rejected.param) == ("invalid", param)
            inputs = {"image": Images((IMAGE,)), "sigmas": Numbers((1.0, 0.5))}
            assert isinstance(await harness.submit("late", **inputs), requests.RequestAccepted)
            assert (await harness.view("late")).inputs == {"prompt": "x", "height": 96, **inputs}

    run_scenario(scenario())


def test_images_that_a_pool_cannot_take_whole_are_refused_where_stages_hand_them_on(
    topology: Callable[..., Topology],
) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            images = [Parameter(name, ParameterKind.IMAGES) for name in ("control_image", "image", "mask_image")]
            signature = Signature((*SIGNATURE.parameters, *images), passes_through=("image", "mask_image"))
            await harness.register("encoder-0", signature=signature)
            largest = 128 << 20  # of the default of 256 MiB

            def image(*pixels: int) -> Images:
                return Images(tuple(Upload("a.png", 8, count) for count in pixels))

            for name, value, most in (
                ("image", image(largest // 3 + 1), "at most 44739242 pixels: "),
                ("image", image(40_000_000, 5_000_000), "at most 44739242 pixels together: "),
                ("mask_image", image(largest + 1), "at most 134217728 pixels: "),
            ):
                rejected = await harness.submit("large", **{name: value})
                assert (rejected.code, rejected.param) == ("invalid", name)
                assert most in rejected.message
                assert "134217728 bytes of a pool" in rejected.message
            for inputs in ({"control_image": image(64_000_000)}, {"image": image(largest // 3)}):
                assert isinstance(await harness.submit(*inputs, **inputs), requests.RequestAccepted)

    run_scenario(scenario())


def test_the_model_says_what_it_takes(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:

            async def described() -> requests.ModelDescription:
                return await harness.head.ask(requests.DescribeModel(), requests.ModelDescription, timeout_s=BOUND_S)

            assert (await described()).parameters == ()
            await harness.register("encoder-0")
            said = await described()
            assert [item.name for item in said.parameters] == ["height", "mask_image", "prompt", "sigmas"]
            assert said.parameters[0].default == 96, "the card's, before the pipeline's"
            assert said.ranges == {"height": (64.0, 128.0, 8.0)}, "and nothing of what may be any number"

    run_scenario(scenario())


def test_answers_to_a_request_carry_the_version_of_the_description(topology: Callable[..., Topology]) -> None:
    async def described(harness: HeadHarness) -> str:
        message = requests.DescribeModel()
        return (await harness.head.ask(message, requests.ModelDescription, timeout_s=BOUND_S)).version

    async def scenario() -> None:
        async with running_head(topology()) as harness:
            unknown = await described(harness)
            assert (await harness.submit("early")).description_version == unknown
            await harness.register("encoder-0")
            known = await described(harness)
            assert known not in ("", unknown), "the instance has said what the pipeline takes"
            await harness.register("encoder-0", generation=2)
            assert (await harness.submit("late")).description_version == known, "it has said nothing new"
            rejected = await harness.submit("late", height=100)
            assert (rejected.code, rejected.description_version) == ("invalid", known)
            serving_config = harness.topology.models[0].path / "triptych.json"
            serving_config.write_text(serving_config.read_text().replace('"height": 96', '"height": 128'))
            await harness.head.ask(ReloadModel(), Reloading, timeout_s=BOUND_S)
            changed = await described(harness)
            assert (await harness.submit("last")).description_version == changed not in (known, unknown)
        async with running_head(topology(), generation=2) as harness:
            await harness.register("encoder-0")
            assert await described(harness) == changed, "a head that comes back describes the same model"

    run_scenario(scenario())


def test_the_result_is_settled_when_the_request_is_accepted(topology: Callable[..., Topology]) -> None:
    video = Signature(
        (Parameter("frame_rate", ParameterKind.NUMBER), Parameter("prompt", ParameterKind.TEXT)),
        medium="video",
        fps=24.0,
    )

    async def scenario() -> None:
        async with running_head(topology()) as harness:
            await harness.submit("early", output=Output("mp4"))
            assert (await harness.view("early")).output == Output("mp4"), "nobody knows yet what is made"
            await harness.register("encoder-0", signature=video)
            rejected = await harness.submit("a", output=Output("wav"))
            assert (rejected.code, rejected.param) == ("invalid", "output_format")
            rejected = await harness.submit("a", frame_rate=500.0)
            assert (rejected.code, rejected.param) == ("invalid", "frame_rate")
            await harness.submit("a", output=Output("mp4"))
            assert (await harness.view("a")).output == Output("mp4", 24.0)
            await harness.submit("b", output=Output(), frame_rate=30)
            assert (await harness.view("b")).output == Output("", 30.0)

    run_scenario(scenario())


def test_videos_play_as_fast_as_the_card_says_before_the_pipeline(topology: Callable[..., Topology]) -> None:
    video = Signature(
        (Parameter("frame_rate", ParameterKind.NUMBER), Parameter("prompt", ParameterKind.TEXT)),
        medium="video",
        fps=24.0,
    )
    made_topology = topology()
    (made_topology.models[0].path / "triptych.json").write_text('{"defaults": {"frame_rate": 30.0}}')

    async def scenario() -> None:
        async with running_head(made_topology) as harness:
            await harness.register("encoder-0", signature=video)
            said = await harness.head.ask(requests.DescribeModel(), requests.ModelDescription, timeout_s=BOUND_S)
            await harness.submit("a")
            assert said.fps == (await harness.view("a")).output.fps == 30.0

    run_scenario(scenario())


def test_a_head_that_cannot_write_accepts_nothing_tells_of_no_end_and_recovers_by_itself(
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


def test_what_is_promised_is_on_the_disk_before_it_is_said(
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


def test_where_nothing_can_be_served_any_more_nothing_is_accepted(topology: Callable[..., Topology]) -> None:
    class Supervisor(Actor):
        states: ClassVar[dict[str, str]] = {"denoiser-0": "gave_up"}

        async def report(self, _: SupervisorQuery) -> SupervisorReport:
            rows = self.states.items()
            return SupervisorReport(tuple(ChildReport(n, "", 0, 1, state, 5, "it died", 0.0) for n, state in rows))

    async def scenario() -> None:
        made_topology = topology(supervision="")
        make_bus_keys(made_topology)
        async with (
            Runtime([Supervisor("supervisor")], Incarnation(AddressBook(made_topology), 1)),
            running_head(made_topology) as harness,
            asyncio.timeout(BOUND_S),
        ):
            rejected, number = await harness.submit("0"), 0
            while isinstance(rejected, requests.RequestAccepted):  # until the head has looked
                number += 1
                rejected = await harness.submit(str(number))
            assert rejected.code == "unavailable"
            assert "no denoiser is started any more (denoiser-0: it died)" in rejected.message
            assert rejected.retry_after_s > 0
            for name in harness.workers:
                await harness.register(name)
            while not isinstance(await harness.submit("back"), requests.RequestAccepted):
                pass

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


def test_after_a_change_of_the_topology_what_was_pending_is_made_again_or_fails_in_words(
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
            job.left_s, job.instance = 0.0, "gone-0"
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


def test_a_restarted_head_leaves_running_work_alone_and_redoes_the_rest(topology: Callable[..., Topology]) -> None:
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


def test_an_instance_that_falls_silent_is_fenced(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            await harness.register("encoder-0", generation=5)
            await harness.submit()
            await harness.next_attempt("encoder-0")
            view = await harness.head.ask(requests.WaitRequest("r", 0.0), requests.RequestView, timeout_s=BOUND_S)
            async with asyncio.timeout(BOUND_S):
                while view.units[0].attempts == 1:
                    view = await harness.view()
            with pytest.raises(RemoteError, match="given up") as refused:
                await harness.report(stages.InstanceHeartbeat(), "encoder-0", 5)
            assert refused.value.code == "fenced"
            with pytest.raises(RemoteError, match="given up"):
                await harness.register("encoder-0", generation=5)
            await harness.register("encoder-0", generation=6)
            assert (await harness.next_attempt("encoder-0")).number == 2

    run_scenario(scenario())


@pytest.mark.parametrize("step_s", [3600.0, -3600.0])
def test_a_step_of_the_clock_neither_ends_a_request_nor_keeps_it(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    wall = time.time
    made = topology("request_timeout_s = 500", supervision="heartbeat_timeout_s = 60")

    async def scenario() -> None:
        async with running_head(made) as harness:
            await harness.register("encoder-0")
            await harness.submit(prompt="a")
            attempt = await harness.next_attempt("encoder-0")
            await harness.report(stages.StageStarted(attempt, "encoder"))
            monkeypatch.setattr(time, "time", lambda: wall() + step_s)
            while harness.actor.models.all[0].scheduler.jobs["r/0"].left_s > 500 - TICK_S:
                assert (await harness.view()).state == "ENCODER_RUNNING"
        async with running_head(made, generation=2) as harness:
            await harness.register("encoder-0", running=(attempt,))
            assert (await harness.view()).state == "ENCODER_RUNNING"
            job = harness.actor.models.all[0].scheduler.jobs["r/0"]
            assert job.left_s <= 500 - TICK_S, "it has what it had left, and no more"
            job.left_s = 2 * TICK_S
            view = await harness.head.ask(
                requests.WaitRequest("r", BOUND_S), requests.RequestView, timeout_s=2 * BOUND_S
            )
            assert (view.state, view.units[0].attempts) == ("TIMED_OUT", 1)
            assert view.units[0].history[-1].reason.endswith("([head] request_timeout_s = 500)")

    run_scenario(scenario())


def test_after_a_pause_of_the_machine_nobody_is_fenced_before_he_could_be_heard(
    topology: Callable[..., Topology],
) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            await harness.register("encoder-0")
            await harness.submit()
            await harness.next_attempt("encoder-0")
            for _ in range(2):
                time.sleep(1.5)  # noqa: ASYNC251  nothing in this process runs, as when the machine is stopped
                await asyncio.sleep(TICK_S)
                await harness.report(stages.InstanceHeartbeat(), "encoder-0")
            assert (await harness.view()).units[0].attempts == 1

    run_scenario(scenario())


def test_an_instance_that_stalls_is_asked_again_and_loses_nothing(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[int] = []
    monkeypatch.setattr(effect_runner, "INSTANCE_ANSWER_S", 0.05)
    monkeypatch.setattr(effect_runner, "backoff_s", lambda attempt: pauses.append(attempt) or 0.01)

    async def scenario() -> None:
        async with running_head(topology("", supervision="heartbeat_timeout_s = 60")) as harness:
            await harness.register("encoder-0")
            await harness.submit("runs")
            runs = await harness.next_attempt("encoder-0")
            await harness.report(stages.StageStarted(runs, "encoder"))
            worker = harness.workers["encoder-0"]
            for stall in (1, 2):
                worker.running.clear()
                await harness.submit(f"comes{stall}", prompt=f"another {stall}")
                pauses.clear()
                async with asyncio.timeout(BOUND_S):
                    while len(pauses) < 2:
                        await harness.view("runs")
                worker.running.set()
                comes = Attempt(f"comes{stall}/0", 1)
                while await harness.next_attempt("encoder-0") != comes:  # what was asked again may come again
                    pass
                await harness.report(stored(comes, "encoder", stall))
            assert (await harness.view("runs")).units[0].attempts == 1
            assert (await harness.view("runs")).state == "ENCODER_RUNNING"

    run_scenario(scenario())


def test_a_request_that_is_too_long_to_be_sent_fails_and_takes_no_instance_out(
    topology: Callable[..., Topology],
) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            await harness.register("encoder-0")
            await harness.submit()
            await harness.next_attempt("encoder-0")
            served = harness.actor.models.all[0]
            long = make_request(
                requests.SubmitRequest("long", {"prompt": "x"}, 7, 1, PNG, ""), served, limits_of(harness.topology), 0.0
            )
            long.inputs["prompt"] = "x" * 2**20
            served.scheduler.accept(long, 0.0)
            harness.actor.commit()
            async with asyncio.timeout(BOUND_S):
                while not long.terminal:
                    await harness.view()
            assert long.state == "FAILED"
            assert "too long to be sent" in long.jobs[0].causes[0]
            assert (await harness.view()).units[0].attempts == 1

    run_scenario(scenario())


def test_a_pool_that_refuses_is_asked_again_after_ever_longer_pauses(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[int] = []
    monkeypatch.setattr(monitor, "backoff_s", lambda attempt: pauses.append(attempt) or 0.0)

    async def scenario() -> None:
        pool = Pool("pool")
        pool.refuses = 3
        async with running_head(topology(), pool=pool) as harness, asyncio.timeout(BOUND_S):
            while harness.actor.monitor.pools_missing():
                await harness.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
        assert pauses == [0, 1, 2]

    run_scenario(scenario())


def test_block_that_their_owner_has_forgotten_are_taken_back(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            await harness.register("encoder-0", generation=4)
            await harness.submit()
            present = await harness.next_attempt("encoder-0")
            old, claimed, spare = Attempt("old/0", 1), Attempt("claimed/0", 1), Attempt("", 1)
            harness.workers["encoder-0"].taken.add(claimed)
            owners = [(old, 4), (claimed, 4), (present, 4), (spare, 4), (old, 3)]
            harness.pool.held = tuple(
                pools.LeaseView(LeaseRef("pool", 1, number, 0, 64), "writing", "encoder-0", generation, attempt)
                for number, (attempt, generation) in enumerate(owners)
            )
            async with asyncio.timeout(BOUND_S):
                while harness.actor.monitor.pools_missing():
                    await harness.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
                await harness.actor.monitor.reclaim()
            assert [lease.lease_id for lease in harness.pool.released.get_nowait()] == [0]
            assert harness.pool.released.empty()

    run_scenario(scenario())


def test_pools_may_come_and_go_while_they_are_looked_through(
    topology: Callable[..., Topology],
) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness, asyncio.timeout(BOUND_S):
            while harness.actor.monitor.pools_missing():
                await harness.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
            harness.pool.silent = True
            looking = asyncio.create_task(harness.actor.monitor.reclaim())
            await harness.pool.asked_for_leases.wait()
            harness.actor.monitor._pools["another"] = 1
            await harness.kill_pool()
            await looking

    run_scenario(scenario())


def test_what_an_instance_waits_for_is_why_the_head_is_not_ready(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology(supervision="")) as harness:

            async def reasons() -> str:
                view = await harness.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
                return " ".join(view.reasons)

            await harness.register("decoder-0")
            await harness.report(stages.InstanceHeartbeat("the disk is full"), "decoder-0")
            assert "decoder-0: the disk is full" in await reasons()
            await harness.report(stages.InstanceHeartbeat(), "decoder-0")
            assert "full" not in await reasons()

    run_scenario(scenario())


def test_an_instance_that_is_not_in_the_books_is_told_to_say_hello(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            with pytest.raises(RemoteError, match="register again") as refused:
                await harness.report(stages.InstanceHeartbeat(), "encoder-0")
            assert refused.value.code == "unknown"

    run_scenario(scenario())


def test_cancel_reaches_the_instance(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            await harness.register("encoder-0")
            await harness.submit()
            attempt = await harness.next_attempt("encoder-0")
            view = await harness.head.ask(requests.CancelRequest("r"), requests.RequestView, timeout_s=BOUND_S)
            assert view.state == "CANCELLED"
            assert await asyncio.wait_for(harness.workers["encoder-0"].cancelled.get(), BOUND_S) == attempt

    run_scenario(scenario())


def test_a_deleted_request_leaves_nothing_behind(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            artifacts = ArtifactStore(harness.topology.state_dir / ARTIFACTS)
            uploads = UploadStore(harness.topology.state_dir / UPLOADS)
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
            assert sorted(path.name for path in artifacts.folder.iterdir()) == ["other_0.png"]
            assert [path.name for path in uploads.folder.iterdir()] == [shared.name]
            with pytest.raises(RemoteError, match="there is no request r"):
                await harness.view("r")
            assert not await delete("r")
            assert (await harness.submit("again", key="k")).request_id == "again"
        async with running_head(topology(), generation=2) as harness:
            with pytest.raises(RemoteError, match="there is no request r"):
                await harness.view("r")


def test_what_was_accepted_for_another_model_is_failed_in_words_and_what_has_ended_stays(
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
            assert await listed(after="c") == (("a",), False)
            assert await listed(after="a", newest_first=False) == (("c", "d"), False)
            with pytest.raises(RemoteError, match="there is no request b"):
                await listed(after="b")

    run_scenario(scenario())


def test_an_adapter_that_is_not_there_is_refused_with_those_that_are(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        loras = "".join(f'[[model.lora]]\nname = "{name}"\npath = "x"\n' for name in ("ink", "clay"))
        async with running_head(topology(lora=loras)) as harness:
            for known in (False, True):  # before an instance has said what it takes, and after
                if known:
                    signature = Signature(tuple(sorted((*SIGNATURE.parameters, *PARAMETERS), key=lambda p: p.name)))
                    await harness.register("encoder-0", signature=signature)
                for inputs, param, sentence in (
                    ({"lora": "chalk"}, "lora", "must be one of clay, ink: there is no adapter 'chalk'."),
                    ({"lora": "ink", "lora_scale": 5}, "lora_scale", "must be -4 to 4."),
                    ({"lora": 1}, "lora", "must be a text, or a list of texts."),
                ):
                    rejected = await harness.submit(f"bad{known}", **inputs)
                    assert (rejected.code, rejected.param, rejected.message) == ("invalid", param, sentence)
                accepted = await harness.submit(f"r{known:d}", lora="ink", lora_scale=1)
                assert isinstance(accepted, requests.RequestAccepted)
                assert (await harness.view(f"r{known:d}")).inputs["lora"] == "ink"

    asyncio.run(scenario())


def test_without_adapters_there_is_no_such_parameter(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            for known in (False, True):
                if known:
                    await harness.register("encoder-0")
                rejected = await harness.submit(f"r{known:d}", lora="ink")
                assert (rejected.code, rejected.param) == ("invalid", "lora")
                assert "is not a parameter of tiny" in rejected.message

    asyncio.run(scenario())


def test_seeds_follow_each_other_or_are_given_for_each() -> None:
    assert seeds_of(5, 3) == [5, 6, 7]
    assert seeds_of((5, 3), 2) == [5, 3]
    for seed, n in (((5, 3), 3), (MAX_SEED, 2)):
        with pytest.raises(ParameterError, match="seed must be"):
            seeds_of(seed, n)
