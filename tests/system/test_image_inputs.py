"""Images that come in over HTTP make what the plain pipeline makes of them, pixel by pixel."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from PIL import Image

from tests.system.reference import pixels, pixels_of_answer
from triptych.api.launch import Cluster
from triptych.engines.parameters.serving_config import load_serving_config
from triptych.tools.families.cases import PROMPT, input_image, mask
from triptych.tools.families.compare import SEED, run_reference


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def plain(pipeline: str, model: Path, **inputs: Any) -> dict[str, Any]:
    """What diffusers alone makes of the same request."""
    return run_reference(pipeline, model, {"prompt": PROMPT, **load_serving_config(model).defaults, **inputs})


@pytest.mark.shared_cluster("models")
def test_image_to_image_in_json_and_in_a_form(
    on_cluster: Callable[..., Any], models: Callable[[str], Path], tmp_path: Path
) -> None:
    name = "image-to-image"
    file = tmp_path / "start.png"
    file.write_bytes(png(input_image()))
    text = base64.b64encode(png(input_image())).decode()
    body = {"model": name, "prompt": PROMPT, "seed": SEED, "strength": 0.7}

    async def through_processes(cluster: Cluster) -> list[np.ndarray]:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
            made = [
                await http.post("/v1/images/generations", json={**body, "image": f"data:image/png;base64,{text}"}),
                await http.post("/v1/images/edits", data=body, files={"image": png(input_image())}),
            ]
            form = {"model": name, "seed": SEED, "strength": 0.7}
            varied = await http.post("/v1/images/variations", data=form, files={"image": png(input_image())})
            ours = await cluster.generate(PROMPT, model=name, seed=SEED, strength=0.7, image=file)
            view = await cluster.request(ours.request_id)
            assert [shown["bytes"] for shown in view["inputs"]["image"]] == [len(png(input_image()))]
            assert "encoder" not in view["units"][0]["instances"], "it was encoded once"
            await an_image_that_is_gone_fails_at_once(
                http, cluster.topology.state_dir / "uploads", body | {"image": text}
            )
            return [*(pixels_of_answer(answer) for answer in (varied, *made)), pixels(ours)]

    varied, *made = on_cluster(through_processes)
    for prompt, images in (("", [varied]), (PROMPT, made)):
        inputs = {"prompt": prompt, "image": input_image(), "strength": 0.7}
        expected = plain("FluxModularPipeline", models("flux-kl"), **inputs)["images"][0]
        for ours in images:
            assert np.array_equal(ours, np.asarray(expected))


async def an_image_that_is_gone_fails_at_once(http: httpx.AsyncClient, uploads: Path, body: dict[str, Any]) -> None:
    """A file that is lost after the request was accepted fails it once, with a sentence, and is not retried."""
    kept = uploads / f"{hashlib.sha256(png(input_image())).hexdigest()}.png"
    assert kept.exists()
    slow = {**body, "n": 10, "num_inference_steps": 50, "strength": 1.0}
    waiting = asyncio.create_task(http.post("/v1/images/generations", json=slow))
    while not (await http.get("/v1/cluster")).json()["head"]["states"]:
        assert not waiting.done()
    kept.unlink()
    answer = await waiting
    assert answer.status_code == 422
    assert "send the image again" in answer.json()["error"]["message"]
    view = (await http.get(f"/v1/requests/{answer.headers['x-request-id']}")).json()
    assert {unit["attempts"] for unit in view["units"] if unit["state"] == "FAILED"} == {1}


@pytest.mark.shared_cluster("models")
def test_inpainting_with_a_mask_of_either_kind(on_cluster: Callable[..., Any], models: Callable[[str], Path]) -> None:
    clear = Image.merge("RGBA", (*input_image().split(), Image.eval(mask(), lambda value: 255 - value)))
    body = {"model": "inpainting", "prompt": PROMPT, "seed": str(SEED), "strength": "0.7"}

    async def through_processes(cluster: Cluster) -> list[np.ndarray]:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
            files = {"image": png(input_image())}
            return [
                pixels_of_answer(await http.post("/v1/images/edits", data=body, files={**files, "mask": png(kind)}))
                for kind in (mask(), clear)
            ]

    made = on_cluster(through_processes)
    inputs = {"image": input_image(), "mask_image": mask(), "strength": 0.7}
    expected = plain("StableDiffusionXLModularPipeline", models("sdxl"), **inputs)["images"][0]
    for ours in made:
        assert np.array_equal(ours, np.asarray(expected))


@pytest.mark.shared_cluster("models")
def test_a_video_from_its_first_frame_is_a_job(on_cluster: Callable[..., Any], models: Callable[[str], Path]) -> None:
    name = "image-to-video"

    async def through_processes(cluster: Cluster) -> tuple[httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
            form = {"model": name, "prompt": PROMPT, "seed": str(SEED), "num_frames": "5"}
            job = (await http.post("/v1/videos", data=form, files={"input_reference": png(input_image())})).json()
            assert (job["object"], job["error"]) == ("video", None)
            async with asyncio.timeout(60):
                while job["status"] in ("queued", "in_progress"):
                    job = (await http.get(f"/v1/videos/{job['id']}")).json()
            assert (job["status"], job["progress"]) == ("completed", 100)
            frames = {"output_format": "zip", "image": base64.b64encode(png(input_image())).decode()}
            body = {"model": name, "prompt": PROMPT, "seed": SEED, "num_frames": 5, **frames}
            return (
                await http.get(f"/v1/videos/{job['id']}/content"),
                await http.post("/v1/images/generations", json=body),
            )

    content, answer = on_cluster(through_processes)
    assert (content.status_code, content.headers["content-type"]) == (200, "video/mp4")
    with av.open(io.BytesIO(content.content)) as film:
        assert len(list(film.decode(video=0))) == 5
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))) as file:
        frames = [np.asarray(Image.open(io.BytesIO(file.read(name)))) for name in sorted(file.namelist())]
    expected = plain("WanImage2VideoModularPipeline", models("wan-i2v"), image=input_image(), num_frames=5)["videos"][0]
    assert np.array_equal(np.asarray(frames), np.rint(np.asarray(expected) * 255).astype(np.uint8))
