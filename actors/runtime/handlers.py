"""The handlers of an actor class, read off its annotations, and `DeferredReply`, which a handler may return."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Coroutine
from typing import Any, Final, Generic, NamedTuple, TypeVar, Union, get_args, get_origin

from triptych.bus import Message

R = TypeVar("R")

_POSITIONAL: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class DeferredReply(Generic[R]):
    """Returned by a handler to answer when a coroutine has finished; meanwhile the actor handles the next messages.

    OTP's `{noreply, State}` followed by `gen_server:reply`. The handler is annotated with `DeferredReply[Reply]`. The
    coroutine runs as a task of the actor: `bus.RefusedError` in it answers the ask, any other exception also crashes
    the actor.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, R]) -> None:
        self.coroutine = coroutine


class Handler(NamedTuple):
    """One method that handles messages."""

    method: str
    """Name of the method."""
    messages: tuple[type[Message], ...]
    """What it takes; more than one when it is annotated with a union."""
    replies: tuple[type[Message], ...]
    """What it may answer; empty for messages that are told, never asked."""


class Handlers(dict[type[Message], Handler]):
    """The handler of each message type."""

    @property
    def messages(self) -> tuple[type[Message], ...]:
        """Every type that is handled, in order of definition."""
        return tuple(self)


def read_handlers(cls: type) -> Handlers:
    """Return the handlers of a class and its bases.

    Raises `TypeError` with a sentence when an annotation cannot be resolved, when a method that takes a message
    is not `async`, takes more than the message, or does not say what it replies, or when two methods take the
    same message.
    """
    found = Handlers()
    for name in _public_functions(cls):
        handler = _read(cls, name)
        if handler is None:
            continue
        for message in handler.messages:
            other = found.setdefault(message, handler)
            if other is not handler:
                raise TypeError(f"{cls.__name__}: {other.method} and {name} both take {message.__name__}")
    return found


def _public_functions(cls: type) -> list[str]:
    names = [name for base in reversed(cls.__mro__) for name in vars(base)]
    return [
        name
        for name in dict.fromkeys(names)
        if not name.startswith("_") and inspect.isfunction(inspect.getattr_static(cls, name))
    ]


def _read(cls: type, name: str) -> Handler | None:
    function: Callable[..., Any] = getattr(cls, name)
    where = f"{cls.__name__}.{name}"
    parameters = list(inspect.signature(function).parameters.values())[1:]
    if not parameters or parameters[0].kind not in _POSITIONAL:
        return None
    only = len(parameters) == 1
    first = parameters[0]
    if first.annotation is inspect.Parameter.empty:
        return None
    messages = _messages(_resolve(function, where, first.annotation, strict=only))
    if not messages:
        return None
    if not only:
        raise TypeError(f"{where} takes a message and more: a handler takes only it, a helper starts with _")
    if not inspect.iscoroutinefunction(function):
        raise TypeError(f"{where} takes a message, so it must be async: a helper starts with _")
    returns = inspect.signature(function).return_annotation
    if returns is inspect.Signature.empty:
        raise TypeError(f"{where} must say what it replies: a Message type, or None for a message that is told")
    return Handler(name, messages, _replies(where, _resolve(function, where, returns, strict=True)))


def _resolve(function: Callable[..., Any], where: str, annotation: Any, *, strict: bool) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        # One annotation at a time: those of other parameters may be there for the type checker alone.
        lone = types.SimpleNamespace(__annotations__={"it": annotation}, __module__=function.__module__)
        return typing.get_type_hints(lone, globalns=inspect.unwrap(function).__globals__)["it"]
    except (NameError, AttributeError, TypeError) as error:
        if not strict:
            return None
        raise TypeError(f"{where}: {annotation!r} cannot be resolved ({error}): import it at run time") from error


def _messages(annotation: Any) -> tuple[type[Message], ...]:
    members = _members(annotation)
    are = [isinstance(member, type) and issubclass(member, Message) for member in members]
    return members if are and all(are) else ()


def _replies(where: str, annotation: Any) -> tuple[type[Message], ...]:
    if annotation is None or annotation is type(None):
        return ()
    if get_origin(annotation) is DeferredReply:
        (annotation,) = get_args(annotation)
    replies = _messages(annotation)
    if not replies:
        raise TypeError(f"{where} replies {annotation!r}: it must be a Message type, a union of some, or None")
    return replies


def _members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)
