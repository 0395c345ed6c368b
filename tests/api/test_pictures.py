"""Pictures that come in: what is taken, how it reaches the head, and everything that is refused."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from api import body
from api import uploads as edge
from engines.parameters import Kind, Parameter
from roles.messages import requests as wire
from roles.messages.work import Numbers, Pictures, Upload
from roles.uploads import UploadsFull

pytestmark = pytest.mark.anyio
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


def encoded(
    form: str = "PNG", *, mode: str = "RGB", colour: object = 7, size: tuple[int, int] = (5, 4), **options
) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, form, **options)
    return file.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def header_only(width: int, height: int) -> bytes:
    """A PNG that promises to be huge, and is a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def moving(form: str) -> bytes:
    frames = [Image.new("RGB", (4, 4), (k, 0, 0)) for k in (0, 250)]
    file = io.BytesIO()
    frames[0].save(file, form, save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


PNG = encoded()
MASK = encoded(mode="L", colour=255)
PARAMETERS = (
    Parameter("image", Kind.IMAGES),
    Parameter("last_image", Kind.IMAGE),
    Parameter("mask_image", Kind.IMAGE),
    Parameter("prompt", Kind.TEXT, required=True),
    Parameter("sigmas", Kind.NUMBERS),
    Parameter("strength", Kind.NUMBER),
    Parameter("max_sequence_length", Kind.INTEGER),
    Parameter("clean_caption", Kind.BOOLEAN),
    Parameter("prompt_2", Kind.TEXT),
    Parameter("video", Kind.IMAGE_LIST),
)


@pytest.fixture(autouse=True)
def model_with_pictures(small_head):
    small_head.description = msgspec.structs.replace(small_head.description, parameters=PARAMETERS)


def check(answer, status: int, param: str | None, *words: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    for word in words:
        assert word in error["message"]


async def submitted(small_head) -> wire.SubmitRequest:
    (submit,) = await small_head.received(wire.SubmitRequest)
    return submit


# -- what is taken


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:;base64,", "DATA:image/PNG;charset=x;BASE64,"])
async def test_a_picture_in_json_becomes_a_file_and_a_reference(client, small_head, uploads, prefix):
    answer = await client.post(GENERATIONS, json={"prompt": "x", "image": prefix + text(PNG), "strength": 0.5})
    assert answer.status_code == 200, answer.text
    submit = await submitted(small_head)
    (file,) = submit.inputs.pop("image").files
    assert submit.inputs == {"prompt": "x", "strength": 0.5}
    assert uploads.read(file) == PNG
    assert uploads.open(file).size == (5, 4)


async def test_several_pictures_keep_their_order(client, small_head, uploads):
    pictures = [encoded(colour=(k, 0, 0)) for k in (3, 1, 2)]
    await client.post(GENERATIONS, json={"prompt": "x", "image": [text(data) for data in pictures]})
    submit = await submitted(small_head)
    assert [uploads.read(file) for file in submit.inputs["image"].files] == pictures


@pytest.mark.parametrize(("form", "ending"), [("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp"), ("MPO", "jpeg")])
async def test_formats_are_known_by_content(client, small_head, form, ending):
    # A JPEG of a camera has a second picture behind the first; that is no reason to refuse it.
    options = {"save_all": True, "append_images": [Image.new("RGB", (2, 2))]} if form == "MPO" else {}
    files = {"image": ("holiday.gif", encoded(form, **options), "text/plain")}
    answer = await client.post(EDITS, data={"prompt": "x"}, files=files)
    assert answer.status_code == 200, answer.text
    (file,) = (await submitted(small_head)).inputs["image"].files
    assert file.name.endswith(f".{ending}")


async def test_the_text_of_a_form_becomes_values(client, small_head):
    data = {
        "prompt": "x", "n": "2", "size": "64x48", "seed": "7", "num_inference_steps": "3", "guidance_scale": "4.5",
        "strength": "1", "max_sequence_length": "16", "clean_caption": "true", "prompt_2": "12", "sigmas": "[1, 0.5]",
    }  # fmt: skip
    answer = await client.post(EDITS, data=data, files={"image": PNG})
    assert answer.status_code == 200, answer.text
    submit = await submitted(small_head)
    assert (submit.seed, submit.n) == (7, 2)
    del submit.inputs["image"]
    assert submit.inputs == {
        "prompt": "x", "height": 48, "width": 64, "num_inference_steps": 3, "guidance_scale": 4.5, "strength": 1.0,
        "max_sequence_length": 16, "clean_caption": True, "prompt_2": "12", "sigmas": Numbers((1, 0.5)),
    }  # fmt: skip


async def test_openais_names_are_diffusers_inputs(client, small_head, uploads):
    files = [("image[]", PNG), ("image[]", encoded(colour=9)), ("mask", MASK)]
    answer = await client.post(EDITS, data={"prompt": "x"}, files=files)
    assert answer.status_code == 200, answer.text
    inputs = (await submitted(small_head)).inputs
    assert [uploads.read(file) for file in inputs["image"].files] == [PNG, encoded(colour=9)]
    assert [uploads.read(file) for file in inputs["mask_image"].files] == [MASK]


async def test_a_mask_is_a_mask_where_the_model_has_one(client, small_head):
    more = (*PARAMETERS, Parameter("mask", Kind.IMAGE_LIST))
    small_head.description = msgspec.structs.replace(small_head.description, parameters=more)
    await client.post(GENERATIONS, json={"prompt": "x", "mask": [text(MASK)] * 20, "video": [text(PNG)] * 20})
    inputs = (await submitted(small_head)).inputs
    assert len(inputs["mask"].files) == len(inputs["video"].files) == 20
    assert "mask_image" not in inputs


async def test_names_are_known_before_an_instance_has_come(client, small_head):
    small_head.description = msgspec.structs.replace(small_head.description, parameters=())
    await client.post(EDITS, data={"prompt": "x", "strength": "0.5"}, files={"image": PNG, "mask": MASK})
    inputs = (await submitted(small_head)).inputs
    assert inputs["strength"] == 0.5
    assert {name for name, value in inputs.items() if isinstance(value, Pictures)} == {"image", "mask_image"}


async def test_a_list_of_numbers_is_one_input(client, small_head):
    await client.post(GENERATIONS, json={"prompt": "x", "sigmas": [1, 0.5, 0.0]})
    assert (await submitted(small_head)).inputs["sigmas"] == Numbers((1, 0.5, 0.0))


async def test_null_is_no_picture(client, small_head):
    await client.post(GENERATIONS, json={"prompt": "x", "image": None})
    assert not (await submitted(small_head)).inputs.get("image")


async def test_the_same_bytes_under_a_key_are_the_same_request(client, small_head):
    headers = {"Idempotency-Key": "k-1"}
    first = await client.post(GENERATIONS, json={"prompt": "x", "image": text(PNG)}, headers=headers)
    again = await client.post(EDITS, data={"prompt": "x"}, files={"image": PNG}, headers=headers)
    other = await client.post(EDITS, data={"prompt": "x"}, files={"image": MASK}, headers=headers)
    assert first.json()["id"] == again.json()["id"]
    assert other.status_code == 409
    assert len(small_head.journal) == 1


async def test_a_picture_far_longer_than_a_message_fits(client, small_head):
    noise = np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG", compress_level=0)
    assert len(file.getvalue()) > 2 * body.MAX_TEXT_BYTES
    answer = await client.post(GENERATIONS, json={"prompt": "x", "image": text(file.getvalue())})
    assert answer.status_code == 200, answer.text
    assert (await submitted(small_head)).inputs["image"].files[0].nbytes == len(file.getvalue())


async def test_a_request_shows_its_pictures_by_name_and_size(client, small_head):
    made = await client.post(GENERATIONS, json={"prompt": "x", "image": text(PNG), "sigmas": [1, 2]})
    inputs = (await client.get(f"/v1/requests/{made.json()['id']}")).json()["inputs"]
    (shown,) = inputs["image"]
    assert (shown["bytes"], len(shown["name"]), inputs["sigmas"]) == (len(PNG), 68, [1, 2])


# -- what is refused


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"", 422, "empty"),
        (b"nonsense", 415, "PNG, JPEG or WebP"),
        (b"GIF89a" + b"\0" * 64, 415, "PNG, JPEG or WebP"),
        (encoded("BMP"), 415, "PNG, JPEG or WebP"),
        (encoded("TIFF"), 415, "PNG, JPEG or WebP"),
        (encoded(size=(64, 64))[:-40], 422, "not complete"),
        (encoded("JPEG", size=(64, 64))[:-200], 422, "not complete"),
        (encoded("WEBP", size=(64, 64))[:-20], 422, ""),
        (PNG[:40] + b"\xff" * 12 + PNG[52:], 422, ""),
        (header_only(30_000, 30_000), 413, "pixels"),
        (header_only(9_000, 9_000), 413, "pixels"),
        (header_only(2**31 - 1, 2**31 - 1), 413, "pixels"),
        (moving("PNG"), 422, "2 frames"),
        (moving("WEBP"), 422, "2 frames"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, bytes) else str(value),
)
@pytest.mark.parametrize("as_json", [True, False], ids=["json", "form"])
async def test_what_is_no_good_picture(client, small_head, uploads, data, status, words, as_json):
    if as_json:
        answer = await client.post(GENERATIONS, json={"prompt": "x", "last_image": text(data)})
        if not data:
            status, words = 422, "empty"
    else:
        answer = await client.post(GENERATIONS, data={"prompt": "x"}, files={"last_image": data})
    check(answer, status, "last_image", words)
    assert not small_head.journal
    assert not uploads.folder.exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("!!!", "base64"),
        ("AAA", "base64"),
        ("data:image/png;base64,###", "base64"),
        ("data:image/png,AAAA", "base64"),
        (text(PNG) + "=", "base64"),
        (text(PNG)[:8] + "\n" + text(PNG)[8:], "base64"),
        ("\u00e4" * 8, "base64"),
        ("https://example.org/cat.png", "nothing is fetched"),
        ("FILE:///etc/passwd", "nothing is fetched"),
        (3, "a picture"),
        (True, "a picture"),
        ({"image_url": text(PNG)}, "a picture"),
        ([], "empty"),
        ([text(PNG), 3], "a picture"),
        ([[text(PNG)]], "a picture"),
        ([text(PNG)] * 17, "at most 16"),
    ],
)
async def test_what_is_no_picture_in_json(client, small_head, value, words):
    check(await client.post(GENERATIONS, json={"prompt": "x", "image": value}), 422, "image", words)
    assert not small_head.journal


