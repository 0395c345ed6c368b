"""Makes the sockets of the bus."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Final

import msgspec
import zmq
from zmq.utils import z85

from triptych.bus._address import Address
from triptych.bus._errors import AddressError

RECONNECT_FIRST_MS: Final = 20
RECONNECT_LAST_MS: Final = 250
_CONNECT_MS: Final = 500  # the kernel tries again only after a second, then two, four: a cut that heals is found sooner
_KEY_BYTES: Final = 32
_HANDSHAKE_MS: Final = 3_000  # a peer that sends nothing holds a descriptor this long
HEARTBEATS_LOST: Final = 3
"""Heartbeats without an answer after which a connection is lost."""
# ZMQ learns of room by half queues, so that two high-water marks always have room for one. A mailbox has more, so that
# the answers to all asks of an outbox find room beside refused tells.
_ROOM: Final = {int(zmq.DEALER): 2, int(zmq.ROUTER): 4}


class CurveKeys(msgspec.Struct, frozen=True):
    """The CURVE key pair of a host, which all its processes have (`zmq.curve_keypair()`)."""

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


def is_public_key(text: str) -> bool:
    """Return whether a text is the public half of a key pair."""
    try:
        return len(z85.decode(text)) == _KEY_BYTES
    except (ValueError, KeyError, struct.error, UnicodeEncodeError):
        return False


class HostKey(msgspec.Struct, frozen=True):
    """A host of the system, as the others know it."""

    name: str
    """Its name, for errors."""
    address: str
    """What stands for it in `tcp://ADDRESS:PORT`."""
    public: bytes
    """The public half of its key pair, Z85 text."""


class SocketOptions(msgspec.Struct, frozen=True):
    """How a mailbox or an outbox sets up its sockets."""

    curve: CurveKeys | None = None
    """Key pair of this host, required for tcp."""
    hosts: tuple[HostKey, ...] = ()
    """Every host of the system, this one included: only they may connect over tcp, and be connected to. Empty for a
    system of one host, where only who has `curve` may."""
    heartbeat_s: float = 1.0
    """Seconds between two heartbeats of a tcp connection, which is lost after `HEARTBEATS_LOST` without an answer."""
    max_message_bytes: int = 1 << 20
    """Longest message, in bytes.

    A mailbox answers one of up to twice as many with "invalid_message". For a longer one the connection is cut before
    the bytes are read.
    """
    high_water_mark: int = 1024
    """Most asks that an outbox has outstanding with one peer.

    As many messages always find room in the queue towards the peer; at twice as many it is full.
    """
    locate: Callable[[str], str] | None = None
    """Returns the present address of the host of a tcp address, where names are not for the system to resolve; asked
    again at each try to connect, so that a host that has moved is found."""
    context: zmq.Context[zmq.Socket[bytes]] | None = None
    """None for `zmq.Context.instance()`."""

    @property
    def zmq_context(self) -> zmq.Context[zmq.Socket[bytes]]:
        """The context to make sockets in."""
        return self.context or zmq.Context.instance()

    @property
    def accepted_keys(self) -> frozenset[bytes]:
        """The public keys of those who may connect over tcp."""
        if self.hosts:
            return frozenset(host.public for host in self.hosts)
        return frozenset((self.curve.public,) if self.curve else ())

    def endpoint(self, address: Address, text: str) -> str:
        """Return what ZMQ is to connect to for `address`, parsed from `text`."""
        if address.scheme != "tcp" or self.locate is None:
            return text
        host = self.locate(address.target)
        return f"tcp://[{host}]:{address.port}" if ":" in host else f"tcp://{host}:{address.port}"

    def host_at(self, address: Address) -> HostKey:
        """Return the host of a tcp address, whose key a peer there must prove to have; raises `AddressError`."""
        if self.curve is not None and not self.hosts:
            return HostKey("", address.target, self.curve.public)
        for host in self.hosts:
            if host.address == address.target:
                return host
        raise AddressError(f"tcp://{address.target}:{address.port} is at no host of this system")


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
        every_ms = max(round(options.heartbeat_s * 1000), 1)
        socket.setsockopt(zmq.HEARTBEAT_IVL, every_ms)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEATS_LOST * every_ms)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)
        socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        socket.setsockopt(zmq.IPV6, int(":" in address.target))
        if curve is not None:
            try:
                _encrypt(socket, kind, curve, address, options)
            except BaseException:
                socket.close(linger=0)
                raise
    return socket


def zap_domain(accepted: frozenset[bytes]) -> bytes:
    """Return the name by which ZMQ asks `bus._authenticator` about a mailbox that accepts these keys."""
    return hashlib.sha256(b" ".join(sorted(accepted))).hexdigest().encode()


def _encrypt(socket: zmq.Socket[bytes], kind: int, curve: CurveKeys, address: Address, options: SocketOptions) -> None:
    socket.setsockopt(zmq.CURVE_PUBLICKEY, curve.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, curve.secret)
    if kind == zmq.ROUTER:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.ZAP_DOMAIN, zap_domain(options.accepted_keys))
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    else:
        socket.setsockopt(zmq.CURVE_SERVERKEY, options.host_at(address).public)
