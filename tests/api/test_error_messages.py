"""What a client reads: each error names the field as it was sent, and says what to send instead."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from PIL import Image

from tests.api.image_inputs import EDITS, GENERATIONS, MASK, PARAMETERS, PNG, encoded, text
from triptych.api.errors import ApiError, error_response
from triptych.engines.parameters.schema import Parameter, ParameterKind
from triptych.roles.media.formats import REQUESTED_FORMATS
from triptych.roles.messages import requests as wire

pytestmark = pytest.mark.anyio
VIDEOS = "/v1/videos"
FRAMES = (
    Parameter("image", ParameterKind.IMAGES),
    Parameter("num_frames", ParameterKind.INTEGER),
    Parameter("prompt", ParameterKind.TEXT),
)


@pytest.fixture(autouse=True)
def model_with_images(fake_head):
    fake_head.description = msgspec.structs.replace(fake_head.description, parameters=PARAMETERS)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": 3}, "prompt", "prompt must be text of 0 to 32768 characters"),
        ({"n": "2"}, "n", "n must be a whole number from 1 to 10"),
        ({"size": 64}, "size", "size must be text"),
        ({"size": "big"}, "size", "size must be WIDTHxHEIGHT in pixels, as in 1024x1024, or auto"),
        ({"response_format": "bytes"}, "response_format", "response_format must be one of b64_json, url"),
        ({"output_format": "?"}, "output_format", f"must be one of {', '.join(sorted(REQUESTED_FORMATS))}"),
        ({"guidance_scale": "high"}, "guidance_scale", "guidance_scale must be a number"),
        ({"colour": {}}, "colour", "colour must be text, a number, true, false, null, an image or a list of numbers"),
        ({"colour": 10**30}, "colour", "colour is out of range: at most 64 bits"),
        ({"output_compression": 50}, "output_compression", "must be 100 or left out unless output_format is jpeg"),
        ({"stream": "later"}, "stream", "must be true or false"),
        ({"partial_images": 4}, "partial_images", "partial_images must be a whole number from 0 to 3"),
        ({"quality": "high"}, "quality", "quality must be auto or standard, or left out: num_inference_steps says"),
        ({"background": "transparent"}, "background", "no transparent background"),
    ],
)
async def test_what_is_wrong_with_a_field(client, fake_head, body, param, message):
    answer = await client.post(GENERATIONS, json={"prompt": "x", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (422, param)
    assert error["message"].startswith(param)
    assert message in error["message"]
    assert not fake_head.journal


@pytest.mark.parametrize(
    ("path", "body", "rejected", "param", "message"),
    [
        (GENERATIONS, {"size": "512x1024"}, ("height", "must be 64."), "size", "the height in size, 1024, must be 64."),
        (GENERATIONS, {"height": 9}, ("height", "must be 64."), "height", "height must be 64."),
        (GENERATIONS, {"mask": text(MASK), "image": text(PNG)}, ("mask_image", "is bad"), "mask", "mask is bad"),
        (EDITS, {"image": text(PNG)}, ("image", "is bad"), "image", "image is bad"),
        (VIDEOS, {"seconds": "30"}, ("num_frames", "must be 1 to 33."), "seconds",
         "the number of frames in seconds, 480 at 16 per second, must be 1 to 33."),
        (VIDEOS, {}, ("image", "is required."), "input_reference", "input_reference is required."),
        (VIDEOS, {"image": text(PNG)}, ("image", "is bad."), "image", "image is bad."),
    ],
)  # fmt: skip
async def test_what_the_head_refuses_goes_by_the_name_that_was_sent(
    client, fake_head, path, body, rejected, param, message
):
    if path == VIDEOS:
        fake_head.description = msgspec.structs.replace(
            fake_head.description, parameters=FRAMES, medium="video", fps=16.0
        )
    fake_head.rejection = wire.RequestRejected("invalid", rejected[1], rejected[0])
    error = (await client.post(path, json={"prompt": "x", **body})).json()["error"]
    assert (error["param"], error["message"]) == (param, message)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" * 5000])
async def test_a_number_out_of_range_names_its_field(client, fake_head, number):
    content = f'{{"prompt": "x", "guidance_scale": {number}}}'.encode()
    answer = await client.post(GENERATIONS, content=content, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (422, "guidance_scale")
    assert error["message"] == "guidance_scale has a number that is out of range"


@pytest.mark.parametrize(("prompt", "half"), [(r"\ud800", True), (r"a\uDC00", True), ("\\ud83d\\ude00", False)])
async def test_half_of_a_character_is_called_that(client, fake_head, prompt, half):
    content = f'{{"prompt": "{prompt}"}}'.encode()
    answer = await client.post(GENERATIONS, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == (400 if half else 200)
    assert not half or "half of a surrogate pair" in answer.json()["error"]["message"]


async def test_what_a_client_sent_comes_back_short(client, fake_head):
    for body in ({"model": "m" * 300_000}, {"f" * 300_000: {}}):
        answer = await client.post(GENERATIONS, json={"prompt": "x", **body})
        assert answer.status_code in (404, 422)
        assert len(answer.content) < 3000
    assert len((await client.get(f"/v1/requests/{'r' * 60_000}")).content) < 3000


async def test_a_method_or_a_path_that_is_not_there_says_what_is(client):
    refused = (await client.get(GENERATIONS)).json()["error"]["message"]
    assert refused == "/v1/images/generations does not take GET, but POST"
    assert "/openapi.json" in (await client.get("/v1/nothing")).json()["error"]["message"]


NO_EFFECT_FIELDS = {
    "quality": "auto", "background": "auto", "moderation": "auto", "style": "vivid", "stream": False,
    "partial_images": 0, "input_fidelity": "low", "user": "u", "n": 1, "response_format": "b64_json", "size": "auto",
}  # fmt: skip


async def test_neutral_values_of_openai_are_taken(client, fake_head):
    sent = {"prompt": "x", **NO_EFFECT_FIELDS, "output_compression": 100}
    assert (await client.post(GENERATIONS, json=sent)).status_code == 200
    form = {name: str(value) for name, value in sent.items()}
    assert (await client.post(EDITS, data=form, files={"image": PNG})).status_code == 200
    submits = await fake_head.received(wire.SubmitRequest, 2)
    assert [sorted(submit.inputs) for submit in submits] == [["prompt"], ["image", "prompt"]]


async def test_a_parameter_of_the_model_goes_before_a_field_without_effect(client, fake_head):
    more = (*PARAMETERS, Parameter("style", ParameterKind.TEXT))
    fake_head.description = msgspec.structs.replace(fake_head.description, parameters=more)
    await client.post(GENERATIONS, json={"prompt": "x", "style": "baroque"})
    (submit,) = await fake_head.received(wire.SubmitRequest)
    assert submit.inputs["style"] == "baroque"


@pytest.mark.parametrize(("sent", "quality"), [(None, 0), (0, 1), (40, 40), (100, 100)])
async def test_compression_is_that_of_the_file(client, fake_head, sent, quality):
    body = {"prompt": "x", "output_format": "webp", "output_compression": sent}
    assert (await client.post(GENERATIONS, json=body)).status_code == 200
    (submit,) = await fake_head.received(wire.SubmitRequest)
    assert submit.output.quality == quality


async def test_images_as_openai_has_them_in_json(client, fake_head, uploads):
    lines = text(PNG)[:8] + "\r\n" + text(PNG)[8:]
    images = [{"image_url": f"data:image/png;base64,{lines}"}, {"image_url": text(encoded(colour=9))}]
    answer = await client.post(EDITS, json={"prompt": "x", "images": images})
    assert answer.status_code == 200, answer.text
    (submit,) = await fake_head.received(wire.SubmitRequest)
    assert [uploads.read(file) for file in submit.inputs["image"].files] == [PNG, encoded(colour=9)]


async def test_a_mask_is_as_large_as_its_image(client, fake_head):
    answer = await client.post(EDITS, data={"prompt": "x"}, files={"image": PNG, "mask": encoded("PNG", size=(4, 5))})
    error = answer.json()["error"]
    assert (error["param"], error["message"]) == ("mask", "mask must be as large as the image, 5x4, not 4x5")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = encoded("JPEG", size=(4, 5), exif=exif)
    answer = await client.post(EDITS, data={"prompt": "x"}, files={"image": turned, "mask": MASK})
    assert answer.status_code == 200, "what counts is the size of the upright image"


@pytest.mark.parametrize(("state", "retried"), [("CANCELLED", False), ("FAILED", False), ("TIMED_OUT", False)])
async def test_an_end_that_is_final_is_not_asked_for_again(client, fake_head, state, retried):
    fake_head.hold = True
    waiting = asyncio.create_task(client.post(GENERATIONS, json={"prompt": "x"}))
    (wait,) = await fake_head.received(wire.WaitRequest)
    fake_head.finish(wait.request_id, state, ("a cause",))
    answer = await waiting
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers


async def test_a_504_says_how_long_it_took_in_which_stage_and_by_which_limit(client, fake_head):
    fake_head.hold = True
    waiting = asyncio.create_task(client.post(GENERATIONS, json={"prompt": "x"}))
    (wait,) = await fake_head.received(wire.WaitRequest)
    reason = "still DENOISING_RUNNING after 2 s ([head] request_timeout_s = 2)"
    fake_head.journal[wait.request_id].reason = reason
    fake_head.finish(wait.request_id, "TIMED_OUT")
    assert (await waiting).json()["error"]["message"] == f"the request took too long: {reason}"


async def test_what_may_be_asked_for_again_says_when():
    for status in (429, 503):
        headers = error_response(ApiError(status, "x", code="x")).headers
        assert (headers["retry-after"], headers.get("x-should-retry")) == ("1", None)
