"""`Actor`: a class whose handlers are read off their annotations."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import structlog

from triptych.actors.child_state import ChildState
from triptych.actors.runtime.handlers import Handlers, read_handlers

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client.metrics_core import Metric

    from triptych.actors.runtime.address_book import AddressBook
    from triptych.bus import Outbox, Reference, Sender

current_sender: ContextVar[Sender] = ContextVar("current_sender")
"""Sender of the message that this task handles; read it as `Actor.sender`. A test that calls a handler sets it."""


@dataclass(frozen=True, slots=True)
class Incarnation:
    """One run of a component: what the actors of its process have in common."""

    address_book: AddressBook
    """Where these and other actors are."""
    generation: int = 0
    """Never repeats and only grows; 0 outside a topology."""
    restarts: int = 0
    """How often the component has been restarted."""
    kind: str = ""
    """Kind of the component, for inspections: "head", "denoiser", ...; "" outside a topology."""


class Actor:
    """One mailbox, one state, one handler at a time.

    Handlers are the public methods whose single parameter is annotated with a `Message` type (or a union of
    some); the return annotation is the type of the reply, or None for a message that is only told:

        class Counter(Actor):
            async def add(self, message: Add) -> Total: ...

    A handler that raises `bus.RefusedError` answers with that failure. Anything else that it raises is answered as
    `handler_failed` and crashes the actor: its process exits, and the supervisor decides.
    """

    handlers: ClassVar[Handlers] = Handlers()
    """What this class accepts; read once, when the class is made."""

    mailbox_capacity: ClassVar[int] = 1024
    """Messages that may wait for a handler; the sender of one more is told that the mailbox is full."""

    name: str
    """"head", "denoiser-0", "denoiser-0.transfer", ..."""
    generation: int
    """Generation of this incarnation; never repeats. Set before `started`."""
    restarts: int
    """How often this component has been restarted. Set before `started`."""
    log: structlog.stdlib.BoundLogger
    """Bound to the name; within a handler also to the `request_id` of a message that has one."""
    outbox: Outbox
    """Sends this actor's messages. Set before `started`."""
    address_book: AddressBook
    """The addresses of other actors. Set before `started`."""
    start_s: dict[str, float]
    """Seconds that parts of `started` took, such as "weights"; for the log and the supervisor."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.handlers = read_handlers(cls)

    def __init__(self, name: str) -> None:
        self.name = name
        self.log = structlog.stdlib.get_logger("actor").bind(actor=name)
        self.state = ChildState.LOADING
        self.detail = ""
        self.start_s = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._on_state: Callable[[], None] = _ignore_state_change
        self._on_crash: Callable[[BaseException], None] = _raise

    @property
    def sender(self) -> Sender:
        """Who sent the message that is being handled: OTP's `From`.

        Known in a handler, in the coroutine of its `DeferredReply`, and in the tasks that it spawns, where it stays
        the same whatever is handled meanwhile. `address_book.component_of(self.sender.name)` is its component.
        Raises `LookupError` where no message is being handled.
        """
        return current_sender.get()

    def caught_up(self) -> None:
        """Do what is done once for all messages that waited: called when none waits any more, or many were handled.

        Under load it is called for groups of messages, and at rest after each one.
        """

    async def started(self) -> None:
        """Load what the actor needs; the actor is ready when this returns, unless it has set another state.

        Messages wait meanwhile. Raises `StartError` with a sentence when it can never work, and
        `StartDelayedError` when it cannot now.
        """

    async def stopping(self) -> None:
        """Finish or give back what is running. Messages are still handled; bounded by `shutdown_s`."""

    def stats(self) -> dict[str, int | float | str | bool]:
        """Return more about the actor for an `Inspection`, such as its slots; must not block."""
        return {}

    def metrics(self) -> Iterable[Metric]:
        """Return what is to be read off the actor when metrics are asked for, such as lengths; must not block."""
        return ()

    def watchdog(self) -> str | None:
        """Return a reason if work hangs, else None. Called before each heartbeat, which a reason withholds."""
        return None

    def set_state(self, state: ChildState, detail: str = "") -> None:
        """Set the state of this actor, which `Inspect` and the supervisor see."""
        if (state, detail) != (self.state, self.detail):
            self.state, self.detail = state, detail
            self._on_state()

    def reference(self, name: str) -> Reference:
        """Return a component ("head") or an actor within one ("denoiser-0.transfer"), to ask or tell it."""
        return self.outbox.reference(name, self.address_book.address(name))

    def spawn(self, coroutine: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        """Run a coroutine as long as the actor lives; an exception in it crashes the actor."""
        task = asyncio.get_running_loop().create_task(coroutine, name=f"{self.name}:{name}")
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._on_crash(error)


def _ignore_state_change() -> None:
    """No-op, for an actor that is not in a runtime."""


def _raise(error: BaseException) -> None:
    raise error
