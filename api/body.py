"""Request bodies: JSON, bounded in size and in time, decoded by msgspec."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request

from api.errors import ApiError, from_validation

MAX_BODY_BYTES = 1 << 19
"""Half of what a mailbox takes, so that no body that passes here is too long for the bus."""
BODY_TIMEOUT_S = 30.0


async def read_json(request: Request) -> dict[str, object]:
    """Read the body's JSON object.

    Raises ApiError 400 (malformed), 408 (too slow), 413 (too long), 415 (not JSON), 422 (JSON, but no object).
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "send JSON, with Content-Type: application/json", code="unsupported_media_type")
    body = await _read(request)
    try:
        return msgspec.json.decode(body, type=dict[str, object])
    except msgspec.ValidationError as error:
        raise from_validation(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


async def _read(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise ApiError(413, f"the body is over {MAX_BODY_BYTES} bytes", code="too_long")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s", code="timeout") from None
    return bytes(body)
