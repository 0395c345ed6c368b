"""Webhooks: who may be called, how they are signed, and what is sent to a real receiver."""

from __future__ import annotations

import asyncio
import base64
import ssl
import time
from pathlib import Path

import httpx
import msgspec
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from tests.api.webhook_receiver import Receiver
from triptych.actors.topology import WebhooksSection
from triptych.api.keys import ApiKeysError
from triptych.api.webhook_keys import WebhookKeys, load_webhook_keys, signature_headers
from triptych.api.webhook_targets import WebhookTargetError, check_address, check_webhook_url
from triptych.api.webhooks import WebhookSender, post
from triptych.roles.messages import requests as wire
from triptych.roles.messages.webhooks import DueWebhook

CERTIFICATE = Path(__file__).with_name("hooks_test.pem")
"""Of hooks.test, valid until 2120."""
SECRET, OTHER = b"s" * 24, b"o" * 64
HOSTS = ("hooks.example.com", "*.below.example", "127.0.0.1", "10.1.0.0/16", "localhost")


def written(secret: bytes) -> str:
    return "whsec_" + base64.b64encode(secret).decode()


# -- who may be called


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("https://hooks.example.com/a?b=c", "hooks.example.com", 443),
        ("https://HOOKS.example.com:8443", "hooks.example.com", 8443),
        ("https://hooks.example.com./", "hooks.example.com", 443),
        ("https://a.b.below.example/", "a.b.below.example", 443),
        ("https://10.1.2.3/", "10.1.2.3", 443),
        ("http://127.0.0.1:9/hook", "127.0.0.1", 9),
        ("http://localhost/hook", "localhost", 80),
    ],
)
def test_a_url_of_a_listed_host(url: str, host: str, port: int) -> None:
    target = check_webhook_url(url, HOSTS)
    assert (target.host, target.port) == (host, port)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.com/", "leads to example.com, which is none of the server's"),
        ("https://hooks.example.com.evil.net/", "which is none of"),
        ("https://evilbelow.example/", "which is none of"),
        ("https://below.example/", "which is none of"),
        ("https://169.254.169.254/latest", "which is none of"),
        ("https://10.2.0.1/", "which is none of"),
        ("http://127.0.0.2/", "which is none of"),
        ("http://[::ffff:10.2.0.1]/", "which is none of"),
        ("http://hooks.example.com/", "must begin with https://"),
        ("http://10.1.2.3/", "must begin with https://"),
        ("https://user:word@hooks.example.com/", "no user and password"),
        ("ftp://hooks.example.com/", "begins with https://"),
        ("file:///etc/passwd", "begins with https://"),
        ("hooks.example.com/path", "begins with https://"),
        ("https:///path", "begins with https://"),
        ("https://hooks.example.com:port/", "must be a URL"),
        ("https://hooks.example.com:70000/", "must have a port from 1 to 65535, not 70000"),
        ("https://hooks.example.com:0/", "must have a port from 1 to 65535, not 0"),
        ("https://[::1/", "must be a URL"),
        ("", "begins with https://"),
    ],
)
def test_a_url_that_is_not_called(url: str, words: str) -> None:
    with pytest.raises(WebhookTargetError, match=words):
        check_webhook_url(url, HOSTS)


def test_without_hosts_nobody_is_called() -> None:
    with pytest.raises(WebhookTargetError, match=r"this server has no \[webhooks\] hosts"):
        check_webhook_url("https://hooks.example.com/", ())


@pytest.mark.parametrize(
    "address",
    ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "10.1.200.3", "64:ff9b::5db8:d822", "64:ff9b::a01:c803"],
)
def test_a_name_may_lead_to_the_world_and_to_what_is_listed(address: str) -> None:
    assert check_address(address, "hooks.example.com", HOSTS) == address


@pytest.mark.parametrize(
    "address",
    [
        "10.2.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "::1",
        "fd00::1",
        "fe80::1%eth0",
        "0.0.0.0",
        "224.0.0.1",
        "::ffff:192.168.1.1",
        "64:ff9b::a02:1",
        "2002:a02:1::1",
        "127.0.0.2",
    ],
)
def test_a_name_may_lead_to_no_private_address_that_is_not_listed(address: str) -> None:
    with pytest.raises(WebhookTargetError, match="a private address that the server's"):
        check_address(address, "hooks.example.com", HOSTS)


# -- how they are signed


def test_a_signature_is_what_the_standard_verifies_and_any_secret_will_do() -> None:
    body = b'{"type": "request.completed"}'
    headers = signature_headers((SECRET, OTHER), "req_1", int(time.time()), body)
    for secret in (SECRET, OTHER):
        assert Webhook(written(secret)).verify(body, headers) == {"type": "request.completed"}
    with pytest.raises(WebhookVerificationError, match="No matching signature"):
        Webhook(written(b"t" * 24)).verify(body, headers)


