"""Input images: everything that is refused."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.image_inputs import (
    EDITS,
    GENERATIONS,
    MASK,
    PARAMETERS,
    PNG,
    check,
    encoded,
    header_only,
    moving,
    text,
)
from triptych.api import body
from triptych.api import uploads as uploads_module
from triptych.engines.parameters.schema import Parameter, ParameterKind, Task
from triptych.roles.media.uploads import UploadsFullError
from triptych.roles.messages.common import Upload

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def model_with_images(fake_head):
    fake_head.description = msgspec.structs.replace(fake_head.description, parameters=PARAMETERS)


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
async def test_what_is_no_good_image(client, fake_head, uploads, data, status, words, as_json):
    if as_json:
        answer = await client.post(GENERATIONS, json={"prompt": "x", "last_image": text(data)})
        if not data:
            status, words = 422, "empty"
    else:
        answer = await client.post(GENERATIONS, data={"prompt": "x"}, files={"last_image": data})
    check(answer, status, "last_image", words)
    assert not fake_head.journal
    assert not uploads.files.folder.exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("!!!", "base64"),
        ("AAA", "base64"),
        ("data:image/png;base64,###", "base64"),
        ("data:image/png,AAAA", "base64"),
        (text(PNG) + "=", "base64"),
        ("\u00e4" * 8, "base64"),
        ("https://example.org/cat.png", "nothing is fetched"),
        ("FILE:///etc/passwd", "nothing is fetched"),
        (3, "an image"),
        (True, "an image"),
        ({"image_urls": text(PNG)}, "an image"),
        ({"image_url": {"url": text(PNG)}}, "an image"),
        ({"file_id": "file-1"}, "send the image itself as image_url"),
        ([{"image_url": "https://example.org/cat.png"}], "nothing is fetched"),
        ([], "empty"),
        ([text(PNG), 3], "an image"),
        ([[text(PNG)]], "an image"),
        ([text(PNG)] * 17, "at most 16"),
    ],
)
async def test_what_is_no_image_in_json(client, fake_head, value, words):
    check(await client.post(GENERATIONS, json={"prompt": "x", "image": value}), 422, "image", words)
    assert not fake_head.journal


async def test_padding_between_two_pieces_is_no_base64(client, fake_head, monkeypatch):
    monkeypatch.setattr(uploads_module, "_BASE64_CHUNK", 4)
    check(await client.post(GENERATIONS, json={"prompt": "x", "image": "QQ==" + text(PNG)}), 422, "image", "padding")
    assert (await client.post(GENERATIONS, json={"prompt": "x", "image": text(PNG)})).status_code == 200


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "form"])
async def test_413_for_a_file_that_is_too_long(client, fake_head, monkeypatch, as_json):
    monkeypatch.setattr(uploads_module, "MAX_FILE_BYTES", len(PNG) - 1)
    if as_json:
        answer = await client.post(GENERATIONS, json={"prompt": "x", "image": text(PNG)})
    else:
        answer = await client.post(GENERATIONS, data={"prompt": "x"}, files={"image": PNG})
    check(answer, 413, "image")


async def test_413_for_too_many_pixels_together(client, fake_head, monkeypatch):
    monkeypatch.setattr(uploads_module, "MAX_TOTAL_PIXELS", 3 * 5 * 4)
    answer = await client.post(GENERATIONS, json={"prompt": "x", "image": [text(PNG)] * 4})
    check(answer, 413, "image", "together")
    assert (await client.post(GENERATIONS, json={"prompt": "x", "image": [text(PNG)] * 3})).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"last_image": [text(PNG)] * 2}, "last_image", "one image"),
        ({"mask_image": text(MASK)}, "image", "image is required: a mask needs the image"),
        ({"mask": text(MASK)}, "image", "image is required: a mask needs the image"),
        ({"mask": text(MASK), "mask_image": text(MASK)}, "mask_image", "given twice"),
        ({"sigmas": [1, "2"]}, "sigmas", "numbers"),
        ({"sigmas": [True]}, "sigmas", "numbers"),
        ({"sigmas": [1] * 1001}, "sigmas", "at most 1000"),
        ({"sigmas": [2**63]}, "sigmas", "range"),
        ({"sigmas": [[1]]}, "sigmas", "numbers"),
    ],
)
async def test_422_names_the_field(client, fake_head, fields, param, words):
    check(await client.post(GENERATIONS, json={"prompt": "x", **fields}), 422, param, words)
    assert not fake_head.journal


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "form"])
async def test_an_edit_needs_an_image(client, fake_head, as_json):
    sent = {"json": {"prompt": "x"}} if as_json else {"data": {"prompt": "x"}, "files": {"last_image": PNG}}
    check(await client.post(EDITS, **sent), 422, "image", "required")
    assert not fake_head.journal


@pytest.mark.parametrize(
    ("data", "files", "param", "words"),
    [
        ({"n": "two"}, {}, "n", "n must be a whole number from 1 to 10"),
        ({"seed": "1.5"}, {}, "seed", "a whole number"),
        ({"strength": "much"}, {}, "strength", "number"),
        ({"max_sequence_length": "many"}, {}, "max_sequence_length", "a whole number"),
        ({"clean_caption": "perhaps"}, {}, "clean_caption", "true or false"),
        ({"sigmas": "1, a"}, {}, "sigmas", "numbers"),
        ({"seed": ["1", "2"]}, {}, "seed", "2 times"),
        ({}, {"prompt_2": PNG}, "prompt_2", "takes no image"),
        ({}, {"seed": PNG}, "seed", "takes no image"),
        ({}, {"control_image": PNG}, "control_image", "image, last_image, mask_image, video"),
    ],
)
async def test_422_names_the_field_of_a_form(client, fake_head, data, files, param, words):
    files = {"image": PNG, **files}
    check(await client.post(EDITS, data={"prompt": "x", **data}, files=files), 422, param, words)
    assert not fake_head.journal


async def test_a_model_without_images_says_so(client, fake_head):
    only_text = (Parameter("prompt", ParameterKind.TEXT, required=True),)
    tasks = (Task("text2image", ("prompt",), ("prompt",)),)
    fake_head.description = msgspec.structs.replace(fake_head.description, parameters=only_text, tasks=tasks)
    check(
        await client.post(EDITS, data={"prompt": "x"}, files={"image": PNG}),
        422,
        "image",
        "takes no images",
        "text2image",
    )
    check(await client.post(GENERATIONS, json={"prompt": "x", "mask": text(MASK)}), 422, "mask", "takes no images")


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
async def test_400_for_what_is_no_form(client, fake_head, content_type, content):
    answer = await client.post(EDITS, content=content, headers={"content-type": content_type})
    check(answer, 400, None)
    assert answer.json()["error"]["code"] == "invalid_form"


async def test_413_for_a_form_without_reading_on(client, fake_head, monkeypatch):
    monkeypatch.setattr(body, "MAX_FORM_BYTES", 100_000)
    check(await client.post(EDITS, data={"prompt": "x"}, files={"image": b"\0" * 200_000}), 413, None)


async def test_413_for_too_much_that_is_no_image(client, fake_head):
    many = {f"text_{k}": "y" * 32_000 for k in range(20)}
    check(await client.post(GENERATIONS, json={"prompt": "x", **many}), 413, "text_0", "524288")
    content = json.dumps({"prompt": "x", "a": [[]] * 600_000}).encode()
    answer = await client.post(GENERATIONS, content=content, headers={"content-type": "application/json"})
    check(answer, 413, None, "too many values")


async def test_429_while_too_much_is_being_sent_and_nothing_is_held_after_it(client, services, fake_head):
    services.body_limiter.limit = 1000
    answer = await client.post(GENERATIONS, json={"prompt": "x" * 2000})
    check(answer, 429, None, "at once")
    assert answer.headers["retry-after"] == "1"
    assert (await client.post(GENERATIONS, json={"prompt": "x"})).status_code == 200
    assert (await client.post(EDITS, content=b"nonsense", headers={"content-type": FORM})).status_code == 400
    assert services.body_limiter.buffered == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [(UploadsFullError("full"), "full"), (OSError(28, "no space"), "disk_full"), (OSError(5, "broken"), "unavailable")],
)
async def test_503_where_the_disk_is_full(client, fake_head, uploads, monkeypatch, error, code):
    def refuse(*_):
        raise error

    monkeypatch.setattr(uploads, "save", refuse)
    answer = await client.post(GENERATIONS, json={"prompt": "x", "image": text(PNG)})
    check(answer, 503, "image")
    assert answer.json()["error"]["code"] == code
    assert int(answer.headers["retry-after"]) > 0


async def test_no_client_chooses_a_path(client, fake_head, uploads):
    files = {"image": ("../../../etc/cron.d/x.png", PNG)}
    await client.post(EDITS, data={"prompt": "x"}, files=files)
    assert [path.suffix for path in uploads.files.folder.iterdir()] == [".png"]
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
async def test_any_image_in_json_is_taken_or_a_client_error(client, fake_head, name, value, prompt):
    content = json.dumps({"prompt": prompt, name: value}).encode("utf-8", "surrogatepass")
    answer = await client.post(GENERATIONS, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    assert "Traceback" not in answer.text


@FUZZ
@given(name=NAME | st.text(max_size=8), data=ANY, text=st.dictionaries(NAME | st.text(max_size=8), st.text(max_size=8)))
async def test_any_file_in_a_form_is_taken_or_a_client_error(client, fake_head, name, data, text):
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
async def test_any_bytes_in_a_form_are_a_client_error_or_taken(client, fake_head, content, boundary):
    answer = await client.post(EDITS, content=boundary + content, headers={"content-type": FORM})
    assert 400 <= answer.status_code < 500, answer.text
