from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.roles.stage import Stage, work
from triptych.actors import ActorCrashed
from triptych.actors.system import Inspect, Inspection
from triptych.bus import RemoteFailure
from triptych.engines.stepping import Denoising
from triptych.roles import instance as instance_module
from triptych.roles.instance import build
from triptych.roles.messages import stages
from triptych.roles.messages.pool import PoolDescription, PoolQuery


def test_three_panels_make_the_picture_that_one_process_makes(
    cluster: Any, run: Any, place: Any, house: Any, scripted_head: Any
) -> None:
    pictures: list[bytes] = []

    async def split(stage: Stage) -> None:
        hellos = await stage.join("encoder-0", "denoiser-0", "decoder-0")
        assert {h.kind: (h.pool, h.slots, h.issued, h.taken, h.running) for h in hellos} == dict.fromkeys(
            ("encoder", "denoiser", "decoder"), ("pool", 2, 2, 0, ())
        )
        assert all(hello.signature.parameter("num_inference_steps") for hello in hellos)
        first = await stage.encoded(work(0))
        assert await stage.inbox.next(stages.StageStarted) == stages.StageStarted(work(0), "encoder-0", "encoder")
        await stage.push("denoiser-0", work(0), first)
        ready = await stage.inbox.next(stages.TransferReady)
        assert (ready.work, ready.instance) == (work(0), "denoiser-0")
        report = await stage.inbox.next(stages.TransferStaged)
        assert (report.panel, report.issued, report.seconds > 0) == ("denoiser", 3, True)
        steps = [(p.step, p.total_steps) for p in stage.inbox.of(stages.StageProgress)]
        assert steps == [(1, 3), (2, 3), (3, 3)]
        await stage.release(first.lease)
        await stage.push("decoder-0", work(0), report.staged)
        finished = await stage.inbox.next(stages.StageFinished)
        assert (finished.panel, finished.issued) == ("decoder", 3)
        await stage.release(report.staged.lease)
        pictures.append((stage.h.topology.state_dir / "artifacts" / finished.artifact.name).read_bytes())
        await stage.empty()
        for name in ("encoder-0", "denoiser-0", "decoder-0"):
            await stage.at_rest(name)

    async def whole(stage: Stage) -> None:
        (hello,) = await stage.join("monolithic-0")
        assert hello.pool == ""
        for number in (0, 1):
            await stage.assign("monolithic-0", work(number), seed=5 + number)
        reports = [await stage.inbox.next(stages.StageFinished) for _ in (0, 1)]
        assert {(r.work, r.instance) for r in reports} == {(work(n), "monolithic-0") for n in (0, 1)}
        artifacts = stage.h.topology.state_dir / "artifacts"
        reports.sort(key=lambda report: report.work.unit_id)
        pictures.extend((artifacts / report.artifact.name).read_bytes() for report in reports)
        started = [(m.work, m.panel) for m in stage.inbox.of(stages.StageStarted)]
        assert sorted(started, key=str) == [
            (work(n), panel) for n in (0, 1) for panel in ("decoder", "denoiser", "encoder")
        ]
        await stage.at_rest("monolithic-0")

    cluster(split)
    cluster(whole, kind="monolithic")
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]


