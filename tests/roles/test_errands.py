"""Between the ledger's decision and the message that carries it out, the world may have changed."""

from __future__ import annotations

import asyncio

from tests.roles.books import a_slot, after, hello, ledger, one_model, request, staged
from triptych.actors import Actor
from triptych.engines.buddy import PAGE
from triptych.engines.panels import Panel
from triptych.roles.errands import Errands
from triptych.roles.ledger import Ledger
from triptych.roles.messages.pool import LeaseView
from triptych.roles.messages.stages import TransferPush
from triptych.roles.messages.work import Renewal, Work
from triptych.roles.request import State, Unit


def assigned_to_a_denoiser() -> tuple[Ledger, Unit]:
    books = ledger()
    for kind in ("encoder", "denoiser"):
        books.hello(hello(f"{kind}-0", slots=2), 0.0)
    books.accept(request(), 0.0)
    after(books)
    unit = books.units["r/0"]
    books.started(unit.work, "encoder-0", Panel.ENCODER, 1.0)
    books.staged(staged(unit.work, "encoder", 1), 2.0)
    after(books)
    assert unit.instance == "denoiser-0"
    return books, unit


def send(books: Ledger, unit: Unit, work: object = None) -> None:
    errands = Errands(Actor("head"), one_model(books), lambda: None, ())
    asyncio.run(errands._assign("denoiser-0", unit, work or unit.work))  # type: ignore[arg-type]


def test_work_whose_tensors_are_lost_before_it_is_sent_starts_over_at_no_cost() -> None:
    books, unit = assigned_to_a_denoiser()
    books.pool_down("pool", 2, 3.0)
    send(books, unit)
    assert unit.state is State.ENCODER_WAITING
    assert (unit.instance, unit.failures) == ("", 0)
    assert books.fleet.instances["denoiser-0"].credits == 2


def test_work_that_is_cancelled_before_it_is_sent_is_not_sent() -> None:
    books, unit = assigned_to_a_denoiser()
    work = unit.work
    books.cancel("r", "enough", 3.0)
    send(books, unit, work)
    assert unit.state is State.CANCELLED
    assert books.fleet.instances["denoiser-0"].credits == 2


def test_tensors_of_another_unit_come_with_what_makes_them_this_units_own() -> None:
    books = ledger(cache=PAGE)
    for kind in ("encoder", "denoiser"):
        books.hello(hello(f"{kind}-0", slots=2), 0.0)
    books.accept(request(), 0.0)
    books.accept(request("second", seed=7, num_inference_steps=9), 0.0)
    after(books)
    books.staged(staged(books.units["r/0"].work, "encoder", 1, seedless=True), 1.0)
    after(books)
    errands = Errands(Actor("head"), one_model(books), lambda: None, ())

    def order(unit_id: str) -> TransferPush:
        unit = books.units[unit_id]
        message = asyncio.run(errands._order("denoiser-0", unit, unit.work))
        assert isinstance(message, TransferPush)
        return message

    first, second = order("r/0"), order("second/0")
    assert first.renewal is None
    assert second.renewal == Renewal({"prompt": "x", "num_inference_steps": 9}, 7)
    assert first.source == second.source

    unneeded = {
        number: errands._unneeded(LeaseView(a_slot(number).lease, "sealed", "encoder-0", 1, Work(unit_id, attempt)))
        for number, unit_id, attempt in ((1, "r/0", 1), (2, "gone/0", 1), (3, "r/0", 0), (4, "r/0", 1))
    }
    assert unneeded == {1: False, 2: True, 3: True, 4: False}
    books.cancel("r", "enough", 2.0)
    books.cancel("second", "enough", 2.0)
    view = LeaseView(a_slot(1).lease, "sealed", "encoder-0", 1, Work("r/0", 1))
    assert not errands._unneeded(view), "the cache keeps it"
    books.clear_cache()
    assert errands._unneeded(view)
