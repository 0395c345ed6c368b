"""Between the ledger's decision and the message that carries it out, the world may have changed."""

from __future__ import annotations

import asyncio

from actors import Actor
from engines.panels import Panel
from roles.errands import Errands
from roles.ledger import Ledger
from roles.request import State, Unit
from tests.roles.books import after, hello, ledger, request, staged


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
    errands = Errands(Actor("head"), books, lambda: None, ())
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
