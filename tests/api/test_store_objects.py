"""Artifacts that no path leads to, as in a bucket: the same answers as for a file."""

from __future__ import annotations

import os

import pytest
from starlette.datastructures import MutableHeaders

from triptych.api import artifacts as endpoints
from triptych.roles.media.files import LocalFiles

pytestmark = pytest.mark.anyio
DATA = os.urandom(3 * endpoints._CHUNK_BYTES + 5)
URL = "/v1/images/r_0.png"


class Objects(LocalFiles):
    """Files that are read through the store alone."""

    def path(self, name):
        return None


def put(store):
    store.save("r/0", "png", DATA)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Range": "bytes=0-0"},
        {"Range": "bytes=100-300000"},
        {"Range": "bytes=700000-"},
        {"Range": "bytes=-7"},
        {"Range": "bytes=5-99999999"},
        {"Range": "bytes=99999999-"},
        {"Range": f"bytes=0-{len(DATA)}"},
        {"Range": "bytes=" + ",".join(f"{k}-{k}" for k in range(0, 300, 2))},
        {"Range": "lines=1-2"},
        {"If-None-Match": "*"},
        {"If-Match": '"another"'},
        {"Range": "bytes=0-9", "If-Range": '"another"'},
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_an_object_is_answered_as_a_file_is(client, store, method, headers):
    put(store)
    file = await client.request(method, URL, headers=headers)
    store.files = Objects(store.files.folder)
    answer = await client.request(method, URL, headers=headers)
    assert (answer.status_code, answer.content) == (file.status_code, file.content)
    ignored = ("x-request-id", "traceparent")
    kept, other = (MutableHeaders(raw=list(each.headers.raw)) for each in (answer, file))
    for name in ignored:
        del kept[name], other[name]
    assert dict(kept) == dict(other)


@pytest.mark.parametrize("objects", [False, True])
async def test_of_several_ranges_each_is_sent_once(client, store, objects):
    put(store)
    if objects:
        store.files = Objects(store.files.folder)
    answer = await client.get(URL, headers={"Range": "bytes=-4, 5-300000, 0-1, 6-9, 9999999-"})
    assert (answer.status_code, len(answer.content)) == (206, int(answer.headers["content-length"]))
    kind, _, boundary = answer.headers["content-type"].partition("; boundary=")
    assert kind == "multipart/byteranges"
    before, *parts, after = answer.content.split(f"--{boundary}".encode())
    assert (before, after) == (b"", b"--\r\n")
    size = len(DATA)
    for part, (start, end) in zip(parts, ((0, 2), (5, 300001), (size - 4, size)), strict=True):
        head, _, body = part.partition(b"\r\n\r\n")
        lines = head.decode().strip().split("\r\n")
        assert lines == ["Content-Type: image/png", f"Content-Range: bytes {start}-{end - 1}/{size}"]
        assert body == DATA[start:end] + b"\r\n"


async def test_a_store_that_cannot_be_reached_is_a_503_and_a_file_that_is_gone_a_410(client, store, fake_head):
    await client.post("/v1/images/generations", json={"prompt": "x"}, headers={"Idempotency-Key": "k"})
    (request_id,) = fake_head.journal
    url = f"/v1/images/{request_id}_0.png"
    store.files = Objects(store.files.folder)
    assert (await client.get(url)).status_code == 200
    store.files.remove([f"{request_id}_0.png"])
    assert (await client.get(url)).json()["error"]["code"] == "artifact_expired"
    store.files = Objects(store.files.folder / "away", shared=True)
    answer = await client.get(url)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert answer.headers["retry-after"] == "5"
    assert str(store.files.folder) not in answer.text


async def test_a_file_that_ends_too_soon_is_no_complete_answer(store):
    put(store)
    store.files = Objects(store.files.folder)
    sent = []
    response = endpoints.FileResponse(store, store.stat("r_0.png"), "image/png", {}, [])
    (store.files.folder / "r_0.png").write_bytes(DATA[:-5])  # smaller than it was when it was looked at

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "headers": [], "asgi": {"spec_version": "2.4"}}
    with pytest.raises(EOFError, match="too soon"):
        await response(scope, receive, send)
    assert not any(message.get("more_body") is False for message in sent), "the client sees that bytes are missing"
