"""Webhooks: POST to the `webhook_url` of a request that has ended, again until it has arrived, at least once.

The head says which are due and keeps what came of each attempt (`roles.head.webhooks`); here they are made and sent.
The client is httpx: it follows no redirect, takes an address beside the name that the certificate has to be of, and
bounds each wait. Connections are not kept, since two names of one address must not share one.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Final, NamedTuple

import httpx
import msgspec
import structlog

from triptych.actors.topology import Topology
from triptych.api.head_client import HeadClient
from triptych.api.requests import show_request
from triptych.api.urls import join_url
from triptych.api.webhook_keys import WebhookKeys, signature_headers
from triptych.api.webhook_targets import WebhookTarget, WebhookTargetError, check_address, check_webhook_url
from triptych.bus import BusError, RemoteError
from triptych.roles.head.job import State
from triptych.roles.messages.requests import RequestView
from triptych.roles.messages.webhooks import DueWebhook, Outcome

log = structlog.stdlib.get_logger("api")

MAX_SENDING: Final = 16
"""Webhooks that are sent at a time."""
HEAD_RETRY_S: Final = 1.0
"""Seconds until the head is asked again when it does not answer."""
_GONE: Final = 410
_TYPES: Final = {State.DONE: "request.completed", State.CANCELLED: "request.cancelled"}
"""Every other end is "request.failed"."""


class Result(NamedTuple):
    """What came of an attempt."""

    outcome: Outcome
    reason: str = ""
    """Why it did not arrive."""


class WebhookSender:
    """Sends the webhooks of a system as they become due.

    Args:
        topology: Says who may be called, and how URLs in the payload begin.
        head: Has the webhooks.
        keys: Sign them.
    """

    def __init__(self, topology: Topology, head: HeadClient, keys: WebhookKeys) -> None:
        self._settings = topology.webhooks
        self._head = head
        self._keys = keys
        self._file_url = partial(join_url, topology.api.public_url or topology.url, "/v1/images/")
        self._sending: set[str] = set()
        self._freed = asyncio.Event()

    async def run(self) -> None:
        """Send until it is cancelled; what was not recorded then is sent again by the next process."""
        # Certificates of the system, with $SSL_CERT_FILE; no proxy of the environment, which would choose the address.
        tls = await asyncio.to_thread(ssl.create_default_context)
        no_limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with (
            httpx.AsyncClient(verify=tls, limits=no_limits, trust_env=False) as client,
            asyncio.TaskGroup() as tasks,
        ):
            while True:
                for webhook in await self._head.take_webhooks(tuple(self._sending), MAX_SENDING - len(self._sending)):
                    self._sending.add(webhook.request_id)
                    tasks.create_task(self._send(client, webhook), name=f"webhook {webhook.request_id}")
                while len(self._sending) == MAX_SENDING:
                    self._freed.clear()
                    await self._freed.wait()

    async def _send(self, client: httpx.AsyncClient, webhook: DueWebhook) -> None:
        try:
            view = await self._view(webhook.request_id)
            if view is None:  # it was deleted, and its webhook with it
                return
            result = await self._attempt(client, view, self._keys.of(webhook.owner))
            retry_s = await self._head.webhook_tried(webhook, result.outcome)
        finally:
            self._sending.discard(webhook.request_id)
            self._freed.set()
        host = httpx.URL(view.webhook_url).host  # the rest of the URL may be a secret
        said = {"request_id": view.request_id, "host": host, "attempt": webhook.attempts + 1}
        if result.outcome == "delivered":
            log.info("webhook delivered", **said)
        elif retry_s is None:
            log.warning("webhook given up", **said, reason=result.reason)
        else:
            log.info("webhook failed", **said, reason=result.reason, retry_s=round(retry_s, 1))

    async def _view(self, request_id: str) -> RequestView | None:
        while True:
            try:
                return await self._head.query(request_id, "")
            except RemoteError as error:
                if error.code == "not_found":
                    return None
                log.info("a webhook waits for the head", request_id=request_id, reason=str(error))
            except BusError as error:
                log.info("a webhook waits for the head", request_id=request_id, reason=str(error))
            await asyncio.sleep(HEAD_RETRY_S)

    async def _attempt(self, client: httpx.AsyncClient, view: RequestView, secrets: Sequence[bytes]) -> Result:
        if not secrets:
            return Result("refused", "the keys file has no secret for this client any more")
        timeout_s = self._settings.timeout_s
        try:
            body, now = payload(view, self._file_url), int(time.time())
            headers = {"Content-Type": "application/json", **signature_headers(secrets, view.request_id, now, body)}
            target = check_webhook_url(view.webhook_url, self._settings.hosts)
            async with asyncio.timeout(timeout_s):
                addresses = await self._addresses(target)
                return result_of(await post(client, target, addresses, body, headers, timeout_s))
        except WebhookTargetError as error:
            return Result("refused", f"the URL {error}")
        except TimeoutError:
            return Result("failed", f"no answer within {timeout_s:g} s")
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:  # the last: long labels
            return Result("failed", f"{type(error).__name__}: {error}")
        except Exception as error:  # it is tried again after a restart, and would end the API each time
            log.exception("a webhook cannot be sent", request_id=view.request_id)
            return Result("failed", f"{type(error).__name__}: {error}")

    async def _addresses(self, target: WebhookTarget) -> list[str]:
        """Look up the addresses of a name; raises OSError, WebhookTargetError for one that may not be called."""
        found = await asyncio.get_running_loop().getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        return [check_address(str(address[0]), target.host, self._settings.hosts) for *_, address in found]


def payload(view: RequestView, file_url: Callable[[str], str]) -> bytes:
    """Write what a receiver gets: the type of the event, its time, and the request as GET /v1/requests/{id} has it."""
    ended = datetime.fromtimestamp(view.finished_at, UTC).isoformat().replace("+00:00", "Z")
    event = {"type": _TYPES.get(State(view.state), "request.failed"), "timestamp": ended}
    return msgspec.json.encode({**event, "data": show_request(view, file_url)})


async def post(
    client: httpx.AsyncClient,
    target: WebhookTarget,
    addresses: Sequence[str],
    body: bytes,
    headers: dict[str, str],
    timeout_s: float,
) -> int:
    """POST to the first of the addresses that can be connected to; returns the status, and reads no more.

    Each address gets an equal share of `timeout_s` to be connected to, so that one that never answers leaves time for
    the next.

    Raises:
        httpx.HTTPError: None of them can be, or there is no answer.
    """
    timeout = httpx.Timeout(timeout_s, connect=timeout_s / len(addresses))
    *others, last = addresses
    for address in others:
        try:
            return await _post_to(client, target, address, body, headers, timeout)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            pass  # the name has further addresses
    return await _post_to(client, target, last, body, headers, timeout)


async def _post_to(
    client: httpx.AsyncClient,
    target: WebhookTarget,
    address: str,
    body: bytes,
    headers: dict[str, str],
    timeout: httpx.Timeout,
) -> int:
    # The address that was checked, and no second look-up; the certificate has to be of the name all the same.
    url = target.url.copy_with(host=address)
    named = {**headers, "Host": target.url.netloc.decode("ascii")}
    sni = {"sni_hostname": target.host}
    request = client.build_request("POST", url, content=body, headers=named, timeout=timeout, extensions=sni)
    answer = await client.send(request, stream=True, follow_redirects=False)
    await answer.aclose()
    return answer.status_code


def result_of(status: int) -> Result:
    """Say what a receiver's status means: any 2xx is an arrival, 410 asks for no further attempt."""
    if 200 <= status < 300:
        return Result("delivered")
    return Result("refused" if status == _GONE else "failed", f"the receiver answered {status}")
