"""POST /v1/images/edits."""

from __future__ import annotations

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from triptych.api.generations import make, read


class Edits(HTTPEndpoint):
    """Make pictures of a picture, and wait for them."""

    async def post(self, request: Request) -> Response:
        """Do as `Generations`, but not without a picture."""
        wanted, inputs, names = await read(request)
        if inputs.get("image") is None:
            raise names.invalid("image", "is required")
        return await make(request, wanted, inputs, names)
