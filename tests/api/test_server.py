from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import socket
import subprocess
import sys
import time

import httpx
import pytest

from triptych.actors import StartDelayedError, StartError
from triptych.actors.runtime.system_messages import Inspect, Inspection, Shutdown, ShuttingDown
from triptych.api.connections import RESERVED_DESCRIPTORS, ConnectionLimits, connection_limit, raise_file_limit
from triptych.api.server import listen
from triptych.roles.messages import requests as wire

pytestmark = pytest.mark.anyio
URL = "/v1/images/generations"
HOST = "127.0.0.1"


async def test_it_serves_over_a_socket(runtime, fake_head, remote):
    async with runtime:
        answer = await remote.post(URL, json={"prompt": "x", "seed": 2, "response_format": "url"})
        assert answer.status_code == 200
        url = answer.json()["data"][0]["url"]
        assert url.startswith(str(remote.base_url))
        assert (await remote.get(url)).headers["content-type"] == "image/png"
        assert "server" not in answer.headers


async def test_it_waits_for_the_head_before_it_listens(runtime, fake_head, topology, outbox):
    await fake_head.stop()
    starting = asyncio.create_task(runtime.__aenter__())
    api = outbox.reference("api", topology.component("api").address)
    inspection = await api.ask(Inspect(), Inspection, timeout_s=10)
    (status,) = inspection.actors
    assert (status.state, status.detail) == ("loading", "waiting for the head")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, topology.api.port)).close()
    await fake_head.start()
    async with asyncio.timeout(10):
        await starting
    socket.create_connection((HOST, topology.api.port)).close()
    (status,) = (await api.ask(Inspect(), Inspection, timeout_s=10)).actors
    assert (status.state, status.detail) == ("ready", "")
    await runtime.__aexit__(None, None, None)


async def test_it_stops_while_it_waits_for_the_head(runtime, topology, outbox):
    starting = asyncio.create_task(runtime.run())
    api = outbox.reference("api", topology.component("api").address)
    await api.ask(Shutdown("enough"), ShuttingDown, timeout_s=10)
    async with asyncio.timeout(10):
        await starting


async def test_a_port_in_use_is_said_in_words(runtime, fake_head, topology):
    with (
        socket.create_server((HOST, topology.api.port)),
        pytest.raises(StartDelayedError, match=rf"port {topology.api.port} .* in use: stop what listens there"),
    ):
        await runtime.run()


def test_an_address_of_another_machine_is_said_in_words():
    with pytest.raises(StartError, match=r"cannot listen on 192\.0\.2\.1 port 8000"):
        listen("192.0.2.1", 8000)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_cancels(runtime, fake_head, topology, stream):
    fake_head.hold = True
    async with runtime:
        wait = await hang_up(fake_head, topology.url, stream=stream)
        (cancel,) = await fake_head.received(wire.CancelRequest)
    assert cancel.request_id == wait.request_id


async def test_a_client_with_a_key_may_hang_up_and_ask_again(runtime, fake_head, topology, remote):
    fake_head.hold = True
    headers = {"Idempotency-Key": "mine"}
    async with runtime:
        wait = await hang_up(fake_head, topology.url, headers)
        again = asyncio.create_task(remote.post(URL, json={"prompt": "x"}, headers=headers))
        await fake_head.received(wire.WaitRequest, 2)
        fake_head.finish(wait.request_id)
        answer = await again
    assert (answer.status_code, answer.json()["id"]) == (200, wait.request_id)
    assert not [message for message in fake_head.seen if isinstance(message, wire.CancelRequest)]


async def test_stopping_finishes_what_runs(runtime, fake_head, remote, topology):
    fake_head.hold = True
    serving = asyncio.create_task(runtime.run())
    await listening(topology.api.port)
    asking = asyncio.create_task(remote.post(URL, json={"prompt": "x"}))
    (wait,) = await fake_head.received(wire.WaitRequest)
    runtime.stop("the test says so")
    await listening(topology.api.port, yes=False)
    fake_head.finish(wait.request_id)
    assert (await asking).status_code == 200
    async with asyncio.timeout(10):
        await serving


async def test_what_cannot_finish_in_time_is_told_where_to_ask(runtime, fake_head, remote):
    fake_head.hold = True
    async with runtime:
        asking = asyncio.create_task(remote.post(URL, json={"prompt": "x"}))
        (wait,) = await fake_head.received(wire.WaitRequest)
    answer = await asking
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping")
    assert f"/v1/requests/{wait.request_id}" in answer.json()["error"]["message"]
    assert not [message for message in fake_head.seen if isinstance(message, wire.CancelRequest)]


async def test_a_stream_that_cannot_finish_in_time_says_where_to_ask(runtime, fake_head, remote):
    fake_head.hold = True
    async with runtime:
        asking = asyncio.create_task(remote.post(URL, json={"prompt": "x", "stream": True}))
        (wait,) = await fake_head.received(wire.WaitRequest)
    last = (await asking).text.strip().rpartition("\n\n")[2]
    assert last.startswith("event: error\ndata: ")
    error = json.loads(last.partition("data: ")[2])["error"]
    assert (error["type"], error["code"]) == ("server_error", "stopping")
    assert f"/v1/requests/{wait.request_id}" in error["message"]
    assert not [message for message in fake_head.seen if isinstance(message, wire.CancelRequest)]


async def hang_up(
    fake_head, url: str, headers: dict[str, str] | None = None, *, stream: bool = False
) -> wire.WaitRequest:
    """Ask for an image, and close the connection once the head is asked for it."""
    async with httpx.AsyncClient(base_url=url) as client:
        asking = asyncio.create_task(client.post(URL, json={"prompt": "x", "stream": stream}, headers=headers))
        (wait,) = await fake_head.received(wire.WaitRequest)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    return wait


