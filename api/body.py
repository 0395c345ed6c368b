"""Request bodies: bounded in size and in time, each one and all together."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager

import msgspec
from starlette.requests import Request

from triptych.api.errors import ApiError, field_error

MAX_TEXT_BYTES = 1 << 19
"""Of a body without its images. Half of what a mailbox takes, so that nothing here is too long for the bus."""
MAX_JSON_BYTES = 1 << 26
MAX_FORM_BYTES = 1 << 27
MAX_BUFFERED_BYTES = 1 << 29
"""Of all bodies that are in hand at one time."""
BODY_TIMEOUT_S = 30.0
"""And a second more for each `MIN_BYTES_PER_S` that have come."""
MIN_BYTES_PER_S = 1 << 20
_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
"""In JSON: a character of Unicode's upper planes of which only one half is written."""


class BodyLimiter:
    """Bound the bytes of all request bodies in memory."""

    def __init__(self, limit: int = MAX_BUFFERED_BYTES) -> None:
        self.limit = limit
        self.buffered = 0

    @asynccontextmanager
    async def stream_chunks(self, request: Request, limit: int) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """Give the chunks of a body of at most `limit` bytes; it counts as in hand until the block is left.

        Raises ApiError 408 (too slow), 413 (too long), 429 (too much together), within the block.
        """
        received = 0
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def chunks() -> AsyncGenerator[bytes, None]:
            nonlocal received
            async for chunk in request.stream():
                received += len(chunk)
                self.buffered += len(chunk)
                if received > limit:
                    raise ApiError(413, f"the body is over {limit} bytes", code="too_long")
                if self.buffered > self.limit:
                    raise ApiError(429, "too much is being sent at once: try again", code="full")
                timer.reschedule(began + BODY_TIMEOUT_S + received / MIN_BYTES_PER_S)
                yield chunk
            timer.reschedule(None)

        try:
            async with asyncio.timeout(BODY_TIMEOUT_S) as timer:
                yield chunks()
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", code="timeout") from None
        finally:
            self.buffered -= received


async def read_object(chunks: AsyncGenerator[bytes, None]) -> dict[str, object]:
    """Read a JSON object, of which only fields of images may be long.

    Raises ApiError 400 (malformed), 413 (too much that is no image), 422 (JSON, but no object).
    """
    body = bytearray()
    async for chunk in chunks:
        body += chunk
    if len(body) > MAX_TEXT_BYTES and sum(map(body.count, (b",", b"[", b"{"))) > MAX_TEXT_BYTES:
        # There are none of these in an image, and each may be an object of a hundred bytes.
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
        # Without a type there is nothing else that a value could not be.
        raise field_error(name, "has a number that is out of range") from None


def check_length(fields: Mapping[str, object]) -> None:
    """Raise ApiError 413 when fields, their images apart, are too long for a message."""
    if len(msgspec.msgpack.encode(fields)) > MAX_TEXT_BYTES:
        longest = max(fields, key=lambda name: len(msgspec.msgpack.encode(fields[name])))
        predicate = f"is too long: all that is no image in a request is at most {MAX_TEXT_BYTES} bytes"
        raise field_error(longest, predicate, status=413, code="too_long")
