"""Bound request bodies in size and in time, each one and all together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager

from triptych.api.errors import ApiError

MAX_BUFFERED_BYTES = 1 << 29
"""Of all bodies that are read at one time."""
BODY_TIMEOUT_S = 30.0
"""And a second more for each `MIN_BYTES_PER_S` that have come."""
MIN_BYTES_PER_S = 1 << 20


class BodyLimiter:
    """Bound the bytes of all request bodies in memory."""

    def __init__(self, limit: int = MAX_BUFFERED_BYTES) -> None:
        self.limit = limit
        self.buffered = 0

    @asynccontextmanager
    async def stream_chunks(self, body: AsyncIterable[bytes], limit: int) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """Give the chunks of a body of at most `limit` bytes; it counts as held until the block is left.

        Raises ApiError 408 (too slow), 413 (too long), 429 (too much together), within the block.
        """
        received = 0
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def chunks() -> AsyncGenerator[bytes, None]:
            nonlocal received
            async for chunk in body:
                received += len(chunk)
                self.buffered += len(chunk)
                if received > limit:
                    raise ApiError(413, f"the body must be at most {limit} bytes", code="too_long")
                if self.buffered > self.limit:
                    raise ApiError(429, "too much is being sent at once: retry later", code="full")
                if received >= MIN_BYTES_PER_S:
                    timer.reschedule(began + BODY_TIMEOUT_S + received / MIN_BYTES_PER_S)
                yield chunk
            timer.reschedule(None)

        try:
            async with asyncio.timeout(BODY_TIMEOUT_S) as timer:
                yield chunks()
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time: retry, or send less", code="timeout") from None
        finally:
            self.buffered -= received