async def test_padding_between_two_pieces_is_no_base64(client, small_head, monkeypatch):
    monkeypatch.setattr(edge, "_BASE64_CHUNK", 4)
    check(await client.post(GENERATIONS, json={"prompt": "x", "image": "QQ==" + text(PNG)}), 422, "image", "padding")
    assert (await client.post(GENERATIONS, json={"prompt": "x", "image": text(PNG)})).status_code == 200


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "form"])
async def test_413_for_a_file_that_is_too_long(client, small_head, monkeypatch, as_json):
    monkeypatch.setattr(edge, "MAX_FILE_BYTES", len(PNG) - 1)
    if as_json:
        answer = await client.post(GENERATIONS, json={"prompt": "x", "image": text(PNG)})
    else:
        answer = await client.post(GENERATIONS, data={"prompt": "x"}, files={"image": PNG})
    check(answer, 413, "image")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"last_image": [text(PNG)] * 2}, "last_image", "one picture"),
        ({"mask_image": text(MASK)}, "image", "a mask needs the image"),
        ({"mask": text(MASK)}, "image", "a mask needs the image"),
        ({"mask": text(MASK), "mask_image": text(MASK)}, "mask_image", "given twice"),
        ({"sigmas": [1, "2"]}, "sigmas", "numbers"),
        ({"sigmas": [True]}, "sigmas", "numbers"),
        ({"sigmas": [1] * 1001}, "sigmas", "at most 1000"),
        ({"sigmas": [2**63]}, "sigmas", "range"),
        ({"sigmas": [[1]]}, "sigmas", "numbers"),
    ],
)
async def test_422_names_the_field(client, small_head, fields, param, words):
    check(await client.post(GENERATIONS, json={"prompt": "x", **fields}), 422, param, words)
    assert not small_head.journal


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "form"])
async def test_an_edit_needs_an_image(client, small_head, as_json):
    sent = {"json": {"prompt": "x"}} if as_json else {"data": {"prompt": "x"}, "files": {"last_image": PNG}}
    check(await client.post(EDITS, **sent), 422, "image", "required")
    check(await client.post(EDITS, json={"image": text(PNG)}), 422, "prompt", "required")
    assert not small_head.journal


