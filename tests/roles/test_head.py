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

from triptych.actors import Actor, AddressBook, Topology, load_topology
from triptych.actors.keys import make_keys
from triptych.actors.runtime import Runtime
from triptych.actors.system import ChildReport, Inspect, Inspection, SupervisorQuery, SupervisorReport
from triptych.bus import Outbox, Reference, Refused, RemoteFailure
from triptych.engines.checks import CardError
from triptych.engines.lora import PARAMETERS
from triptych.engines.parameters import Kind, Parameter, Signature
from triptych.roles import errands
from triptych.roles.artifacts import ARTIFACTS, ArtifactStore
from triptych.roles.head import TICK_S, Head, seeds_of
from triptych.roles.journal import Journal
from triptych.roles.messages import pool as pools
from triptych.roles.messages import requests, stages
from triptych.roles.messages.work import MAX_SEED, Artifact, LeaseRef, Numbers, Output, Pictures, Staged, Upload, Work
from triptych.roles.request import Request, Unit
from triptych.roles.uploads import UPLOADS, UploadStore

BOUND_S = 10.0

PNG = Output("png")
SIGNATURE = Signature(
    (
        Parameter("height", Kind.INTEGER, 512),
        Parameter("mask_image", Kind.IMAGE),
        Parameter("prompt", Kind.TEXT, required=True),
        Parameter("sigmas", Kind.NUMBERS),
    ),
    encodes=("prompt",),
)
PICTURE = Upload("a.png", 8)


class Pool(Actor):
    """Answers for the pool: nothing is ever staged in it."""

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
            raise Refused("not_ready", "it opens")
        return pools.PoolDescription(self.name, 1, 1, 0, 64, 64, 0, "", 0, "none")

    async def leases(self, _: pools.LeaseQuery) -> pools.LeaseReport:
        self.asked_for_leases.set()
        if self.silent:
            await asyncio.Event().wait()
        return pools.LeaseReport(self.held)

    async def release(self, message: pools.ReleaseSlots) -> pools.SlotsReleased:
        self.released.put_nowait(message.leases)
        return pools.SlotsReleased(len(message.leases))


