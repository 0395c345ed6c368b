"""Request bodies: bounded in size and in time, each one and all together."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager

import msgspec
from starlette.requests import Request

from triptych.api.errors import ApiError, refused

MAX_TEXT_BYTES = 1 << 19
"""Of a body without its pictures. Half of what a mailbox takes, so that nothing here is too long for the bus."""
MAX_JSON_BYTES = 1 << 26
MAX_FORM_BYTES = 1 << 27
MAX_TOGETHER_BYTES = 1 << 29
"""Of all bodies that are in hand at one time."""
BODY_TIMEOUT_S = 30.0
"""And a second more for each `SLOWEST_BYTES_PER_S` that have come."""
SLOWEST_BYTES_PER_S = 1 << 20
_HALF_PAIR = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
"""In JSON: a character of Unicode's upper planes of which only one half is written."""


class Intake:
    """Counts the bytes of bodies that are in hand: what many send at once has to fit into memory."""

    def __init__(self, most: int = MAX_TOGETHER_BYTES) -> None:
        self.most = most
        self.held = 0

    @asynccontextmanager
    async def receive(self, request: Request, most: int) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """Give the chunks of a body of at most `most` bytes; it counts as in hand until the block is left.

        Raises ApiError 408 (too slow), 413 (too long), 429 (too much together), within the block.
        """
        received = 0
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def chunks() -> AsyncGenerator[bytes, None]:
            nonlocal received
            async for chunk in request.stream():
                received += len(chunk)
                self.held += len(chunk)
                if received > most:
                    raise ApiError(413, f"the body is over {most} bytes", code="too_long")
                if self.held > self.most:
                    raise ApiError(429, "too much is being sent at once: try again", code="full")
                timer.reschedule(began + BODY_TIMEOUT_S + received / SLOWEST_BYTES_PER_S)
                yield chunk
            timer.reschedule(None)

        try:
            async with asyncio.timeout(BODY_TIMEOUT_S) as timer:
                yield chunks()
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", code="timeout") from None
        finally:
            self.held -= received


async def read_object(chunks: AsyncGenerator[bytes, None]) -> dict[str, object]:
    """Read a JSON object, of which only fields of pictures may be long.

    Raises ApiError 400 (malformed), 413 (too much that is no picture), 422 (JSON, but no object).
    """
    body = bytearray()
    async for chunk in chunks:
        body += chunk
    if len(body) > MAX_TEXT_BYTES and sum(map(body.count, (b",", b"[", b"{"))) > MAX_TEXT_BYTES:
        # There are none of these in a picture, and each may be an object of a hundred bytes.
        raise ApiError(413, "the body has too many values", code="too_long")
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        return {name: _decode(name, value) for name, value in fields.items()}
    except msgspec.ValidationError:
        raise ApiError(422, "the body must be a JSON object", code="invalid_value") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        why = "it has half of a surrogate pair" if _HALF_PAIR.search(body) else error
        raise ApiError(400, f"the body is not valid JSON: {why}", code="invalid_json") from None


def _decode(name: str, value: msgspec.Raw) -> object:
    try:
        return msgspec.json.decode(value)
    except msgspec.ValidationError:
        # Without a type there is nothing else that a value could not be.
        raise refused(name, "has a number that is out of range") from None


def check_length(fields: Mapping[str, object]) -> None:
    """Raise ApiError 413 when fields, their pictures apart, are too long for a message."""
    if len(msgspec.msgpack.encode(fields)) > MAX_TEXT_BYTES:
        longest = max(fields, key=lambda name: len(msgspec.msgpack.encode(fields[name])))
        predicate = f"is too long: all that is no picture in a request is at most {MAX_TEXT_BYTES} bytes"
        raise refused(longest, predicate, status=413, code="too_long")
