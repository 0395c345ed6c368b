"""Makes the sockets of the bus."""

from __future__ import annotations

from typing import Final

import msgspec
import zmq

from triptych.bus._address import Address
from triptych.bus._errors import AddressError

RECONNECT_FIRST_MS: Final = 20
RECONNECT_LAST_MS: Final = 250
_CONNECT_MS: Final = 1_000  # the kernel's own time-out doubles while a host is away
_HANDSHAKE_MS: Final = 3_000  # a peer that sends nothing holds a descriptor this long
_HEARTBEAT_EVERY_MS: Final = 1_000
_HEARTBEAT_LOST_MS: Final = 3_000
# ZMQ learns of room by half queues, so that two high-water marks always have room for one. A mailbox has more, so that
# the answers to all asks of an outbox find room beside refused tells.
_ROOM: Final = {int(zmq.DEALER): 2, int(zmq.ROUTER): 4}


class CurveKeys(msgspec.Struct, frozen=True):
    """The CURVE key pair that every process of a system has (`zmq.curve_keypair()`).

    Both halves are secrets, and neither is ever sent in clear: a peer needs the public one to begin a handshake,
    and the secret one to be let in.
    """

    public: bytes
    """Z85 text, 40 bytes."""
    secret: bytes
    """Z85 text, 40 bytes."""

    @classmethod
    def new(cls) -> CurveKeys:
        """Make a pair."""
        return cls(*zmq.curve_keypair())

    @classmethod
    def of(cls, secret: str) -> CurveKeys:
        """Return the pair of a secret half; raises `ValueError` for any other text."""
        half = secret.encode()
        try:
            return cls(zmq.curve_public(half), half)
        except zmq.ZMQError as error:
            raise ValueError("no CURVE key") from error


class SocketOptions(msgspec.Struct, frozen=True):
    """How a mailbox or an outbox sets up its sockets."""

    curve: CurveKeys | None = None
    """Key pair, required for tcp; only who has the same one can connect."""
    max_message_bytes: int = 1 << 20
    """Longest message, in bytes.

    A mailbox answers one of up to twice as many with "invalid_message". For a longer one the connection is cut before
    the bytes are read.
    """
    high_water_mark: int = 1024
    """Most asks that an outbox has outstanding with one peer.

    As many messages always find room in the queue towards the peer; at twice as many it is full.
    """
    context: zmq.Context[zmq.Socket[bytes]] | None = None
    """None for `zmq.Context.instance()`."""

    @property
    def zmq_context(self) -> zmq.Context[zmq.Socket[bytes]]:
        """The context to make sockets in."""
        return self.context or zmq.Context.instance()


DEFAULT_OPTIONS: Final = SocketOptions()


def open_socket(kind: int, address: Address, options: SocketOptions) -> zmq.Socket[bytes]:
    """Make a ROUTER or a DEALER, not yet bound or connected.

    Raises `AddressError` for tcp without keys, on loopback as well: every user of the host can connect there.
    """
    curve = options.curve
    if address.scheme == "tcp" and curve is None:
        raise AddressError(f"tcp://{address.target}:{address.port} can be reached by others: it needs CURVE keys")
    socket = options.zmq_context.socket(kind)
    room = options.high_water_mark * _ROOM[kind]
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, room)
    socket.setsockopt(zmq.RCVHWM, room)
    # Twice the limit: a little too long still gets a typed answer, anything longer cuts the connection.
    socket.setsockopt(zmq.MAXMSGSIZE, 2 * options.max_message_bytes)
    if address.scheme == "tcp":
        # A host that vanishes sends no FIN; a process that dies on this host always does.
        socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_EVERY_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_LOST_MS)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)
        socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        socket.setsockopt(zmq.IPV6, int(":" in address.target))
        if curve is not None:
            _encrypt(socket, kind, curve)
    return socket


def _encrypt(socket: zmq.Socket[bytes], kind: int, curve: CurveKeys) -> None:
    socket.setsockopt(zmq.CURVE_PUBLICKEY, curve.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, curve.secret)
    if kind == zmq.ROUTER:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.ZAP_DOMAIN, curve.public)  # so that `bus._authenticator` knows which key is asked for
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    else:
        socket.setsockopt(zmq.CURVE_SERVERKEY, curve.public)
