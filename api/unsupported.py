"""What OpenAI's API has and this one does not: answered with what to do in its place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from triptych.api.errors import not_found

INSTEAD: Final = {
    "/v1/images/variations": "there are no variations: send the image to POST /v1/images/edits, with a strength",
    "/v1/videos/{video_id}/remix": "there is no remix: send the prompt anew to POST /v1/videos, with another seed",
}


def unsupported(sentence: str) -> Callable[[Request], Awaitable[Response]]:
    """Make the endpoint that answers 404 with a sentence."""

    async def answer(_: Request) -> Response:
        raise not_found(sentence, code="unsupported")

    return answer
