"""The sending end: an `Outbox` for each actor, a `Reference` for each peer, a `_Connection` while the peer lives."""

from __future__ import annotations

import asyncio
import errno
import itertools
import math
import struct
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, cast

import zmq

from triptych.backoff import backoff_s
from triptych.bus import _inproc
from triptych.bus._address import Address, parse_address
from triptych.bus._dead_letters import DeadLetters
from triptych.bus._errors import (
    AskTimeoutError,
    BusError,
    HandshakeRefusedError,
    MailboxFullError,
    RemoteError,
    UnreachableError,
)
from triptych.bus._local import LocalLink
from triptych.bus._pump import Pump
from triptych.bus._sockets import DEFAULT_OPTIONS, RECONNECT_FIRST_MS, RECONNECT_LAST_MS, SocketOptions, open_socket
from triptych.bus._wire import (
    BadBodyError,
    BodyDecoder,
    Envelope,
    EnvelopeKind,
    FailureCode,
    Message,
    UnreadableError,
    decode_envelope,
    decode_failure,
    decoder_of,
    encode,
)

if TYPE_CHECKING:
    from triptych.bus._mailbox import Mailbox

R = TypeVar("R", bound=Message)

_EVENT: Final = struct.Struct("=Hi")
_ESTABLISHED: Final = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
_DISCONNECTED: Final = int(zmq.EVENT_DISCONNECTED)
_RETRIES: Final = int(zmq.EVENT_CONNECT_RETRIED)
_REFUSED_HERE: Final = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
_NO_CURVE: Final = int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
_HANDSHAKE_BROKEN_OFF: Final = int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
# A peer that cannot read our greeting closes the connection, and ZMQ tries again every 20 ms for ever. So does one that
# dies in the middle of a handshake, but not this often within this many seconds.
_MAX_FAILED_HANDSHAKES: Final = 3
_FAILED_HANDSHAKES_WITHIN_S: Final = 1.0
# ZMQ does not try again after a refusal, or does so 40 times a second: a new connection waits instead.
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 2.0
_keys = itertools.count(1)