@pytest.mark.parametrize(
    ("data", "files", "param", "words"),
    [
        ({"n": "two"}, {}, "n", "int"),
        ({"seed": "1.5"}, {}, "seed", "int"),
        ({"strength": "much"}, {}, "strength", "number"),
        ({"max_sequence_length": "many"}, {}, "max_sequence_length", "integer"),
        ({"clean_caption": "perhaps"}, {}, "clean_caption", "boolean"),
        ({"sigmas": "1, a"}, {}, "sigmas", "numbers"),
        ({"seed": ["1", "2"]}, {}, "seed", "2 times"),
        ({}, {"prompt_2": PNG}, "prompt_2", "takes no file"),
        ({}, {"seed": PNG}, "seed", "takes no file"),
        ({}, {"control_image": PNG}, "control_image", "image, last_image, mask_image, video"),
    ],
)
async def test_422_names_the_field_of_a_form(client, small_head, data, files, param, words):
    files = {"image": PNG, **files}
    check(await client.post(EDITS, data={"prompt": "x", **data}, files=files), 422, param, words)
    assert not small_head.journal


async def test_a_model_without_pictures_says_so(client, small_head):
    only_text = (Parameter("prompt", Kind.TEXT, required=True),)
    small_head.description = msgspec.structs.replace(small_head.description, parameters=only_text)
    check(await client.post(EDITS, data={"prompt": "x"}, files={"image": PNG}), 422, "image", "takes no pictures")