def test_a_client_with_a_secret_of_its_own_has_no_other(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# two\n{written(SECRET)}\nalice : {written(OTHER)}\n")
    file.chmod(0o600)
    keys = load_webhook_keys(file)
    assert (keys.of(""), keys.of("bob"), keys.of("alice")) == ([SECRET], [SECRET], [OTHER])
    file.chmod(0o640)
    with pytest.raises(ApiKeysError, match="can be read by others"):
        load_webhook_keys(file)


@pytest.mark.parametrize(
    "text", ["", "# none\n", "secret\n", "whsec_c2hvcnQ=\n", f"whsec_{'A' * 33}\n", "a/b:whsec_AAAA\n"]
)
def test_a_file_without_a_good_secret_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ApiKeysError, match="make one with python -c"):
        load_webhook_keys(file)


# -- what is sent


class Head:
    """The head as the sender sees it, with one request."""

    def __init__(self, view: wire.RequestView) -> None:
        self.request = view
        self.due: asyncio.Queue[DueWebhook] = asyncio.Queue()
        self.tried: asyncio.Queue[tuple[int, str]] = asyncio.Queue()

    async def take_webhooks(self, _sending, _limit) -> tuple[DueWebhook, ...]:
        return (await self.due.get(),)

    async def query(self, _request_id, _owner) -> wire.RequestView:
        return self.request

    async def webhook_tried(self, webhook: DueWebhook, outcome: str) -> float | None:
        await self.tried.put((webhook.attempts, outcome))
        return None

    async def outcome(self, attempts: int = 0) -> str:
        await self.due.put(DueWebhook(self.request.request_id, "", attempts))
        async with asyncio.timeout(20):
            tried, outcome = await self.tried.get()
        assert tried == attempts
        return outcome


@pytest.fixture
def send(fake_head, topology):
    """Run a sender for the one request of a head, which has ended as asked; returns that head."""

    async def run(url: str, state: str = "DONE", *, hosts=("127.0.0.1",), timeout_s: float = 10.0):
        fake_head.journal.clear()
        fake_head._submit(wire.SubmitRequest("req_1", {"prompt": "x"}, seed=7, webhook_url=url))
        if state != "DONE":
            fake_head.finish("req_1", state)
        view = msgspec.structs.replace(fake_head.view("req_1"), webhook_url=url, finished_at=1_700_000_000.25)
        settings = WebhooksSection(hosts=hosts, keys_file="keys", timeout_s=timeout_s)
        head = Head(view)
        sender = WebhookSender(msgspec.structs.replace(topology, webhooks=settings), head, WebhookKeys({"": (SECRET,)}))
        tasks.append(asyncio.create_task(sender.run()))
        return head

    tasks: list[asyncio.Task[None]] = []
    yield run
    for task in tasks:
        task.cancel()


@pytest.mark.anyio
async def test_a_receiver_gets_the_request_signed_and_each_attempt_under_one_id(send, client, topology) -> None:
    receiver = Receiver()
    async with receiver.serving() as url:
        head = await send(url)
        assert [await head.outcome(attempts) for attempts in (0, 1)] == ["delivered", "delivered"]
        first, second = receiver.received
        event = Webhook(written(SECRET)).verify(first.body, first.headers)
        assert first.body == second.body
        assert first.headers["webhook-id"] == second.headers["webhook-id"] == "req_1"
        with pytest.raises(WebhookVerificationError):
            Webhook(written(OTHER)).verify(first.body, first.headers)
        assert (event["type"], event["timestamp"]) == ("request.completed", "2023-11-14T22:13:20.250000Z")
        shown = (await client.get("/v1/requests/req_1")).json()
        assert event["data"].keys() == shown.keys()
        assert event["data"]["units"][0]["artifact"]["url"] == f"{topology.url}/v1/images/req_1_0.png"
        for state, kind in (("FAILED", "failed"), ("TIMED_OUT", "failed"), ("CANCELLED", "cancelled")):
            assert await (await send(url, state)).outcome() == "delivered"
            assert receiver.received[-1].event["type"] == f"request.{kind}"


@pytest.mark.anyio
async def test_what_is_no_arrival_is_tried_again_and_no_redirect_is_followed(send) -> None:
    receiver, elsewhere = Receiver(500), Receiver()
    async with receiver.serving() as url, elsewhere.serving() as other:
        head = await send(url)
        assert await head.outcome() == "failed"
        receiver.status, receiver.headers = 307, {"Location": other}
        assert await head.outcome() == "failed"
        receiver.status = 410
        assert await head.outcome() == "refused"
        assert elsewhere.received == []
    assert await head.outcome() == "failed", "nobody listens there any more"


