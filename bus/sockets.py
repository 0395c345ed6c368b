"""How the sockets of the bus are set up."""

from __future__ import annotations

from typing import Final

import msgspec
import zmq

from bus.address import Address
from bus.errors import AddressError

RECONNECT_FIRST_MS: Final = 20
RECONNECT_LAST_MS: Final = 250
_HEARTBEAT_EVERY_MS: Final = 1_000
_HEARTBEAT_LOST_MS: Final = 3_000


class CurveKeys(msgspec.Struct, frozen=True):
    """One CURVE key pair, shared by every host of the system (`zmq.curve_keypair()`).

    Both halves are secrets: neither is ever sent in clear, and a peer needs the public one to be let in.
    """

    public: bytes
    """Z85 text, 40 bytes."""
    secret: bytes
    """Z85 text, 40 bytes."""


def open_socket(
    context: zmq.Context[zmq.Socket[bytes]],
    kind: int,
    address: Address,
    *,
    high_water_mark: int,
    max_message_bytes: int,
    curve: CurveKeys | None,
) -> zmq.Socket[bytes]:
    """Make a socket, not yet bound or connected; raises `AddressError` for tcp to the outside in clear."""
    if not address.loopback and curve is None:
        raise AddressError(f"tcp to {address.target!r} leaves this host: it needs CURVE keys")
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, high_water_mark)
    socket.setsockopt(zmq.RCVHWM, high_water_mark)
    # Twice the limit: a little too long still gets a typed answer, anything longer cuts the connection.
    socket.setsockopt(zmq.MAXMSGSIZE, 2 * max_message_bytes)
    if address.scheme == "tcp":
        # A host that vanishes sends no FIN; a process that dies on this host always does.
        socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_EVERY_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_LOST_MS)
        socket.setsockopt(zmq.IPV6, int(":" in address.target))
    if curve is not None and address.scheme == "tcp":
        _encrypt(socket, kind, curve)
    return socket


def _encrypt(socket: zmq.Socket[bytes], kind: int, curve: CurveKeys) -> None:
    socket.setsockopt(zmq.CURVE_PUBLICKEY, curve.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, curve.secret)
    if kind == zmq.ROUTER:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
    else:
        socket.setsockopt(zmq.CURVE_SERVERKEY, curve.public)
