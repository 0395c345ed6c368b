"""Input images: which are taken, and how they reach the head."""

from __future__ import annotations

import io
import json

import msgspec
import numpy as np
import pytest
from PIL import Image

from tests.api.image_inputs import EDITS, GENERATIONS, MASK, PARAMETERS, PNG, encoded, submitted, text
from triptych.api import body
from triptych.engines.parameters.schema import Parameter, ParameterKind
from triptych.roles.messages import requests as wire
from triptych.roles.messages.common import Images, Json, Numbers, Options

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def model_with_images(fake_head):
    fake_head.description = msgspec.structs.replace(fake_head.description, parameters=PARAMETERS)


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:;base64,", "DATA:image/PNG;charset=x;BASE64,"])
async def test_an_image_in_json_becomes_a_file_and_a_reference(client, fake_head, uploads, prefix):
    answer = await client.post(GENERATIONS, json={"prompt": "x", "image": prefix + text(PNG), "strength": 0.5})
    assert answer.status_code == 200, answer.text
    submit = await submitted(fake_head)
    (file,) = submit.inputs.pop("image").files
    assert submit.inputs == {"prompt": "x", "strength": 0.5}
    assert uploads.read(file) == PNG
    assert uploads.open(file).size == (5, 4)


async def test_several_images_keep_their_order(client, fake_head, uploads):
    images = [encoded(colour=(k, 0, 0)) for k in (3, 1, 2)]
    await client.post(GENERATIONS, json={"prompt": "x", "image": [text(data) for data in images]})
    submit = await submitted(fake_head)
    assert [uploads.read(file) for file in submit.inputs["image"].files] == images


@pytest.mark.parametrize(("form", "ending"), [("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp"), ("MPO", "jpeg")])
async def test_formats_are_known_by_content(client, fake_head, form, ending):
    # A JPEG of a camera has a second image behind the first; that is no reason to refuse it.
    options = {"save_all": True, "append_images": [Image.new("RGB", (2, 2))]} if form == "MPO" else {}
    files = {"image": ("holiday.gif", encoded(form, **options), "text/plain")}
    answer = await client.post(EDITS, data={"prompt": "x"}, files=files)
    assert answer.status_code == 200, answer.text
    (file,) = (await submitted(fake_head)).inputs["image"].files
    assert file.name.endswith(f".{ending}")


async def test_the_text_of_a_form_becomes_values(client, fake_head):
    data = {
        "prompt": "x", "n": "2", "size": "64x48", "seed": "7", "num_inference_steps": "3", "guidance_scale": "4.5",
        "strength": "1", "max_sequence_length": "16", "clean_caption": "true", "prompt_2": "12", "sigmas": "[1, 0.5]",
    }  # fmt: skip
    answer = await client.post(EDITS, data=data, files={"image": PNG})
    assert answer.status_code == 200, answer.text
    submit = await submitted(fake_head)
    assert (submit.seed, submit.n) == (7, 2)
    del submit.inputs["image"]
    assert submit.inputs == {
        "prompt": "x", "height": 48, "width": 64, "num_inference_steps": 3, "guidance_scale": 4.5, "strength": 1.0,
        "max_sequence_length": 16, "clean_caption": True, "prompt_2": "12", "sigmas": Numbers((1, 0.5)),
    }  # fmt: skip


async def test_openais_names_are_diffusers_inputs(client, fake_head, uploads):
    files = [("image[]", PNG), ("image[]", encoded(colour=9)), ("mask", MASK)]
    answer = await client.post(EDITS, data={"prompt": "x"}, files=files)
    assert answer.status_code == 200, answer.text
    inputs = (await submitted(fake_head)).inputs
    assert [uploads.read(file) for file in inputs["image"].files] == [PNG, encoded(colour=9)]
    assert [uploads.read(file) for file in inputs["mask_image"].files] == [MASK]


async def test_a_mask_is_a_mask_where_the_model_has_one(client, fake_head):
    more = (*PARAMETERS, Parameter("mask", ParameterKind.IMAGE_LIST))
    fake_head.description = msgspec.structs.replace(fake_head.description, parameters=more)
    await client.post(GENERATIONS, json={"prompt": "x", "mask": [text(MASK)] * 20, "video": [text(PNG)] * 20})
    inputs = (await submitted(fake_head)).inputs
    assert len(inputs["mask"].files) == len(inputs["video"].files) == 20
    assert "mask_image" not in inputs


async def test_names_are_known_before_an_instance_has_come(client, fake_head):
    fake_head.description = msgspec.structs.replace(fake_head.description, parameters=())
    await client.post(EDITS, data={"prompt": "x", "strength": "0.5"}, files={"image": PNG, "mask": MASK})
    inputs = (await submitted(fake_head)).inputs
    assert inputs["strength"] == 0.5
    assert {name for name, value in inputs.items() if isinstance(value, Images)} == {"image", "mask_image"}


