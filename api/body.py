"""Request bodies: bounded in size and in time, each one and all together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager

import msgspec
from starlette.requests import Request

from api.errors import ApiError, from_validation

MAX_TEXT_BYTES = 1 << 19
"""Of a body without its pictures. Half of what a mailbox takes, so that nothing here is too long for the bus."""
MAX_JSON_BYTES = 1 << 26
MAX_FORM_BYTES = 1 << 27
MAX_TOGETHER_BYTES = 1 << 29
"""Of all bodies that are in hand at one time."""
BODY_TIMEOUT_S = 30.0
"""And a second more for each `SLOWEST_BYTES_PER_S` that have come."""
SLOWEST_BYTES_PER_S = 1 << 20


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
                    message = "too much is being sent at once: try again"
                    raise ApiError(429, message, code="full", retry_after_s=1.0)
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
        return msgspec.json.decode(body, type=dict[str, object])
    except msgspec.ValidationError as error:
        raise from_validation(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def check_length(fields: Mapping[str, object]) -> None:
    """Raise ApiError 413 when fields, their pictures apart, are too long for a message."""
    if len(msgspec.msgpack.encode(fields)) > MAX_TEXT_BYTES:
        longest = max(fields, key=lambda name: len(msgspec.msgpack.encode(fields[name])))
        message = f"what is no picture in the body is over {MAX_TEXT_BYTES} bytes"
        raise ApiError(413, message, code="too_long", param=longest)
