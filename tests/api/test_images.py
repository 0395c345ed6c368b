from __future__ import annotations

import asyncio
import base64
import io

import msgspec
import pytest
from PIL import Image

from triptych.roles.messages import requests as wire

pytestmark = pytest.mark.anyio
URL = "/v1/images/generations"


async def test_an_image_comes_back_inline(client, fake_head):
    answer = await client.post(
        URL,
        json={
            "prompt": "a red square",
            "size": "64x48",
            "seed": 7,
            "num_inference_steps": 3,
            "guidance_scale": 5,
            "negative_prompt": "",
            "model": "tiny/shapes",
            "user": "somebody",
            "priority": 5,
            "deadline_s": 2.5,
        },
    )
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body.keys() == {"created", "id", "data", "output_format", "size"}
    assert (body["output_format"], body["size"]) == ("png", "64x48")
    assert answer.headers["x-request-id"] == body["id"]
    (image,) = body["data"]
    assert image["seed"] == 7
    assert set(image) == {"seed", "b64_json"}
    assert Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))).getpixel((0, 0)) == (7, 0, 0)
    (submit,) = await fake_head.received(wire.SubmitRequest)
    assert submit.inputs == {
        "prompt": "a red square",
        "height": 48,
        "width": 64,
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "negative_prompt": "",
    }
    assert (submit.request_id, submit.seed, submit.n) == (body["id"], 7, 1)
    assert (submit.priority, submit.deadline_s) == (5, 2.5)


async def test_what_is_not_given_is_not_sent(client, fake_head):
    await client.post(URL, json={"prompt": "x", "size": "auto"})
    (submit,) = await fake_head.received(wire.SubmitRequest)
    assert submit.inputs == {"prompt": "x"}


async def test_null_is_the_same_as_not_given(client, fake_head):
    nothing = dict.fromkeys(("n", "size", "model", "response_format", "output_format", "user", "seed"))
    answer = await client.post(URL, json={"prompt": "x", **nothing})
    assert answer.status_code == 200, answer.text
    (submit,) = await fake_head.received(wire.SubmitRequest)
    assert (submit.inputs, submit.n, submit.output.format) == ({"prompt": "x"}, 1, "")


async def test_each_image_has_a_seed_of_its_own(client, fake_head):
    answer = await client.post(URL, json={"prompt": "x", "seed": [5, 3, 9]})
    assert answer.status_code == 200, answer.text
    await client.post(URL, files={"prompt": (None, "x"), "seed": (None, "5, 3"), "n": (None, "2")})
    first, second = await fake_head.received(wire.SubmitRequest, 2)
    assert [(submit.seed, submit.n) for submit in (first, second)] == [((5, 3, 9), 3), ((5, 3), 2)]
    for body, words in (
        ({"seed": [1, 2], "n": 3}, "seed must be 3 seeds, one for each of n, not 2"),
        ({"seed": [1, -2]}, "seed must be a whole number from 0"),
        ({"seed": []}, "or a list of 1 to 10 of them"),
    ):
        error = (await client.post(URL, json={"prompt": "x", **body})).json()["error"]
        assert error["param"] == "seed"
        assert words in error["message"]


async def test_who_prefers_not_to_wait_is_told_where_to_look(client, fake_head):
    fake_head.hold = True
    answer = await client.post(URL, json={"prompt": "x"}, headers={"Prefer": "wait=5, Respond-Async"})
    assert answer.status_code == 202
    assert answer.headers["preference-applied"] == "respond-async"
    request = answer.json()
    assert (request["terminal"], answer.headers["x-request-id"]) == (False, request["id"])
    fake_head.finish(request["id"])
    later = (await client.get(answer.headers["location"])).json()
    result = await client.get(later["units"][0]["artifact"]["url"])
    assert Image.open(io.BytesIO(result.content)).size == (8, 8)


async def test_images_by_url(client, fake_head):
    answer = await client.post(
        URL, json={"prompt": "x", "n": 2, "seed": 1, "response_format": "url", "output_format": "webp"}
    )
    for image in answer.json()["data"]:
        assert set(image) == {"seed", "url"}
        result = await client.get(image["url"])
        assert result.status_code == 200
        assert result.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(result.content)).size == (8, 8)


async def test_n_images_in_the_order_of_their_seeds(client, fake_head):
    answer = await client.post(URL, json={"prompt": "x", "n": 3, "seed": 40})
    assert [image["seed"] for image in answer.json()["data"]] == [40, 41, 42]


async def test_a_missing_seed_is_drawn_and_told(client, fake_head):
    seeds = {(await client.post(URL, json={"prompt": "x"})).json()["data"][0]["seed"] for _ in range(4)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)


async def test_other_scalars_are_inputs_of_the_pipeline(client, fake_head):
    extra = {"max_sequence_length": 16, "true_cfg_scale": 4.5, "clean_caption": True, "prompt_2": None}
    await client.post(URL, json={"prompt": "x", **extra})
    (submit,) = await fake_head.received(wire.SubmitRequest)
    assert submit.inputs == {"prompt": "x", **extra}


async def test_a_key_sent_again_gives_the_same_request(client, fake_head):
    first, again = [await client.post(URL, json={"prompt": "x"}, headers={"Idempotency-Key": "k-1"}) for _ in range(2)]
    assert first.json()["id"] == again.json()["id"] == again.headers["x-request-id"]
    assert first.json()["data"] == again.json()["data"]
    assert len(fake_head.journal) == 1