async def test_options_are_one_input_in_json_and_in_a_form(client, fake_head):
    given = {"use_karras_sigmas": True, "sigma_max": None, "solver_order": 3, "disable_corrector": [0, 1]}
    options = Parameter("scheduler_options", ParameterKind.OPTIONS, chosen_by="scheduler")
    fake_head.description = msgspec.structs.replace(fake_head.description, parameters=(*PARAMETERS, options))
    await client.post(GENERATIONS, json={"prompt": "x", "scheduler_options": given})
    form = {"prompt": "x", "scheduler_options": json.dumps(given)}
    await client.post(EDITS, data=form, files={"image": PNG})
    expected = Options({**given, "disable_corrector": (0, 1)})
    first, second = await fake_head.received(wire.SubmitRequest, 2)
    assert first.inputs["scheduler_options"] == second.inputs["scheduler_options"] == expected
    shown = (await client.get(f"/v1/requests/{first.request_id}")).json()["inputs"]
    assert shown["scheduler_options"] == given
    for wrong, words in (
        ({"a": {"b": 1}}, "has 'a', which must be"),
        ("x", "must be an object"),
        ({"a": ["b"]}, "list"),
    ):
        answer = await client.post(GENERATIONS, json={"prompt": "x", "scheduler_options": wrong})
        if isinstance(wrong, str):
            answer = await client.post(EDITS, data={**form, "scheduler_options": wrong}, files={"image": PNG})
        assert answer.status_code == 422
        error = answer.json()["error"]
        assert error["param"] == "scheduler_options"
        assert words in error["message"]


async def test_a_list_of_numbers_is_one_input(client, fake_head):
    await client.post(GENERATIONS, json={"prompt": "x", "sigmas": [1, 0.5, 0.0]})
    assert (await submitted(fake_head)).inputs["sigmas"] == Numbers((1, 0.5, 0.0))


async def test_null_is_no_image(client, fake_head):
    await client.post(GENERATIONS, json={"prompt": "x", "image": None})
    assert not (await submitted(fake_head)).inputs.get("image")


async def test_the_same_bytes_under_a_key_are_the_same_request(client, fake_head):
    headers = {"Idempotency-Key": "k-1"}
    first = await client.post(GENERATIONS, json={"prompt": "x", "image": text(PNG)}, headers=headers)
    again = await client.post(EDITS, data={"prompt": "x"}, files={"image": PNG}, headers=headers)
    other = await client.post(EDITS, data={"prompt": "x"}, files={"image": MASK}, headers=headers)
    assert first.json()["id"] == again.json()["id"]
    assert other.status_code == 409
    assert len(fake_head.journal) == 1


async def test_an_image_far_longer_than_a_message_fits(client, fake_head):
    noise = np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG", compress_level=0)
    assert len(file.getvalue()) > 2 * body.MAX_TEXT_BYTES
    answer = await client.post(GENERATIONS, json={"prompt": "x", "image": text(file.getvalue())})
    assert answer.status_code == 200, answer.text
    kept = (await submitted(fake_head)).inputs["image"].files[0]
    assert kept.nbytes == len(file.getvalue())
    with Image.open(file) as opened:
        assert kept.pixels == opened.width * opened.height


async def test_a_request_shows_its_images_by_name_and_size(client, fake_head):
    made = await client.post(GENERATIONS, json={"prompt": "x", "image": text(PNG), "sigmas": [1, 2]})
    inputs = (await client.get(f"/v1/requests/{made.json()['id']}")).json()["inputs"]
    (shown,) = inputs["image"]
    assert (shown["bytes"], len(shown["name"]), inputs["sigmas"]) == (len(PNG), 68, [1, 2])


async def test_texts_and_json_are_one_input_in_json_and_in_a_form(client, fake_head):
    taken = (Parameter("phrases", ParameterKind.TEXTS), Parameter("boxes", ParameterKind.JSON))
    fake_head.description = msgspec.structs.replace(fake_head.description, parameters=(*PARAMETERS, *taken))
    given = {"phrases": ["a cat", "a dog"], "boxes": [[0.1, 0.2], {"a": None}]}
    await client.post(GENERATIONS, json={"prompt": "x", **given})
    form = {"prompt": "x", **{name: json.dumps(value) for name, value in given.items()}}
    await client.post(EDITS, data=form, files={"image": PNG})
    first, second = await fake_head.received(wire.SubmitRequest, 2)
    for name, value in given.items():
        expected = Json(json.dumps(value, separators=(",", ":")))
        assert first.inputs[name] == second.inputs[name] == expected
    shown = (await client.get(f"/v1/requests/{first.request_id}")).json()["inputs"]
    assert shown == {"prompt": "x", **given}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"phrases": ["a", 1]}, "phrases must be a text, or a list of texts"),
        ({"phrases": {"a": 1}}, "phrases must be a text, or a list of texts"),
        ({"boxes": [[[[[[[[[0]]]]]]]]]}, "boxes must have at most 8 lists or objects in each other"),
        ({"boxes": ["x" * 40_000]}, "boxes must be at most 32768 characters of JSON"),
        ({"prompt_2": ["a"]}, "prompt_2 must be a list of numbers alone, if it is a list"),
    ],
)
async def test_json_that_is_not_taken_is_refused(client, fake_head, wrong, message):
    taken = (Parameter("phrases", ParameterKind.TEXTS), Parameter("boxes", ParameterKind.JSON))
    fake_head.description = msgspec.structs.replace(fake_head.description, parameters=(*PARAMETERS, *taken))
    answer = await client.post(GENERATIONS, json={"prompt": "x", **wrong})
    assert (answer.status_code, answer.json()["error"]["message"]) == (422, message)
