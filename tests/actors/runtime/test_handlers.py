from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from triptych.actors import Actor, DeferredReply
from triptych.actors.runtime.handlers import Handler
from triptych.bus import Message

if TYPE_CHECKING:
    from collections import OrderedDict  # a name that only the type checker knows


class Add(Message):
    amount: int


class Subtract(Message):
    amount: int


class Note(Message):
    text: str


class Total(Message):
    value: int


class Overflow(Message):
    pass


class Counter(Actor):
    async def change(self, message: Add | Subtract) -> Total | Overflow:
        return Total(message.amount)

    async def note(self, message: Note) -> None:
        pass

    async def started(self) -> None:
        pass

    async def helper(self, number: int) -> int:
        return number

    def plain(self, *numbers: int, **named: int) -> None:
        pass

    def two(self, first: OrderedDict[str, int], second: int) -> None:
        pass

    def bare(self, anything) -> None:  # type: ignore[no-untyped-def]
        pass

    def _private(self, message: Add) -> Total:
        return Total(message.amount)

    @staticmethod
    async def static(message: Add) -> Total:
        return Total(message.amount)

    @property
    def value(self) -> int:
        return 3


class Slow(Counter):
    async def note(self, message: Note) -> None:
        """Takes the place of the base's."""

    async def total(self, message: Overflow) -> DeferredReply[Total | Overflow]:
        return DeferredReply(self._total())

    async def _total(self) -> Total | Overflow:
        return Overflow()


def test_handlers_are_read_off_annotations() -> None:
    change = Handler("change", (Add, Subtract), (Total, Overflow))
    assert Counter.handlers == {Add: change, Subtract: change, Note: Handler("note", (Note,), ())}
    assert Counter.handlers.messages == (Add, Subtract, Note)


def test_handlers_are_inherited_and_overridden() -> None:
    assert Slow.handlers.keys() == {*Counter.handlers, Overflow}
    assert Slow.handlers[Overflow] == Handler("total", (Overflow,), (Total, Overflow))
    assert Actor.handlers == {}


def define(**methods: Any) -> type[Actor]:
    return type("Broken", (Actor,), methods)


async def no_reply(self: Actor, message: Add): ...  # type: ignore[no-untyped-def]


async def wrong_reply(self: Actor, message: Add) -> int:
    return message.amount


async def maybe_reply(self: Actor, message: Add) -> Total | None:
    return None


async def more(self: Actor, message: Add, amount: int) -> Total:
    return Total(amount)


async def unknown(self: Actor, message: OrderedDict[str, int]) -> Total:
    return Total(0)


async def unknown_reply(self: Actor, message: Add) -> OrderedDict[str, int]: ...  # type: ignore[empty-body]


async def good(self: Actor, message: Add) -> Total:
    return Total(message.amount)


def sync(self: Actor, message: Add) -> Total:
    return Total(message.amount)


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        ({"f": no_reply}, r"Broken.f must say what it replies"),
        ({"f": wrong_reply}, r"Broken.f replies <class 'int'>: it must be a Message type"),
        ({"f": maybe_reply}, r"Broken.f replies .*Total \| None: it must be a Message type"),
        ({"f": more}, r"Broken.f takes a message and more"),
        ({"f": unknown}, r"Broken.f: 'OrderedDict\[str, int\]' cannot be resolved .* import it at run time"),
        ({"f": unknown_reply}, r"Broken.f: 'OrderedDict\[str, int\]' cannot be resolved"),
        ({"f": sync}, r"Broken.f takes a message, so it must be async"),
        ({"f": good, "g": good}, r"Broken: f and g both take Add"),
    ],
)
def test_a_bad_annotation_is_refused_when_the_class_is_made(methods: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        define(**methods)
