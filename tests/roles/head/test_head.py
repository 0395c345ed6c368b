"""The head as an actor, from the first stage of a request to its end."""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.roles.head.head_harness import BOUND_S, PNG, finished, run_scenario, running_head, stored
from triptych.actors import Topology
from triptych.actors.topology import agreement
from triptych.bus import Mailbox, Message, Reference, RemoteError
from triptych.roles.head import effect_runner
from triptych.roles.head import head as head_module
from triptych.roles.head.admission import limits_of, make_request
from triptych.roles.head.head import TICK_S
from triptych.roles.messages import requests, stages
from triptych.roles.messages.common import (
    Attempt,
)


def test_a_request_goes_from_stage_to_stage_and_who_waits_for_it_is_notified(topology: Callable[..., Topology]) -> None:
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


def test_the_next_stage_is_sent_before_anything_that_it_does_not_wait_for(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    ask, answer = Reference._frame, Mailbox._answer

    def asks(self: Reference, kind: Any, number: int, timeout_s: float, message: Message) -> bytes:
        if self._outbox.name == "head":
            sent.append(type(message).__name__)
        return ask(self, kind, number, timeout_s, message)

    def answers(self: Mailbox, route: Any, asked: Any, kind: Any, message: Message) -> None:
        if self.name == "head":
            sent.append(type(message).__name__)
        answer(self, route, asked, kind, message)

    monkeypatch.setattr(Reference, "_frame", asks)
    monkeypatch.setattr(Mailbox, "_answer", answers)

    async def scenario() -> None:
        async with running_head(topology(lora='prompt_cache = "0"')) as harness:
            for name in harness.workers:
                await harness.register(name)
            await harness.submit()
            await harness.report(stored(await harness.next_attempt("encoder-0"), "encoder", 1))
            attempt = await harness.next_attempt("denoiser-0")
            sent.clear()
            await harness.report(stored(attempt, "denoiser", 2))
            assert set(sent) >= {"TransferPush", "ReleaseBlocks", "Acknowledged"}
            assert sent[0] == "TransferPush"

    run_scenario(scenario())


def test_that_a_stage_has_begun_is_written_with_the_next_change(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "TICK_S", BOUND_S)

    async def scenario() -> None:
        async with running_head(topology()) as harness:
            await harness.register("encoder-0")
            await harness.submit()
            attempt = await harness.next_attempt("encoder-0")
            unwritten = harness.actor.models.all[0].scheduler.dirty
            await harness.report(stages.StageStarted(attempt, "encoder"))
            assert (await harness.view()).state == "ENCODER_RUNNING"
            assert unwritten == {"r/0"}
            await harness.report(stored(attempt, "encoder", 1))
            assert not unwritten

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
            job.expires_at = job.clock.now + 2 * TICK_S
            harness.actor.models.all[0].scheduler.changed(job)
            view = await harness.head.ask(
                requests.WaitRequest("r", BOUND_S), requests.RequestView, timeout_s=2 * BOUND_S
            )
            assert (view.state, view.units[0].attempts) == ("TIMED_OUT", 1)
            assert view.units[0].history[-1].reason.endswith("([head] request_timeout_s = 500)")

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
            await harness.first_attempt()
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


def test_cancel_reaches_the_instance(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            attempt = await harness.first_attempt()
            view = await harness.head.ask(requests.CancelRequest("r"), requests.RequestView, timeout_s=BOUND_S)
            assert view.state == "CANCELLED"
            assert await asyncio.wait_for(harness.workers["encoder-0"].cancelled.get(), BOUND_S) == attempt

    run_scenario(scenario())


def test_an_instance_of_another_release_is_refused_in_words_until_it_runs_the_heads(
    topology: Callable[..., Topology],
) -> None:
    async def scenario() -> None:
        async with running_head(made := topology()) as harness:
            version, digest = importlib.metadata.version("triptych"), agreement(made, "denoiser-0")
            head = harness.head_as("denoiser-0")
            with pytest.raises(RemoteError, match=r"denoiser-0 runs Triptych .*, and the head") as refused:
                await head.ask(stages.Hello("0.0.1", digest), stages.Acknowledged, timeout_s=BOUND_S)
            cluster = await harness.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
            assert refused.value.detail in cluster.reasons
            with pytest.raises(RemoteError, match="has read another topology"):
                await head.ask(stages.Hello(version, "0"), stages.Acknowledged, timeout_s=BOUND_S)
            await head.ask(stages.Hello(version, digest), stages.Acknowledged, timeout_s=BOUND_S)
            cluster = await harness.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
            assert not [reason for reason in cluster.reasons if "denoiser-0" in reason]

    run_scenario(scenario())
