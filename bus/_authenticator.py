"""Decides who may connect over tcp: answers the request that ZMQ makes for each CURVE handshake (ZAP, RFC 27)."""

from __future__ import annotations

import time
from collections import Counter
from typing import Final
from weakref import WeakKeyDictionary

import structlog
import zmq
from zmq.utils import z85

from triptych.bus._pump import Pump
from triptych.bus._sockets import zap_domain

_ADDRESS: Final = "inproc://zeromq.zap.01"
_REQUEST_FRAMES: Final = 9  # route, empty, version, request, domain, address, identity, mechanism, CURVE key
_LOG_EVERY_S: Final = 1.0
_log = structlog.stdlib.get_logger("bus")
_authenticators: WeakKeyDictionary[zmq.Context[zmq.Socket[bytes]], CurveAuthenticator] = WeakKeyDictionary()


class CurveAuthenticator:
    """Accepts a peer that has proved to have one of the keys that the mailbox accepts, and no other.

    ZMQ asks at one address in each context, so the mailboxes of a context share an authenticator, on the loop of the
    first. The domain of a request stands for the accepted keys. Without an authenticator, and for a domain that it
    does not know, ZMQ accepts nobody (`ZAP_ENFORCE_DOMAIN`).
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Bind the address in `context`; call `open_authenticator` in place of this."""
        self.refused = 0
        """Connections that were refused for their key."""
        self._logged_at = float("-inf")
        self._accepted: dict[bytes, frozenset[bytes]] = {}
        self._users: Counter[bytes] = Counter()
        socket = context.socket(zmq.ROUTER)
        socket.bind(_ADDRESS)
        self._context, self._socket = context, socket
        self._pump = Pump(socket, self._on_request)

    def accept(self, keys: frozenset[bytes]) -> None:
        """Accept these public keys in the domain that stands for them."""
        domain = zap_domain(keys)
        self._accepted[domain] = keys
        self._users[domain] += 1

    def close(self, keys: frozenset[bytes]) -> None:
        """End one use of `accept`; after the last one nobody is accepted any more."""
        domain = zap_domain(keys)
        self._users[domain] -= 1
        if not self._users[domain]:
            del self._users[domain], self._accepted[domain]
        if not self._users:
            del _authenticators[self._context]
            self._socket.unbind(_ADDRESS)  # free at once for a successor, not when ZMQ's thread closes the socket
            self._pump.close()

    def _on_request(self, frames: list[bytes]) -> None:
        is_curve = len(frames) == _REQUEST_FRAMES and frames[7] == b"CURVE"
        key = z85.encode(frames[8]) if is_curve else b""
        known = key in self._accepted.get(frames[4], ())
        if not known:
            self._record_refused(frames[5].decode(errors="replace"), key.decode())
        status, text = (b"200", b"") if known else (b"400", b"unknown key")
        self._pump.send(frames[0], b"", b"1.0", frames[3], status, text, b"", b"")

    def _record_refused(self, address: str, key: str) -> None:
        """Count and log who was refused, at most one line a second: a refused peer tries again."""
        self.refused += 1
        now = time.monotonic()
        if now - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = now
            _log.warning("connection refused for its key", address=address, public_key=key, count=self.refused)


def open_authenticator(context: zmq.Context[zmq.Socket[bytes]], keys: frozenset[bytes]) -> CurveAuthenticator:
    """Return the authenticator of a context, which accepts `keys` until it is closed with them."""
    authenticator = _authenticators.get(context)
    if authenticator is None:
        authenticator = _authenticators[context] = CurveAuthenticator(context)
    authenticator.accept(keys)
    return authenticator