FORM = "multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n'


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("multipart/form-data", PART + b"--b--\r\n"),
        (FORM, b""),
        (FORM, b"nonsense"),
        (FORM, PART),
        (FORM, PART + b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nhalf a pic'),
        (FORM, b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"),
        (FORM, b"".join([PART.replace(b"prompt", b"f%d" % k) for k in range(200)]) + b"--b--\r\n"),
        (FORM, PART.replace(b"x", b"x" * 600_000) + b"--b--\r\n"),
    ],
)
async def test_400_for_what_is_no_form(client, small_head, content_type, content):
    answer = await client.post(EDITS, content=content, headers={"content-type": content_type})
    check(answer, 400, None)
    assert answer.json()["error"]["code"] == "invalid_form"


async def test_413_for_a_form_without_reading_on(client, small_head, monkeypatch):
    monkeypatch.setattr(body, "MAX_FORM_BYTES", 100_000)
    monkeypatch.setattr("api.forms.MAX_FORM_BYTES", 100_000)
    check(await client.post(EDITS, data={"prompt": "x"}, files={"image": b"\0" * 200_000}), 413, None)


async def test_413_for_too_much_that_is_no_picture(client, small_head):
    many = {f"text_{k}": "y" * 32_000 for k in range(20)}
    check(await client.post(GENERATIONS, json={"prompt": "x", **many}), 413, "text_0", "524288")
    content = json.dumps({"prompt": "x", "a": [[]] * 600_000}).encode()
    answer = await client.post(GENERATIONS, content=content, headers={"content-type": "application/json"})
    check(answer, 413, None, "too many values")


