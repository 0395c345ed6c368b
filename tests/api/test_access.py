"""Who may ask, from where, and how often; and that nobody sees what another key made."""

from __future__ import annotations

import dataclasses
import re

import httpx
import msgspec
import pytest

from tests.api.conftest import BOUND_S
from triptych.actors.topology import ApiSection
from triptych.api.access import TokenBucket, check_host, check_origin, host_of, own_host_names
from triptych.api.app import make_app
from triptych.api.errors import ApiError
from triptych.api.keys import ApiClient, ApiKeys
from triptych.roles.messages import requests as wire

pytestmark = pytest.mark.anyio
URL = "/v1/images/generations"
ALICE, BOB, LAST = "alice-0123456789abcdef", "bob-0123456789abcdef", "last-0123456789abcdef"


@pytest.fixture
async def client_of(services, fake_head):
    """Make a client of an app with `[api]` keys of its own, in this process."""
    clients = []

    def make(key: str = "", *, keys: dict[str, ApiClient] | None = None, **api: object) -> httpx.AsyncClient:
        topology = services.topology
        changed = msgspec.structs.replace(topology, api=msgspec.structs.replace(topology.api, **api))
        app = make_app(dataclasses.replace(services, topology=changed), ApiKeys(keys) if keys else None)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000", headers=headers, timeout=BOUND_S
        )
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture
def with_key(client_of):
    clients = {ALICE: ApiClient("alice"), BOB: ApiClient("bob", 5), LAST: ApiClient("last", -5)}
    return lambda key: client_of(key, keys=clients)


@pytest.mark.parametrize("sent", ["", "Bearer", "Bearer wrong", f"Basic {ALICE}", f"Bearer {ALICE}x", "Bearer \xe9"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/cluster", "/openapi.json", "/v1/requests/r", "/nowhere"])
async def test_without_a_key_there_is_nothing_to_see(with_key, fake_head, sent, path):
    answer = await with_key("").get(path, headers={"Authorization": sent.encode("latin-1")} if sent else {})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"], error["param"]) == (
        401, "invalid_api_key", "invalid_request_error", None,
    )  # fmt: skip
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"].startswith("req_")
    assert not fake_head.seen


async def test_probes_need_no_key(with_key):
    assert (await with_key("").get("/live")).status_code == 200


async def test_a_request_is_seen_by_its_own_key_alone(with_key, fake_head):
    alice, bob = with_key(ALICE), with_key(BOB)
    made = (await alice.post(URL, json={"prompt": "x", "response_format": "url"})).json()
    assert fake_head.journal[made["id"]].submit.owner == "alice"
    image = made["data"][0]["url"]
    assert (await alice.get(f"/v1/requests/{made['id']}")).status_code == 200
    assert (await alice.get(image)).status_code == 200
    for method, path in (
        ("GET", f"/v1/requests/{made['id']}"),
        ("DELETE", f"/v1/requests/{made['id']}"),
        ("GET", image),
        ("GET", f"/v1/videos/{made['id']}"),
        ("GET", f"/v1/videos/{made['id']}/content"),
        ("DELETE", f"/v1/videos/{made['id']}"),
    ):
        answer = await bob.request(method, path)
        assert answer.status_code == 404, path


async def test_idempotency_keys_are_each_key_s_own(with_key, fake_head):
    made = [
        (await with_key(key).post(URL, json={"prompt": "x"}, headers={"Idempotency-Key": "k"})).json()["id"]
        for key in (ALICE, BOB, ALICE)
    ]
    assert made[0] == made[2] != made[1]


async def test_a_key_lowers_its_priority_and_raises_it_as_far_as_it_may(with_key, client, fake_head):
    allowed = {ALICE: (-100, 0), BOB: (5,)}
    for key, priorities in allowed.items():
        for priority in priorities:
            made = (await with_key(key).post(URL, json={"prompt": "x", "priority": priority})).json()
            assert fake_head.journal[made["id"]].submit.priority == priority
    for key in allowed:
        refused = await with_key(key).post(URL, json={"prompt": "x", "priority": 6})
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, "priority")
    for key, default in ((ALICE, 0), (BOB, 0), (LAST, -5)):
        made = (await with_key(key).post(URL, json={"prompt": "x"})).json()
        assert fake_head.journal[made["id"]].submit.priority == default
    made = (await client.post(URL, json={"prompt": "x", "priority": 100})).json()
    assert fake_head.journal[made["id"]].submit.priority == 100, "without keys everybody is the operator"