def test_bytes_that_travel_are_given_a_slot_first(cluster: Any) -> None:
    async def body(stage: Stage) -> None:
        await stage.join("encoder-0", "denoiser-0")
        source = await stage.encoded(work(0))
        alloc = stages.TransferAlloc(work(0), source.nbytes)
        replies = (stages.TransferAllocated, stages.TransferRejected)
        given = await stage.ask("denoiser-0", alloc, *replies)
        assert isinstance(given, stages.TransferAllocated)
        assert given.target.pool == "pool-denoiser"
        assert (await stage.facts("denoiser-0"))["reserved"] == 1
        asked = stages.WorkQuery((work(0), work(9)))
        assert (await stage.ask("denoiser-0", asked, stages.WorkInHand)).works == (work(0),)
        assert await stage.ask("denoiser-0", alloc, *replies) == given
        await stage.push("denoiser-0", work(0), source, given.target)
        assert (await stage.inbox.next(stages.TransferStaged)).staged.lease.pool == "pool-denoiser"
        await stage.until(lambda: holds(stage, "pool-denoiser", 1))
        # A reservation whose work is cancelled comes back, and the work is not taken any more.
        await stage.ask("denoiser-0", stages.TransferAlloc(work(1), 4096), *replies)
        stage.cancel("denoiser-0", work(1))
        await stage.until(lambda: holds(stage, "pool-denoiser", 1))
        with pytest.raises(RemoteFailure, match="cancelled"):
            await stage.push("denoiser-0", work(1), source, given.target)
        # No more reservations than slots, and none that can never be.
        for number in (2, 3):
            await stage.ask("denoiser-0", stages.TransferAlloc(work(number), 4096), *replies)
        refused = await stage.ask("denoiser-0", stages.TransferAlloc(work(4), 4096), *replies)
        assert isinstance(refused, stages.TransferRejected)
        assert refused.retryable
        stage.cancel("denoiser-0", work(3))
        never = await stage.ask("denoiser-0", stages.TransferAlloc(work(5), 1 << 40), *replies)
        assert isinstance(never, stages.TransferRejected)
        assert not never.retryable

    cluster(body, engine="mooncake", backend="shm")


def test_a_picture_travels_over_mooncake_between_the_processes_of_three_pools(
    run: Any, place: Any, house: Any, scripted_head: Any, tiny_model: Path
) -> None:
    pools = ("pool-encoder", "pool-denoiser", "pool-decoder")

    async def body() -> None:
        async with house(place(tiny_model, engine="mooncake")) as h:
            for name in pools:
                await h.process(name)
            await h.start(head := scripted_head())
            stage = Stage(h, head)
            await stage.join("encoder-0", "denoiser-0", "decoder-0")
            staged = await stage.encoded(work(0))
            for name in ("denoiser-0", "decoder-0"):
                source = staged
                alloc = stages.TransferAlloc(work(0), source.nbytes)
                target = (await stage.ask(name, alloc, stages.TransferAllocated)).target
                assert target.pool != source.lease.pool
                await stage.push(name, work(0), source, target)
                await stage.inbox.next(stages.TransferReady)
                if name == "denoiser-0":
                    staged = (await stage.inbox.next(stages.TransferStaged)).staged
                    await stage.release(source.lease)
            finished = await stage.inbox.next(stages.StageFinished)
            await stage.release(staged.lease)
            assert (h.topology.state_dir / "artifacts" / finished.artifact.name).stat().st_size
            await stage.empty(*pools)
            found = [await stage.ask(name, PoolQuery(), PoolDescription) for name in pools]
            assert {f.pid for f in found} == {h.processes[name].pid for name in pools}
            assert all("mooncake" in f.transport.lower() for f in found)
            # A pool that is killed takes what was staged in it along; its successor serves on the same name.
            staged = await stage.encoded(work(1))
            alloc = stages.TransferAlloc(work(1), staged.nbytes)
            target = (await stage.ask("denoiser-0", alloc, stages.TransferAllocated)).target
            await h.end("pool-encoder")
            await h.process("pool-encoder", generation=2)
            await stage.push("denoiser-0", work(1), staged, target)
            assert (await stage.inbox.next(stages.TransferFailed)).source_gone
            staged = await stage.encoded(work(2))
            alloc = stages.TransferAlloc(work(2), staged.nbytes)
            target = (await stage.ask("denoiser-0", alloc, stages.TransferAllocated)).target
            await stage.push("denoiser-0", work(2), staged, target)
            assert (await stage.inbox.next(stages.TransferStaged)).work == work(2)

    run(body())


