"""Decides who may connect over tcp: answers ZMQ's question for each CURVE handshake (ZAP, RFC 27)."""

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
    """Lets in who proves to have the key pair of the mailbox itself, and nobody else.

    ZMQ asks at one address in each context, so the mailboxes of a context share a gate, on the loop of the first.
    The domain of a question is the mailbox's public key. Without a gate ZMQ lets nobody in (`ZAP_ENFORCE_DOMAIN`).
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Use `shared_authenticator`, which shares it."""
        self.users = 0
        self.refused = 0
        """Connections that were turned away for their key."""
        socket = context.socket(zmq.ROUTER)
        socket.bind(_ADDRESS)
        self._context, self._socket = context, socket
        self._pump = Pump(socket, self._on_request)

    def close(self) -> None:
        """Give up one use; after the last one nobody is let in any more."""
        self.users -= 1
        if not self.users:
            del _authenticators[self._context]
            self._socket.unbind(_ADDRESS)  # free at once for a successor, not when ZMQ gets round to the socket
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
    """Return the gate of a context, made at its first use; `close` it when the mailbox closes."""
    gate = _authenticators.get(context)
    if gate is None:
        gate = _authenticators[context] = CurveAuthenticator(context)
    gate.users += 1
    return gate
