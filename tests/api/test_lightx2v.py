"""LightX2V's task API over the same requests: its field names, its answers, our errors."""

from __future__ import annotations

import io
from types import SimpleNamespace

import msgspec
import pytest
from PIL import Image

from tests.api.image_inputs import MASK, PNG, text
from triptych.api.lightx2v import QueueStatus, nearest_side, queue_status, request_id_of, size_of_ratio
from triptych.engines.parameters.schema import Parameter, ParameterKind
from triptych.roles.messages import requests as wire
from triptych.roles.tracing import TraceContext, traced_request_id

pytestmark = pytest.mark.anyio
IMAGE, VIDEO = "/v1/tasks/image/", "/v1/tasks/video/"
PARAMETERS = (
    Parameter("fps", ParameterKind.NUMBER),
    Parameter("height", ParameterKind.INTEGER, 96),
    Parameter("image", ParameterKind.IMAGES),
    Parameter("last_image", ParameterKind.IMAGE),
    Parameter("lora", ParameterKind.TEXTS),
    Parameter("lora_scale", ParameterKind.NUMBERS),
    Parameter("mask_image", ParameterKind.IMAGE),
    Parameter("num_frames", ParameterKind.INTEGER),
    Parameter("num_inference_steps", ParameterKind.INTEGER),
    Parameter("prompt", ParameterKind.TEXT, required=True),
    Parameter("strength", ParameterKind.NUMBER),
    Parameter("width", ParameterKind.INTEGER, 96),
)


@pytest.fixture(autouse=True)
def model_with_images(fake_head):
    fake_head.description = msgspec.structs.replace(
        fake_head.description, parameters=PARAMETERS, defaults={"height": 96, "width": 96}
    )


def makes_videos(fake_head) -> None:
    fake_head.description = msgspec.structs.replace(fake_head.description, medium="video", fps=16.0)


async def submitted(fake_head) -> wire.SubmitRequest:
    (submit,) = await fake_head.received(wire.SubmitRequest)
    return submit


async def test_a_task_from_its_beginning_to_its_file(client, fake_head):
    fake_head.hold = True
    body = {
        "prompt": "a cat", "negative_prompt": "", "infer_steps": 3, "seed": 42, "aspect_ratio": "16:9",
        "target_shape": [64, 128], "save_result_path": "./cat.png", "use_prompt_enhancer": False, "image_path": "",
        "lora_name": None,
    }  # fmt: skip
    begun = await client.post(IMAGE, json=body)
    task = begun.json()
    assert begun.status_code == 200, begun.text
    submit = await submitted(fake_head)
    assert task == {"task_id": submit.request_id, "task_status": "pending", "save_result_path": "./cat.png"}
    assert submit.inputs == {"prompt": "a cat", "num_inference_steps": 3, "height": 64, "width": 128}
    assert (submit.seed, submit.n) == (42, 1)
    status = (await client.get(f"/v1/tasks/{task['task_id']}/status")).json()
    assert set(status) == {
        "task_id", "status", "start_time", "end_time", "error", "error_type", "save_result_path",
    }  # fmt: skip
    assert (status["status"], status["end_time"], status["error_type"]) == ("processing", None, "")
    early = await client.get(f"/v1/tasks/{task['task_id']}/result")
    assert (early.status_code, early.json()["error"]["code"]) == (404, "not_completed")
    fake_head.finish(task["task_id"])
    status = (await client.get(f"/v1/tasks/{task['task_id']}/status")).json()
    assert status["status"] == "completed"
    assert status["start_time"] <= status["end_time"]
    for url in (f"/v1/tasks/{task['task_id']}/result", f"/v1/files/download/{status['save_result_path']}"):
        assert Image.open(io.BytesIO((await client.get(url)).content)).getpixel((0, 0)) == (42, 0, 0)
    assert task["task_id"] in (await client.get("/v1/tasks/")).json()


async def test_a_traced_task_is_found_by_its_id(client, fake_head, services):
    object.__setattr__(services, "exporter", SimpleNamespace(export=lambda _spans: None))
    context = TraceContext("a" * 32, "b" * 16)
    assert request_id_of("", traced_request_id(context)) == traced_request_id(context)
    task_id = (await client.post(IMAGE, json={"prompt": "x"}, headers={"traceparent": context.traceparent})).json()[
        "task_id"
    ]
    assert task_id.startswith(f"req_{context.trace_id}-")
    assert (await client.get(f"/v1/tasks/{task_id}/status")).json()["status"] == "completed"
    assert (await client.get(f"/v1/tasks/{task_id}/result")).status_code == 200


async def test_images_come_as_base64_or_as_files_of_a_form(client, fake_head):
    body = {"prompt": "x", "image_path": text(PNG), "image_mask_path": text(MASK), "i2i_denoise_strength": 0.5}
    assert (await client.post(IMAGE, json={**body, "lora_name": "ink", "lora_strength": 0.7})).status_code == 200
    form = {
        "prompt": (None, "x"),
        "infer_steps": (None, "4"),
        "image_file": ("a.png", PNG),
        "aspect_ratio": (None, "16:9"),
    }
    assert (await client.post(f"{IMAGE}form", files=form)).status_code == 200
    first, second = await fake_head.received(wire.SubmitRequest, 2)
    assert set(first.inputs) == {"prompt", "image", "mask_image", "strength", "lora", "lora_scale"}
    assert set(second.inputs) == {"prompt", "image", "num_inference_steps"}, "an image has its own ratio"