async def holds(stage: Stage, pool_name: str, count: int) -> bool:
    return sum(bool(view.work.unit_id) for view in (await stage.leases(pool_name)).leases) == count


def test_the_next_work_is_loaded_while_one_computes(cluster: Any, gate: threading.Event) -> None:
    async def body(stage: Stage) -> None:
        await stage.join("encoder-0", "denoiser-0")
        sources = [await stage.encoded(work(n)) for n in range(3)]
        await stage.push("denoiser-0", work(0), sources[0])
        await stage.inbox.next(stages.StageProgress)
        await stage.push("denoiser-0", work(1), sources[1])
        ready = [(await stage.inbox.next(stages.TransferReady)).work for _ in range(2)]
        assert ready == [work(0), work(1)]
        with pytest.raises(RemoteFailure) as refusal:
            await stage.push("denoiser-0", work(2), sources[2])
        assert refusal.value.code == "no_credit"
        gate.set()
        done = [await stage.inbox.next(stages.TransferStaged) for _ in range(2)]
        assert [(d.work, d.issued) for d in done] == [(work(0), 3), (work(1), 4)]

    cluster(body)


def test_cancelled_work_stops_within_a_step_and_leaves_nothing_behind(cluster: Any, gate: threading.Event) -> None:
    async def body(stage: Stage) -> None:
        await stage.join("encoder-0", "denoiser-0")
        sources = [await stage.encoded(work(n), num_inference_steps=50) for n in range(2)]
        for n in range(2):
            await stage.push("denoiser-0", work(n), sources[n])
        await stage.inbox.next(stages.StageProgress)
        stage.cancel("denoiser-0", work(1))
        assert (await stage.inbox.next(stages.StageCancelled)).work == work(1)
        stage.cancel("denoiser-0", work(0))
        await stage.facts("denoiser-0")
        gate.set()
        cancelled = await stage.inbox.next(stages.StageCancelled)
        assert (cancelled.work, cancelled.issued) == (work(0), 4)
        assert len(stage.inbox.of(stages.StageProgress)) < 5
        assert not [r for r in stage.inbox.of(stages.TransferStaged) if r.panel == "denoiser"]
        await stage.at_rest("denoiser-0")
        await stage.release(*(s.lease for s in sources))
        await stage.empty()

    cluster(body)


def test_a_head_that_comes_back_finds_the_work_as_it_was(
    cluster: Any, gate: threading.Event, scripted_head: Any
) -> None:
    async def body(stage: Stage) -> None:
        await stage.join("encoder-0", "denoiser-0")
        sources = [await stage.encoded(work(n)) for n in range(2)]
        for n in range(2):
            await stage.push("denoiser-0", work(n), sources[n])
        await stage.inbox.next(stages.StageProgress)
        await stage.h.kill("head")
        gate.set()
        second = scripted_head()
        second.unknown = {work(1)}
        await stage.h.start(second, generation=2)
        stage.head, stage.inbox = second, second.inbox
        hellos = {h.name: h for h in [await second.inbox.next(stages.InstanceHello) for _ in range(2)]}
        hello = hellos["denoiser-0"]
        assert set(hello.running) >= {work(0), work(1)}
        assert hello.taken == 2
        assert hellos["encoder-0"].running == ()
        staged = await second.inbox.next(stages.TransferStaged)
        assert staged.work == work(0)
        assert staged.issued >= 3
        await stage.until(lambda: at(stage, "denoiser-0", credits=2, reports_pending=0))
        ended = [m for m in second.inbox.all if isinstance(m, (stages.TransferStaged, stages.StageCancelled))]
        assert {m.work for m in ended} == {work(0), work(1)}
        assert max(m.issued for m in ended) == 4

    cluster(body)


async def at(stage: Stage, instance: str, **expected: Any) -> bool:
    facts = await stage.facts(instance)
    return all(facts[name] == value for name, value in expected.items())


