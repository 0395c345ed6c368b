"""`DeferredReply`: an answer that takes its time without holding up the mailbox."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

R = TypeVar("R")


class DeferredReply(Generic[R]):
    """What a handler returns to answer when a coroutine has finished, and meanwhile take the next message.

    OTP's `{noreply, State}` followed by `gen_server:reply`. The handler is annotated with `DeferredReply[Reply]`. The
    coroutine runs as a task of the actor: `bus.RefusedError` in it answers the ask, any other exception also crashes
    the actor.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, R]) -> None:
        self.coroutine = coroutine
