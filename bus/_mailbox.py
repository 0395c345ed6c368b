"""The receiving end: a bound ROUTER, one typed decoder, and the queue of what waits for the actor."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

import zmq

from triptych.bus import _inproc
from triptych.bus._address import parse_address
from triptych.bus._authenticator import CurveAuthenticator, open_authenticator
from triptych.bus._binding import Binding
from triptych.bus._dead_letters import DeadLetters
from triptych.bus._errors import BusError, MessageTooLongError, RefusedError
from triptych.bus._local import LocalLink
from triptych.bus._pump import Pump
from triptych.bus._sockets import DEFAULT_OPTIONS, SocketOptions, open_socket
from triptych.bus._wire import (
    BadBodyError,
    BodyDecoder,
    Envelope,
    EnvelopeKind,
    Failure,
    FailureCode,
    Message,
    Sender,
    UnreadableError,
    decode_envelope,
    encode,
)

LINGER_MS: Final = 250
_FENCED_SENDERS: Final = 4096  # generations remembered; more than any deployment has components


Route: TypeAlias = bytes | LocalLink
"""The way back to a sender: the identity of its socket, or the link of one on the same event loop."""


class Delivery:
    """A message that arrived, and how to answer it."""

    __slots__ = ("_expires_at", "_mailbox", "_route", "answered", "envelope", "message")

    def __init__(self, mailbox: Mailbox, route: Route, envelope: Envelope, message: Message) -> None:
        self.envelope = envelope
        self.message = message
        self.answered = False
        self._mailbox = mailbox
        self._route = route
        self._expires_at = time.monotonic() + envelope.timeout_s if envelope.kind is EnvelopeKind.ASK else math.inf

    @property
    def sender(self) -> Sender:
        """The actor that sent the message, and its generation."""
        return Sender(self.envelope.sender, self.envelope.generation)

    @property
    def expired(self) -> bool:
        """Whether the asker's time for the answer has passed since the ask arrived; never for a tell."""
        return time.monotonic() >= self._expires_at

    def reply(self, message: Message) -> None:
        """Answer an ask; the answer to a tell is dropped.

        Never blocks, and raises nothing when the peer fails: an answer that cannot be delivered (asker gone,
        its queue full) is a dead letter of this mailbox, one that is too long reaches the asker as
        "invalid_message". Raises `BusError` when the ask has been answered already.
        """
        if self.envelope.kind is EnvelopeKind.ASK:
            self._answer(EnvelopeKind.REPLY, message)

    def fail(self, code: str, detail: str) -> None:
        """Answer an ask or a tell with `Failure(code, detail)`; the sender of a tell records it as a dead letter.

        Raises `BusError` when the message has been answered already.
        """
        self._answer(EnvelopeKind.FAILURE, Failure(str(code), detail))

    def refuse(self, code: str, detail: str) -> None:
        """Record the message as a dead letter of the mailbox, and answer as `fail` does."""
        self._mailbox.dead_letters.add(code, detail, self.envelope)
        self.fail(code, detail)

    def _answer(self, kind: EnvelopeKind, message: Message) -> None:
        if self.answered:
            raise BusError(f"{self.envelope.sender}'s ask {self.envelope.message_id} is already answered")
        self._mailbox._answer(self._route, self.envelope, kind, message)
        self.answered = True