def test_a_report_that_the_old_head_never_acknowledged_reaches_the_new_one(cluster: Any, scripted_head: Any) -> None:
    async def body(stage: Stage) -> None:
        stage.head.silent_on = stages.TransferStaged
        await stage.join("encoder-0")
        await stage.assign("encoder-0", work(0))
        lost = await stage.inbox.next(stages.TransferStaged)
        await stage.h.kill("head")
        await stage.h.start(second := scripted_head(), generation=2)
        assert (await second.inbox.next(stages.InstanceHello)).running == (work(0),)
        assert await second.inbox.next(stages.TransferStaged) == lost

    cluster(body)


def test_an_instance_that_was_given_up_ends(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(stage: Stage) -> None:
        await stage.join("encoder-0")
        stage.head.fenced = True
        with pytest.raises(ActorCrashed, match="given this incarnation up"):
            await stage.h.runtimes["encoder-0"].wait()

    cluster(body)


@pytest.mark.parametrize("name", ["encoder-0", "monolithic-0"])
def test_an_older_incarnation_of_an_instance_ends(cluster: Any, name: str) -> None:
    async def body(stage: Stage) -> None:
        await stage.join(name, generation=7)
        await stage.h.kill(name)
        actors = build(stage.h.topology.component(name), stage.h.topology)
        with pytest.raises(ActorCrashed, match="given this incarnation up"):  # noqa: PT012  either may notice first
            await stage.h.start(*actors, generation=6)
            await stage.h.runtimes[name].wait()
        if stream := actors[1]._stream:  # it may still be loading, which the next test's load must not meet
            await stream.run(bool)

    cluster(body, kind="monolithic" if name == "monolithic-0" else "")


def test_a_head_that_has_forgotten_an_instance_is_greeted_again(cluster: Any) -> None:
    async def body(stage: Stage) -> None:
        await stage.join("encoder-0")
        stage.head.forgets = True
        assert (await stage.inbox.next(stages.InstanceHello)).name == "encoder-0"
        stage.head.forgets = False
        await stage.assign("encoder-0", work(0))
        await stage.inbox.next(stages.TransferStaged)

    cluster(body)


def test_a_request_at_fault_fails_for_good_and_its_credit_comes_back(cluster: Any) -> None:
    async def body(stage: Stage) -> None:
        await stage.join("encoder-0")
        await stage.assign("encoder-0", work(0), no_such_input=1)
        failed = await stage.inbox.next(stages.StageFailed)
        assert (failed.work, failed.panel, failed.retryable, failed.issued) == (work(0), "encoder", False, 3)
        assert "no_such_input" in failed.error
        await stage.at_rest("encoder-0")

    cluster(body)


def test_tensors_that_are_damaged_are_not_computed_on(cluster: Any) -> None:
    async def body(stage: Stage) -> None:
        await stage.join("encoder-0", "denoiser-0")
        source = await stage.encoded(work(0))
        stage.h.actors["pool"]._store.arena.view(source.lease.offset, 1)[0] ^= 1
        await stage.push("denoiser-0", work(0), source)
        failed = await stage.inbox.next(stages.TransferFailed)
        assert (failed.work, failed.source_gone, failed.issued) == (work(0), True, 3)
        assert not [m for m in stage.inbox.of(stages.StageStarted) if m.panel == "denoiser"]
        await stage.at_rest("denoiser-0")

    cluster(body)


def test_a_lost_device_is_reported_and_other_work_given_back_before_the_process_ends(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def lost(*_: Any) -> bool:
        gate.wait(30)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    async def body(stage: Stage) -> None:
        await stage.join("encoder-0", "denoiser-0")
        sources = [await stage.encoded(work(n)) for n in range(2)]
        monkeypatch.setattr(Denoising, "advance", lost)
        await stage.push("denoiser-0", work(0), sources[0])
        await stage.push("denoiser-0", work(1), sources[1])
        gate.set()
        failed = await stage.inbox.next(stages.StageFailed)
        assert (failed.work, failed.retryable) == (work(0), True)
        assert (await stage.inbox.next(stages.StageReturned)).work == work(1)
        with pytest.raises(ActorCrashed, match="illegal memory access"):
            await stage.h.runtimes["denoiser-0"].wait()

    cluster(body)


def test_a_drain_ends_what_is_in_hand_and_takes_nothing_more(cluster: Any, gate: threading.Event) -> None:
    async def body(stage: Stage) -> None:
        await stage.join("encoder-0", "denoiser-0")
        sources = [await stage.encoded(work(n)) for n in range(2)]
        await stage.push("denoiser-0", work(0), sources[0])
        await stage.inbox.next(stages.StageProgress)
        stopping = asyncio.ensure_future(stage.h.stop("denoiser-0"))
        await stage.until(lambda: drains(stage))
        with pytest.raises(RemoteFailure) as refusal:
            await stage.push("denoiser-0", work(1), sources[1])
        assert refusal.value.code == "draining"
        gate.set()
        await stopping
        assert [r.work for r in stage.inbox.of(stages.TransferStaged) if r.panel == "denoiser"] == [work(0)]

    cluster(body)


@pytest.mark.parametrize("bound", ["CLEARLY", "LAST_CALL"])
def test_what_cannot_be_done_before_the_end_is_given_back(
    cluster: Any, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(instance_module, bound, 0.0)

    async def body(stage: Stage) -> None:
        await stage.join("encoder-0", "denoiser-0")
        sources = [await stage.encoded(work(n), num_inference_steps=50) for n in range(2)]
        for n in range(2):
            await stage.push("denoiser-0", work(n), sources[n])
        await stage.inbox.next(stages.StageProgress)
        stopping = asyncio.ensure_future(stage.h.stop("denoiser-0"))
        assert await stage.inbox.next(stages.InstanceLeaving) == stages.InstanceLeaving("denoiser-0", 1)
        assert (await stage.inbox.next(stages.StageReturned)).work == work(1)
        if bound == "CLEARLY":
            gate.set()
        else:
            await stage.until(lambda: stops(stage))
            gate.set()
        assert await stage.inbox.next(stages.StageReturned) == stages.StageReturned(work(0), "denoiser-0", 4)
        await stopping
        assert not [r for r in stage.inbox.of(stages.TransferStaged) if r.panel == "denoiser"]

    cluster(body)


async def stops(stage: Stage) -> bool:
    (item,) = stage.h.actors["denoiser-0"].workload.items.values()
    await asyncio.sleep(0)
    return bool(item.cancelled)


async def drains(stage: Stage) -> bool:
    found = await stage.ask("denoiser-0", Inspect(), Inspection)
    return found.actors[0].state == "draining"


def test_a_drain_without_a_head_waits_for_nobody(cluster: Any, gate: threading.Event) -> None:
    async def body(stage: Stage) -> None:
        await stage.join("encoder-0", "denoiser-0")
        source = await stage.encoded(work(0))
        await stage.push("denoiser-0", work(0), source)
        await stage.inbox.next(stages.StageProgress)
        await stage.h.kill("head")
        await stage.h.stop("denoiser-0")
        assert stage.h.actors["denoiser-0"].workload.items

    cluster(body)


def test_an_instance_waits_for_a_head_that_comes_later(
    run: Any, place: Any, house: Any, scripted_head: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance_module, "ANSWER_S", 0.1)

    async def body() -> None:
        async with house(place(tiny_model, kind="monolithic")) as h:
            runtime = await h.component("monolithic-0", build)
            assert [a.state for a in runtime.inspection().actors] == ["joining", "ready", "ready"]
            await h.start(head := scripted_head())
            await head.inbox.next(stages.InstanceHello)
            await head.inbox.next(stages.InstanceAlive)
            assert runtime.inspection().actors[0].state == "ready"

    run(body())
