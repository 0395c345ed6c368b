"""Decides who may connect over tcp: answers the request that ZMQ makes for each CURVE handshake (ZAP, RFC 27)."""

from __future__ import annotations

from typing import Final
from weakref import WeakKeyDictionary

import zmq
from zmq.utils import z85

from triptych.bus._pump import Pump

_ADDRESS: Final = "inproc://zeromq.zap.01"
_REQUEST_FRAMES: Final = 9  # route, empty, version, request, domain, address, identity, mechanism, CURVE key
_authenticators: WeakKeyDictionary[zmq.Context[zmq.Socket[bytes]], CurveAuthenticator] = WeakKeyDictionary()


class CurveAuthenticator:
    """Accepts a peer that has proved to have the key pair of the mailbox itself, and no other.

    ZMQ asks at one address in each context, so the mailboxes of a context share an authenticator, on the loop of the
    first. The domain of a request is the mailbox's public key. Without an authenticator ZMQ accepts nobody
    (`ZAP_ENFORCE_DOMAIN`).
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Bind the address in `context`; call `shared_authenticator` in place of this."""
        self.users = 0
        self.refused = 0
        """Connections that were refused for their key."""
        socket = context.socket(zmq.ROUTER)
        socket.bind(_ADDRESS)
        self._context, self._socket = context, socket
        self._pump = Pump(socket, self._on_request)

    def close(self) -> None:
        """Release one use; after the last one nobody is accepted any more."""
        self.users -= 1
        if not self.users:
            del _authenticators[self._context]
            self._socket.unbind(_ADDRESS)  # free at once for a successor, not when ZMQ's thread closes the socket
            self._pump.close()

    def _on_request(self, frames: list[bytes]) -> None:
        if len(frames) == _REQUEST_FRAMES and frames[7] == b"CURVE":
            known = z85.encode(frames[8]) == frames[4]
        else:
            known = False
        self.refused += not known
        status, text = (b"200", b"") if known else (b"400", b"unknown key")
        self._pump.send(frames[0], b"", b"1.0", frames[3], status, text, b"", b"")


def shared_authenticator(context: zmq.Context[zmq.Socket[bytes]]) -> CurveAuthenticator:
    """Return the authenticator of a context, made at its first use; `close` it when the mailbox closes."""
    authenticator = _authenticators.get(context)
    if authenticator is None:
        authenticator = _authenticators[context] = CurveAuthenticator(context)
    authenticator.users += 1
    return authenticator