async def test_a_key_that_asks_too_often_is_told_when_to_try_again(with_key, client_of, fake_head):
    alice, bob = (
        client_of(key, keys={ALICE: ApiClient("alice"), BOB: ApiClient("bob")}, rate_limit="1/h")
        for key in (ALICE, BOB)
    )
    assert (await alice.post(URL, json={"prompt": "x"})).status_code == 200
    refused = await alice.post(URL, json={"prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    assert 3500 < int(refused.headers["retry-after"]) <= 3600
    assert (await alice.get("/v1/models")).status_code == 200, "to look is no request for work"
    assert (await bob.post(URL, json={"prompt": "x"})).status_code == 200


def test_a_bucket_fills_again():
    bucket = TokenBucket(2, 60.0, now=0.0)
    assert [bucket.take(0.0), bucket.take(0.0), bucket.take(0.0)] == [0.0, 0.0, 30.0]
    assert bucket.take(30.0) == 0.0
    assert bucket.take(45.0) == pytest.approx(15.0)
    assert [bucket.take(1e6) for _ in range(3)] == [0.0, 0.0, 30.0]


@pytest.mark.parametrize(
    ("host", "taken"),
    [
        ("127.0.0.1:8000", True), ("127.9.9.9", True), ("[::1]:8000", True), ("localhost", True), ("LOCALHOST:1", True),
        ("pictures.example.com", True), ("Pictures.Example.com.:443", True), ("10.0.0.7:8000", False),
        ("evil.example", False), ("", False), ("localhost.evil.example", False), ("127.0.0.1.evil.example", False),
        ("evil.example@127.0.0.1", True), ("[::1", False), ("user:pass@evil.example", False),
    ],
)  # fmt: skip
async def test_a_host_is_one_of_ours(host, taken):
    if taken:
        check_host(host, {"pictures.example.com"})
        return
    with pytest.raises(ApiError) as refused:
        check_host(host, {"pictures.example.com"})
    assert (refused.value.status, refused.value.code) == (421, "unknown_host")


def test_where_all_addresses_are_listened_on_any_of_them_is_a_host():
    check_host("10.0.0.7:8000", (), any_address=True)
    with pytest.raises(ApiError):
        check_host("evil.example", (), any_address=True)


@pytest.mark.parametrize(
    ("origin", "taken"),
    [
        ("http://127.0.0.1:8000", True), ("https://pictures.example.com", True), ("https://app.example.com:8443", True),
        ("https://evil.example", False), ("null", False), ("http://127.0.0.1:3000", False), ("", False),
        ("http://localhost:8000", False), ("file://127.0.0.1:8000", False),
        ("https://pictures.example.com.evil.example", False),
    ],
)  # fmt: skip
def test_a_page_of_another_site_may_not_call(origin, taken):
    allowed = own_host_names(
        ApiSection(public_url="https://pictures.example.com/x", allowed_hosts=("app.example.com",))
    )
    if taken:
        check_origin(origin, "127.0.0.1:8000", allowed)
        return
    with pytest.raises(ApiError) as refused:
        check_origin(origin, "127.0.0.1:8000", allowed)
    assert refused.value.status == 403


def test_the_name_of_a_host():
    assert [host_of(text) for text in ("A.b:1", "[::1]:80", "x.", "", ":80", "[")] == ["a.b", "::1", "x", "", "", ""]


async def test_rebinding_and_cross_site_forms_are_refused(client, fake_head):
    rebound = await client.get("/v1/cluster", headers={"Host": "evil.example"})
    assert (rebound.status_code, rebound.json()["error"]["code"]) == (421, "unknown_host")
    forged = await client.post(URL, files={"prompt": (None, "csrf")}, headers={"Origin": "https://evil.example"})
    assert (forged.status_code, forged.json()["error"]["code"]) == (403, "foreign_origin")
    assert not fake_head.seen


async def test_urls_start_where_the_topology_says(client_of, fake_head):
    client = client_of(public_url="https://pictures.example.com/made/")
    headers = {"Host": "pictures.example.com", "Origin": "https://pictures.example.com"}
    answer = await client.post(URL, json={"prompt": "x", "response_format": "url"}, headers=headers)
    made = answer.json()
    assert made["data"][0]["url"] == f"https://pictures.example.com/made/v1/images/{made['id']}_0.png"
    later = await client.post(URL, json={"prompt": "x"}, headers={**headers, "Prefer": "respond-async"})
    assert later.headers["location"] == f"https://pictures.example.com/made/v1/requests/{later.json()['id']}"


async def test_a_client_waits_for_its_own_requests_alone(with_key, fake_head):
    await with_key(ALICE).post(URL, json={"prompt": "x"})
    (wait,) = await fake_head.received(wire.WaitRequest)
    assert wait.owner == "alice"


async def test_the_page_needs_no_key_and_what_it_calls_does(with_key, fake_head):
    client = with_key("")
    page = await client.get("/")
    assert page.status_code == 200
    script = re.search(r'src="(page/[^"]+)"', page.text)
    assert (await client.get(f"/{script[1]}")).status_code == 200
    assert (await client.get("/v1/models")).status_code == 401
    assert (await client.get("/", headers={"Host": "evil.example"})).status_code == 421
