from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.roles.cluster_harness import ClusterDriver, attempt
from triptych.actors import ActorCrashedError
from triptych.actors.runtime._actor_cell import ActorCell
from triptych.actors.runtime.system_messages import Inspect, Inspection
from triptych.bus import Delivery, RemoteError
from triptych.engines.memory.arena import ArenaAddress
from triptych.engines.stages import Stage
from triptych.engines.steps.denoising import Denoising
from triptych.roles.messages import stages
from triptych.roles.messages.pool import PoolDescription, PoolQuery
from triptych.roles.worker import instance as instance_module
from triptych.roles.worker.instance import build


def test_three_stages_make_the_image_that_one_process_makes(
    cluster: Any, run: Any, make_topology: Any, local_cluster: Any, scripted_head: Any
) -> None:
    images: list[bytes] = []

    async def split(driver: ClusterDriver) -> None:
        registrations = await driver.join("encoder-0", "denoiser-0", "decoder-0")
        assert {h.kind: (h.pool, h.slots, h.issued, h.taken, h.running) for h in registrations} == dict.fromkeys(
            ("encoder", "denoiser", "decoder"), ("pool", 2, 2, 0, ())
        )
        assert all(registration.signature.parameter("num_inference_steps") for registration in registrations)
        first = await driver.encoded(attempt(0))
        started = await driver.inbox.next(stages.StageStarted)
        assert (started.attempt, started.stage) == (attempt(0), "encoder")
        await driver.push("denoiser-0", attempt(0), first)
        report = await driver.inbox.next(stages.StageOutputsStored)
        assert (report.stage, report.issued, report.seconds > 0) == ("denoiser", 3, True)
        steps = [(p.step, p.total_steps) for p in driver.inbox.of(stages.StageProgress)]
        assert steps == [(1, 3), (2, 3), (3, 3)]
        await driver.release(first.lease)
        await driver.push("decoder-0", attempt(0), report.stored)
        finished = await driver.inbox.next(stages.StageFinished)
        assert (finished.stage, finished.issued) == ("decoder", 3)
        await driver.release(report.stored.lease)
        images.append((driver.h.topology.state_dir / "artifacts" / finished.artifact.name).read_bytes())
        await driver.empty()
        for name in ("encoder-0", "denoiser-0", "decoder-0"):
            await driver.at_rest(name)

    async def whole(driver: ClusterDriver) -> None:
        (registration,) = await driver.join("monolithic-0")
        assert registration.pool == ""
        for number in (0, 1):
            await driver.assign("monolithic-0", attempt(number), seed=5 + number)
        reports = [await driver.inbox.next(stages.StageFinished) for _ in (0, 1)]
        assert {r.attempt for r in reports} == {attempt(0), attempt(1)}
        artifacts = driver.h.topology.state_dir / "artifacts"
        reports.sort(key=lambda report: report.attempt.job_id)
        images.extend((artifacts / report.artifact.name).read_bytes() for report in reports)
        started = [(m.attempt, m.stage) for m in driver.inbox.of(stages.StageStarted)]
        assert sorted(started, key=str) == [
            (attempt(n), harness) for n in (0, 1) for harness in ("decoder", "denoiser", "encoder")
        ]
        await driver.at_rest("monolithic-0")

    cluster(split)
    cluster(whole, kind="monolithic")
    assert images[0] == images[1]
    assert images[0] != images[2]


