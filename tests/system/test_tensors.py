"""Tensors over HTTP: latents that one request makes are what another begins with, and embeddings stand for a prompt."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline
from safetensors.torch import load, save

from tests.system.reference import pixels_of_answer
from triptych.api.launch import Cluster

GENERATIONS = "/v1/images/generations"


@pytest.mark.shared_cluster("models")
def test_tensors_in_and_out(models: Callable[[str], Path], on_cluster: Callable[..., Any]) -> None:
    model = models("pixart")
    pipeline: Any = PixArtAlphaPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    shape = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0}
    more = {"use_resolution_binning": False, "clean_caption": False}
    names = ("prompt_embeds", "prompt_attention_mask")
    embeds = dict(zip(names, pipeline.encode_prompt("a cat", do_classifier_free_guidance=False)[:2], strict=True))
    first = pipeline("a ship", **shape, **more, generator=torch.Generator().manual_seed(7), output_type="latent").images
    given = {**embeds, "latents": first}
    second = pipeline(**shape, **more, **given, negative_prompt=None, generator=torch.Generator().manual_seed(8)).images

    async def scenario(cluster: Cluster) -> tuple[torch.Tensor, np.ndarray]:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
            body = {**shape, **more, "model": "pixart", "prompt": "a ship", "seed": 7, "output_type": "latent"}
            answer = await http.post(GENERATIONS, json=body)
            assert answer.status_code == 200, answer.text
            latents = load(base64.b64decode(answer.json()["data"][0]["b64_json"]))["latents"]
            file = save({**embeds, "latents": latents})
            form = {name: str(value) for name, value in {**shape, **more, "model": "pixart", "seed": 8}.items()}
            made = await http.post(GENERATIONS, data=form, files={"tensors": file})
            hint = await http.post(GENERATIONS, data=form, files={"tensors": save({"hint": first})})
            assert hint.status_code == 422, hint.text
            assert hint.json()["error"]["param"] == "tensors"
            assert "has hint, which the pipeline does not take" in hint.json()["error"]["message"]
            listed = (await http.get("/v1/models/pixart")).json()["parameters"]
            (tensors,) = [each for each in listed if each["name"] == "tensors"]
            assert {"latents", *names} <= set(tensors["choices"])
            return latents, pixels_of_answer(made)

    latents, made = on_cluster(scenario)
    assert torch.equal(latents, first)
    assert np.array_equal(made, np.asarray(second[0]))
