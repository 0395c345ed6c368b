"""One actor and its mailbox: runs the handlers one at a time, and answers system messages meanwhile."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import structlog

from triptych.actors.child_state import ChildState
from triptych.actors.errors import OF_THE_MACHINE, ActorCrashedError, StartDelayedError, StartError, describe
from triptych.actors.runtime.actor import current_sender
from triptych.actors.runtime.handlers import DeferredReply, Handler
from triptych.actors.runtime.system_messages import SYSTEM_MESSAGES, DeadLetterQuery, DeadLetterReport
from triptych.bus import (
    AddressError,
    DeadLetter,
    Delivery,
    EnvelopeKind,
    FailureCode,
    Mailbox,
    Outbox,
    RefusedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from triptych.actors.runtime.actor import Actor, Incarnation

_MAX_RECENT_DEAD_LETTERS: Final = 100
MAX_HANDLED: Final = 16
"""Most messages between two calls of `Actor.caught_up`: some 5 ms of the head."""
TURN: Final = 4
"""Messages after which the loop has a turn for its other work, such as the answers to those before."""


class ActorCell:
    """Runs one actor.

    Messages for the actor's handlers wait in its mailbox, bounded by the actor's `mailbox_capacity`. System messages
    are answered on arrival, also while a handler runs and while the actor loads.

    Args:
        actor: not yet started.
        incarnation: of its component.
        local: the open mailboxes of the process, by address.
        on_system: answers a system message on arrival, so it must not block.
        on_crash: told what went wrong when the actor cannot go on.

    """

    def __init__(
        self,
        actor: Actor,
        incarnation: Incarnation,
        *,
        local: dict[str, Mailbox],
        on_system: Callable[[ActorCell, Delivery], None],
        on_crash: Callable[[Actor, BaseException], None],
    ) -> None:
        self.actor = actor
        self.started = False
        address_book = incarnation.address_book
        self.mailbox = Mailbox(
            actor.name,
            address_book.bind_address(actor.name),
            actor.handlers.messages,
            generation=incarnation.generation,
            capacity=actor.mailbox_capacity,
            urgent=dict.fromkeys(SYSTEM_MESSAGES, self._answer_system_message),
            component_of=address_book.component_of,
            options=address_book.socket_options,
            local=local,
        )
        actor.generation, actor.restarts = incarnation.generation, incarnation.restarts
        actor.address_book = address_book
        actor.outbox = Outbox(actor.name, incarnation.generation, address_book.socket_options, local)
        self._on_system = on_system
        self._crash: Callable[[BaseException], None] = lambda error: on_crash(actor, error)
        actor._on_crash = self._crash
        self._handling: asyncio.Task[None] | None = None
        self._closing = False

    async def open(self) -> None:
        """Bind the mailbox and answer system messages; raises `StartDelayedError` for an address that is taken."""
        try:
            await self.mailbox.start()
        except AddressError as error:
            raise StartDelayedError(str(error)) from error

    async def start(self) -> None:
        """Start the actor, then begin to handle messages.

        Raises `StartError`, `StartDelayedError` and `ActorCrashedError`.
        """
        _bind_log(self.actor)
        try:
            await self.actor.started()
        except StartError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
                raise StartDelayedError(describe(error)) from error
            raise ActorCrashedError(self.actor.name, error) from error
        self.started = True
        if self.actor.state == ChildState.LOADING:
            self.actor.set_state(ChildState.READY)
        self._handling = asyncio.get_running_loop().create_task(
            self._run_handlers(), name=f"{self.actor.name}:handlers"
        )
        self._handling.add_done_callback(self._on_task_done)

    async def close(self) -> None:
        """Cancel what still runs, tell who still waits, close the sockets."""
        self._closing = True
        tasks = [*self.actor._tasks, *([self._handling] if self._handling else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # what they raise has reached _done
        self.mailbox.close()
        self.actor.outbox.close()

    def _answer_system_message(self, delivery: Delivery) -> None:
        try:
            if isinstance(delivery.message, DeadLetterQuery):
                delivery.reply(self._dead_letters())
            else:
                self._on_system(self, delivery)
        except Exception as error:  # noqa: BLE001  an inspection runs `Actor.stats`: its errors are crashes
            self._crash(error)

    def _dead_letters(self) -> DeadLetterReport:
        boxes = (self.mailbox.dead_letters, self.actor.outbox.dead_letters)
        recent: list[DeadLetter] = sorted((letter for box in boxes for letter in box.recent), key=lambda x: x.at)
        return DeadLetterReport(sum(box.count for box in boxes), tuple(recent[-_MAX_RECENT_DEAD_LETTERS:]))

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._crash(error)

    async def _run_handlers(self) -> None:
        _bind_log(self.actor)
        handled = 0
        while True:
            if handled % TURN == 0:
                await asyncio.sleep(0)
            delivery = self.mailbox.receive_nowait() if handled < MAX_HANDLED else None
            if delivery is None:
                self.actor.caught_up()
                if handled == MAX_HANDLED:
                    await asyncio.sleep(0)  # what follows goes out before the next messages are handled
                handled, delivery = 0, await self.mailbox.receive()
            handled += 1
            current_sender.set(delivery.sender)
            await self._handle(delivery)

    async def _handle(self, delivery: Delivery) -> None:
        message = delivery.message
        handler = self.actor.handlers[type(message)]
        asked = delivery.envelope.kind is EnvelopeKind.ASK
        if asked and not handler.replies:
            what = f"{type(message).__name__} is told, never asked: it has no reply"
            delivery.refuse(FailureCode.REFUSED, what)
            return
        request_id = getattr(message, "request_id", None)
        if request_id is not None:
            structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self._answer(delivery, handler, getattr(self.actor, handler.method)(message))
        finally:
            if request_id is not None:
                structlog.contextvars.unbind_contextvars("request_id")

    async def _answer(self, delivery: Delivery, handler: Handler, making: Coroutine[Any, Any, Any]) -> None:
        try:
            reply = await making
            if isinstance(reply, DeferredReply):
                self.actor.spawn(self._answer(delivery, handler, reply.coroutine), name=handler.method)
            elif delivery.envelope.kind is EnvelopeKind.ASK:
                if not isinstance(reply, handler.replies):
                    what = f"{handler.method} replied {reply!r} to {type(delivery.message).__name__}"
                    raise TypeError(what)  # noqa: TRY301
                delivery.reply(reply)
        except RefusedError as refused:
            delivery.fail(refused.code, refused.detail)
        except asyncio.CancelledError as error:
            delivery.fail(FailureCode.STOPPING, f"{self.actor.name} stops")
            if self._closing:
                raise
            # Something that the handler waited for was cancelled: as a cancellation it would end this task
            # without a word, and the actor would never handle a message again.
            raise RuntimeError(f"{handler.method} was cancelled from within") from error
        except Exception as error:
            if not delivery.answered:
                delivery.fail(FailureCode.HANDLER_FAILED, describe(error))
            raise


def _bind_log(actor: Actor) -> None:
    structlog.contextvars.bind_contextvars(actor=actor.name)