@pytest.mark.parametrize("path", [VIDEO, "/v1/tasks/"])
async def test_a_video_is_a_task_too(client, fake_head, path):
    makes_videos(fake_head)
    body = {
        "prompt": "x",
        "target_video_length": 81,
        "target_fps": 16,
        "last_frame_path": text(PNG),
        "num_fragments": 1,
    }
    assert (await client.post(path, json={**body, "video_duration": 5, "talk_objects": []})).status_code == 200
    submit = await submitted(fake_head)
    assert (submit.inputs["num_frames"], submit.inputs["fps"], submit.output.format) == (81, 16, "mp4")
    assert "last_image" in submit.inputs


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (IMAGE, {"infer_steps": 0}, "infer_steps", "infer_steps must be a whole number from 1"),
        (IMAGE, {"image_path": "https://a/b.png"}, "image_path", "image_path is a URL, and nothing is fetched"),
        (IMAGE, {"image_path": "/etc/passwd"}, "image_path", "image_path must be base64"),
        (IMAGE, {"image_mask_path": text(MASK)}, "image_path", "image_path is required: a mask needs"),
        (IMAGE, {"target_shape": [64]}, "target_shape", "target_shape must be a list of 2, each a whole number from 1"),
        (IMAGE, {"aspect_ratio": "wide"}, "aspect_ratio", "aspect_ratio must be width and height as in 16:9"),
        (IMAGE, {"use_prompt_enhancer": True}, "use_prompt_enhancer", "must be false, or left out: no prompt is"),
        (IMAGE, {"presigned_url": "https://a"}, "presigned_url", "presigned_url must be left out: results are fetched"),
        (IMAGE, {"task_id": f"req_{'0' * 32}"}, "task_id", "task_id must not look like an id of this server"),
        (IMAGE, {"infer_step": 3}, "infer_step", "infer_step"),
        (VIDEO, {}, "model", "makes no videos: send the task to /v1/tasks/image/"),
    ],
)
async def test_what_is_wrong_is_said_by_the_name_that_was_sent(client, fake_head, path, body, param, words):
    if param == "infer_step":  # as the head does
        fake_head.rejection = wire.RequestRejected("invalid", "is not known.", param="infer_step")
    answer = await client.post(path, json={"prompt": "x", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (422, param)
    assert words in error["message"]


async def test_what_the_head_refuses_has_the_name_that_was_sent(client, fake_head):
    for param, field in (
        ("height", "target_shape"),
        ("num_inference_steps", "infer_steps"),
        ("num_frames", "target_video_length"),
    ):
        fake_head.rejection = wire.RequestRejected("invalid", "must be 64.", param=param)
        error = (await client.post(IMAGE, json={"prompt": "x", "infer_steps": 3, "target_shape": [8, 8]})).json()[
            "error"
        ]
        assert error["param"] == field
        assert field in error["message"]


async def test_a_client_may_name_its_task_and_finds_only_its_own(client, fake_head):
    fake_head.hold = True
    body = {"prompt": "x", "task_id": "cat 1"}
    first, again = await client.post(IMAGE, json=body), await client.post(IMAGE, json=body)
    assert first.json() == again.json() == {"task_id": "cat 1", "task_status": "pending", "save_result_path": "cat 1"}
    refused = await client.post(IMAGE, json={**body, "prompt": "y"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (409, "task_id")
    assert refused.json()["error"]["message"] == "task_id came with another body before"
    assert len(fake_head.journal) == 1
    status = (await client.get("/v1/tasks/cat%201/status")).json()
    assert (status["task_id"], status["status"]) == ("cat 1", "processing")
    assert (await client.get("/v1/tasks/cat/status")).status_code == 404
    assert request_id_of("alice", "cat 1") != request_id_of("", "cat 1")


async def test_a_task_is_stopped_once(client, fake_head):
    fake_head.hold = True
    task_id = (await client.post(IMAGE, json={"prompt": "x"})).json()["task_id"]
    answers = [(await client.delete(f"/v1/tasks/{id_}")).json() for id_ in (task_id, task_id, "nobody")]
    assert [answer["stop_status"] for answer in answers] == ["success", "do_nothing", "do_nothing"]
    status = (await client.get(f"/v1/tasks/{task_id}/status")).json()
    assert (status["status"], status["error"]) == ("cancelled", "Task cancelled by user")
    other = (await client.post(IMAGE, json={"prompt": "y"})).json()["task_id"]
    assert (await client.delete("/v1/tasks/all/running")).json()["stop_status"] == "success"
    assert fake_head.journal[other].state == "CANCELLED"


async def test_all_tasks_are_stopped_however_many_there_are(client, fake_head, monkeypatch):
    monkeypatch.setattr("triptych.api.lightx2v.LISTED_AT_ONCE", 2)
    fake_head.hold = True
    for _ in range(5):
        await client.post(IMAGE, json={"prompt": "x"})
    fake_head.failures[wire.CancelRequest] = ["not_found"]
    assert (await client.delete("/v1/tasks/all/running")).status_code == 200
    assert sorted(task.state for task in fake_head.journal.values()) == [*["CANCELLED"] * 4, "DENOISING_RUNNING"]
    await client.post(IMAGE, json={"prompt": "x"})
    fake_head.failures[wire.CancelRequest] = ["unavailable"]
    assert (await client.delete("/v1/tasks/all/running")).status_code == 503
    assert len([task for task in fake_head.journal.values() if task.state == "CANCELLED"]) == 5


async def test_what_failed_says_why(client, fake_head):
    fake_head.hold = True
    task_id = (await client.post(IMAGE, json={"prompt": "x"})).json()["task_id"]
    fake_head.finish(task_id, "FAILED", ("denoiser-0: out of memory",))
    status = (await client.get(f"/v1/tasks/{task_id}/status")).json()
    assert (status["status"], status["error_type"]) == ("failed", "RuntimeError")
    assert "out of memory" in status["error"]


async def test_who_waits_gets_the_file_or_a_timeout(client, fake_head):
    answer = await client.post(f"{IMAGE}sync", json={"prompt": "x", "seed": 9})
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).getpixel((0, 0)) == (9, 0, 0)
    fake_head.hold = True
    late = await client.post(f"{IMAGE}sync", params={"timeout_seconds": 0.05}, json={"prompt": "x"})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timed_out")
    assert fake_head.journal[late.headers["x-request-id"]].state == "CANCELLED"
    for body, headers in (({"prompt": "x", "task_id": "cat"}, {}), ({"prompt": "x"}, {"Idempotency-Key": "k"})):
        late = await client.post(f"{IMAGE}sync", params={"timeout_seconds": 0.05}, json=body, headers=headers)
        assert late.status_code == 504
        assert fake_head.journal[late.headers["x-request-id"]].state != "CANCELLED", "it can be asked for again"
    bad = await client.post(f"{IMAGE}sync", params={"timeout_seconds": 0}, json={"prompt": "x"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (422, "timeout_seconds")


async def test_the_queue_and_the_service(client, fake_head):
    queue = (await client.get("/v1/tasks/queue/status")).json()
    assert queue == {
        "is_processing": True, "current_task": "req_1", "pending_count": 0, "active_count": 1, "queue_size": 256,
        "queue_available": 255,
    }  # fmt: skip
    service = (await client.get("/v1/service/status")).json()
    assert (service["service_status"], service["active_tasks"]) == ("busy", ["req_1"])


async def test_the_queue_counts_what_waits_apart_from_what_runs():
    instance = wire.InstanceView("denoiser-0", "denoiser", 7, 1, 2, ("req_1/0", "req_1/1"))
    states = {"PENDING": 1, "ENCODER_RUNNING": 1, "DENOISING_RUNNING": 2, "DECODER_WAITING": 3}
    cluster = wire.ClusterView(True, (), (instance,), states, 3, 0.5)
    assert queue_status(cluster, 5) == QueueStatus(True, "req_1", 4, 7, 5, 0)
    assert queue_status(wire.ClusterView(True, (), (), {}, 3, 0.5), 5) == QueueStatus(False, None, 0, 0, 5, 5)


async def test_a_ratio_is_that_of_sides_that_the_model_can_make(fake_head):
    model = fake_head.description
    assert size_of_ratio("16:9", {}, None, msgspec.structs.replace(model, ranges={})) == {"height": 64, "width": 128}
    assert size_of_ratio("1:1", {}, None, msgspec.structs.replace(model, ranges={})) == {"height": 96, "width": 96}
    assert size_of_ratio("16:9", {}, (8, 8), model) == size_of_ratio("", {}, None, model) == {}
    assert [nearest_side(value, (64, 128, 8)) for value in (1.0, 71, 77, 500)] == [64, 72, 80, 128]
    assert [nearest_side(value, (60, 130)) for value in (1.0, 71.4, 500)] == [60, 71, 130]


async def test_what_routers_ask(client, fake_head):
    version = (await client.get("/version")).json()["version"]
    server = (await client.get("/server_info")).json()
    assert server == {
        "model_path": "tiny/shapes", "served_model_name": "tiny/shapes", "tp_size": 1, "dp_size": 1, "version": version,
    }  # fmt: skip
    model = (await client.get("/model_info")).json()
    assert (model["is_generation"], model["model_type"], model["is_image_gen"]) == (True, "diffusion", True)
    assert (model["task_type"], model["has_image_understanding"]) == ("TI2I", True)
    (card,) = (await client.get("/v1/models")).json()["data"]
    assert {"id", "object", "created", "owned_by"} <= card.keys()
    makes_videos(fake_head)
    assert (await client.get("/model_info")).json()["task_type"] == "TI2V"