async def test_429_while_too_much_is_being_sent_and_nothing_is_held_after_it(client, app, small_head, monkeypatch):
    intake = app.app.state.intake
    intake.most = 1000
    answer = await client.post(GENERATIONS, json={"prompt": "x" * 2000})
    check(answer, 429, None, "at once")
    assert answer.headers["retry-after"] == "1"
    assert (await client.post(GENERATIONS, json={"prompt": "x"})).status_code == 200
    assert (await client.post(EDITS, content=b"nonsense", headers={"content-type": FORM})).status_code == 400
    assert intake.held == 0


@pytest.mark.parametrize(("error", "code"), [(UploadsFull("full"), "full"), (OSError(28, "no space"), "unavailable")])
async def test_503_where_there_is_no_room(client, small_head, uploads, monkeypatch, error, code):
    def refuse(*_):
        raise error

    monkeypatch.setattr(uploads, "save", refuse)
    answer = await client.post(GENERATIONS, json={"prompt": "x", "image": text(PNG)})
    check(answer, 503, "image")
    assert answer.json()["error"]["code"] == code
    assert int(answer.headers["retry-after"]) > 0


async def test_no_client_chooses_a_path(client, small_head, uploads):
    files = {"image": ("../../../etc/cron.d/x.png", PNG)}
    await client.post(EDITS, data={"prompt": "x"}, files=files)
    assert [path.suffix for path in uploads.folder.iterdir()] == [".png"]
    forged = {"files": [{"name": "../journal.sqlite", "nbytes": 1}]}
    for value in (forged, ["Pictures", [["x", 1]]], Upload("x", 1).name):
        check(await client.post(GENERATIONS, json={"prompt": "x", "image": value}), 422, "image")


# -- whatever is sent

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DAMAGED = st.builds(
    lambda data, at, byte: data[: at % len(data)] + bytes([byte]) + data[at % len(data) + 1 :],
    st.sampled_from([encoded(form, size=(32, 32)) for form in ("PNG", "JPEG", "WEBP")]),
    st.integers(0, 10_000),
    st.integers(0, 255),
)
CUT = st.builds(lambda data, at: data[: at % len(data)], DAMAGED, st.integers(0, 10_000))
ANY = st.binary(max_size=60) | DAMAGED | CUT
TEXT = ANY.map(text) | st.text(max_size=20)
NAME = st.sampled_from(("image", "image[]", "mask", "mask_image", "last_image", "video", "input_reference", "sigmas"))


@FUZZ
@given(name=NAME, value=TEXT | st.lists(TEXT | st.integers() | st.floats(), max_size=4), prompt=st.text(max_size=5))
async def test_any_picture_in_json_is_taken_or_a_client_error(client, small_head, name, value, prompt):
    content = json.dumps({"prompt": prompt, name: value}).encode("utf-8", "surrogatepass")
    answer = await client.post(GENERATIONS, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    assert "Traceback" not in answer.text


@FUZZ
@given(name=NAME | st.text(max_size=8), data=ANY, text=st.dictionaries(NAME | st.text(max_size=8), st.text(max_size=8)))
async def test_any_file_in_a_form_is_taken_or_a_client_error(client, small_head, name, data, text):
    text = {
        key.encode("utf-8", "replace").decode(): value.encode("utf-8", "replace").decode()
        for key, value in text.items()
    }
    answer = await client.post(
        EDITS, data={"prompt": "x", **text}, files=[(name.encode("utf-8", "replace").decode(), data)]
    )
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text


@FUZZ
@given(content=st.binary(max_size=300), boundary=st.sampled_from([b"", PART, PART + b"--b--\r\n"]))
async def test_any_bytes_in_a_form_are_a_client_error_or_taken(client, small_head, content, boundary):
    answer = await client.post(EDITS, content=boundary + content, headers={"content-type": FORM})
    assert 400 <= answer.status_code < 500, answer.text
