"""Multipart forms that are damaged in every way: an answer that says so, and no crash."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.api.image_inputs import PARAMETERS, encoded

pytestmark = pytest.mark.anyio
PNG = encoded("PNG", size=(16, 16))
PIECES = (
    b"--b\r\n", b"--b--\r\n", b"--b--", b"--b", b"--", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\0", PNG, PNG[:40],
    b'Content-Disposition: form-data; name="prompt"\r\n\r\nx\r\n',
    b'Content-Disposition: form-data; name="seed"\r\n\r\n7\r\n',
    b'Content-Disposition: form-data; name="image"; filename="x.png"\r\nContent-Type: image/png\r\n\r\n',
    b'Content-Disposition: form-data; name="mask"; filename=""\r\n\r\n',
    b'Content-Disposition: form-data; name="tensors"; filename="t"\r\n\r\n',
    b"Content-Disposition: form-data; filename*=utf-8''%ff%00; name*=utf-8''image\r\n\r\n",
    b'Content-Disposition: attachment; name="prompt"\r\n\r\n',
    b"Content-Disposition: form-data\r\n\r\n",
    b'Content-Disposition: form-data; name="\xff\xfe"\r\n\r\n',
    b"Content-Disposition:\r\n", b"Content-Transfer-Encoding: base64\r\n", b": \r\n", b"X\r\n",
    b"Content-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n", b"X-Long: " + b"y" * 20_000 + b"\r\n",
)  # fmt: skip
WHOLE = b"".join((b"--b\r\n", PIECES[12], b"--b\r\n", PIECES[14], PNG, b"\r\n--b--\r\n"))
ANY_FORM = st.lists(st.sampled_from(PIECES) | st.binary(max_size=8), max_size=20).map(b"".join)
CUTS = st.tuples(
    st.integers(0, len(WHOLE)), st.integers(0, len(WHOLE)), st.sampled_from(PIECES) | st.binary(max_size=8)
)
DAMAGED = CUTS.map(lambda cut: WHOLE[: min(cut[:2])] + cut[2] + WHOLE[max(cut[:2]) :])
TYPES = st.sampled_from(
    ("multipart/form-data; boundary=b",) * 8
    + ('multipart/form-data; boundary="b', "multipart/form-data", "multipart/form-data; boundary=",
       "multipart/form-data; boundary=b; charset=utf-7", "multipart/form-data; boundary=b; charset=none",
       "MULTIPART/FORM-DATA;BOUNDARY=b", f"multipart/form-data; boundary={'b' * 300}")
)  # fmt: skip
PATHS = st.sampled_from(("/v1/images/generations", "/v1/images/edits", "/v1/videos"))


@pytest.fixture(autouse=True)
def model_with_images(fake_head):
    fake_head.description = msgspec.structs.replace(fake_head.description, parameters=PARAMETERS)


async def chunks(content: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


@seed(0)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=ANY_FORM | DAMAGED, content_type=TYPES, path=PATHS, size=st.sampled_from((1 << 20, 37, 1)))
async def test_a_malformed_form_is_answered(client, fake_head, form, content_type, path, size):
    size = size if len(form) < 3000 else 1 << 20
    answer = await client.post(path, content=chunks(form, size), headers={"content-type": content_type})
    assert answer.status_code < 500, answer.text
    assert answer.status_code == 200 or answer.json()["error"]["message"]


async def test_a_whole_form_is_taken(client, fake_head):
    sent = await client.post(
        "/v1/images/edits", content=chunks(WHOLE, 7), headers={"content-type": "multipart/form-data; boundary=b"}
    )
    assert sent.status_code == 200, sent.text
