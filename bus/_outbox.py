"""The sending end: one `Outbox` for each actor, one `Reference` for each peer that it talks to."""

from __future__ import annotations

import itertools
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

import zmq

from triptych.bus._address import Address, parse_address
from triptych.bus._connection import Connection
from triptych.bus._dead_letters import DeadLetters
from triptych.bus._envelope import Envelope, EnvelopeKind
from triptych.bus._errors import UnreachableError
from triptych.bus._message import Message
from triptych.bus._sockets import CurveKeys
from triptych.bus._wire import DEFAULT_MAX_MESSAGE_BYTES, decoder_of, encode

R = TypeVar("R", bound=Message)


class Outbox:
    """Everything one actor incarnation sends leaves through here, all on one event loop.

    Args:
        name: the sending actor's name.
        generation: its incarnation; 0 = an unfenced client.
        high_water_mark: most asks outstanding with one peer. As many messages always find room in the queue
            towards it; at twice as many it is full.
        max_message_bytes: longest message that may be sent.
        dead_letters: where to record refused tells and late answers, by default a ring of its own.
        context: default `zmq.Context.instance()`.
        curve: key pair, required for tcp.

    """

    def __init__(
        self,
        name: str,
        generation: int = 0,
        *,
        high_water_mark: int = 1024,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        dead_letters: DeadLetters | None = None,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        curve: CurveKeys | None = None,
    ) -> None:
        self.name = name
        self.generation = generation
        self.high_water_mark = high_water_mark
        self.max_message_bytes = max_message_bytes
        self.dead_letters = dead_letters or DeadLetters()
        self.context = context
        self.curve = curve
        self.closed = False
        self.message_ids = itertools.count(1)
        self._references: dict[tuple[str, str], Reference] = {}

    def reference(self, name: str, address: str) -> Reference:
        """Return the actor `name` at `address`; the same object each time. Connects at its first use.

        Raises `AddressError` when the address is malformed.
        """
        key = (name, address)
        reference = self._references.get(key)
        if reference is None:
            reference = self._references[key] = Reference(self, name, address)
        return reference

    def close(self) -> None:
        """Close every connection; outstanding asks fail with `UnreachableError`, unsent tells are dropped."""
        self.closed = True
        for reference in self._references.values():
            reference._disconnect()


class Reference:
    """A peer: ask it, tell it, or wait until it goes down.

    A peer that is not there yet is waited for. When an established connection is lost, the outstanding asks
    fail at once, whatever was still queued towards the dead incarnation is dropped, and the next use
    connects anew: everything sent after the loss goes to the successor and nothing sent before it.
    """

    def __init__(self, outbox: Outbox, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self._outbox = outbox
        self._parsed: Address = parse_address(address)
        self._connection: Connection | None = None

    async def ask(self, message: Message, *replies: type[R], timeout_s: float) -> R:
        """Send and wait for the answer, one of the types `replies`.

        Raises:
            AskTimeoutError: no answer within `timeout_s` seconds.
            MailboxFullError: the peer's queue, or the queue towards it, is full.
            UnreachableError: the connection was lost meanwhile; the peer may or may not have handled the message.
            HandshakeRefusedError: the peer does not have the same keys; an `UnreachableError`.
            RemoteError: the peer answered with a `Failure`, or with something else than `replies`.
            MessageTooLongError: it was not sent.

        """
        decoder = decoder_of(*replies)
        connection = self._connect()
        connection.check_room()
        message_id = next(self._outbox.message_ids)
        connection.send(message_id, self._frame(EnvelopeKind.ASK, message_id, max(timeout_s, 0.0), message))
        return cast(R, await connection.answer(message_id, decoder, timeout_s))

    def tell(self, message: Message) -> None:
        """Send and forget; needs a running loop.

        Best effort: it is lost without a word when the peer dies before handling it, or before it left this
        process. What the peer refuses comes back as a dead letter of the outbox. Raises `MailboxFullError` when
        the queue towards the peer is full, and `MessageTooLongError`.
        """
        message_id = next(self._outbox.message_ids)
        self._connect().send(message_id, self._frame(EnvelopeKind.TELL, message_id, 0.0, message))

    def down(self) -> Coroutine[Any, Any, None]:
        """Await it to learn that the peer went down: its process died, or it closed the mailbox.

        It watches the connection of the moment of the call, not of the first await, and connects if there is
        none; a peer that is not there yet has to come before it can go, or to refuse the handshake. Raises
        `UnreachableError` when this side closes.
        """
        return self._connect().down()

    def _frame(self, kind: EnvelopeKind, message_id: int, timeout_s: float, message: Message) -> bytes:
        outbox = self._outbox
        envelope = Envelope(self.name, outbox.name, kind, message_id, 0, timeout_s, outbox.generation)
        return encode(envelope, message, outbox.max_message_bytes)

    def _connect(self) -> Connection:
        connection = self._connection
        if connection is None:
            outbox = self._outbox
            if outbox.closed:
                raise UnreachableError(f"the outbox of {outbox.name} is closed")
            connection = self._connection = Connection(
                self.name,
                self.address,
                self._parsed,
                dead_letters=outbox.dead_letters,
                high_water_mark=outbox.high_water_mark,
                max_message_bytes=outbox.max_message_bytes,
                context=outbox.context,
                curve=outbox.curve,
                lost=self._on_lost,
            )
        return connection

    def _on_lost(self) -> None:
        self._connection = None

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
