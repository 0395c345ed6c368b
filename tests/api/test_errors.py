from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triptych.api import body, body_limiter
from triptych.api.errors import error_response, error_type, from_bus
from triptych.bus import AskTimeoutError, BusError, MailboxFullError, MessageTooLongError, RemoteError, UnreachableError
from triptych.roles.messages import requests as wire

pytestmark = pytest.mark.anyio
URL = "/v1/images/generations"


def check(answer, status, code=None, param=None):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == error_type(status)
    assert error["param"] == param
    if code is not None:
        assert error["code"] == code


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 3}, "prompt"),
        ({"prompt": "x" * 32_769}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"size": "big"}, "size"),
        ({"size": "0x64"}, "size"),
        ({"size": "64x64\n"}, "size"),
        ({"size": "123456x64"}, "size"),
        ({"size": "64x64", "height": 64}, "size"),
        ({"model": 1}, "model"),
        ({"response_format": "bytes"}, "response_format"),
        ({"output_format": "bmp"}, "output_format"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 2**63 - 1, "n": 2}, "seed"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": "4"}, "num_inference_steps"),
        ({"guidance_scale": "high"}, "guidance_scale"),
        ({"negative_prompt": []}, "negative_prompt"),
        ({"priority": 101}, "priority"),
        ({"priority": 0.5}, "priority"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": "soon"}, "deadline_s"),
        ({"prompt_2": ["a"]}, "prompt_2"),
        ({"max_sequence_length": 10**30}, "max_sequence_length"),
        ({f"a{k}": k for k in range(70)}, None),
    ],
)
async def test_422_names_the_field(client, fake_head, fields, param):
    check(await client.post(URL, json={"prompt": "x", **fields}), 422, "invalid_value", param)
    assert not fake_head.journal


@pytest.mark.parametrize("fields", [{"prompt": ""}, {"prompt": None}, {}])
async def test_whether_a_prompt_is_needed_is_for_the_model_to_say(client, fake_head, fields):
    answer = await client.post(URL, json={"seed": 1, **fields})
    assert answer.status_code == 200, answer.text
    (submit,) = await fake_head.received(wire.SubmitRequest)
    assert submit.inputs == {name: value for name, value in fields.items() if value is not None}


async def test_422_for_json_that_is_no_object(client, fake_head):
    check(await client.post(URL, json=[1]), 422, "invalid_value")


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"prompt": "x",}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "guidance_scale": NaN}',
        b'{"prompt": "x", "a": ' + b"[" * 100_000,
    ],
)
async def test_400_for_what_is_no_json(client, fake_head, content):
    check(await client.post(URL, content=content, headers=JSON), 400, "invalid_json")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" * 5000])
async def test_numbers_out_of_range_are_refused(client, fake_head, number):
    content = f'{{"prompt": "x", "guidance_scale": {number}}}'.encode()
    answer = await client.post(URL, content=content, headers=JSON)
    assert answer.status_code in (400, 422), answer.text
    assert not fake_head.journal


async def test_400_for_a_key_that_is_no_header_value(client, fake_head):
    empty = await client.post(URL, json={"prompt": "x"}, headers={"Idempotency-Key": ""})
    check(empty, 400, "invalid_header")
    answer = await client.post(URL, json={"prompt": "x"}, headers={"Idempotency-Key": "k" * 256})
    check(answer, 400, "invalid_header")


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded"])
async def test_415_for_another_content_type(client, fake_head, content_type):
    answer = await client.post(URL, content=b'{"prompt": "x"}', headers={"content-type": content_type})
    check(answer, 415, "unsupported_media_type")


async def test_a_charset_beside_the_content_type_is_fine(client, fake_head):
    headers = {"content-type": "application/json; charset=utf-8"}
    assert (await client.post(URL, content=b'{"prompt": "x"}', headers=headers)).status_code == 200


async def test_413_without_reading_on(client, fake_head):
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 1
            yield b" " * 65_536

    check(await client.post(URL, content=endless(), headers=JSON), 413, "too_long")
    assert sent * 65_536 <= 2 * body.MAX_JSON_BYTES


async def test_408_for_a_body_that_does_not_end(client, fake_head, monkeypatch):
    monkeypatch.setattr(body_limiter, "BODY_TIMEOUT_S", 0.05)

    async def stuck():
        yield b"{"
        await asyncio.Event().wait()

    check(await client.post(URL, content=stuck(), headers=JSON), 408, "timeout")


async def test_the_longest_prompt_fits_on_the_bus(client, fake_head):
    answer = await client.post(URL, json={"prompt": "\N{GRINNING FACE}" * 32_768})
    assert answer.status_code == 200, answer.text