class Outbox:
    """Sends the messages of one incarnation of an actor, on one event loop.

    Args:
        name: the sending actor's name.
        generation: its incarnation; 0 = an unfenced client.
        options: of its sockets.
        local: the open mailboxes of the same event loop, by address; those are reached without sockets.

    """

    def __init__(
        self,
        name: str,
        generation: int = 0,
        options: SocketOptions = DEFAULT_OPTIONS,
        local: Mapping[str, Mailbox] | None = None,
    ) -> None:
        self.name = name
        self.generation = generation
        self.options = options
        self.local: Mapping[str, Mailbox] = local if local is not None else {}
        self.dead_letters = DeadLetters()
        """Refused tells and late answers."""
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
    connects anew: everything sent after the loss goes to the successor and nothing sent before it. After a
    refused handshake the next connection pauses first, longer after each one, and what is sent meanwhile waits.
    """

    def __init__(self, outbox: Outbox, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self._outbox = outbox
        self._parsed: Address = parse_address(address)
        self._connection: _Connection | None = None
        self._refusals = 0  # handshakes, since the last one that succeeded
        self._refusal: HandshakeRefusedError | None = None

    async def ask(self, message: Message, *replies: type[R], timeout_s: float) -> R:
        """Send and wait for the answer, one of the types `replies`.

        Raises:
            AskTimeoutError: no answer within `timeout_s` seconds.
            MailboxFullError: the peer's queue, or the queue towards it, is full.
            UnreachableError: the connection was lost meanwhile; the peer may or may not have handled the message.
            HandshakeRefusedError: one side does not accept the other's key; an `UnreachableError`.
            AddressError: there is no host of the system at the peer's address.
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

        Best effort: it is lost silently when the peer dies before it handles the message, or this process before
        the message is sent. What the peer refuses comes back as a dead letter of the outbox. Raises
        `MailboxFullError` when the queue towards the peer is full, and `MessageTooLongError`.
        """
        message_id = next(self._outbox.message_ids)
        self._connect().send(message_id, self._frame(EnvelopeKind.TELL, message_id, 0.0, message))

    def down(self) -> Coroutine[Any, Any, None]:
        """Return a coroutine that ends when the peer goes down: its process died, or it closed the mailbox.

        It watches the connection as of this call, not of the first await, and connects if there is none. A peer that
        is not there yet is waited for; one that refuses the handshake is down. Raises `UnreachableError` when this
        side closes.
        """
        return self._connect().down()

    def _frame(self, kind: EnvelopeKind, message_id: int, timeout_s: float, message: Message) -> bytes:
        outbox = self._outbox
        envelope = Envelope(self.name, outbox.name, kind, message_id, 0, timeout_s, outbox.generation)
        return encode(envelope, message, outbox.options.max_message_bytes)

    def _connect(self) -> _Connection:
        connection = self._connection
        if connection is None:
            outbox = self._outbox
            if outbox.closed:
                raise UnreachableError(f"the outbox of {outbox.name} is closed")
            connection = self._connection = _Connection(
                self.name,
                self.address,
                self._parsed,
                outbox.options,
                dead_letters=outbox.dead_letters,
                lost=self._on_lost,
                refusal=self._refusal,
                pause_s=self._pause_s(),
                mailbox=outbox.local.get(self.address),
            )
        return connection

    def _pause_s(self) -> float:
        if not self._refusals:
            return 0.0
        return backoff_s(self._refusals - 1, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S)

    def _on_lost(self, error: UnreachableError) -> None:
        self._connection = None
        self._refusal = error if isinstance(error, HandshakeRefusedError) else None
        self._refusals = self._refusals + 1 if self._refusal else 0

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _Ask(NamedTuple):
    answer: asyncio.Future[Message]
    decoder: BodyDecoder
    expires_at: float  # loop time, seconds
    timeout_s: float


class _Connection:
    """One connection to one peer: a DEALER and its monitor, or a local link, and the asks that wait for an answer.

    It is not used again after a loss. A new one for each incarnation of the peer keeps its messages apart: ZMQ would
    send what is queued to the successor, after the asks had failed.
    """

    def __init__(
        self,
        name: str,
        text: str,
        address: Address,
        options: SocketOptions,
        *,
        dead_letters: DeadLetters,
        lost: Callable[[UnreachableError], None],
        refusal: HandshakeRefusedError | None,
        pause_s: float,
        mailbox: Mailbox | None,
    ) -> None:
        self._peer = f"{name} at {text}"
        self._inproc = address.target if address.scheme == "inproc" else None
        self._dead_letters = dead_letters
        self._high_water_mark = options.high_water_mark
        self._lost = lost
        self._refusal = refusal  # of the connection before: why there is none yet
        self._options = options
        self._text = text
        self._address = address
        self._endpoint = ""  # that ZMQ connects to
        self._asks: dict[int, _Ask] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._unsent: dict[int, bytes] = {}  # frames by message number, until the connection is established
        self._established = address.scheme == "inproc"  # which ZMQ's monitor does not see
        self._ended = asyncio.Event()
        self._closed_here = False
        self._failed_handshakes: deque[float] = deque(maxlen=_MAX_FAILED_HANDSHAKES)
        self._key = next(_keys)
        self._loop = asyncio.get_running_loop()
        self._monitor: Pump | None = None
        self._connecting: asyncio.TimerHandle | None = None
        self._pump: Pump | LocalLink
        if mailbox is not None:
            self._pump, self._established = mailbox.link(self._on_message, self._on_disconnected), True
            return
        socket = open_socket(zmq.DEALER, address, options)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_FIRST_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_LAST_MS)
        self._socket = socket
        self._monitor = self._watch(options.zmq_context, socket)
        self._pump = Pump(socket, self._on_message)
        if pause_s:
            self._connecting = self._loop.call_later(pause_s, self._connect)
        else:
            self._connect()

    def check_room(self) -> None:
        """Raise `MailboxFullError` when `high_water_mark` asks are outstanding: so every answer has room."""
        if len(self._asks) >= self._high_water_mark:
            raise MailboxFullError(f"{len(self._asks)} asks to {self._peer} are outstanding")

    def send(self, message_id: int, frame: bytes) -> None:
        """Queue the frame of message `message_id` towards the peer; raises `MailboxFullError`.

        ZMQ gets it once the connection is established: an ask that is given up before is never sent.
        """
        if not self._established:
            if len(self._unsent) >= 2 * self._high_water_mark:
                raise self._queue_full_error()
            self._unsent[message_id] = frame
            return
        try:
            self._pump.send(frame)
        except zmq.Again:
            raise self._queue_full_error() from None

    async def answer(self, message_id: int, decoder: BodyDecoder, timeout_s: float) -> Message:
        """Wait for the answer to message `message_id`; raises as `Reference.ask` does."""
        answer: asyncio.Future[Message] = self._loop.create_future()
        expires_at = self._loop.time() + timeout_s
        self._asks[message_id] = _Ask(answer, decoder, expires_at, timeout_s)
        if expires_at < self._timer_at:
            self._set_timer(expires_at)
        try:
            return await answer
        finally:
            self._asks.pop(message_id, None)
            self._unsent.pop(message_id, None)

    async def down(self) -> None:
        """Return when the established connection is lost or refused; raises `UnreachableError` after `close`."""
        await self._ended.wait()
        if self._closed_here:
            raise UnreachableError(f"this side closed its connection to {self._peer}")

    def close(self) -> None:
        """Close from this side."""
        self._closed_here = True
        self._close(UnreachableError(f"this side closed its connection to {self._peer}"))

    def _watch(self, context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes]) -> Pump | None:
        if self._inproc is not None:
            _inproc.watch(self._inproc, self._key, self._on_disconnected)
            return None
        endpoint = f"inproc://bus.monitor.{self._key}"
        seen = _ESTABLISHED | _DISCONNECTED | _HANDSHAKE_BROKEN_OFF | _REFUSED_HERE | _NO_CURVE
        socket.monitor(endpoint, seen | _RETRIES if self._options.locate else seen)
        events = context.socket(zmq.PAIR)
        events.setsockopt(zmq.RCVHWM, 0)  # no limit: at one, ZMQ's thread would block, and with it all sockets
        events.connect(endpoint)
        return Pump(events, self._on_monitor_event)

    def _on_monitor_event(self, frames: list[bytes]) -> None:
        event, value = _EVENT.unpack(frames[0])
        if event == _ESTABLISHED:
            self._established = True
            for frame in self._unsent.values():
                self._pump.send(frame)  # never full: ZMQ's queue has room for as many, and is empty
            self._unsent.clear()
        elif event == _DISCONNECTED and self._established:
            self._on_disconnected()
        elif event == _RETRIES and not self._established:
            self._connect()
        elif event == _REFUSED_HERE:
            self._on_refused(own_key=True)
        elif event == _NO_CURVE or (
            event == _HANDSHAKE_BROKEN_OFF and value != errno.EAGAIN and self._handshake_keeps_failing()
        ):
            self._on_refused(own_key=False)

    def _connect(self) -> None:
        """Connect to where the peer's host is now; what waits to be sent is not ZMQ's yet."""
        endpoint = self._options.endpoint(self._address, self._text)
        if endpoint == self._endpoint:
            return
        if self._endpoint:
            self._socket.disconnect(self._endpoint)
        if endpoint != self._text:
            self._socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        self._socket.connect(endpoint)
        self._endpoint = endpoint

    def _handshake_keeps_failing(self) -> bool:
        self._failed_handshakes.append(self._loop.time())
        return (
            len(self._failed_handshakes) == _MAX_FAILED_HANDSHAKES
            and self._failed_handshakes[-1] - self._failed_handshakes[0] < _FAILED_HANDSHAKES_WITHIN_S
        )

    def _on_refused(self, *, own_key: bool) -> None:
        if not self._ended.is_set():
            error = HandshakeRefusedError(self._why_refused(own_key=own_key))
            self._close(error)
            self._lost(error)

    def _why_refused(self, *, own_key: bool) -> str:
        curve, hosts = self._options.curve, self._options.hosts
        if curve is None or not hosts:
            return f"{self._peer} refuses the handshake: it has other keys, or somebody else has its address"
        host = self._options.host_at(self._address)
        if own_key:
            here = next((each.name for each in hosts if each.public == curve.public), "this host")
            what = f"host {host.name} refuses the key of host {here}"
            fix = f"list public_key = {curve.public.decode()!r} for {here} there, and start {host.name} again"
        else:
            what = f"host {host.name} does not have the key that is listed for it here, {host.public.decode()!r}"
            fix = "correct that public_key and start again, or find out who else has its address"
        return f"{self._peer}: {what}: {fix}"

    def _on_disconnected(self) -> None:
        if not self._ended.is_set():
            self._pump.drain()  # answers that had arrived before the loss count
            error = UnreachableError(f"the connection to {self._peer} was lost")
            self._close(error)
            self._lost(error)

    def _close(self, why: UnreachableError) -> None:
        if self._monitor is not None:
            # Before its reader is closed: ZMQ's thread would block for ever on an event that nobody reads.
            self._socket.disable_monitor()
            self._monitor.close()
        self._pump.close()
        if self._inproc is not None:
            _inproc.unwatch(self._inproc, self._key)
        for timer in (self._timer, self._connecting):
            if timer is not None:
                timer.cancel()
        for ask in self._asks.values():
            _fail(ask, type(why)(str(why)))
        self._asks.clear()
        self._ended.set()

    def _on_message(self, frames: list[bytes]) -> None:
        try:
            envelope, body = decode_envelope(frames)
        except UnreadableError as error:
            self._dead_letters.add("unreadable", f"from {self._peer}: {error}")
            return
        ask = self._asks.pop(envelope.reply_to, None)
        if ask is None or ask.answer.done():
            self._record_unexpected_answer(envelope, body)
        elif envelope.kind is EnvelopeKind.REPLY:
            try:
                ask.answer.set_result(ask.decoder.decode(body))
            except BadBodyError as error:
                _fail(ask, RemoteError(error.code, f"the answer of {self._peer}: {error.detail}"))
        else:
            _fail(ask, self._error_from(envelope, body))

    def _queue_full_error(self) -> MailboxFullError:
        return MailboxFullError(f"over {self._high_water_mark} messages to {self._peer} are queued")

    def _record_unexpected_answer(self, envelope: Envelope, body: memoryview) -> None:
        if envelope.kind is EnvelopeKind.FAILURE:
            failure = decode_failure(body)
            self._dead_letters.add(failure.code, f"{self._peer}: {failure.detail}", envelope)
        else:
            self._dead_letters.add("late_reply", f"nobody waits for this answer of {self._peer}", envelope)

    def _error_from(self, envelope: Envelope, body: memoryview) -> BusError:
        if envelope.kind is not EnvelopeKind.FAILURE:
            return RemoteError(FailureCode.INVALID_MESSAGE, f"{self._peer} sent a message in place of an answer")
        failure = decode_failure(body)
        if failure.code == FailureCode.MAILBOX_FULL:
            return MailboxFullError(failure.detail)
        if failure.code == FailureCode.DEADLINE_EXCEEDED:
            return AskTimeoutError(failure.detail)
        return RemoteError(failure.code, failure.detail)

    # One timer for all asks: it is set for the earliest deadline and left alone when that ask is answered,
    # which costs an idle wake-up now and then and saves a timer for each ask.

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(at, self._expire)
        self._timer_at = at

    def _expire(self) -> None:
        self._timer, self._timer_at = None, math.inf
        now = self._loop.time()
        for ask in self._asks.values():
            if ask.expires_at <= now:
                _fail(ask, self._late_error(ask))
        waiting = [ask.expires_at for ask in self._asks.values() if not ask.answer.done()]
        if waiting:
            self._set_timer(min(waiting))

    def _late_error(self, ask: _Ask) -> BusError:
        if self._established:
            return AskTimeoutError(f"no answer from {self._peer} within {ask.timeout_s:g} s")
        if self._refusal is not None:
            return HandshakeRefusedError(str(self._refusal))
        return AskTimeoutError(f"no connection to {self._peer} within {ask.timeout_s:g} s")


def _fail(ask: _Ask, error: BusError) -> None:
    if not ask.answer.done():
        ask.answer.set_exception(error)
