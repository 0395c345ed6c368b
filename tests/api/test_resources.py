from __future__ import annotations

import asyncio
import os

import msgspec
import pytest

from triptych.actors import load_topology
from triptych.actors.runtime.system_messages import (
    ActorStatus,
    ChildReport,
    DeadLetterQuery,
    DeadLetterReport,
    Inspect,
    Inspection,
    SupervisorQuery,
    SupervisorReport,
)
from triptych.api.cluster_observer import actor_rows, assess_readiness, host_rows, silent_hosts
from triptych.bus import DeadLetter, Mailbox
from triptych.roles.messages import requests as wire
from triptych.roles.messages.pool import PoolDescription, PoolQuery

pytestmark = pytest.mark.anyio
URL = "/v1/images/generations"


async def test_models_in_openais_shape(client, fake_head):
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["created"]) == ("tiny/shapes", "model", 1_700_000_000)
    assert (model["family"], model["medium"], model["dtype"]) == ("stable-diffusion-xl", "image", "float32")
    assert "fps" not in model, "it makes no video"
    tasks = [{"name": "text2image", "requires": ["prompt"]}, {"name": "video2image", "requires": ["prompt", "video"]}]
    assert (model["task"], model["tasks"]) == ("any", tasks)
    height, prompt, sigmas, scale, video = model["parameters"]
    limits = {"minimum": 64, "maximum": 128, "multiple_of": 8}
    says = {"description": "In pixels."}
    assert height == {"name": "height", "kind": "integer", "default": 64, "required": False, **limits, **says}
    assert prompt == {"name": "prompt", "kind": "text", "default": None, "required": True}
    assert sigmas["default"] == [1.0, 0.5]
    assert (scale["maximum"], scale["alias_of"]) == (100.0, "guidance_scale")
    assert video["kind"] == "images", "whether one makes a list is between us and the pipeline"
    assert (await client.get("/v1/models/tiny/shapes")).json() == model


async def test_a_request_tells_its_life(client, fake_head):
    made = (await client.post(URL, json={"prompt": "x", "n": 2, "seed": 5})).json()
    shown = (await client.get(f"/v1/requests/{made['id']}")).json()
    assert (shown["id"], shown["state"], shown["terminal"]) == (made["id"], "DONE", True)
    assert shown["inputs"] == {"prompt": "x"}
    unit = next(unit for unit in shown["units"] if unit["index"] == 1)
    assert unit["seed"] == 6
    assert unit["instances"] == {"denoiser": "denoiser-0"}
    assert unit["stage_seconds"] == {"denoiser": 0.25}
    assert [move["state"] for move in unit["history"]] == ["PENDING", "DONE"]
    image = await client.get(unit["artifact"]["url"])
    assert image.status_code == 200
    assert "immutable" in image.headers["cache-control"]


async def test_partial_images_are_asked_for_listed_and_sent(client, fake_head):
    fake_head.previews = (12, 25)
    sent = {"prompt": "x", "partial_images": 2}
    made = (await client.post(URL, json=sent, headers={"Prefer": "respond-async"})).json()
    (submit,) = await fake_head.received(wire.SubmitRequest, 1)
    assert submit.partial_images == 2
    (unit,) = (await client.get(f"/v1/requests/{made['id']}")).json()["units"]
    assert [preview["step"] for preview in unit["previews"]] == [12, 25]
    first = unit["previews"][0]["artifact"]
    assert (await client.get(first["url"])).json()["error"]["code"] == "artifact_expired"
    fake_head.store.save(f"{made['id']}/0.12", "png", b"the preview")
    image = await client.get(first["url"])
    assert (image.status_code, image.content, image.headers["content-type"]) == (200, b"the preview", "image/png")
    other = await client.get(first["url"].replace(".12.", ".13."))
    assert other.status_code == 404, "that one was never made"


async def test_delete_removes_what_has_ended(client, fake_head):
    made = (await client.post(URL, json={"prompt": "x"})).json()
    gone = {"id": made["id"], "object": "request.deleted", "deleted": True}
    assert (await client.delete(f"/v1/requests/{made['id']}")).json() == gone
    assert (await client.delete(f"/v1/requests/{made['id']}")).status_code == 404