async def listening(port: int, *, yes: bool = True) -> None:
    """Wait until somebody, or nobody, listens there."""
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await asyncio.open_connection(HOST, port)
                writer.close()
                await writer.wait_closed()
                there = True
            except ConnectionRefusedError:
                there = False
            except ConnectionResetError:  # it was in the queue of a socket that closed: look again
                continue
            if there is yes:
                return


async def test_uploads_that_no_request_can_need_are_removed(runtime, fake_head, topology, uploads, remote):
    names = [uploads.save(data, "png").name for data in (b"old", b"needed", b"new")]
    keep_s = topology.head.request_timeout_s + 3600.0
    for name, age_s in zip(names, (keep_s + 60, keep_s - 60, 0), strict=True):
        os.utime(uploads.files.folder / name, (time.time() - age_s,) * 2)
    async with runtime, asyncio.timeout(10):
        while (uploads.files.folder / names[0]).exists():
            await remote.get("/live")
    assert {path.name for path in uploads.files.folder.iterdir()} == set(names[1:])


def test_the_api_imports_no_torch():
    code = "import api.server, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def read_all(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(10):
        return await reader.read()


async def test_a_head_that_does_not_end_ends(runtime, fake_head, topology, remote):
    runtime.actors[0]._limits.header_timeout_s = 0.3
    async with runtime:
        silent, _ = await asyncio.open_connection(HOST, topology.api.port)
        assert await read_all(silent) == b""
        slow, writer = await asyncio.open_connection(HOST, topology.api.port)
        writer.write(b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /live HTTP/1.1\r\nX-A: ")
        answers = await read_all(slow)
        assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"408"]
        fake_head.hold = True
        waiting = asyncio.create_task(remote.post(URL, json={"prompt": "x"}))
        (wait,) = await fake_head.received(wire.WaitRequest)
        await read_all((await asyncio.open_connection(HOST, topology.api.port))[0])  # for as long as a head may take
        fake_head.finish(wait.request_id)
        assert (await waiting).status_code == 200, "an answer may take longer than a head"


async def test_one_connection_too_many_is_told_so(runtime, fake_head, topology, remote):
    async with runtime:
        limits = runtime.actors[0]._limits
        limits.limit = 2
        held = [await asyncio.open_connection(HOST, topology.api.port) for _ in range(2)]
        answer = await remote.get("/live")
        assert (answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]) == (503, "full", "1")
        assert limits.refused == 1
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
        async with asyncio.timeout(10):
            while (await remote.get("/live")).status_code != 200:
                pass


def test_as_many_connections_as_there_are_descriptors_for():
    assert connection_limit(1024, 1 << 20) == 1024
    assert connection_limit(1024, 256) == 256 - RESERVED_DESCRIPTORS
    assert connection_limit(1024, 10) == 1


def test_as_many_files_may_be_open_as_the_system_allows():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], 512), before[1]))
        files = raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[1]
        assert files == before[1] or before[1] == resource.RLIM_INFINITY
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_refusals_are_logged_once_a_second(monkeypatch):
    lines = []
    monkeypatch.setattr("triptych.api.connections.log.warning", lambda event, **facts: lines.append(facts["refused"]))
    limits = ConnectionLimits(2)
    for now in (0.0, 0.1, 0.2, 1.0, 1.1, 2.5):
        limits.refuse(3, now)
    assert lines == [1, 3, 2]


async def sent_raw(port: int, *parts: bytes) -> bytes:
    """What the server answers to bytes, until it closes the connection."""
    reader, writer = await asyncio.open_connection(HOST, port)
    for part in parts:
        writer.write(part)
        await writer.drain()
    answer = await read_all(reader)
    writer.close()
    return answer


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\nX A: b\r\n\r\n", 400),
        (b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: a\0b\r\n\r\n", 400),
        (b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: a\r\nConnection: close\r\n\r\n", 400),
        (b"GET /live HTTP/1.1\r\nConnection: close\r\n\r\n", 421),
        (b"POST /v1/videos HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST /v1/videos HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"y" * 70_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 431),
        (b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X-A: y\r\n" * 20_000 + b"\r\n", 431),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, bytes) else str(value),
)  # fmt: skip
async def test_what_is_no_request_or_too_long_is_answered_with_an_error(runtime, fake_head, topology, head, status):
    async with runtime:
        answer = await sent_raw(topology.api.port, head)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:300]
    headers, _, text = answer.partition(b"\r\n\r\n")
    assert b"application/json" in headers
    assert json.loads(text)["error"]["message"]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /live HTTP/1.1\r\nX-A: ",
        b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
        b"\r\n\r\n0\r\nX-A: ",
    ],
    ids=["head", "trailer"],
)
async def test_a_header_without_an_end_is_not_kept(runtime, fake_head, topology, head):
    async with runtime:
        with pytest.raises(ConnectionError):  # it is closed before all of that is read
            await sent_raw(topology.api.port, head, *[b"y" * 1_000_000] * 30)


async def test_requests_that_come_together_are_answered_in_order(runtime, fake_head, topology):
    ask = b"GET /v1/requests/r%d HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    last = b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    async with runtime:
        answers = await sent_raw(topology.api.port, b"".join(ask % number for number in range(20)) + last)
    assert [int(found) for found in re.findall(rb"no such request: r(\d+)", answers)] == list(range(20))
    assert answers.endswith(b'{"status":"live"}')
