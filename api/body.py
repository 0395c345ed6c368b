"""Read a request's body, JSON or a form: its fields by name."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import msgspec
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from triptych.api.errors import ApiError, field_error
from triptych.api.services import ApiRequest

MAX_TEXT_BYTES = 1 << 19
"""Of a body without its images. Half of what a mailbox takes, so that nothing here is too long for the bus."""
MAX_JSON_BYTES = 1 << 26
MAX_FORM_BYTES = 1 << 27
MAX_FORM_FILES = 512
"""Of a form."""
MAX_FORM_FIELDS = 128
"""Of a form, beside its files."""
_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
"""In JSON: a character of Unicode's upper planes of which only one half is written."""


class BodyFields(NamedTuple):
    """The fields of a body."""

    fields: dict[str, object]
    """By name: values as in JSON; of a form texts, or lists of texts and files."""
    is_form: bool


@asynccontextmanager
async def read_body(request: ApiRequest) -> AsyncIterator[BodyFields]:
    """Read a body that is JSON or a multipart form; its files can be read until the block is left.

    Raises ApiError: 400 (malformed), 408 (too slow), 413 (too long), 415 (neither JSON nor a form), 422 (a field is
    given twice), 429 (too much is being sent at once).
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in ("application/json", "multipart/form-data"):
        message = "send JSON, with Content-Type: application/json, or a form, with multipart/form-data"
        raise ApiError(415, message, code="unsupported_media_type")
    is_form = content_type != "application/json"
    limit = MAX_FORM_BYTES if is_form else MAX_JSON_BYTES
    async with AsyncExitStack() as stack:
        limiter = request.state["services"].body_limiter
        chunks = await stack.enter_async_context(limiter.stream_chunks(request.stream(), limit))
        fields = await (_read_form(request.headers, chunks, stack) if is_form else _read_object(chunks))
        yield BodyFields(fields, is_form)


async def _read_object(chunks: AsyncGenerator[bytes, None]) -> dict[str, object]:
    """Read a JSON object, of which only fields of images may be long.

    Raises ApiError 400 (malformed), 413 (too much that is no image), 422 (JSON, but no object).
    """
    body = bytearray()
    async for chunk in chunks:
        body += chunk
    if len(body) > MAX_TEXT_BYTES and sum(map(body.count, (b",", b"[", b"{"))) > MAX_TEXT_BYTES:
        # An image has none of these characters, and each may become an object of a hundred bytes.
        raise ApiError(413, "the body has too many values", code="too_long")
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        return {name: _decode(name, value) for name, value in fields.items()}
    except msgspec.ValidationError:
        raise ApiError(422, "the body must be a JSON object", code="invalid_value") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        why = "it has half of a surrogate pair" if _LONE_SURROGATE.search(body) else error
        raise ApiError(400, f"the body is not valid JSON: {why}", code="invalid_json") from None


def _decode(name: str, value: msgspec.Raw) -> object:
    try:
        return msgspec.json.decode(value)
    except msgspec.ValidationError:
        # Decoding without a type fails at nothing else.
        raise field_error(name, "has a number that is out of range") from None


async def _read_form(headers: Headers, chunks: AsyncGenerator[bytes, None], stack: AsyncExitStack) -> dict[str, object]:
    parser = _CompleteFormParser(
        headers, chunks, max_files=MAX_FORM_FILES, max_fields=MAX_FORM_FIELDS, max_part_size=MAX_TEXT_BYTES
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, f"the form cannot be read: {error.message}", code="invalid_form") from None
    stack.push_async_callback(form.close)
    if not parser.ended:
        raise ApiError(400, "the form is cut off: it has no last boundary", code="invalid_form")
    given: dict[str, object] = {}
    for name in form:
        values = form.getlist(name)
        files = [value for value in values if isinstance(value, UploadFile)]
        if len(values) > 1 and not files:
            raise field_error(name, f"is given {len(values)} times: give it once")
        given[name] = list(values) if files else values[0]
    return given


class _CompleteFormParser(MultiPartParser):
    """A parser that knows whether the form is complete."""

    ended = False

    def on_end(self) -> None:
        """Note that the last boundary has come."""
        self.ended = True
