"""A pipeline as in diffusers that runs in a Triptych elsewhere. It needs httpx and Pillow; copy it.

pipeline = RemotePipeline("http://127.0.0.1:8000")
image = pipeline(prompt="a large red circle", num_inference_steps=4, seed=7).images[0]
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from PIL import Image

MOST_PREVIEWS = 3


class RemotePipelineError(Exception):
    """The server cannot be reached, or has refused or failed a request; the message is its own."""


@dataclass(frozen=True)
class RemotePipelineOutput:
    """What a call has made."""

    images: list[Image.Image]
    seeds: list[int]
    """With which each image is made again."""


class RemotePipeline:
    """Calls a model of a Triptych.

    Args:
        url: Where its API is.
        model: One of several models; "" for the first.
        api_key: By default that of the environment variable TRIPTYCH_API_KEY.
        timeout: Seconds without any news of a request after which it is given up.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        model: str = "",
        api_key: str = os.environ.get("TRIPTYCH_API_KEY", ""),
        timeout: float = 600.0,
    ) -> None:
        self.model = model
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)

    def __call__(
        self,
        prompt: str | None = None,
        *,
        image: Image.Image | list[Image.Image] | None = None,
        mask_image: Image.Image | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        generator: Any = None,
        callback_on_preview: Callable[[int, int, Image.Image], None] | None = None,
        **parameters: Any,
    ) -> RemotePipelineOutput:
        """Make images.

        Args:
            prompt: What to show.
            image: One or several images to start from.
            mask_image: The part of the image to repaint: white.
            num_images_per_prompt: How many, with consecutive seeds.
            seed: Of the first image; random by default.
            generator: A torch.Generator, for its seed, as diffusers has it.
            callback_on_preview: Called with the number of the image, the number of the preview (0 to 2), and the image
                as it is then, while it is made.
            parameters: Those of the model, as in diffusers: num_inference_steps, guidance_scale, height, width, ...

        Raises:
            RemotePipelineError: The request was refused, has failed, or the server cannot be reached.
        """
        if generator is not None:
            seed = generator.initial_seed()
        body = {"prompt": prompt, "n": num_images_per_prompt, "seed": seed, "stream": True, **parameters}
        body |= {"model": self.model or None, "image": _encoded(image), "mask": _encoded(mask_image)}
        body |= {"partial_images": MOST_PREVIEWS} if callback_on_preview else {}
        done: dict[int, dict[str, Any]] = {}
        try:
            for event in self._events({name: value for name, value in body.items() if value is not None}):
                if event["type"] == "error":
                    raise RemotePipelineError(event["error"]["message"])
                if event["type"].endswith(".completed"):
                    done[event["index"]] = event
                elif callback_on_preview is not None:
                    callback_on_preview(event["index"], event["partial_image_index"], _decoded(event["b64_json"]))
        except httpx.HTTPError as error:
            raise RemotePipelineError(f"{self._http.base_url}: {error or type(error).__name__}") from error
        events = [done[index] for index in sorted(done)]
        return RemotePipelineOutput([_decoded(each["b64_json"]) for each in events], [each["seed"] for each in events])

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield what the server sends of a request; leaving it cancels the request."""
        with self._http.stream("POST", "/v1/images/generations", json=body) as answer:
            if not answer.is_success:
                raise RemotePipelineError(json.loads(answer.read())["error"]["message"])
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))


def _encoded(images: Image.Image | list[Image.Image] | None) -> str | list[str] | None:
    if isinstance(images, list):
        return [_as_png(image) for image in images]
    return None if images is None else _as_png(images)


def _as_png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _decoded(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


if __name__ == "__main__":
    pipeline = RemotePipeline()
    made = pipeline(
        "a large red circle on the left of a blue background", callback_on_preview=lambda *news: print(news)
    )
    made.images[0].save("circle.png")
