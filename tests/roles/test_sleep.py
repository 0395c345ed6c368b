"""The books of a model that sleeps, and of one that has to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from msgspec.structs import replace

from tests.roles.books import KINDS, SIGNATURE, a_slot, after, hello, ledger, request, staged
from tests.roles.stage import Stage, work
from triptych.bus import RemoteFailure
from triptych.engines.panels import Panel
from triptych.engines.pipeline import PanelPipeline
from triptych.roles.effects import Assign, Release, Turn
from triptych.roles.ledger import UNTRIED, Ledger
from triptych.roles.messages import stages
from triptych.roles.messages.stages import InstanceAwake
from triptych.roles.request import State, Unit
from triptych.roles.stream_worker import FilesChanged


def joined(*, awake: bool = True, cache: int = 0) -> Ledger:
    books = ledger(cache=cache)
    for kind in KINDS:
        books.hello(replace(hello(f"{kind}-0"), awake=awake), 0.0)
    return books


def turned(name: str, *, awake: bool, generation: int = 1) -> InstanceAwake:
    return InstanceAwake(name, generation, awake, SIGNATURE, 64, 0.5)


def encoded(books: Ledger) -> Unit:
    books.accept(request(), 0.0)
    after(books)
    unit = books.units["r/0"]
    assert books.started(unit.work, "encoder-0", Panel.ENCODER, 1.0)
    assert books.staged(staged(unit.work, "encoder", 1), 2.0)
    return unit


def test_an_instance_gets_no_work_from_when_it_is_told_to_sleep_until_it_is_awake() -> None:
    books = joined()
    books.turn(["encoder-0"], awake=False)
    books.turn(["encoder-0"], awake=False)
    books.accept(request(), 0.0)
    assert after(books) == [Turn("encoder-0", awake=False)], "told once"
    assert books.turned(turned("encoder-0", awake=False))
    books.turn(["encoder-0"], awake=True)
    assert after(books) == [Turn("encoder-0", awake=True)]
    assert not books.turned(turned("encoder-0", awake=True, generation=7)), "another incarnation"
    assert books.turned(turned("encoder-0", awake=True))
    assert books.fleet.instances["encoder-0"].weights == 64
    assert after(books) == [Assign("encoder-0", "r/0")]


def test_who_could_not_be_told_is_told_again_and_so_is_its_successor() -> None:
    books = joined(awake=False)
    books.turn(["encoder-0"], awake=True)
    books.not_turned("encoder-0", 1)
    books.turn(["encoder-0"], awake=True)
    books.instance_down("encoder-0", "its process ended", 1.0)
    books.hello(replace(hello("encoder-0", generation=2), awake=False), 2.0)
    books.turn(["encoder-0"], awake=True)
    assert after(books) == [Turn("encoder-0", awake=True)] * 3


def test_a_model_that_is_to_sleep_begins_nothing_and_finishes_what_it_has_begun() -> None:
    books = joined(cache=1 << 20)
    unit = encoded(books)
    books.paused = True
    books.accept(request("s"), 2.0)
    books.accept(request("same"), 2.0)  # what the prompt cache has is not begun either
    assert after(books) == [Assign("denoiser-0", "r/0")]
    assert books.begun
    assert books.staged(staged(unit.work, "denoiser", 2), 3.0)
    after(books)
    books.cancel("r", "enough", 4.0)
    assert not books.begun
    books.elapse(5.0, 9.0)
    assert books.waits_s == 5.0


def test_what_a_sleeping_model_has_in_a_full_pool_is_made_again() -> None:
    books = joined()
    unit = encoded(books)
    books.give_way("pool", 3.0)
    assert unit.state is State.DENOISING_WAITING, "its instances are awake"
    for kind in KINDS:
        books.hello(replace(hello(f"{kind}-0", generation=2), awake=False), 3.0)
    books.give_way("another", 3.0)
    assert unit.state is State.DENOISING_WAITING
    books.give_way("pool", 3.0)
    assert (unit.state, unit.failures) == (State.ENCODER_WAITING, 0)
    assert Release((a_slot(1).lease,)) in after(books)


def test_an_instance_that_was_woken_makes_what_it_made_before(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(stage: Stage) -> None:
        (hello,) = await stage.join("monolithic-0")
        assert (hello.awake, hello.device) == (True, "cpu")
        assert hello.weights > 0
        before = await made(stage, 0)
        await stage.ask("monolithic-0", stages.Sleep(), stages.Acknowledged)
        asleep = await stage.inbox.next(stages.InstanceAwake)
        assert (asleep.awake, asleep.trouble) == (False, "")
        worker = stage.h.actors["monolithic-0.stream"]
        assert worker._pipeline is None, "nothing holds the weights"
        with pytest.raises(RemoteFailure, match="no weights in memory") as refused:
            await stage.assign("monolithic-0", work(1))
        assert refused.value.code in UNTRIED

        load = worker._load
        worker._load = without_room
        await stage.ask("monolithic-0", stages.Wake(), stages.Acknowledged)
        assert "has no room" in (await stage.inbox.next(stages.InstanceAwake)).trouble
        worker._load = load
        for _ in range(2):  # asked again, it does so once
            await stage.ask("monolithic-0", stages.Wake(), stages.Acknowledged)
        woken = await stage.inbox.next(stages.InstanceAwake)
        assert (woken.awake, woken.trouble, woken.weights) == (True, "", hello.weights)
        assert await made(stage, 1) == before
        assert not [m for m in stage.inbox._unread if isinstance(m, stages.InstanceAwake)]

        await stage.ask("monolithic-0", stages.Sleep(), stages.Acknowledged)
        await stage.inbox.next(stages.InstanceAwake)
        monkeypatch.setattr("triptych.roles.stream_worker.model_version", lambda files: "another")
        with pytest.raises(FilesChanged, match="while it slept"):
            await worker._bring(worker._stream, worker.premises.model)

    def without_room(device: torch.device) -> PanelPipeline:
        raise torch.OutOfMemoryError("others are there")

    async def made(stage: Stage, number: int) -> bytes:
        await stage.assign("monolithic-0", work(number))
        artifact = (await stage.inbox.next(stages.StageFinished)).artifact
        return bytes((stage.h.topology.state_dir / "artifacts" / artifact.name).read_bytes())

    cluster(body, kind="monolithic")
