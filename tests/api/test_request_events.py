from __future__ import annotations

import asyncio
import json

import httpx
import msgspec
import pytest

from tests.api.conftest import BOUND_S
from triptych.api.event_stream import ServerEvent, encode
from triptych.api.request_events import Seen, changes, seen_of
from triptych.roles.media.files import StoreUnavailableError
from triptych.roles.messages import requests as wire

pytestmark = pytest.mark.anyio
URL = "/v1/images/generations"
ASYNC = {"Prefer": "respond-async"}


def job(index: int, moves: int, step: int, previews: int) -> wire.JobView:
    return wire.JobView(
        index=index, seed=index, state="DENOISING_RUNNING", attempts=1, step=step, total_steps=20,
        history=tuple(wire.Transition(f"STATE_{number}", float(number)) for number in range(moves)),
        instances={}, stage_seconds={}, causes=(),
        previews=tuple(
            wire.PreviewView(number, wire.Artifact(f"r_{index}.{number}.png", "image/png", 1))
            for number in range(previews)
        ),
    )  # fmt: skip


def view(*jobs: wire.JobView) -> wire.RequestView:
    revision = "-".join(f"{len(job.history)}.{job.step}.{len(job.previews)}" for job in jobs)
    return wire.RequestView("r", "DENOISING_RUNNING", False, 0.0, 0.0, {}, wire.Output(), jobs, revision=revision)


def events(seen: str, *jobs: wire.JobView) -> list[tuple[str, object]]:
    made = changes(view(*jobs), seen, lambda name: f"/{name}")
    return [(event.name, {k: v for k, v in event.data.items() if k not in ("at", "reason")}) for event in made]


def test_a_client_gets_what_it_has_not_seen():
    assert events("2.3.1-1.0.0", job(0, 3, 4, 2), job(1, 1, 0, 0)) == [
        ("state", {"index": 0, "state": "STATE_2"}),
        ("step", {"index": 0, "step": 4, "total_steps": 20}),
        ("partial_image", {"index": 0, "partial_image_index": 1, "step": 1, "url": "/r_0.1.png"}),
    ]
    assert events("3.4.2-1.0.0", job(0, 3, 4, 2), job(1, 1, 0, 0)) == []


def test_of_a_history_that_was_shortened_a_client_gets_the_moves_that_are_new_to_it():
    long = msgspec.structs.replace(view(job(0, 4, 0, 0)), revision="900.0.0")
    for seen, count in (("898.0.0", 2), ("900.0.0", 0), ("12.0.0", 4), ("", 4)):
        assert len([*changes(long, seen, str)]) == count


@pytest.mark.parametrize("revision", ["", "1.2.3"])
def test_a_client_that_knows_nothing_of_this_request_gets_all(revision):
    assert seen_of(revision, 2) == [Seen(), Seen()]
    assert [name for name, _ in events(revision, job(0, 2, 0, 0), job(1, 1, 0, 0))] == ["state"] * 3


def test_an_event_is_written_on_lines_of_its_own():
    assert (
        encode(ServerEvent("step", {"text": "a\nb"}, "1.2.3")) == b'id: 1.2.3\nevent: step\ndata: {"text":"a\\nb"}\n\n'
    )
    assert encode(ServerEvent("")) == b":\n\n"


async def streamed(answer) -> list[tuple[str, dict]]:
    found, name = [], ""
    async for line in answer.aiter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            found.append((name, json.loads(line.removeprefix("data: "))))
    return found


async def test_the_events_of_a_request_end_with_it(client, fake_head):
    request_id = (await client.post(URL, json={"prompt": "x", "n": 2}, headers=ASYNC)).json()["id"]
    answer = await client.get(f"/v1/requests/{request_id}/events")
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    found = [(line.partition(": ")[2]) for line in answer.text.splitlines() if line.startswith("event: ")]
    assert found[-1] == "ended"
    assert found.count("state") == 4
    (last,) = (line.partition(": ")[2] for line in answer.text.splitlines() if line.startswith("id: "))
    again = await client.get(f"/v1/requests/{request_id}/events", headers={"Last-Event-ID": last})
    assert (again.status_code, again.content) == (204, b"")
    damaged = await client.get(f"/v1/requests/{request_id}/events", headers={"Last-Event-ID": "1.2"})
    assert damaged.status_code == 200
    assert (await client.get("/v1/requests/req_none/events")).status_code == 404


