"""The node, over the HTTP API of a Triptych."""

from __future__ import annotations

import base64
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

TIMEOUT_S = 600.0
MOST_PREVIEWS = 3
PREVIEW_SIDE = 512


class TriptychGenerate:
    """Make images from a prompt, or from another image where the model takes one."""

    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    FUNCTION = "generate"
    CATEGORY = "image/triptych"
    DESCRIPTION = "Has a Triptych server make the images, and shows them while they are made."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:  # noqa: N802  ComfyUI asks for this name
        """Return the inputs of the node, as ComfyUI draws them."""
        return {
            "required": {
                "url": ("STRING", {"default": "http://127.0.0.1:8000"}),
                "prompt": ("STRING", {"multiline": True, "default": ""}),
                "width": ("INT", {"default": 0, "min": 0, "max": 16384, "step": 8, "tooltip": "0: the model's own"}),
                "height": ("INT", {"default": 0, "min": 0, "max": 16384, "step": 8, "tooltip": "0: the model's own"}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0: the model's own"}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 0xFFFFFFFF, "control_after_generate": True}),
                "count": ("INT", {"default": 1, "min": 1, "max": 10}),
            },
            "optional": {
                "image": ("IMAGE",),
                "negative_prompt": ("STRING", {"multiline": True, "default": ""}),
                "model": ("STRING", {"default": "", "tooltip": "one of several models; empty: the first"}),
                "parameters": ("STRING", {"default": "{}", "tooltip": 'as JSON, such as {"guidance_scale": 3.5}'}),
            },
        }

    def generate(
        self,
        url: str,
        prompt: str,
        width: int,
        height: int,
        steps: int,
        seed: int,
        count: int,
        image: torch.Tensor | None = None,
        negative_prompt: str = "",
        model: str = "",
        parameters: str = "{}",
    ) -> tuple[torch.Tensor]:
        """Return the images, (count, height, width, 3), float32 from 0 to 1.

        Raises:
            ValueError: `parameters` is not a JSON object.
            RuntimeError: The request was refused, has failed, or the server cannot be reached.
        """
        more = json.loads(parameters)
        if not isinstance(more, dict):
            raise ValueError('parameters is not a JSON object, such as {"guidance_scale": 3.5}')  # noqa: TRY004  ComfyUI shows the sentence
        body = {
            **more,
            "prompt": prompt,
            "width": width or None,
            "height": height or None,
            "num_inference_steps": steps or None,
            "seed": seed,
            "n": count,
            "image": None if image is None else [to_base64(each) for each in image],
            "negative_prompt": negative_prompt or None,
            "model": model or None,
            "stream": True,
            "partial_images": MOST_PREVIEWS,
        }
        show = progress_of(count * (MOST_PREVIEWS + 1))
        done: dict[int, torch.Tensor] = {}
        for event in events(url, {name: value for name, value in body.items() if value is not None}):
            if event["type"] == "error":
                raise RuntimeError(event["error"]["message"])
            found = Image.open(io.BytesIO(base64.b64decode(event["b64_json"]))).convert("RGB")
            if event["type"].endswith(".completed"):
                done[event["index"]] = to_tensor(found)
            show(found)
        return (torch.stack([done[index] for index in sorted(done)]),)


def events(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the server-sent events of a request for images; leaving it cancels the request."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("TRIPTYCH_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    if not url.startswith(("http://", "https://")):
        raise RuntimeError(f"{url!r} is no URL of a server: write it as in http://127.0.0.1:8000")
    address = f"{url.rstrip('/')}/v1/images/generations"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)  # noqa: S310  http or https
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            for line in answer:
                stop_if_interrupted()
                if line.startswith(b"data:"):
                    yield json.loads(line.removeprefix(b"data:"))
    except urllib.error.HTTPError as error:
        raise RuntimeError(json.loads(error.read())["error"]["message"]) from error
    except OSError as error:
        raise RuntimeError(f"{url}: {error}: is `triptych up` running?") from error


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Return an RGB image as ComfyUI has it: (height, width, 3), float32 from 0 to 1."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)


def to_base64(image: torch.Tensor) -> str:
    """Return an image of ComfyUI as a PNG in base64."""
    pixels = (image.cpu().numpy() * 255.0).round().clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def progress_of(total: int) -> Callable[[Image.Image], None]:
    """Return what shows an image on the node, and how far it is; nothing outside of ComfyUI."""
    try:
        from comfy.utils import ProgressBar
    except ImportError:  # such as in a test
        return lambda _: None
    bar, shown = ProgressBar(total), 0

    def show(image: Image.Image) -> None:
        nonlocal shown
        shown = min(shown + 1, total)
        bar.update_absolute(shown, total, ("JPEG", image, PREVIEW_SIDE))

    return show


def stop_if_interrupted() -> None:
    """Raise what ComfyUI raises when its user has pressed Cancel."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted
    except ImportError:  # not in ComfyUI
        return
    throw_exception_if_processing_interrupted()