@pytest.mark.usefixtures("impatient")
async def test_a_head_that_was_given_up_is_called_that(client, topology):
    gave_up = ChildReport("head", "head", 0, 9, "gave_up", 5, "5 restarts within 30 s", 1.0)
    async with supervisor(topology, gave_up):
        answer = await client.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "head_unreachable")
    assert "not started any more (5 restarts within 30 s)" in answer.json()["error"]["message"]


async def test_a_request_that_is_not_there_is_no_warning(client, fake_head, monkeypatch):
    lines = []
    monkeypatch.setattr("triptych.api.exception_handlers.log.warning", lambda event, **_: lines.append(event))
    assert (await client.get("/v1/requests/nothing")).status_code == 404
    assert not lines


async def test_delete_cancels(client, fake_head):
    fake_head.hold = True
    waiting = asyncio.create_task(client.post(URL, json={"prompt": "x"}))
    (wait,) = await fake_head.received(wire.WaitRequest)
    shown = (await client.delete(f"/v1/requests/{wait.request_id}")).json()
    assert (shown["state"], shown["terminal"]) == ("CANCELLED", True)
    assert (await waiting).status_code == 409


@pytest.mark.parametrize(
    "name",
    ["..%2f..%2fjournal.sqlite", "%2e%2e", ".req_1_0.png.tmp", "req_1_0.png%00", "req_1_0.png", "a_0.exe"],
)
async def test_names_that_are_no_images(client, fake_head, name):
    assert (await client.get(f"/v1/images/{name}")).status_code == 404


async def test_an_image_is_served_under_its_exact_name_alone(client, fake_head, store):
    saved = store.save("req_1/0", "png", b"the bytes")
    (store.files.folder.parent / "secret_0.png").write_bytes(b"not this")
    answer = await client.get(f"/v1/images/{saved.name}")
    assert (answer.content, answer.headers["content-type"]) == (b"the bytes", "image/png")
    assert (await client.get("/v1/images/..%2Fsecret_0.png")).status_code == 404


async def test_what_was_made_and_is_not_kept_any_more_is_gone(client, fake_head, store):
    key = {"Idempotency-Key": "k"}
    body = {"prompt": "x", "seed": 3, "n": 2}
    made = (await client.post(URL, json=body, headers=key)).json()
    store.discard(f"{made['id']}/0")
    again = await client.post(URL, json=body, headers=key)
    one = await client.get(f"/v1/images/{made['id']}_0.png")
    for answer in (again, one):
        assert answer.status_code == 410
        assert answer.json()["error"]["code"] == "artifact_expired"
        assert answer.headers["x-should-retry"] == "false"
    assert (await client.get(f"/v1/images/{made['id']}_1.png")).status_code == 200
    assert (await client.get(f"/v1/images/{made['id']}_2.png")).status_code == 404, "which never was"