async def test_a_key_with_another_body_is_a_conflict(client, fake_head):
    await client.post(URL, json={"prompt": "x"}, headers={"Idempotency-Key": "k-1"})
    answer = await client.post(URL, json={"prompt": "y"}, headers={"Idempotency-Key": "k-1"})
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "conflict"


async def test_without_a_key_nothing_is_shared(client, fake_head):
    for _ in range(2):
        await client.post(URL, json={"prompt": "x", "seed": 1})
    assert len(fake_head.journal) == 2


async def test_a_request_that_the_model_cannot_run_is_a_bad_request(client, fake_head):
    fake_head.hold = True
    waiting = asyncio.create_task(client.post(URL, json={"prompt": "x", "n": 2}))
    (wait,) = await fake_head.received(wire.WaitRequest)
    fake_head.finish(wait.request_id, "FAILED", ("encoder-0: ValueError: too blue",), at_fault=True)
    answer = await waiting
    assert answer.status_code == 422
    assert "too blue" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("state", "status", "code"),
    [("FAILED", 500, "failed"), ("TIMED_OUT", 504, "timed_out"), ("CANCELLED", 409, "cancelled")],
)
async def test_a_request_that_ends_without_its_image(client, fake_head, state, status, code):
    fake_head.hold = True
    waiting = asyncio.create_task(client.post(URL, json={"prompt": "x", "n": 2}))
    (wait,) = await fake_head.received(wire.WaitRequest)
    trace = "Traceback (most recent call last):\n  File x, line 1\nValueError: too blue"
    fake_head.finish(wait.request_id, state, ("denoiser-0 died", trace))
    answer = await waiting
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["code"] == code
    assert "denoiser-0 died; ValueError: too blue" in error["message"]
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"] == wait.request_id


async def test_a_head_that_restarts_still_gives_the_image(client, fake_head):
    fake_head.hold = True
    waiting = asyncio.create_task(client.post(URL, json={"prompt": "x", "seed": 3}))
    (wait,) = await fake_head.received(wire.WaitRequest)
    await fake_head.stop()
    await fake_head.start()
    await fake_head.received(wire.WaitRequest, 2)
    fake_head.finish(wait.request_id)
    answer = await waiting
    assert answer.status_code == 200
    assert answer.json()["data"][0]["seed"] == 3
    assert len(fake_head.journal) == 1


@pytest.mark.parametrize("written", [True, False])
async def test_a_head_that_dies_with_the_submission_gets_it_again_and_makes_one_request(client, fake_head, written):
    fake_head.unresponsive = True
    waiting = asyncio.create_task(client.post(URL, json={"prompt": "x"}))
    (submit,) = await fake_head.received(wire.SubmitRequest)
    await fake_head.stop()
    if written:  # the answer was lost, the request was not
        fake_head._submit(submit)
    fake_head.unresponsive = False
    await fake_head.start()
    answer = await waiting
    assert answer.status_code == 200
    assert list(fake_head.journal) == [answer.json()["id"]]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("key", [{}, {"Idempotency-Key": "k"}])
async def test_what_nobody_can_ask_for_again_is_cancelled(client, fake_head, key):
    fake_head.unresponsive = True
    assert (await client.post(URL, json={"prompt": "x"}, headers=key)).status_code == 503
    (submit,) = await fake_head.received(wire.SubmitRequest)
    await client.get("/v1/requests/later")  # who holds a key may still ask: what would have been sent came before this
    await fake_head.received(wire.QueryRequest)
    cancelled = [m.request_id for m in fake_head.seen if isinstance(m, wire.CancelRequest)]
    assert cancelled == ([] if key else [submit.request_id])


async def test_a_trace_goes_in_and_out(client, fake_head):
    trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    answer = await client.post(URL, json={"prompt": "x"}, headers={"traceparent": f"00-{trace}-{span}-00"})
    _, answered, new_span, flags = answer.headers["traceparent"].split("-")
    assert (answered, flags) == (trace, "00")
    assert new_span != span


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{'0' * 32}-{'1' * 16}-01", f"00-{'a' * 32}-{'0' * 16}-01"])
async def test_a_trace_that_cannot_be_read_starts_a_new_one(client, fake_head, header):
    answer = await client.get("/live", headers={"traceparent": header})
    version, trace, _, _ = answer.headers["traceparent"].split("-")
    assert version == "00"
    assert int(trace, 16)
    assert trace not in header


async def test_a_description_is_asked_for_once_and_again_when_its_version_changes(client, fake_head):
    async def post(**fields) -> int:
        answer = await client.post(URL, json={"prompt": "x", **fields})
        asked = [message for message in fake_head.seen if isinstance(message, wire.DescribeModel)]
        assert answer.status_code == (200 if fields["sigmas"] else 422)
        return len(asked)

    assert await post(sigmas=[1, 0.5]) == 1
    assert await post(sigmas=[1, 0.5]) == 1
    fake_head.description = msgspec.structs.replace(fake_head.description, version="2")
    assert await post(sigmas=[1, 0.5]) == 1, "its answer says that there is another version"
    assert await post(sigmas=[1, 0.5]) == 2
    assert await post(sigmas={}) == 2
    assert await post(sigmas=[1, 0.5]) == 3, "a refusal may come from a description that is out of date"


async def test_a_description_of_a_model_that_is_not_loaded_is_not_kept(client, fake_head):
    loaded = fake_head.description
    fake_head.description = msgspec.structs.replace(loaded, parameters=(), tasks=())
    await client.post(URL, json={"prompt": "x", "strength": 0.5})
    fake_head.description = loaded
    answer = await client.post(URL, json={"prompt": "x", "video": "no image"})
    assert answer.json()["error"]["message"].startswith("video must be base64")
