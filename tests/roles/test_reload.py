"""Changed weights: no mix of them is served, and a reload goes over to new ones without losing a request."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.roles.books import KINDS, a_slot, after, finished, hello, ledger, request, staged
from triptych.engines.panels import Panel
from triptych.roles.effects import Assign, Release, Restart
from triptych.roles.ledger import Ledger
from triptych.roles.messages.stages import InstanceHello
from triptych.roles.request import State, Unit

OLD, NEW = "old", "new"


def joins(books: Ledger, name: str, model: str, generation: int = 1) -> bool:
    message: InstanceHello = replace(hello(name, generation=generation, slots=2), model=model)
    admitted = books.admit(name, model)
    if admitted:
        books.hello(message, 0.0)
    return admitted


@pytest.fixture
def books() -> Ledger:
    books = ledger(cache=1 << 20)
    for kind in KINDS:
        assert joins(books, f"{kind}-0", OLD)
    return books


def encoded(books: Ledger, id_: str, lease: int) -> Unit:
    """A request whose encoder's output is at rest."""
    books.accept(request(id_, prompt=id_), 0.0)
    after(books)
    unit = books.units[f"{id_}/0"]
    assert books.started(unit.work, "encoder-0", Panel.ENCODER, 1.0)
    assert books.staged(staged(unit.work, "encoder", lease, seedless=True), 2.0)
    return unit


def comes_back(books: Ledger, name: str) -> None:
    books.instance_down(name, "its process ended", 5.0)
    assert joins(books, name, NEW, generation=2)


def test_an_instance_with_other_weights_than_the_rest_is_turned_away(books: Ledger) -> None:
    books.instance_down("encoder-0", "its process ended", 1.0)
    assert not joins(books, "encoder-0", NEW)
    assert books.refused == {"encoder-0": NEW}
    assert joins(books, "encoder-0", OLD), "the files are as they were again"
    assert not books.refused


def test_when_nobody_is_left_with_the_old_weights_the_new_ones_are_taken(books: Ledger) -> None:
    unit = encoded(books, "r", 1)
    for kind in KINDS:
        books.instance_down(f"{kind}-0", "its process ended", 3.0)
    assert joins(books, "denoiser-0", NEW)
    effects = after(books)
    assert Release((a_slot(1).lease,)) in effects, "what old weights made is of no use to new ones"
    assert unit.state is State.ENCODER_WAITING
    assert not unit.failures


def test_a_reload_finishes_what_was_begun_and_restarts_one_idle_instance_after_the_other(books: Ledger) -> None:
    begun = encoded(books, "begun", 1)
    assert books.reload(NEW) == ("decoder-0", "denoiser-0", "encoder-0")
    books.accept(request("fresh"), 3.0)
    effects = after(books)
    assert [e for e in effects if isinstance(e, Assign | Restart)] == [
        Restart("encoder-0"),
        Assign("denoiser-0", "begun/0"),
    ]
    assert not [e for e in after(books) if isinstance(e, Restart)], "one at a time"
    comes_back(books, "encoder-0")
    assert Assign("encoder-0", "fresh/0") in after(books)
    fresh = books.units["fresh/0"]
    assert books.staged(staged(fresh.work, "encoder", 2, seedless=True), 6.0)
    assert not [e for e in after(books) if isinstance(e, Assign | Restart)], "the old denoiser has work, the new none"
    assert books.staged(staged(begun.work, "denoiser", 3), 7.0)
    assert [e for e in after(books) if isinstance(e, Assign | Restart)] == [
        Restart("denoiser-0"),
        Assign("decoder-0", "begun/0"),
    ]
    comes_back(books, "denoiser-0")
    assert Assign("denoiser-0", "fresh/0") in after(books)
    assert books.finished(finished(begun.work), 8.0)
    assert Restart("decoder-0") in after(books)
    comes_back(books, "decoder-0")
    after(books)
    assert not books.reloading
    assert books.reload(NEW) == ()
    assert {i.model for i in books.fleet.instances.values()} == {NEW}


def test_prompts_that_old_encoders_encoded_are_encoded_anew(books: Ledger) -> None:
    unit = encoded(books, "r", 1)
    assert len(books.staging.cache) == 1
    books.reload(NEW)
    assert len(books.staging.cache) == 0
    books.accept(request("again", prompt="r"), 3.0)
    after(books)
    assert books.units["again/0"].state is State.ENCODER_WAITING
    assert books.staged(staged(unit.work, "denoiser", 3), 7.0) is not None


def test_what_an_old_encoder_makes_during_a_reload_is_not_kept_for_others(books: Ledger) -> None:
    books.accept(request("r"), 0.0)
    after(books)
    unit = books.units["r/0"]
    assert books.started(unit.work, "encoder-0", Panel.ENCODER, 1.0)
    books.reload(NEW)
    assert books.staged(staged(unit.work, "encoder", 1, seedless=True), 2.0)
    assert len(books.staging.cache) == 0
    assert Assign("denoiser-0", "r/0") in after(books)


def test_a_unit_starts_over_when_the_last_instance_with_its_weights_dies(books: Ledger) -> None:
    unit = encoded(books, "r", 1)
    books.reload(NEW)
    after(books)
    comes_back(books, "encoder-0")
    comes_back(books, "denoiser-0")
    assert Assign("encoder-0", "r/0") in after(books)
    assert (unit.state, unit.model) == (State.ENCODER_WAITING, NEW)
    assert not unit.deaths
