"""Access control: the Host and Origin of a request, its API key, and the rate of that key."""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Callable, Collection
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from triptych.actors.topology import ApiSection, is_loopback, parse_rate
from triptych.api.errors import ApiError, error_response
from triptych.api.keys import ApiClient, ApiKeys
from triptych.api.page import FILES
from triptych.roles.messages.common import MAX_PRIORITY

OPEN_PATHS: Final = frozenset({"/live", "/ready", "/health", *FILES})
"""Paths of probes and of the files of the page, which need no key."""
ANYBODY: Final = ApiClient("", MAX_PRIORITY)
"""Whoever asks without a key."""
_MISDIRECTED: Final = 421


class AccessMiddleware:
    """ASGI middleware: refuses requests that may not be made, and sets `state["owner"]` and `state["max_priority"]`."""

    def __init__(
        self, app: ASGIApp, api: ApiSection, keys: ApiKeys | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.app = app
        self.api = api
        self.keys = keys
        self.clock = clock
        self.sites = own_host_names(api)
        self.names = self.sites | {api.host.lower()}
        self.any_address = is_unspecified(api.host)
        self._buckets: dict[str, TokenBucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request, or refuse it."""
        if scope["type"] == "http":
            try:
                client = self._admit(scope)
                scope["state"].update(owner=client.name, max_priority=client.max_priority)
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _admit(self, scope: Scope) -> ApiClient:
        headers = Headers(scope=scope)
        if len(hosts := headers.getlist("host")) > 1:
            raise ApiError(400, f"a request must have one Host header, not {len(hosts)}", code="invalid_header")
        check_host(headers.get("host", ""), self.names, any_address=self.any_address)
        if (origin := headers.get("origin")) is not None:
            check_origin(origin, headers.get("host", ""), self.sites)
        if self.keys is None:
            client = ANYBODY
        elif scope["path"] in OPEN_PATHS:
            return ANYBODY
        else:
            client = authenticate(headers.get("authorization", ""), self.keys)
        if self.api.rate_limit and scope["method"] == "POST":
            self._check_rate(client.name)
        return client

    def _check_rate(self, owner: str) -> None:
        count, period_s = parse_rate(self.api.rate_limit)
        bucket = self._buckets.setdefault(owner, TokenBucket(count, period_s, self.clock()))
        wait_s = bucket.take(self.clock())
        if wait_s > 0:
            whose = f"the key of {owner}" if owner else "this server"
            message = f"{whose} may begin {self.api.rate_limit.replace('/', ' requests per ')}: retry"
            message += f" in {math.ceil(wait_s)} s"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=wait_s)


class TokenBucket:
    """A rate limit: `count` requests at once, and as many again in each `period_s` seconds."""

    def __init__(self, count: int, period_s: float, now: float) -> None:
        self.count = count
        self.period_s = period_s
        self._tokens = float(count)
        self._at = now

    def take(self, now: float) -> float:
        """Take a token at `now` (seconds of any clock); returns 0, or the seconds until there is one."""
        self._tokens = min(self.count, self._tokens + (now - self._at) * self.count / self.period_s)
        self._at = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) * self.period_s / self.count


def own_host_names(api: ApiSection) -> frozenset[str]:
    """Return the names that the topology gives the API, in lower case; pages of these hosts may call it."""
    public = urlsplit(api.public_url).hostname or ""
    return frozenset(name.lower() for name in (public, *api.allowed_hosts) if name)


def check_host(host: str, names: Collection[str], *, any_address: bool = False) -> None:
    """Refuse a Host header that does not name this server.

    A page of another site can make its own name lead to this address (DNS rebinding) and then read what we answer, but
    its browser says the name that it was given.

    Args:
        host: The header.
        names: Of this server, in lower case.
        any_address: Whether any IP address will do, as when the server listens on all addresses of the machine.

    Raises:
        ApiError: 421, the request is for another host.
    """
    name = host_of(host)
    if is_loopback(name) or name in names or (any_address and _is_address(name)):
        return
    message = f"this server is not called {name!r}: add the name to [api] allowed_hosts, or set [api] public_url"
    raise ApiError(_MISDIRECTED, message, code="unknown_host")


def check_origin(origin: str, host: str, allowed: Collection[str]) -> None:
    """Refuse a request from a page of another site, which its visitor did not make; raises ApiError 403."""
    scheme, _, authority = origin.partition("://")
    same = scheme in ("http", "https") and authority.lower() == host.lower()
    if not same and host_of(authority) not in allowed:
        message = f"pages of {origin} may not call this server: add the site to [api] allowed_hosts"
        raise ApiError(403, message, code="foreign_origin")


def host_of(authority: str) -> str:
    """Return the host of `HOST:PORT` in lower case, without brackets and port; "" where there is none."""
    try:
        return (urlsplit(f"//{authority}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def authenticate(authorization: str, keys: ApiKeys) -> ApiClient:
    """Return the client of the key in an Authorization header; raises ApiError 401."""
    scheme, _, key = authorization.partition(" ")
    client = keys.find(key.strip()) if scheme.lower() == "bearer" else None
    if client is None:
        given = "this is not a key of this server" if authorization else "a key is needed"
        message = f"{given}: send Authorization: Bearer KEY, with a key of the server's [api] keys_file"
        error = ApiError(401, message, code="invalid_api_key")
        error.headers["WWW-Authenticate"] = "Bearer"
        raise error
    return client


def is_unspecified(host: str) -> bool:
    """Whether listening on `host` means on all addresses of the machine."""
    return _is_address(host) and ipaddress.ip_address(host).is_unspecified


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