@pytest.mark.anyio
async def test_a_receiver_that_does_not_answer_in_time_has_failed(send) -> None:
    receiver = Receiver()
    receiver.answering.clear()
    async with receiver.serving() as url:
        assert await (await send(url, timeout_s=0.3)).outcome() == "failed"


@pytest.mark.anyio
async def test_what_the_topology_lists_no_longer_is_not_called(send) -> None:
    receiver = Receiver()
    async with receiver.serving() as url:
        assert await (await send(url, hosts=("10.0.0.1",))).outcome() == "refused"
        named = url.replace("127.0.0.1", "localhost")
        assert await (await send(named, hosts=("localhost",))).outcome() == "delivered"
        assert len(receiver.received) == 1
        assert receiver.received[0].headers["host"] == f"localhost:{receiver.port}"


@pytest.mark.anyio
async def test_a_listed_name_that_leads_to_an_address_that_is_not_is_not_called(send, monkeypatch) -> None:
    loop = asyncio.get_running_loop()
    look_up = loop.getaddrinfo

    async def hooks_test_is_here(host, *arguments, **options):
        return await look_up("127.0.0.1" if host == "hooks.test" else host, *arguments, **options)

    monkeypatch.setattr(loop, "getaddrinfo", hooks_test_is_here)
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    receiver = Receiver()
    async with receiver.serving(certificate=CERTIFICATE) as url:
        named = url.replace("127.0.0.1", "hooks.test")
        assert await (await send(named, hosts=("hooks.test",))).outcome() == "refused"
        assert receiver.received == []
        assert await (await send(named, hosts=("hooks.test", "127.0.0.1"))).outcome() == "delivered"


@pytest.mark.anyio
async def test_a_webhook_that_nobody_foresaw_fails_and_the_next_one_is_sent(send, monkeypatch) -> None:
    receiver = Receiver()
    async with receiver.serving() as url:
        head = await send(url)
        with monkeypatch.context() as patched:
            patched.delattr("triptych.api.webhooks.post")
            assert await head.outcome() == "failed"
        assert await head.outcome() == "delivered"


@pytest.mark.anyio
async def test_an_address_is_called_beside_the_name_that_its_certificate_has_to_be_of() -> None:
    trusting = ssl.create_default_context(cafile=CERTIFICATE)
    receiver = Receiver()
    async with receiver.serving(certificate=CERTIFICATE) as url, httpx.AsyncClient(verify=trusting) as client:
        for name in ("hooks.test", "other.test"):
            target = check_webhook_url(url.replace("127.0.0.1", name), ("*.test", "hooks.test"))
            sending = post(client, target, ["127.0.0.1"], b"{}", {}, 10.0)
            if name == "hooks.test":
                assert await sending == 204
            else:
                with pytest.raises(httpx.ConnectError, match=r"certificate is not valid for 'other\.test'"):
                    await sending
    (received,) = receiver.received
    assert received.headers["host"] == f"hooks.test:{receiver.port}"


@pytest.mark.anyio
@pytest.mark.parametrize("error", [httpx.ConnectTimeout, httpx.ConnectError])
async def test_an_address_that_nobody_can_be_reached_at_leaves_time_for_the_next(error) -> None:
    asked = []

    async def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.url.host, request.extensions["timeout"]["connect"]))
        if request.url.host == "2001:db8::1":
            raise error("nobody there")
        return httpx.Response(204)

    target = check_webhook_url("https://hooks.example.com/", HOSTS)
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        assert await post(client, target, ["2001:db8::1", "192.0.2.1"], b"{}", {}, 10.0) == 204
    assert asked == [("2001:db8::1", 5.0), ("192.0.2.1", 5.0)]


# -- what a request asks for


@pytest.mark.anyio
async def test_a_request_names_its_webhook_where_the_server_has_some(client, fake_head, services) -> None:
    for path, body in (("/v1/images/generations", {}), ("/v1/tasks/image/", {})):
        answer = await client.post(path, json={"prompt": "x", "webhook_url": "https://a.example/", **body})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (422, "webhook_url")
        assert "webhook_url cannot be called: this server has no [webhooks] hosts" in error["message"]
    section = WebhooksSection(hosts=("a.example",), keys_file="keys")
    object.__setattr__(services, "topology", msgspec.structs.replace(services.topology, webhooks=section))
    body = {"prompt": "x", "webhook_url": "https://a.example/"}
    error = (await client.post("/v1/images/generations", json=body)).json()["error"]
    assert "no secret for" in error["message"]
    object.__setattr__(services, "webhook_keys", WebhookKeys({"": (SECRET,)}))
    assert (await client.post("/v1/images/generations", json=body)).status_code == 200
    (submit,) = await fake_head.received(wire.SubmitRequest)
    assert submit.webhook_url == "https://a.example/"