async def test_requests_are_listed_by_page_and_by_whether_they_have_ended(client, fake_head):
    ended = [(await client.post(URL, json={"prompt": f"{k}"}, headers=ASYNC)).json()["id"] for k in range(2)]
    fake_head.hold = True
    active = (await client.post(URL, json={"prompt": "x"}, headers=ASYNC)).json()["id"]
    page = (await client.get("/v1/requests", params={"limit": 2})).json()
    assert [one["id"] for one in page["data"]] == [active, ended[1]]
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", active, ended[1], True)
    rest = (await client.get("/v1/requests", params={"after": page["last_id"]})).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == ([ended[0]], False)
    for status, ids in (("active", [active]), ("ended", ended[::-1]), ("all", [active, *ended[::-1]])):
        shown = (await client.get("/v1/requests", params={"status": status})).json()
        assert [one["id"] for one in shown["data"]] == ids
    refused = await client.get("/v1/requests", params={"status": "lost"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "status")


async def test_images_are_streamed_each_as_soon_as_it_is_done(client, fake_head):
    body = {"prompt": "x", "n": 2, "stream": True, "seed": 5}
    async with client.stream("POST", URL, json=body) as answer:
        assert answer.headers["x-request-id"]
        found = await streamed(answer)
    assert [name for name, _ in found] == ["image_generation.completed"] * 2
    assert {(event["index"], event["seed"]) for _, event in found} == {(0, 5), (1, 6)}
    assert all(event["type"] == "image_generation.completed" and event["b64_json"] for _, event in found)
    assert all(event["usage"]["total_tokens"] == 0 for _, event in found)


async def test_a_failure_within_a_stream_is_its_last_event(client, fake_head):
    fake_head.hold = True
    answer = asyncio.create_task(client.post(URL, json={"prompt": "x", "stream": True}))
    (wait,) = await fake_head.received(wire.WaitRequest)
    fake_head.finish(wait.request_id, "FAILED", ("denoiser-0: out of paint",))
    (event,) = [json.loads(line[6:]) for line in (await answer).text.splitlines() if line.startswith("data: ")]
    assert event["type"] == "error"
    assert "out of paint" in event["error"]["message"]
    assert not [one for one in fake_head.seen if isinstance(one, wire.CancelRequest)]


async def test_a_head_that_cannot_answer_for_a_moment_ends_no_stream(client, fake_head):
    fake_head.failures[wire.QueryRequest] = ["unavailable", "stopping"]
    answer = await client.post(URL, json={"prompt": "x", "stream": True})
    assert [line[7:] for line in answer.text.splitlines() if line.startswith("event: ")] == [
        "image_generation.completed"
    ]


@pytest.mark.parametrize("code", ["not_found", "store_unavailable"])
async def test_what_fails_beside_the_request_ends_its_stream_with_an_error(app, fake_head, monkeypatch, store, code):
    def unavailable(_name: str) -> bytes:
        raise StoreUnavailableError("nobody there")

    if code == "not_found":  # it is deleted while somebody waits for it
        fake_head.hold, fake_head.failures = True, {wire.WaitRequest: ["not_found"]}
    else:
        monkeypatch.setattr(store, "read", unavailable)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        answer = await client.post(URL, json={"prompt": "x", "stream": True})
    last = answer.text.strip().rpartition("\n\n")[2]
    assert last.startswith("event: error\n")
    assert json.loads(last.partition("data: ")[2])["error"]["code"] == code
    assert not [one for one in fake_head.seen if isinstance(one, wire.CancelRequest)]


async def test_the_events_of_a_request_end_when_it_is_deleted(app, fake_head):
    fake_head.hold, fake_head.failures = True, {wire.WaitRequest: ["not_found"]}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        request_id = (await client.post(URL, json={"prompt": "x"}, headers=ASYNC)).json()["id"]
        answer = await client.get(f"/v1/requests/{request_id}/events")
    assert "event: state" in answer.text
    assert "event: ended" not in answer.text


async def test_to_head_a_stream_is_its_headers_alone(client, fake_head):
    fake_head.hold = True
    request_id = (await client.post(URL, json={"prompt": "x"}, headers=ASYNC)).json()["id"]
    async with asyncio.timeout(BOUND_S):
        for path in (f"/v1/requests/{request_id}/events", "/v1/cluster/events"):
            answer = await client.head(path)
            assert (answer.status_code, answer.content) == (200, b"")
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert "content-length" not in answer.headers