class FakeProcess:
    """Another process's mailbox, with fixed answers."""

    def __init__(self, name: str, address: str, answers: dict[type, object]) -> None:
        self.mailbox = Mailbox(name, address, tuple(answers), generation=1)
        self.answers = answers

    async def __aenter__(self) -> FakeProcess:
        await self.mailbox.start()
        self.task = asyncio.get_running_loop().create_task(self._serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        self.mailbox.close()

    async def _serve(self) -> None:
        while True:
            delivery = await self.mailbox.receive()
            delivery.reply(self.answers[type(delivery.message)])


def status_of(name: str, kind: str) -> ActorStatus:
    return ActorStatus(name, kind, os.getpid(), 7, "ready", "", 1, 2.5, 3, 1024, 0, {"slots": 2})


def supervisor(topology, *children: ChildReport) -> FakeProcess:
    report = {SupervisorQuery: SupervisorReport(children)}
    return FakeProcess("supervisor", f"ipc://{topology.run_dir}/supervisor", report)


GAVE_UP = ChildReport("encoder-0", "encoder", 0, 9, "gave_up", 5, "no such model", 1.0)
SENTENCE = "encoder-0: no such model"


async def test_the_cluster_shows_who_answers_and_who_does_not(client, fake_head, topology):
    denoiser = {
        Inspect: Inspection((status_of("denoiser-0", "denoiser"), status_of("denoiser-0.stream", "stream"))),
        DeadLetterQuery: DeadLetterReport(1, (DeadLetter(1.0, "unknown_message", "a", "b", 1, "c"),)),
    }
    pool = {
        Inspect: Inspection((status_of("pool", "pool"),)),
        DeadLetterQuery: DeadLetterReport(0, ()),
        PoolQuery: PoolDescription("pool", 4, 1000, 900, 100, "", 0, "shared memory"),
    }
    async with (
        FakeProcess("denoiser-0", topology.component("denoiser-0").address, denoiser),
        FakeProcess("pool", topology.component("pool").address, pool),
        supervisor(topology, GAVE_UP),
    ):
        seen = (await client.get("/v1/cluster")).json()
    actors = {actor["name"]: actor for actor in seen["actors"]}
    assert set(actors) == {
        "pool", "encoder-0", "denoiser-0", "denoiser-0.stream", "decoder-0", "head", "api",
    }  # fmt: skip
    shown = actors["denoiser-0"]
    assert (shown["state"], shown["pid"], shown["generation"], shown["restarts"]) == (
        "ready",
        os.getpid(),
        7,
        1,
    )
    assert (shown["mailbox_depth"], shown["mailbox_capacity"]) == (3, 1024)
    assert (shown["credits"], shown["slots"], shown["running"]) == (1, 2, ["req_1/0"])
    assert shown["facts"] == {"slots": 2}
    assert "credits" not in actors["denoiser-0.stream"]
    assert (actors["encoder-0"]["state"], actors["encoder-0"]["detail"]) == ("gave_up", "no such model")
    assert actors["decoder-0"]["state"] == "down"
    (described,) = seen["pools"]
    assert (described["capacity"], described["free"], described["leased"]) == (1000, 900, 100)
    assert described["transport"] == "shared memory"
    assert not described.keys() & {"session", "base_address", "arena", "fd", "pid"}, "nobody's business"
    assert seen["dead_letters"]["denoiser-0"]["recent"][0]["reason"] == "unknown_message"
    assert seen["head"]["states"] == {"DENOISING_RUNNING": 1}


async def test_live_needs_nobody(client):
    assert (await client.get("/live")).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_probes_share_what_the_actors_are_asked(client, fake_head, monkeypatch, path):
    monkeypatch.setattr("triptych.api.cluster.PROBE_AGE_S", 60.0)
    answers = await asyncio.gather(*(client.get(path) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(await fake_head.received(wire.ClusterQuery)) == 1


async def test_ready_when_the_head_says_so(client, fake_head, monkeypatch):
    monkeypatch.setattr("triptych.api.cluster.PROBE_AGE_S", 0.0)
    fake_head.ready, fake_head.reasons = False, ("no denoiser is ready",)
    answer = await client.get("/ready")
    assert (answer.status_code, answer.json()["reasons"]) == (503, ["no denoiser is ready"])
    fake_head.ready, fake_head.reasons = True, ()
    answer = await client.get("/ready")
    assert (answer.status_code, answer.json()["reasons"]) == (200, [])


async def test_ready_names_whom_the_supervisor_gave_up_on(client, fake_head, topology, monkeypatch):
    monkeypatch.setattr("triptych.api.cluster.PROBE_AGE_S", 0.0)
    async with supervisor(topology, GAVE_UP):
        answer = await client.get("/ready")
        assert (answer.status_code, answer.json()["gave_up"]) == (503, [SENTENCE])
        fake_head.ready, fake_head.reasons = False, ("no encoder is ready",)
        answer = await client.get("/ready")
        assert (answer.status_code, answer.json()["reasons"]) == (
            503, ["no encoder is ready", "encoder-0: no such model"],
        )  # fmt: skip


async def test_nothing_is_ready_without_a_head(client):
    for path in ("/ready", "/health"):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["reasons"]) == (503, ["the head does not answer"])


async def test_health_is_degraded_while_somebody_is_down(client, fake_head):
    answer = await client.get("/health")
    assert answer.status_code == 200
    assert (answer.json()["status"], answer.json()["completed"]) == ("degraded", 3)
    assert "decoder-0" in answer.json()["down"]


async def test_a_child_that_still_loads_is_not_down(topology):
    child = ChildReport("decoder-0", "decoder", 42, 3, "loading", 0, "", 1.0)
    (row,) = actor_rows(topology.component("decoder-0"), None, child, None)
    assert (row["state"], row["pid"], row["generation"]) == ("loading", 42, 3)
    child = msgspec.structs.replace(child, detail="decoder-0.stream: 3.1 of 24.0 GB")
    status = ActorStatus("decoder-0", "decoder", 42, 3, "loading", "", 0, 1.0, 0, 8, 0, {})
    for answer in (None, Inspection((status,))):
        (row,) = actor_rows(topology.component("decoder-0"), answer, child, None)
        assert row["detail"] == "decoder-0.stream: 3.1 of 24.0 GB"


async def test_a_child_that_its_supervisor_holds_for_ready_but_does_not_answer_is_down(topology):
    child = ChildReport("decoder-0", "decoder", 42, 3, "ready", 0, "", 1.0)
    (row,) = actor_rows(topology.component("decoder-0"), None, child, None)
    assert row["state"] == "down"


def test_a_host_is_down_where_no_supervisor_answers_and_others_say_how_they_are(tmp_path):
    hosts = "".join(f'[[hosts]]\nname = "{name}"\naddress = "10.0.0.{n}"\n' for n, name in enumerate("abc", start=1))
    kinds = zip("abc", ("encoder", "denoiser", "decoder"), strict=True)
    roles = "".join(f'[[roles]]\nhost = "{host}"\nkind = "{kind}"\n' for host, kind in kinds)
    file = tmp_path / "hosts.toml"
    file.write_text(f'[model]\npath = "."\n{hosts}[head]\nhost = "a"\n[transfer]\ntrusted_network = true\n{roles}')
    topology = load_topology(file)
    states = {"pool-b": "ready", "denoiser-0": "gave_up"}
    children = tuple(ChildReport(name, "", 1, 1, state, 2, "", 1.0) for name, state in states.items())
    up = tuple(ChildReport(c.name, c.kind, 1, 1, "ready", 0, "", 1.0) for c in topology.on_host("a"))
    reports = {"supervisor-a": SupervisorReport(up), "supervisor-b": SupervisorReport(children), "supervisor-c": None}
    rows = host_rows(topology, reports)
    assert [(row["name"], row["state"], row["restarts"], row["gave_up"]) for row in rows] == [
        ("a", "ready", 0, []),
        ("b", "not ready", 4, ["denoiser-0"]),
        ("c", "down", 0, []),
    ]
    assert silent_hosts(topology, reports) == ["c"]
    answer = assess_readiness(wire.ClusterView(True, (), (), {}, 0, 0.0), up, ["c"])
    assert answer == (True, ["host c does not answer"], []), "what is left may serve all stages"


async def test_readiness_is_the_heads_word_unless_something_was_given_up():
    assert assess_readiness(wire.ClusterView(True, (), (), {}, 0, 0.0), []).ready
    assert assess_readiness(wire.ClusterView(True, (), (), {}, 0, 0.0), [GAVE_UP]) == (False, [SENTENCE], [SENTENCE])
    assert not assess_readiness(wire.ClusterView(False, ("x",), (), {}, 0, 0.0), []).ready
    assert not assess_readiness(None, []).ready


@pytest.mark.parametrize(
    ("output_format", "content_type"), [("mp4", "video/mp4"), ("zip", "application/zip"), ("wav", "audio/wav")]
)
async def test_a_player_may_ask_for_a_part_of_a_file(client, fake_head, store, output_format, content_type):
    saved = store.save("req_1/0", output_format, bytes(range(100)))
    whole = await client.get(f"/v1/images/{saved.name}")
    assert (whole.status_code, whole.headers["content-type"]) == (200, content_type)
    assert whole.headers["accept-ranges"] == "bytes"
    part = await client.get(f"/v1/images/{saved.name}", headers={"Range": "bytes=90-"})
    assert (part.status_code, part.content) == (206, bytes(range(90, 100)))
    assert (await client.get(f"/v1/images/{saved.name}", headers={"Range": "bytes=100-"})).status_code == 416


async def test_a_file_is_sent_again_only_if_it_is_another(client, fake_head, store):
    saved = store.save("req_1/0", "png", bytes(range(100)))
    url = f"/v1/images/{saved.name}"
    whole = await client.get(url)
    etag, modified = whole.headers["etag"], whole.headers["last-modified"]
    for headers, status in (
        ({"If-None-Match": etag}, 304),
        ({"If-None-Match": f'"other", W/{etag}'}, 304),
        ({"If-None-Match": '"other"', "If-Modified-Since": modified}, 200),
        ({"If-Modified-Since": modified}, 304),
        ({"If-Modified-Since": "Mon, 01 Jan 2001 00:00:00 GMT"}, 200),
        ({"If-Modified-Since": "yesterday"}, 200),
        ({"If-Modified-Since": f"Mon, 01 Jan {'9' * 20} 00:00:00 GMT"}, 200),
        ({"If-Unmodified-Since": f"Mon, 01 Jan 2001 00:00:00 +{'9' * 20}"}, 200),
        ({"If-Match": '"other"'}, 412),
        ({"If-Match": f"{etag}"}, 200),
        ({"If-Match": "*"}, 200),
        ({"If-Unmodified-Since": "Mon, 01 Jan 2001 00:00:00 GMT"}, 412),
        ({"If-Unmodified-Since": modified}, 200),
    ):
        for method in ("GET", "HEAD"):
            answer = await client.request(method, url, headers=headers)
            assert answer.status_code == status, (method, headers)
            assert status != 304 or (answer.content, answer.headers["etag"]) == (b"", etag)
    assert (await client.get(url, headers={"If-Match": '"other"'})).json()["error"]["code"] == "changed"


@pytest.mark.parametrize(
    ("header", "status", "content"),
    [
        ("bytes=0-9", 206, bytes(range(10))),
        ("Bytes = -5", 206, bytes(range(95, 100))),
        ("bytes=90-1000", 206, bytes(range(90, 100))),
        ("bytes=200-300, 7-7", 206, bytes([7])),
        ("lines=0-1", 200, bytes(range(100))),
        ("bytes=5-2", 200, bytes(range(100))),
        ("bytes=a-b", 200, bytes(range(100))),
        ("bytes=", 200, bytes(range(100))),
        ("bytes=-", 200, bytes(range(100))),
        ("bytes=100-", 416, None),
        ("bytes=-0", 416, None),
    ],
)
async def test_ranges_are_those_of_the_standard(client, fake_head, store, header, status, content):
    saved = store.save("req_1/0", "mp4", bytes(range(100)))
    answer = await client.get(f"/v1/images/{saved.name}", headers={"Range": header})
    assert answer.status_code == status
    if status == 416:
        assert answer.headers["content-range"] == "bytes */100"
        assert answer.json()["error"]["code"] == "no_such_range"
    else:
        assert answer.content == content
    head = await client.head(f"/v1/images/{saved.name}", headers={"Range": header})
    assert head.status_code == 200, "a Range is one of GET"
    other = await client.get(f"/v1/images/{saved.name}", headers={"Range": header, "If-Range": '"other"'})
    assert (other.status_code, len(other.content)) == (200, 100)


@pytest.mark.parametrize("path", ["/v1/requests/{}", "/v1/requests/{}/events", "/v1/videos/{}", "/v1/images/{}_0.png"])
async def test_an_id_that_is_longer_than_any_is_not_found(client, fake_head, path):
    assert (await client.get(path.format("x" * 200))).status_code == 404