def test_an_attempt_passes_from_actor_to_actor_and_a_step_costs_no_message_within_the_process(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    within: list[str] = []
    handle = ActorCell._handle

    async def counted(self: ActorCell, delivery: Delivery) -> None:
        sender, to = delivery.envelope.sender, delivery.envelope.to
        if sender.partition(".")[0] == to.partition(".")[0] != "head":
            within.append(f"{sender} {type(delivery.message).__name__} {to}")
        await handle(self, delivery)

    monkeypatch.setattr(ActorCell, "_handle", counted)

    async def body(driver: ClusterDriver) -> None:
        await driver.join("encoder-0", "denoiser-0", "decoder-0")
        source = await driver.encoded(attempt(0), num_inference_steps=20)
        await driver.push("denoiser-0", attempt(0), source)
        denoised = await driver.inbox.next(stages.StageOutputsStored)
        await driver.push("decoder-0", attempt(0), denoised.stored)
        await driver.inbox.next(stages.StageFinished)
        assert len(driver.inbox.of(stages.StageProgress)) == 20
        assert within == [
            "encoder-0 RunStage encoder-0.stream",
            "encoder-0.stream StoreOutputs encoder-0.transfer",
            "denoiser-0 LoadInputs denoiser-0.transfer",
            "denoiser-0.transfer RunStage denoiser-0.stream",
            "denoiser-0.stream StoreOutputs denoiser-0.transfer",
            "decoder-0 LoadInputs decoder-0.transfer",
            "decoder-0.transfer RunStage decoder-0.stream",
            "decoder-0.stream SaveArtifact decoder-0.transfer",
        ]

    cluster(body)


def test_bytes_that_travel_are_given_a_block_first(cluster: Any) -> None:
    async def body(driver: ClusterDriver) -> None:
        await driver.join("encoder-0", "denoiser-0")
        source = await driver.encoded(attempt(0))
        alloc = stages.TransferAlloc(attempt(0), source.nbytes)
        replies = (stages.TransferAllocated, stages.TransferRejected)
        given = await driver.ask("denoiser-0", alloc, *replies)
        assert isinstance(given, stages.TransferAllocated)
        assert given.target.pool == "pool-denoiser"
        assert (await driver.stats("denoiser-0"))["reserved"] == 1
        asked = stages.AttemptQuery((attempt(0), attempt(9)))
        assert (await driver.ask("denoiser-0", asked, stages.AttemptsAssigned)).attempts == (attempt(0),)
        assert await driver.ask("denoiser-0", alloc, *replies) == given
        await driver.push("denoiser-0", attempt(0), source, given.target)
        assert (await driver.inbox.next(stages.StageOutputsStored)).stored.lease.pool == "pool-denoiser"
        await driver.until(lambda: holds(driver, "pool-denoiser", 1))
        # A reservation whose work is cancelled comes back, and the work is not taken any more.
        await driver.ask("denoiser-0", stages.TransferAlloc(attempt(1), 4096), *replies)
        driver.cancel("denoiser-0", attempt(1))
        await driver.until(lambda: holds(driver, "pool-denoiser", 1))
        with pytest.raises(RemoteError, match="cancelled"):
            await driver.push("denoiser-0", attempt(1), source, given.target)
        # No more reservations than slots, and none that can never be.
        for number in (2, 3):
            await driver.ask("denoiser-0", stages.TransferAlloc(attempt(number), 4096), *replies)
        refused = await driver.ask("denoiser-0", stages.TransferAlloc(attempt(4), 4096), *replies)
        assert isinstance(refused, stages.TransferRejected)
        assert refused.retryable
        driver.cancel("denoiser-0", attempt(3))
        never = await driver.ask("denoiser-0", stages.TransferAlloc(attempt(5), 1 << 40), *replies)
        assert isinstance(never, stages.TransferRejected)
        assert not never.retryable

    cluster(body, engine="mooncake", backend="shm")


def test_an_image_travels_over_mooncake_between_the_processes_of_three_pools(
    run: Any, make_topology: Any, local_cluster: Any, scripted_head: Any, tiny_model: Path
) -> None:
    pools = ("pool-encoder", "pool-denoiser", "pool-decoder")

    async def body() -> None:
        async with local_cluster(make_topology(tiny_model, engine="mooncake")) as h:
            for name in pools:
                await h.process(name)
            await h.start(head := scripted_head())
            driver = ClusterDriver(h, head)
            await driver.join("encoder-0", "denoiser-0", "decoder-0")
            stored = await driver.encoded(attempt(0))
            for name in ("denoiser-0", "decoder-0"):
                source = stored
                alloc = stages.TransferAlloc(attempt(0), source.nbytes)
                target = (await driver.ask(name, alloc, stages.TransferAllocated)).target
                assert target.pool != source.lease.pool
                await driver.push(name, attempt(0), source, target)
                if name == "denoiser-0":
                    stored = (await driver.inbox.next(stages.StageOutputsStored)).stored
                    await driver.release(source.lease)
            finished = await driver.inbox.next(stages.StageFinished)
            await driver.release(stored.lease)
            assert (h.topology.state_dir / "artifacts" / finished.artifact.name).stat().st_size
            await driver.empty(*pools)
            found = [await driver.ask(name, PoolQuery(), PoolDescription) for name in pools]
            assert {ArenaAddress.parse(f.arena).pid for f in found} == {h.processes[name].pid for name in pools}
            assert all("mooncake" in f.transport.lower() for f in found)
            # A pool that is killed takes what was stored in it along; its successor serves on the same name.
            stored = await driver.encoded(attempt(1))
            await h.end("pool-encoder")
            await h.process("pool-encoder", generation=2)
            gone, tries = False, 0
            while not gone:  # it may first be silent, while the other pool finds it again
                tries += 1
                alloc = stages.TransferAlloc(attempt(1, tries), stored.nbytes)
                target = (await driver.ask("denoiser-0", alloc, stages.TransferAllocated)).target
                await driver.push("denoiser-0", alloc.attempt, stored, target)
                gone = (await driver.inbox.next(stages.TransferFailed)).source_gone
            stored = await driver.encoded(attempt(2))
            alloc = stages.TransferAlloc(attempt(2), stored.nbytes)
            target = (await driver.ask("denoiser-0", alloc, stages.TransferAllocated)).target
            await driver.push("denoiser-0", attempt(2), stored, target)
            assert (await driver.inbox.next(stages.StageOutputsStored)).attempt == attempt(2)

    run(body())


async def holds(driver: ClusterDriver, pool_name: str, count: int) -> bool:
    return sum(bool(view.attempt.job_id) for view in (await driver.leases(pool_name)).leases) == count


def test_the_next_job_is_loaded_while_one_computes(cluster: Any, denoise_gate: threading.Event) -> None:
    async def body(driver: ClusterDriver) -> None:
        await driver.join("encoder-0", "denoiser-0")
        sources = [await driver.encoded(attempt(n)) for n in range(3)]
        await driver.push("denoiser-0", attempt(0), sources[0])
        await driver.inbox.next(stages.StageProgress)
        await driver.push("denoiser-0", attempt(1), sources[1])
        items = driver.h.actors["denoiser-0"].attempts.active
        await driver.until(lambda: has_inputs(items[attempt(1)]))
        with pytest.raises(RemoteError) as refusal:
            await driver.push("denoiser-0", attempt(2), sources[2])
        assert refusal.value.code == "no_credit"
        denoise_gate.set()
        done = [await driver.inbox.next(stages.StageOutputsStored) for _ in range(2)]
        assert [(d.attempt, d.issued) for d in done] == [(attempt(0), 3), (attempt(1), 4)]

    cluster(body)


async def has_inputs(item: Any) -> bool:
    await asyncio.sleep(0)
    return bool(item.values)


def test_a_cancelled_attempt_stops_within_a_step_and_leaves_nothing_behind(
    cluster: Any, denoise_gate: threading.Event
) -> None:
    async def body(driver: ClusterDriver) -> None:
        await driver.join("encoder-0", "denoiser-0")
        sources = [await driver.encoded(attempt(n), num_inference_steps=50) for n in range(2)]
        for n in range(2):
            await driver.push("denoiser-0", attempt(n), sources[n])
        await driver.inbox.next(stages.StageProgress)
        driver.cancel("denoiser-0", attempt(1))
        assert (await driver.inbox.next(stages.StageCancelled)).attempt == attempt(1)
        driver.cancel("denoiser-0", attempt(0))
        await driver.stats("denoiser-0")
        denoise_gate.set()
        cancelled = await driver.inbox.next(stages.StageCancelled)
        assert (cancelled.attempt, cancelled.issued) == (attempt(0), 4)
        assert len(driver.inbox.of(stages.StageProgress)) < 5
        assert not [r for r in driver.inbox.of(stages.StageOutputsStored) if r.stage == "denoiser"]
        await driver.at_rest("denoiser-0")
        await driver.release(*(s.lease for s in sources))
        await driver.empty()

    cluster(body)


def test_a_head_that_comes_back_finds_the_attempts_as_they_were(
    cluster: Any, denoise_gate: threading.Event, scripted_head: Any
) -> None:
    async def body(driver: ClusterDriver) -> None:
        await driver.join("encoder-0", "denoiser-0")
        sources = [await driver.encoded(attempt(n)) for n in range(2)]
        for n in range(2):
            await driver.push("denoiser-0", attempt(n), sources[n])
        computed = (await driver.inbox.next(stages.StageProgress)).attempt  # either may have been loaded first
        (waits,) = {attempt(0), attempt(1)} - {computed}
        await driver.h.kill("head")
        second = scripted_head()
        second.unknown = {waits}
        await driver.h.start(second, generation=2)
        driver.head, driver.inbox = second, second.inbox
        registrations = {h.name: h for h in [await second.inbox.next(stages.RegisterInstance) for _ in range(2)]}
        registration = registrations["denoiser-0"]
        assert set(registration.running) >= {attempt(0), attempt(1)}
        assert registration.taken == 2
        assert registrations["encoder-0"].running == ()
        started = await second.inbox.next(stages.StageStarted)
        assert (started.attempt, started.stage) == (computed, Stage.DENOISER)
        denoise_gate.set()
        stored = await second.inbox.next(stages.StageOutputsStored)
        assert stored.attempt == computed
        assert stored.issued >= 3
        await driver.until(lambda: at(driver, "denoiser-0", credits=2, reports_pending=0))
        ended = [m for m in second.inbox.all if isinstance(m, (stages.StageOutputsStored, stages.StageCancelled))]
        assert {m.attempt for m in ended} == {attempt(0), attempt(1)}
        assert max(m.issued for m in ended) == 4

    cluster(body)


def test_an_instance_that_has_lost_the_head_for_long_stops_and_gives_its_attempts_back(
    cluster: Any, denoise_gate: threading.Event
) -> None:
    async def body(driver: ClusterDriver) -> None:
        await driver.join("encoder-0", "denoiser-0")
        source = await driver.encoded(attempt(0), num_inference_steps=20)
        await driver.push("denoiser-0", attempt(0), source)
        await driver.inbox.next(stages.StageProgress)
        denoiser = driver.h.actors["denoiser-0"]
        denoiser._host_lost_s = 0.0
        await denoiser._stop_without_head()
        denoise_gate.set()
        assert (await driver.inbox.next(stages.StageReturned)).attempt == attempt(0)
        await driver.release(source.lease)
        await driver.at_rest("denoiser-0")

    cluster(body)


async def at(driver: ClusterDriver, instance: str, **expected: Any) -> bool:
    facts = await driver.stats(instance)
    return all(facts[name] == value for name, value in expected.items())


def test_a_report_that_the_old_head_never_acknowledged_reaches_the_new_one(cluster: Any, scripted_head: Any) -> None:
    async def body(driver: ClusterDriver) -> None:
        driver.head.silent_on = stages.StageOutputsStored
        await driver.join("encoder-0")
        await driver.assign("encoder-0", attempt(0))
        lost = await driver.inbox.next(stages.StageOutputsStored)
        await driver.h.kill("head")
        await driver.h.start(second := scripted_head(), generation=2)
        assert (await second.inbox.next(stages.RegisterInstance)).running == (attempt(0),)
        assert await second.inbox.next(stages.StageOutputsStored) == lost

    cluster(body)


def test_an_instance_that_was_given_up_ends(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(driver: ClusterDriver) -> None:
        await driver.join("encoder-0")
        driver.head.fenced = True
        with pytest.raises(ActorCrashedError, match="given this incarnation up"):
            await driver.h.runtimes["encoder-0"].wait()

    cluster(body)


@pytest.mark.parametrize("name", ["encoder-0", "monolithic-0"])
def test_an_older_incarnation_of_an_instance_ends(cluster: Any, name: str) -> None:
    async def body(driver: ClusterDriver) -> None:
        await driver.join(name, generation=7)
        await driver.h.kill(name)
        actors = build(driver.h.topology.component(name), driver.h.topology)
        with pytest.raises(ActorCrashedError, match="given this incarnation up"):  # noqa: PT012  either may notice first
            await driver.h.start(*actors, generation=6)
            await driver.h.runtimes[name].wait()
        if stream := actors[1]._stream:  # it may still be loading, which the next test's load must not meet
            await stream.run(bool)

    cluster(body, kind="monolithic" if name == "monolithic-0" else "")


def test_an_instance_that_the_head_does_not_know_registers_again(cluster: Any) -> None:
    async def body(driver: ClusterDriver) -> None:
        await driver.join("encoder-0")
        driver.head.forgets = True
        assert (await driver.inbox.next(stages.RegisterInstance)).name == "encoder-0"
        driver.head.forgets = False
        await driver.assign("encoder-0", attempt(0))
        await driver.inbox.next(stages.StageOutputsStored)

    cluster(body)


def test_a_request_at_fault_fails_for_good_and_its_credit_comes_back(cluster: Any) -> None:
    async def body(driver: ClusterDriver) -> None:
        await driver.join("encoder-0")
        await driver.assign("encoder-0", attempt(0), no_such_input=1)
        failed = await driver.inbox.next(stages.StageFailed)
        assert (failed.attempt, failed.stage, failed.retryable, failed.issued) == (attempt(0), "encoder", False, 3)
        assert "no_such_input" in failed.error
        await driver.at_rest("encoder-0")

    cluster(body)


def test_tensors_that_are_damaged_are_not_computed_on(cluster: Any) -> None:
    async def body(driver: ClusterDriver) -> None:
        await driver.join("encoder-0", "denoiser-0")
        source = await driver.encoded(attempt(0))
        driver.h.actors["pool"]._store.arena.view(source.lease.offset, 1)[0] ^= 1
        await driver.push("denoiser-0", attempt(0), source)
        failed = await driver.inbox.next(stages.TransferFailed)
        assert (failed.attempt, failed.source_gone, failed.issued) == (attempt(0), True, 3)
        assert not [m for m in driver.inbox.of(stages.StageStarted) if m.stage == "denoiser"]
        await driver.at_rest("denoiser-0")

    cluster(body)


def test_a_lost_device_is_reported_and_other_attempts_are_returned_before_the_process_ends(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoise_gate = threading.Event()

    def lost(*_: Any) -> bool:
        denoise_gate.wait(30)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    async def body(driver: ClusterDriver) -> None:
        await driver.join("encoder-0", "denoiser-0")
        sources = [await driver.encoded(attempt(n)) for n in range(2)]
        monkeypatch.setattr(Denoising, "proceed", lost)
        await driver.push("denoiser-0", attempt(0), sources[0])
        await driver.push("denoiser-0", attempt(1), sources[1])
        denoise_gate.set()
        failed = await driver.inbox.next(stages.StageFailed)
        assert (failed.attempt, failed.retryable) == (attempt(0), True)
        assert (await driver.inbox.next(stages.StageReturned)).attempt == attempt(1)
        with pytest.raises(ActorCrashedError, match="illegal memory access"):
            await driver.h.runtimes["denoiser-0"].wait()

    cluster(body)


def test_a_drain_finishes_what_is_assigned_and_takes_nothing_more(cluster: Any, denoise_gate: threading.Event) -> None:
    async def body(driver: ClusterDriver) -> None:
        await driver.join("encoder-0", "denoiser-0")
        sources = [await driver.encoded(attempt(n)) for n in range(2)]
        await driver.push("denoiser-0", attempt(0), sources[0])
        await driver.inbox.next(stages.StageProgress)
        stopping = asyncio.ensure_future(driver.h.stop("denoiser-0"))
        await driver.until(lambda: drains(driver))
        with pytest.raises(RemoteError) as refusal:
            await driver.push("denoiser-0", attempt(1), sources[1])
        assert refusal.value.code == "draining"
        denoise_gate.set()
        await stopping
        assert [r.attempt for r in driver.inbox.of(stages.StageOutputsStored) if r.stage == "denoiser"] == [attempt(0)]

    cluster(body)


@pytest.mark.parametrize("bound", ["HAND_BACK_FACTOR", "DRAIN_SHARE"])
def test_attempts_that_cannot_finish_before_the_end_are_returned(
    cluster: Any, denoise_gate: threading.Event, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(instance_module, bound, 0.0)

    async def body(driver: ClusterDriver) -> None:
        await driver.join("encoder-0", "denoiser-0")
        sources = [await driver.encoded(attempt(n), num_inference_steps=50) for n in range(2)]
        for n in range(2):
            await driver.push("denoiser-0", attempt(n), sources[n])
        await driver.inbox.next(stages.StageProgress)
        stopping = asyncio.ensure_future(driver.h.stop("denoiser-0"))
        assert await driver.inbox.next(stages.InstanceStopping) == stages.InstanceStopping()
        assert (await driver.inbox.next(stages.StageReturned)).attempt == attempt(1)
        if bound == "HAND_BACK_FACTOR":
            denoise_gate.set()
        else:
            await driver.until(lambda: stops(driver))
            denoise_gate.set()
        assert await driver.inbox.next(stages.StageReturned) == stages.StageReturned(attempt(0), 4)
        await stopping
        assert not [r for r in driver.inbox.of(stages.StageOutputsStored) if r.stage == "denoiser"]

    cluster(body)


async def stops(driver: ClusterDriver) -> bool:
    (item,) = driver.h.actors["denoiser-0"].attempts.active.values()
    await asyncio.sleep(0)
    return bool(item.cancelled)


async def drains(driver: ClusterDriver) -> bool:
    found = await driver.ask("denoiser-0", Inspect(), Inspection)
    return found.actors[0].state == "draining"


def test_a_drain_without_a_head_waits_for_nobody(cluster: Any, denoise_gate: threading.Event) -> None:
    async def body(driver: ClusterDriver) -> None:
        await driver.join("encoder-0", "denoiser-0")
        source = await driver.encoded(attempt(0))
        await driver.push("denoiser-0", attempt(0), source)
        await driver.inbox.next(stages.StageProgress)
        await driver.h.kill("head")
        await driver.h.stop("denoiser-0")
        assert driver.h.actors["denoiser-0"].attempts.active

    cluster(body)


def test_an_instance_waits_for_a_head_that_comes_later_and_takes_it(
    run: Any,
    make_topology: Any,
    local_cluster: Any,
    scripted_head: Any,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(instance_module, "HEAD_ANSWER_S", 0.1)

    async def body() -> None:
        async with local_cluster(make_topology(tiny_model, kind="monolithic")) as h:
            runtime = await h.component("monolithic-0", build)
            assert [a.state for a in runtime.inspection().actors] == ["joining", "ready", "ready"]
            head = scripted_head()
            head.refuses_hello = "monolithic-0 runs Triptych 0.0.1, and the head another"
            await h.start(head)
            for _ in range(2):  # the second follows when the first one has been answered
                await head.inbox.next(stages.Hello)
            status = runtime.inspection().actors[0]
            assert (status.state, status.detail) == ("joining", head.refuses_hello)
            head.refuses_hello = ""
            await head.inbox.next(stages.RegisterInstance)
            await head.inbox.next(stages.InstanceHeartbeat)
            assert runtime.inspection().actors[0].state == "ready"

    run(body())