class Worker(Actor):
    """An instance's mailbox: what the head sends it waits for the test."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.work: asyncio.Queue[Work] = asyncio.Queue()
        self.cancelled: asyncio.Queue[Work] = asyncio.Queue()
        self.taken: set[Work] = set()
        self.running = asyncio.Event()
        self.running.set()

    async def assign(self, message: stages.StageAssign) -> stages.StageTaken:
        await self.running.wait()
        if message.work not in self.taken:  # as the real one does
            self.taken.add(message.work)
            self.work.put_nowait(message.work)
        return stages.StageTaken(message.work)

    async def push(self, message: stages.TransferPush) -> stages.StageTaken:
        self.work.put_nowait(message.work)
        return stages.StageTaken(message.work)

    async def cancel(self, message: stages.StageCancel) -> None:
        self.cancelled.put_nowait(message.work)

    async def in_hand(self, message: stages.WorkQuery) -> stages.WorkInHand:
        return stages.WorkInHand(tuple(work for work in message.works if work in self.taken))


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


class Stage:
    """A head under test and the other ends of its wires."""

    def __init__(self, actor: Head, head: Reference, pool: Pool, workers: dict[str, Worker]) -> None:
        self.actor, self.head, self.pool, self.workers = actor, head, pool, workers
        self.topology = actor.topology
        self.kill_pool: Callable[[], Coroutine[Any, Any, None]]

    async def submit(
        self, id_: str = "r", *, key: str = "", n: int = 1, output: Output = PNG, owner: str = "", **inputs: Any
    ) -> Any:
        message = requests.SubmitRequest(id_, {"prompt": "x", **inputs}, 7, n, output, key, owner)
        return await self.head.ask(message, requests.RequestAccepted, requests.RequestRejected, timeout_s=BOUND_S)

    async def view(self, id_: str = "r") -> requests.RequestView:
        return await self.head.ask(requests.QueryRequest(id_), requests.RequestView, timeout_s=BOUND_S)

    async def hello(
        self, name: str, *, generation: int = 1, running: tuple[Work, ...] = (), signature: Signature = SIGNATURE
    ) -> stages.InstanceWelcome:
        hello = stages.InstanceHello(
            name, name.partition("-")[0], generation, 1, 2, 2, len(running), "pool", signature, running
        )
        return await self.head.ask(hello, stages.InstanceWelcome, timeout_s=BOUND_S)

    async def report(self, message: Any) -> None:
        await self.head.ask(message, stages.Acknowledged, timeout_s=BOUND_S)

    async def next_work(self, name: str) -> Work:
        return await asyncio.wait_for(self.workers[name].work.get(), BOUND_S)


@asynccontextmanager
async def playing(topology: Topology, *, generation: int = 1, pool: Pool | None = None) -> AsyncIterator[Stage]:
    book = AddressBook(topology)
    names = [c.name for c in topology.components if c.kind in ("encoder", "denoiser", "decoder")]
    workers = {name: Worker(name) for name in names}
    make_keys(topology)
    outbox = Outbox("test", curve=book.keys)
    pool = pool or Pool("pool")
    head = Head(topology)
    async with (
        Runtime([pool], book=book, generation=generation) as pools_process,
        Runtime(list(workers.values()), book=book, generation=generation),
        Runtime([head], book=book, generation=generation),
    ):
        stage = Stage(head, outbox.reference("head", book.address("head")), pool, workers)
        stage.kill_pool = pools_process._close
        yield stage
        outbox.close()


def play(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def finished(work: Work) -> stages.StageFinished:
    return stages.StageFinished(work, "decoder-0", "decoder", Artifact("r_0.png", "image/png", 1), 0.1, 3)


def staged(work: Work, panel: str, number: int) -> stages.TransferStaged:
    slot = Staged(LeaseRef("pool", 1, number, 0, 64), b"", 0, 64)
    return stages.TransferStaged(work, f"{panel}-0", panel, slot, 0.1, 3)


def test_a_request_goes_from_hand_to_hand_and_whoever_waits_is_told(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with playing(topology()) as stage:
            for name in stage.workers:
                await stage.hello(name)
            assert isinstance(await stage.submit(), requests.RequestAccepted)
            waiting = asyncio.create_task(
                stage.head.ask(requests.WaitRequest("r", BOUND_S), requests.RequestView, timeout_s=2 * BOUND_S)
            )
            work = await stage.next_work("encoder-0")
            await stage.report(stages.StageStarted(work, "encoder-0", "encoder"))
            await stage.report(staged(work, "encoder", 1))
            work = await stage.next_work("denoiser-0")
            await stage.report(stages.StageStarted(work, "denoiser-0", "denoiser"))
            await stage.report(staged(work, "denoiser", 2))
            work = await stage.next_work("decoder-0")
            assert not waiting.done()
            await stage.report(finished(work))
            assert (await waiting).state == "DONE"
            early = await stage.head.ask(requests.WaitRequest("r", 0.0), requests.RequestView, timeout_s=BOUND_S)
            assert early.terminal

    play(scenario())


def test_what_is_not_accepted_says_why(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with playing(topology("max_pending = 2")) as stage:
            await stage.hello("encoder-0")
            rejected = await stage.submit("a", height=100)
            assert (rejected.code, rejected.param) == ("invalid", "height")
            rejected = await stage.submit("a", hieght=64)
            assert (rejected.code, rejected.param) == ("invalid", "hieght")
            rejected = await stage.submit("../etc/passwd")
            assert (rejected.code, rejected.param) == ("invalid", "request_id")
            assert (await stage.submit("a", key="k")).request_id == "a"
            assert (await stage.submit("b", key="k")).request_id == "a"
            assert (await stage.submit("b", key="k", height=64)).code == "conflict"
            last_seed = requests.SubmitRequest("c", {"prompt": "x"}, MAX_SEED, 2)
            rejected = await stage.head.ask(last_seed, requests.RequestRejected, timeout_s=BOUND_S)
            assert (rejected.code, rejected.param) == ("invalid", "seed")
            rejected = await stage.submit("c", n=2)
            assert rejected.code == "full"
            assert rejected.retry_after_s > 0
            with pytest.raises(RemoteFailure, match="there is no request c"):
                await stage.view("c")

    play(scenario())


def test_inputs_are_checked_by_what_the_pipeline_takes(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with playing(topology()) as stage:
            # Nobody knows yet whether there is such a parameter: the encoder will.
            assert isinstance(await stage.submit("early", negative_prompt="grey"), requests.RequestAccepted)
            assert (await stage.submit("early2", mask_image="ship.png")).param == "mask_image"
            needs = msgspec.structs.replace(SIGNATURE.parameters[1], name="image", required=True)
            await stage.hello("encoder-0", signature=Signature((*SIGNATURE.parameters, needs)))
            for inputs, param in (
                ({"negative_prompt": "grey"}, "negative_prompt"),
                ({"mask_image": "ship.png"}, "mask_image"),
                ({"mask_image": Pictures((PICTURE, PICTURE))}, "mask_image"),
                ({"sigmas": 0.5}, "sigmas"),
                ({"height": Pictures((PICTURE,))}, "height"),
                ({}, "image"),
            ):
                rejected = await stage.submit("late", **({"image": Pictures((PICTURE,))} if inputs else {}), **inputs)
                assert (rejected.code, rejected.param) == ("invalid", param)
            inputs = {"image": Pictures((PICTURE,)), "sigmas": Numbers((1.0, 0.5))}
            assert isinstance(await stage.submit("late", **inputs), requests.RequestAccepted)
            assert (await stage.view("late")).inputs == {"prompt": "x", "height": 96, **inputs}

    play(scenario())


def test_images_that_a_pool_cannot_take_whole_are_refused_where_stages_hand_them_on(
    topology: Callable[..., Topology],
) -> None:
    async def scenario() -> None:
        async with playing(topology()) as stage:
            images = [Parameter(name, Kind.IMAGES) for name in ("control_image", "image", "mask_image")]
            signature = Signature((*SIGNATURE.parameters, *images), hands_on=("image", "mask_image"))
            await stage.hello("encoder-0", signature=signature)
            largest = 128 << 20  # of the default of 256 MiB

            def image(*pixels: int) -> Pictures:
                return Pictures(tuple(Upload("a.png", 8, count) for count in pixels))

            for name, value, most in (
                ("image", image(largest // 3 + 1), "at most 44739242 pixels: "),
                ("image", image(40_000_000, 5_000_000), "at most 44739242 pixels together: "),
                ("mask_image", image(largest + 1), "at most 134217728 pixels: "),
            ):
                rejected = await stage.submit("large", **{name: value})
                assert (rejected.code, rejected.param) == ("invalid", name)
                assert most in rejected.message
                assert "134217728 bytes of a pool" in rejected.message
            for inputs in ({"control_image": image(64_000_000)}, {"image": image(largest // 3)}):
                assert isinstance(await stage.submit(*inputs, **inputs), requests.RequestAccepted)

    play(scenario())


def test_the_model_says_what_it_takes(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with playing(topology()) as stage:

            async def described() -> requests.ModelDescription:
                return await stage.head.ask(requests.DescribeModel(), requests.ModelDescription, timeout_s=BOUND_S)

            assert (await described()).parameters == ()
            await stage.hello("encoder-0")
            said = await described()
            assert [item.name for item in said.parameters] == ["height", "mask_image", "prompt", "sigmas"]
            assert said.parameters[0].default == 96, "the card's, before the pipeline's"
            assert said.ranges == {"height": (64.0, 128.0, 8.0)}, "and nothing of what may be any number"

    play(scenario())


def test_the_result_is_settled_when_the_request_is_accepted(topology: Callable[..., Topology]) -> None:
    video = Signature((Parameter("frame_rate", Kind.NUMBER), Parameter("prompt", Kind.TEXT)), medium="video", fps=24.0)

    async def scenario() -> None:
        async with playing(topology()) as stage:
            await stage.submit("early", output=Output("mp4"))
            assert (await stage.view("early")).output == Output("mp4"), "nobody knows yet what is made"
            await stage.hello("encoder-0", signature=video)
            rejected = await stage.submit("a", output=Output("wav"))
            assert (rejected.code, rejected.param) == ("invalid", "output_format")
            rejected = await stage.submit("a", frame_rate=500.0)
            assert (rejected.code, rejected.param) == ("invalid", "frame_rate")
            await stage.submit("a", output=Output("mp4"))
            assert (await stage.view("a")).output == Output("mp4", 24.0)
            await stage.submit("b", output=Output(), frame_rate=30)
            assert (await stage.view("b")).output == Output("", 30.0)

    play(scenario())


def test_videos_play_as_fast_as_the_card_says_before_the_pipeline(topology: Callable[..., Topology]) -> None:
    video = Signature((Parameter("frame_rate", Kind.NUMBER), Parameter("prompt", Kind.TEXT)), medium="video", fps=24.0)
    place = topology()
    (place.models[0].path / "triptych.json").write_text('{"defaults": {"frame_rate": 30.0}}')

    async def scenario() -> None:
        async with playing(place) as stage:
            await stage.hello("encoder-0", signature=video)
            said = await stage.head.ask(requests.DescribeModel(), requests.ModelDescription, timeout_s=BOUND_S)
            await stage.submit("a")
            assert said.fps == (await stage.view("a")).output.fps == 30.0

    play(scenario())


def test_a_head_that_cannot_write_accepts_nothing_tells_of_no_end_and_recovers_by_itself(
    topology: Callable[..., Topology],
) -> None:
    async def scenario() -> None:
        async with playing(topology()) as stage:
            journal = stage.topology.state_dir / "journal.sqlite"

            async def unwritten() -> bool:
                cluster = await stage.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
                return any(str(journal) in reason for reason in cluster.reasons)

            async def cancel() -> requests.RequestView:
                return await stage.head.ask(requests.CancelRequest("r"), requests.RequestView, timeout_s=BOUND_S)

            await stage.submit()
            for idle in (True, False):
                with sqlite3.connect(journal) as other:
                    other.execute("ALTER TABLE units RENAME TO elsewhere")
                if idle:
                    rejected = await stage.submit("late")
                    assert rejected.code == "unavailable"
                    assert str(journal) in rejected.message
                else:
                    for ask in (cancel, stage.view):
                        with pytest.raises(RemoteFailure, match="r has ended, but that is not on the disk") as refused:
                            await ask()
                        assert refused.value.code == "unavailable"
                assert await unwritten()
                with sqlite3.connect(journal) as other:
                    other.execute("ALTER TABLE elsewhere RENAME TO units")
                async with asyncio.timeout(BOUND_S):
                    while await unwritten():
                        pass
            assert (await stage.view()).state == "CANCELLED"

    play(scenario())


def test_what_is_promised_is_on_the_disk_before_it_is_said(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    syncing, go_on, sync = threading.Event(), threading.Event(), Journal.sync

    def held(journal: Journal) -> None:
        syncing.set()
        assert go_on.wait(BOUND_S)
        sync(journal)

    async def scenario() -> None:
        async with playing(topology()) as stage:

            def cancel() -> Coroutine[Any, Any, requests.RequestView]:
                return stage.head.ask(requests.CancelRequest("r"), requests.RequestView, timeout_s=BOUND_S)

            def wait() -> Coroutine[Any, Any, requests.RequestView]:
                return stage.head.ask(requests.WaitRequest("r", BOUND_S), requests.RequestView, timeout_s=BOUND_S)

            monkeypatch.setattr(Journal, "sync", held)
            for promises in ([stage.submit], [wait, cancel, stage.view]):
                syncing.clear()
                go_on.clear()
                asked = [asyncio.create_task(promise()) for promise in promises]
                assert await asyncio.to_thread(syncing.wait, BOUND_S)
                # The head goes on meanwhile.
                await stage.head.ask(requests.DescribeModel(), requests.ModelDescription, timeout_s=BOUND_S)
                assert not any(task.done() for task in asked)
                go_on.set()
                answers = await asyncio.gather(*asked)
            assert {answer.state for answer in answers} == {"CANCELLED"}

    play(scenario())


def test_where_nothing_can_be_served_any_more_nothing_is_accepted(topology: Callable[..., Topology]) -> None:
    class Supervisor(Actor):
        states: ClassVar[dict[str, str]] = {"denoiser-0": "gave_up"}

        async def report(self, _: SupervisorQuery) -> SupervisorReport:
            rows = self.states.items()
            return SupervisorReport(tuple(ChildReport(n, "", 0, 1, state, 5, "it died", 0.0) for n, state in rows))

    async def scenario() -> None:
        place = topology(supervision="")
        make_keys(place)
        async with (
            Runtime([Supervisor("supervisor")], book=AddressBook(place), generation=1),
            playing(place) as stage,
            asyncio.timeout(BOUND_S),
        ):
            rejected, number = await stage.submit("0"), 0
            while isinstance(rejected, requests.RequestAccepted):  # until the head has looked
                number += 1
                rejected = await stage.submit(str(number))
            assert rejected.code == "unavailable"
            assert "no denoiser is started any more (denoiser-0: it died)" in rejected.message
            assert rejected.retry_after_s > 0
            for name in stage.workers:
                await stage.hello(name)
            while not isinstance(await stage.submit("back"), requests.RequestAccepted):
                pass

    play(scenario())


def test_a_large_journal_is_read_while_the_head_lives_and_old_keys_count_at_once(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on, active = threading.Event(), threading.Event(), Journal.active

    def held(journal: Journal) -> list[Request]:
        reading.set()
        assert go_on.wait(BOUND_S)
        return active(journal)

    async def scenario() -> None:
        async with playing(topology()) as stage:
            await stage.submit(key="k")
            await stage.head.ask(requests.CancelRequest("r"), requests.RequestView, timeout_s=BOUND_S)
        with sqlite3.connect(stage.topology.state_dir / "journal.sqlite") as db:
            db.execute("UPDATE requests SET finished_at = 1.0")  # so long ago that it is the first to be pruned
        monkeypatch.setattr("triptych.roles.head.prune", lambda *_, **__: (0, set()))
        monkeypatch.setattr(Journal, "active", held)
        second = asyncio.create_task(after_the_start())
        assert await asyncio.to_thread(reading.wait, BOUND_S)
        outbox = Outbox("asker", curve=AddressBook(stage.topology).keys)
        head = outbox.reference("head", AddressBook(stage.topology).address("head"))
        assert (await head.ask(Inspect(), Inspection, timeout_s=BOUND_S)).actors[0].state == "loading"
        outbox.close()
        go_on.set()
        await second

    async def after_the_start() -> None:
        async with playing(topology(), generation=2) as stage:
            assert (await stage.submit("again", key="k")).request_id == "r"
            assert (await stage.submit("again", key="k", height=64)).code == "conflict"

    play(scenario())


def test_after_a_change_of_the_topology_what_was_pending_is_made_again_or_fails_in_words(
    topology: Callable[..., Topology],
) -> None:
    """Other pools, other names, an adapter less; one request is past its time, and held by nobody known any more."""
    lora = '[[model.lora]]\nname = "ink"\npath = "x"\n'
    inks = Signature(tuple(sorted((*SIGNATURE.parameters, *PARAMETERS), key=lambda parameter: parameter.name)))

    async def scenario() -> None:
        async with playing(topology(lora=lora, supervision="")) as stage:
            for name in stage.workers:
                await stage.hello(name, signature=inks)
            await stage.submit("kept")
            work = await stage.next_work("encoder-0")
            await stage.report(staged(work, "encoder", 1))
            await stage.next_work("denoiser-0")
            await stage.submit("inked", lora="ink")
            await stage.submit("late")
        path = stage.topology.path
        text = path.read_text().replace(lora, "").replace('kind = "denoiser"', 'kind = "denoiser"\nname = "big"')
        path.write_text(text + '[transfer]\nengine = "mooncake"\ntrusted_network = true\n')
        with sqlite3.connect(stage.topology.state_dir / "journal.sqlite") as db:
            (body,) = db.execute("SELECT body FROM units WHERE id = 'late/0'").fetchone()
            unit = msgspec.msgpack.decode(body, type=Unit)
            unit.left_s, unit.instance = 0.0, "gone-0"
            db.execute("UPDATE units SET body = ? WHERE id = 'late/0'", (msgspec.msgpack.encode(unit),))
        async with playing(load_topology(path), generation=2, pool=Pool("pool-encoder")) as stage:
            view = await stage.view("inked")
            assert view.state == "FAILED"
            assert "it has no adapters" in view.units[0].history[-1].reason
            kept = await stage.view("kept")
            assert (kept.state, kept.units[0].causes) == ("ENCODER_WAITING", ("the topology has changed",))
            waited = await stage.head.ask(
                requests.WaitRequest("late", BOUND_S), requests.RequestView, timeout_s=BOUND_S
            )
            assert waited.state == "TIMED_OUT"
            await stage.hello("encoder-0")
            assert await stage.next_work("encoder-0") == Work("kept/0", 2)
            await stage.report(staged(Work("kept/0", 2), "encoder", 7))  # in a pool that is not there
            await stage.head.ask(requests.CancelRequest("kept"), requests.RequestView, timeout_s=BOUND_S)
            with pytest.raises(RemoteFailure, match="denoiser-0 is no component of this topology"):
                await stage.hello("denoiser-0")

    play(scenario())


def test_a_restarted_head_leaves_running_work_alone_and_redoes_the_rest(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with playing(topology()) as stage:
            await stage.hello("encoder-0")
            await stage.submit("kept", prompt="a")
            await stage.submit("lost", prompt="b")
            works = [await stage.next_work("encoder-0"), await stage.next_work("encoder-0")]
            kept = next(work for work in works if work.unit_id == "kept/0")
            await stage.report(stages.StageStarted(kept, "encoder-0", "encoder"))
        async with playing(topology(), generation=2) as stage:
            assert {(await stage.view(id_)).state for id_ in ("kept", "lost")} == {"ENCODER_RUNNING", "ENCODER_WAITING"}
            welcome = await stage.hello("encoder-0", running=(kept, Work("other/0", 1)))
            assert welcome.unknown == (Work("other/0", 1),)
            await stage.report(stages.StageCancelled(Work("other/0", 1), "encoder-0", 3))
            assert await stage.next_work("encoder-0") == Work("lost/0", 2)
            await stage.report(staged(kept, "encoder", 1))
            assert (await stage.view("kept")).state == "DENOISING_WAITING"

    play(scenario())


def test_an_instance_that_falls_silent_is_fenced(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with playing(topology()) as stage:
            await stage.hello("encoder-0", generation=5)
            await stage.submit()
            await stage.next_work("encoder-0")
            view = await stage.head.ask(requests.WaitRequest("r", 0.0), requests.RequestView, timeout_s=BOUND_S)
            async with asyncio.timeout(BOUND_S):
                while view.units[0].attempts == 1:
                    view = await stage.view()
            with pytest.raises(RemoteFailure, match="given up") as refused:
                await stage.report(stages.InstanceAlive("encoder-0", 5))
            assert refused.value.code == "fenced"
            with pytest.raises(RemoteFailure, match="given up"):
                await stage.hello("encoder-0", generation=5)
            await stage.hello("encoder-0", generation=6)
            assert (await stage.next_work("encoder-0")).attempt == 2

    play(scenario())


@pytest.mark.parametrize("step_s", [3600.0, -3600.0])
def test_a_step_of_the_clock_neither_ends_a_request_nor_keeps_it(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    wall = time.time
    made = topology("request_timeout_s = 500", supervision="heartbeat_timeout_s = 60")

    async def scenario() -> None:
        async with playing(made) as stage:
            await stage.hello("encoder-0")
            await stage.submit(prompt="a")
            work = await stage.next_work("encoder-0")
            await stage.report(stages.StageStarted(work, "encoder-0", "encoder"))
            monkeypatch.setattr(time, "time", lambda: wall() + step_s)
            while stage.actor.models.all[0].ledger.units["r/0"].left_s > 500 - TICK_S:
                assert (await stage.view()).state == "ENCODER_RUNNING"
        async with playing(made, generation=2) as stage:
            await stage.hello("encoder-0", running=(work,))
            assert (await stage.view()).state == "ENCODER_RUNNING"
            unit = stage.actor.models.all[0].ledger.units["r/0"]
            assert unit.left_s <= 500 - TICK_S, "it has what it had left, and no more"
            unit.left_s = 2 * TICK_S
            view = await stage.head.ask(requests.WaitRequest("r", BOUND_S), requests.RequestView, timeout_s=2 * BOUND_S)
            assert (view.state, view.units[0].attempts) == ("TIMED_OUT", 1)
            assert view.units[0].history[-1].reason.endswith("([head] request_timeout_s = 500)")

    play(scenario())


def test_after_a_pause_of_the_machine_nobody_is_fenced_before_he_could_be_heard(
    topology: Callable[..., Topology],
) -> None:
    async def scenario() -> None:
        async with playing(topology()) as stage:
            await stage.hello("encoder-0")
            await stage.submit()
            await stage.next_work("encoder-0")
            for _ in range(2):
                time.sleep(1.5)  # noqa: ASYNC251  nothing in this process runs, as when the machine is stopped
                await asyncio.sleep(TICK_S)
                await stage.report(stages.InstanceAlive("encoder-0", 1))
            assert (await stage.view()).units[0].attempts == 1

    play(scenario())


def test_an_instance_that_stalls_is_asked_again_and_loses_nothing(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[int] = []
    monkeypatch.setattr(errands, "ANSWER_S", 0.05)
    monkeypatch.setattr(errands, "pause_s", lambda attempt, _: pauses.append(attempt) or 0.01)

    async def scenario() -> None:
        async with playing(topology("", supervision="heartbeat_timeout_s = 60")) as stage:
            await stage.hello("encoder-0")
            await stage.submit("runs")
            runs = await stage.next_work("encoder-0")
            await stage.report(stages.StageStarted(runs, "encoder-0", "encoder"))
            worker = stage.workers["encoder-0"]
            for stall in (1, 2):
                worker.running.clear()
                await stage.submit(f"comes{stall}", prompt=f"another {stall}")
                pauses.clear()
                async with asyncio.timeout(BOUND_S):
                    while len(pauses) < 2:
                        await stage.view("runs")
                worker.running.set()
                comes = Work(f"comes{stall}/0", 1)
                while await stage.next_work("encoder-0") != comes:  # what was asked again may come again
                    pass
                await stage.report(staged(comes, "encoder", stall))
            assert (await stage.view("runs")).units[0].attempts == 1
            assert (await stage.view("runs")).state == "ENCODER_RUNNING"

    play(scenario())


def test_a_request_that_is_too_long_to_be_sent_fails_and_takes_no_instance_out(
    topology: Callable[..., Topology],
) -> None:
    async def scenario() -> None:
        async with playing(topology()) as stage:
            await stage.hello("encoder-0")
            await stage.submit()
            await stage.next_work("encoder-0")
            served = stage.actor.models.all[0]
            long = stage.actor._request(served, requests.SubmitRequest("long", {"prompt": "x"}, 7, 1, PNG, ""), "")
            long.inputs["prompt"] = "x" * 2**20
            served.ledger.accept(long, 0.0)
            stage.actor.settle()
            async with asyncio.timeout(BOUND_S):
                while not long.terminal:
                    await stage.view()
            assert long.state == "FAILED"
            assert "too long to be sent" in long.units[0].causes[0]
            assert (await stage.view()).units[0].attempts == 1

    play(scenario())


def test_a_pool_that_refuses_is_asked_again_after_ever_longer_pauses(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[int] = []
    monkeypatch.setattr(errands, "pause_s", lambda attempt, _: pauses.append(attempt) or 0.0)

    async def scenario() -> None:
        pool = Pool("pool")
        pool.refuses = 3
        async with playing(topology(), pool=pool) as stage, asyncio.timeout(BOUND_S):
            while stage.actor.errands.pools_missing():
                await stage.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
        assert pauses == [0, 1, 2]

    play(scenario())


def test_slots_that_their_owner_has_forgotten_are_taken_back(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with playing(topology()) as stage:
            await stage.hello("encoder-0", generation=4)
            await stage.submit()
            present = await stage.next_work("encoder-0")
            old, claimed, spare = Work("old/0", 1), Work("claimed/0", 1), Work("", 1)
            stage.workers["encoder-0"].taken.add(claimed)
            owners = [(old, 4), (claimed, 4), (present, 4), (spare, 4), (old, 3)]
            stage.pool.held = tuple(
                pools.LeaseView(LeaseRef("pool", 1, number, 0, 64), "writing", "encoder-0", generation, work)
                for number, (work, generation) in enumerate(owners)
            )
            async with asyncio.timeout(BOUND_S):
                while stage.actor.errands.pools_missing():
                    await stage.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
                await stage.actor.errands.reclaim()
            assert [lease.lease_id for lease in stage.pool.released.get_nowait()] == [0]
            assert stage.pool.released.empty()

    play(scenario())


def test_pools_may_come_and_go_while_they_are_looked_through(
    topology: Callable[..., Topology],
) -> None:
    async def scenario() -> None:
        async with playing(topology()) as stage, asyncio.timeout(BOUND_S):
            while stage.actor.errands.pools_missing():
                await stage.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
            stage.pool.silent = True
            looking = asyncio.create_task(stage.actor.errands.reclaim())
            await stage.pool.asked_for_leases.wait()
            stage.actor.errands._pools["another"] = 1
            await stage.kill_pool()
            await looking

    play(scenario())


def test_what_an_instance_waits_for_is_why_the_head_is_not_ready(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with playing(topology(supervision="")) as stage:

            async def reasons() -> str:
                view = await stage.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
                return " ".join(view.reasons)

            await stage.hello("decoder-0")
            await stage.report(stages.InstanceAlive("decoder-0", 1, "the disk is full"))
            assert "decoder-0: the disk is full" in await reasons()
            await stage.report(stages.InstanceAlive("decoder-0", 1))
            assert "full" not in await reasons()

    play(scenario())


def test_an_instance_that_is_not_in_the_books_is_told_to_say_hello(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with playing(topology()) as stage:
            with pytest.raises(RemoteFailure, match="say hello") as refused:
                await stage.report(stages.InstanceAlive("encoder-0", 1))
            assert refused.value.code == "unknown"

    play(scenario())


def test_cancel_reaches_the_instance(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with playing(topology()) as stage:
            await stage.hello("encoder-0")
            await stage.submit()
            work = await stage.next_work("encoder-0")
            view = await stage.head.ask(requests.CancelRequest("r"), requests.RequestView, timeout_s=BOUND_S)
            assert view.state == "CANCELLED"
            assert await asyncio.wait_for(stage.workers["encoder-0"].cancelled.get(), BOUND_S) == work

    play(scenario())


def test_a_deleted_request_leaves_nothing_behind(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with playing(topology()) as stage:
            artifacts = ArtifactStore(stage.topology.state_dir / ARTIFACTS)
            uploads = UploadStore(stage.topology.state_dir / UPLOADS)
            own, shared = uploads.save(b"own", "png"), uploads.save(b"shared", "png")

            async def delete(id_: str) -> bool:
                answer = await stage.head.ask(requests.DeleteRequest(id_), requests.RequestDeleted, timeout_s=BOUND_S)
                return answer.existed

            images = Parameter("image", Kind.IMAGES)
            await stage.hello("encoder-0", signature=Signature((images, *SIGNATURE.parameters)))
            await stage.submit("r", key="k", image=Pictures((own, shared)))
            await stage.submit("other", image=Pictures((shared,)))
            work = await stage.next_work("encoder-0")
            artifacts.save("r/0", "png", b"picture")
            artifacts.save("other/0", "png", b"picture")
            assert await delete("r"), "an active one is cancelled first"
            assert await asyncio.wait_for(stage.workers["encoder-0"].cancelled.get(), BOUND_S) == work
            artifacts.save("r/0", "png", b"picture")  # by an instance that was about to write it
            await stage.report(stages.StageCancelled(work, "encoder-0", 3))
            async with asyncio.timeout(BOUND_S):
                while artifacts.path("r_0.png").exists():  # noqa: ASYNC110  a file tells nobody that it goes
                    await asyncio.sleep(0)
            assert sorted(path.name for path in artifacts.folder.iterdir()) == ["other_0.png"]
            assert [path.name for path in uploads.folder.iterdir()] == [shared.name]
            with pytest.raises(RemoteFailure, match="there is no request r"):
                await stage.view("r")
            assert not await delete("r")
            assert (await stage.submit("again", key="k")).request_id == "again"
        async with playing(topology(), generation=2) as stage:
            with pytest.raises(RemoteFailure, match="there is no request r"):
                await stage.view("r")


def test_what_was_accepted_for_another_model_is_failed_in_words_and_what_has_ended_stays(
    topology: Callable[..., Topology],
) -> None:
    async def scenario() -> None:
        async with playing(topology()) as stage:
            await stage.submit("done")
            await stage.head.ask(requests.CancelRequest("done"), requests.RequestView, timeout_s=BOUND_S)
            await stage.submit("waiting", n=2)
        card = topology().models[0].path / "triptych.json"
        card.write_text(card.read_text().replace('"height": 96', '"height": 128'))
        async with playing(topology(), generation=2) as stage:
            assert (await stage.view("waiting")).state == "ENCODER_WAITING", "other defaults are no other model"
        (topology().models[0].path / "model_index.json").write_text(
            '{"_class_name": "FluxPipeline", "vae": ["a", "b"]}'
        )
        for generation in (3, 4):
            async with playing(topology(), generation=generation) as stage:
                waiting = await stage.view("waiting")
                assert waiting.state == "FAILED"
                assert all("accepted for another model" in unit.history[-1].reason for unit in waiting.units)
                assert (await stage.view("done")).state == "CANCELLED"
                await stage.hello("encoder-0")
                if generation == 3:
                    await stage.submit("new")
                assert (await stage.next_work("encoder-0")).unit_id == "new/0"

    play(scenario())


def test_a_request_is_found_by_its_owner_alone_also_after_a_restart(topology: Callable[..., Topology]) -> None:
    async def ask(stage: Stage, message: Any) -> Any:
        return await stage.head.ask(message, requests.RequestView, timeout_s=BOUND_S)

    async def scenario() -> None:
        async with playing(topology()) as stage:
            assert (await stage.submit("a", key="k", owner="alice")).request_id == "a"
            assert (await stage.submit("b", key="k", owner="bob")).request_id == "b"
        async with playing(topology(), generation=2) as stage:
            assert (await stage.submit("c", key="k", owner="alice")).request_id == "a"
            for kind in (requests.QueryRequest, requests.CancelRequest):
                with pytest.raises(RemoteFailure, match="there is no request a"):
                    await ask(stage, kind("a", owner="bob"))
            with pytest.raises(RemoteFailure, match="there is no request a"):
                await ask(stage, requests.WaitRequest("a", 0.0, "bob"))
            assert (await ask(stage, requests.CancelRequest("a", owner="alice"))).state == "CANCELLED"
            for owner, existed in (("bob", False), ("alice", True)):
                message = requests.DeleteRequest("a", owner)
                answer = await stage.head.ask(message, requests.RequestDeleted, timeout_s=BOUND_S)
                assert answer.existed is existed
            assert (await stage.view("b")).state == "ENCODER_WAITING", "who names no owner sees all"

    play(scenario())


def test_requests_are_listed_by_owner_and_page(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with playing(topology()) as stage:
            for id_, owner in (("a", "alice"), ("b", "bob"), ("c", "alice"), ("d", "alice")):
                await stage.submit(id_, owner=owner)
            # An ended one is listed with the others.
            await stage.head.ask(requests.CancelRequest("c"), requests.RequestView, timeout_s=BOUND_S)

            async def listed(owner: str = "alice", **query: Any) -> tuple[tuple[str, ...], bool]:
                message = requests.ListRequests(owner, **query)
                found = await stage.head.ask(message, requests.RequestList, timeout_s=BOUND_S)
                return found.request_ids, found.has_more

            assert await listed() == (("d", "c", "a"), False)
            assert await listed("") == (("d", "c", "b", "a"), False)
            assert await listed("carol") == ((), False)
            assert await listed(limit=2) == (("d", "c"), True)
            assert await listed(after="c") == (("a",), False)
            assert await listed(after="a", newest_first=False) == (("c", "d"), False)
            with pytest.raises(RemoteFailure, match="there is no request b"):
                await listed(after="b")

    play(scenario())


def test_an_adapter_that_is_not_there_is_refused_with_those_that_are(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        loras = "".join(f'[[model.lora]]\nname = "{name}"\npath = "x"\n' for name in ("ink", "clay"))
        async with playing(topology(lora=loras)) as stage:
            for known in (False, True):  # before an instance has said what it takes, and after
                if known:
                    signature = Signature(tuple(sorted((*SIGNATURE.parameters, *PARAMETERS), key=lambda p: p.name)))
                    await stage.hello("encoder-0", signature=signature)
                for inputs, param, sentence in (
                    ({"lora": "chalk"}, "lora", "must be one of clay, ink: there is no adapter 'chalk'."),
                    ({"lora": "ink", "lora_scale": 5}, "lora_scale", "must be -4 to 4."),
                    ({"lora": 1}, "lora", "must be a text, or a list of texts."),
                ):
                    rejected = await stage.submit(f"bad{known}", **inputs)
                    assert (rejected.code, rejected.param, rejected.message) == ("invalid", param, sentence)
                accepted = await stage.submit(f"r{known:d}", lora="ink", lora_scale=1)
                assert isinstance(accepted, requests.RequestAccepted)
                assert (await stage.view(f"r{known:d}")).inputs["lora"] == "ink"

    asyncio.run(scenario())


def test_without_adapters_there_is_no_such_parameter(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with playing(topology()) as stage:
            for known in (False, True):
                if known:
                    await stage.hello("encoder-0")
                rejected = await stage.submit(f"r{known:d}", lora="ink")
                assert (rejected.code, rejected.param) == ("invalid", "lora")
                assert "is not a parameter of tiny" in rejected.message

    asyncio.run(scenario())


def test_seeds_follow_each_other_or_are_given_for_each() -> None:
    assert seeds_of(5, 3) == [5, 6, 7]
    assert seeds_of((5, 3), 2) == [5, 3]
    for seed, n in (((5, 3), 3), (MAX_SEED, 2)):
        with pytest.raises(CardError, match="seed must be"):
            seeds_of(seed, n)