class Mailbox:
    """Receives the messages of one actor; one consumer awaits `receive`.

    What is not handled is answered with a typed `Failure` where an envelope could be read, and is a dead
    letter in any case: unknown or invalid message, stale generation, full queue, deadline that passed in the queue.

    Args:
        name: the actor's name; messages for another name are refused.
        address: `inproc://NAME`, `ipc:///path` (its folder becomes 0700) or `tcp://host:port`.
        messages: the types this actor accepts; a union of them is the one decoder.
        generation: this incarnation, sent along with every answer.
        capacity: most messages that wait, apart from the one being handled.
        urgent: more messages that this actor accepts, each with the function that answers it as soon as it has
            arrived: they never wait, and find room when the queue is full. The function must not block.
        component_of: returns the component of a sender, by which generations are compared; "" for a sender whose
            generation is not compared. By default every sender is a component.
        options: of its socket.
        local: the open mailboxes of this event loop by address; it is one of them while it is open. Outboxes that were
            given the same ones reach it without its socket.

    Raises:
        AddressError: malformed address.

    """

    def __init__(
        self,
        name: str,
        address: str,
        messages: tuple[type[Message], ...],
        *,
        generation: int = 0,
        capacity: int = 1024,
        urgent: Mapping[type[Message], Callable[[Delivery], None]] | None = None,
        component_of: Callable[[str], str] = str,
        options: SocketOptions = DEFAULT_OPTIONS,
        local: dict[str, Mailbox] | None = None,
    ) -> None:
        self.name = name
        self.address = address
        self.generation = generation
        self.capacity = capacity
        self.options = options
        self.dead_letters = DeadLetters()
        self._parsed = parse_address(address)
        self._urgent = dict(urgent or {})
        self._decoder = BodyDecoder((*messages, *self._urgent))
        self._component_of = component_of
        self._message_ids = itertools.count(1)
        self._generations: dict[str, int] = {}
        self._queue: deque[Delivery] = deque()
        self._consumer: asyncio.Future[None] | None = None
        self._pump: Pump | None = None
        self._binding: Binding | None = None
        self._authenticator: CurveAuthenticator | None = None
        self._local = local if local is not None else {}
        self._links: list[LocalLink] = []

    @property
    def depth(self) -> int:
        """Messages that wait in the queue."""
        return len(self._queue)

    async def start(self) -> None:
        """Bind and begin to receive; raises `AddressError` when the address cannot be bound, or is tcp without keys.

        An ipc file that a killed process left behind is replaced; one that is being served is not.
        """
        socket = open_socket(zmq.ROUTER, self._parsed, self.options)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if self._parsed.scheme == "tcp":
            self._authenticator = open_authenticator(self.options.zmq_context, self.options.accepted_keys)
        try:
            self._binding = Binding(socket, self._parsed, self.address)
        except BaseException:
            socket.close(linger=0)
            self._close_authenticator()
            raise
        self._pump = Pump(socket, self._on_message)
        self._local[self.address] = self

    def link(self, on_answer: Callable[[list[bytes]], None], on_lost: Callable[[], None]) -> LocalLink:
        """Connect an outbox of the same event loop."""
        link = LocalLink(self._take, on_answer, on_lost, 2 * self.options.high_water_mark)
        self._links.append(link)
        return link

    async def receive(self) -> Delivery:
        """Return the next message, in order of arrival; one consumer at a time.

        An ask whose deadline has passed while it waited is refused. Raises `BusError` once the mailbox is closed.
        """
        while (delivery := self.receive_nowait()) is None:
            if self._pump is None:
                raise BusError(f"mailbox {self.name} is not open")
            self._consumer = self._pump.loop.create_future()
            try:
                await self._consumer
            finally:
                self._consumer = None
        return delivery

    def receive_nowait(self) -> Delivery | None:
        """As `receive`, but return None if no message waits."""
        while self._queue:
            delivery = self._queue.popleft()
            if not delivery.expired:
                return delivery
            delivery.refuse(FailureCode.DEADLINE_EXCEEDED, "the deadline passed while it waited")
        return None

    def close(self) -> None:
        """Stop receiving, answer "stopping" to what still waits, remove the ipc file; at once, idempotent.

        ZMQ's own thread has `LINGER_MS` to send the last answers.
        """
        if self._pump is None or self._binding is None:
            return
        while self._queue:
            self._queue.popleft().refuse(FailureCode.STOPPING, f"{self.name} stops")
        self._binding.release()
        self._pump.close(LINGER_MS)
        self._pump = None
        del self._local[self.address]
        while self._links:
            self._links.pop().lose()
        self._close_authenticator()
        if self._parsed.scheme == "inproc":
            _inproc.announce_closed(self._parsed.target)
        self._wake_consumer()

    def _close_authenticator(self) -> None:
        if self._authenticator is not None:
            self._authenticator.close(self.options.accepted_keys)
            self._authenticator = None

    def _on_message(self, frames: list[bytes]) -> None:
        route, *rest = frames
        self._take(route, rest)

    def _take(self, route: Route, frames: list[bytes]) -> None:
        if self._pump is None:
            return  # it came over a link, and the mailbox has closed meanwhile
        try:
            envelope, body = decode_envelope(frames)
        except UnreadableError as error:
            self.dead_letters.add("unreadable", str(error))
            return
        try:
            message = self._validate(envelope, body, len(frames[0]))
        except RefusedError as refused:
            self._refuse(route, envelope, FailureCode(refused.code), refused.detail)
            return
        delivery = Delivery(self, route, envelope, message)
        answer_now = self._urgent.get(type(message))
        if answer_now is not None:
            answer_now(delivery)
        elif len(self._queue) >= self.capacity:
            delivery.refuse(FailureCode.MAILBOX_FULL, f"{self.name} has {self.capacity} messages waiting")
        else:
            self._queue.append(delivery)
            self._wake_consumer()

    def _validate(self, envelope: Envelope, body: memoryview, size: int) -> Message:
        """Return the message; raises `RefusedError` when it is not to be accepted."""
        if envelope.kind is not EnvelopeKind.ASK and envelope.kind is not EnvelopeKind.TELL:
            raise RefusedError(FailureCode.INVALID_MESSAGE, "an answer was sent to a mailbox")
        if size > self.options.max_message_bytes:
            raise RefusedError(
                FailureCode.INVALID_MESSAGE, f"{size} bytes, the limit is {self.options.max_message_bytes}"
            )
        if envelope.to != self.name:
            raise RefusedError(FailureCode.REFUSED, f"for {envelope.to!r}, but this is {self.name!r}")
        try:
            message = self._decoder.decode(body)
        except BadBodyError as error:
            raise RefusedError(error.code, error.detail) from error
        if envelope.generation:
            self._check_generation(self._component_of(envelope.sender), envelope.generation)
        return message

    def _check_generation(self, component: str, generation: int) -> None:
        """Remember the newest generation of a component; raises `RefusedError` for an older one."""
        newest = self._generations.get(component, 0)
        if generation < newest:
            raise RefusedError(FailureCode.STALE_GENERATION, f"generation {generation}, {newest} is known")
        if component and (newest or len(self._generations) < _FENCED_SENDERS):
            self._generations[component] = generation

    def _refuse(self, route: Route, envelope: Envelope, code: FailureCode, detail: str) -> None:
        self.dead_letters.add(code, detail, envelope)
        if envelope.kind is EnvelopeKind.ASK or envelope.kind is EnvelopeKind.TELL:
            self._answer(route, envelope, EnvelopeKind.FAILURE, Failure(code, detail))

    def _answer(self, route: Route, asked: Envelope, kind: EnvelopeKind, message: Message) -> None:
        number = next(self._message_ids)
        head = Envelope(asked.sender, self.name, kind, number, asked.message_id, 0.0, self.generation)
        if self._pump is None:
            self.dead_letters.add("mailbox_closed", "the answer came after the mailbox was closed", head)
            return
        try:
            frame = encode(head, message, self.options.max_message_bytes)
            if isinstance(route, LocalLink):
                route.answer(frame)
            else:
                self._pump.send(route, frame)
        except MessageTooLongError as error:
            self.dead_letters.add(FailureCode.INVALID_MESSAGE, f"the answer: {error}", head)
            self._answer(route, asked, EnvelopeKind.FAILURE, Failure(FailureCode.INVALID_MESSAGE, str(error)))
        except zmq.Again:
            self.dead_letters.add("peer_full", "the asker does not read its answers", head)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.dead_letters.add("peer_gone", "the asker has gone", head)

    def _wake_consumer(self) -> None:
        if self._consumer is not None and not self._consumer.done():
            self._consumer.set_result(None)
