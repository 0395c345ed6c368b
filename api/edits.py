"""POST /v1/images/edits."""

from __future__ import annotations

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from triptych.api.images import generate_images, read_image_request


class ImageEdits(HTTPEndpoint):
    """Make images of an image, and wait for them."""

    async def post(self, request: Request) -> Response:
        """Do as `ImageGenerations`, but not without an image."""
        wanted, inputs, names = await read_image_request(request)
        if inputs.get("image") is None:
            raise names.invalid("image", "is required")
        return await generate_images(request, wanted, inputs, names)