async def test_404_for_another_model(client, fake_head):
    check(await client.post(URL, json={"prompt": "x", "model": "gpt-image-1"}), 404, "model_not_found", "model")


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/nothing", None), ("//v1/models", None), ("/v1/images", None), ("/v1/requests/nothing", None),
        ("/v1/models/", "model"), ("/v1/models/nothing", "model"),
    ],
)  # fmt: skip
async def test_404_for_what_is_not_there(client, fake_head, path, param):
    check(await client.get(path), 404, param=param)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", URL, "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("PUT", "/v1/requests/r", "GET, HEAD, DELETE"),
    ],
)
async def test_405_says_what_is_allowed(client, fake_head, method, path, allow):
    answer = await client.request(method, path)
    check(answer, 405, "method_not_allowed")
    assert set(allow.split(", ")) - {"HEAD"} <= set(answer.headers["allow"].split(", "))


@pytest.mark.parametrize(
    ("rejection", "status", "code", "retry_after"),
    [
        (wire.RequestRejected("invalid", "must be 64", "height"), 422, "invalid_value", None),
        (wire.RequestRejected("full", "256 wait", retry_after_s=2.5), 429, "full", "3"),
        (wire.RequestRejected("full", "256 wait"), 429, "full", "1"),
        (wire.RequestRejected("conflict", "another body"), 409, "conflict", None),
        (wire.RequestRejected("unavailable", "no denoiser"), 503, "unavailable", "1"),
    ],
)
async def test_what_the_head_refuses(client, fake_head, rejection, status, code, retry_after):
    fake_head.rejection = rejection
    answer = await client.post(URL, json={"prompt": "x"})
    check(answer, status, code, rejection.param or None)
    assert answer.headers.get("retry-after") == retry_after


@pytest.mark.usefixtures("impatient")
async def test_503_without_a_head(client):
    answer = await client.post(URL, json={"prompt": "x"})
    check(answer, 503, "head_unreachable")
    assert answer.headers["retry-after"] == "1"


async def test_500_without_a_traceback(client, fake_head, store):
    fake_head.hold = True
    waiting = asyncio.create_task(client.post(URL, json={"prompt": "x"}))
    (wait,) = await fake_head.received(wire.WaitRequest)
    fake_head.finish(wait.request_id)
    for file in list(store.files.folder.iterdir()):
        file.unlink()
        file.mkdir()  # nothing that the API expects
    answer = await waiting
    check(answer, 500, "internal_error")
    assert "Traceback" not in answer.text
    assert str(store.files.folder) not in answer.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MailboxFullError("full"), 429),
        (MessageTooLongError("long"), 413),
        (AskTimeoutError("late"), 503),
        (UnreachableError("gone"), 503),
        (RemoteError("not_found", "no such request"), 404),
        (RemoteError("stopping", "bye"), 503),
        (RemoteError("handler_failed", "KeyError: 'secret'"), 500),
        (BusError("other"), 500),
    ],
)
async def test_what_goes_wrong_on_the_bus(error, status):
    mapped = from_bus(error)
    assert mapped.status == status
    assert "secret" not in mapped.message
    headers, retryable = error_response(mapped).headers, status in (429, 503)
    assert ("retry-after" in headers, "x-should-retry" in headers) == (retryable, not retryable)


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
FIELDS = st.sampled_from(
    ("prompt", "n", "size", "model", "response_format", "output_format", "user", "seed", "height",
     "num_inference_steps", "guidance_scale", "negative_prompt", "priority", "deadline_s")
)  # fmt: skip


@FUZZ
@given(content=st.binary(max_size=200))
async def test_any_bytes_are_answered_with_a_client_error(client, fake_head, content):
    answer = await client.post(URL, content=content, headers=JSON)
    assert 400 <= answer.status_code < 500
    assert "Traceback" not in answer.text


@FUZZ
@given(fields=st.dictionaries(FIELDS | st.text(max_size=8), VALUE, max_size=6), prompt=st.text(max_size=20))
async def test_any_json_is_an_image_or_a_client_error(client, fake_head, fields, prompt):
    import json

    content = json.dumps({"prompt": prompt, **fields}).encode("utf-8", "surrogatepass")
    answer = await client.post(URL, content=content, headers=JSON)
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    assert "Traceback" not in answer.text


@FUZZ
@given(name=st.text(min_size=1, max_size=30))
async def test_any_name_of_an_image_is_answered_with_404(client, fake_head, name):
    from urllib.parse import quote

    answer = await client.get(f"/v1/images/{quote(name, safe='', errors='replace')}")
    assert answer.status_code == (405 if name in ("generations", "edits") else 404)
