"""Partial images of a request come while it is made, and change nothing about it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.system.conftest import BOUND_S
from tests.system.reference import pixels
from triptych.actors.command._console import stderr
from triptych.actors.command.generate import PreviewFeed, Show
from triptych.api.launch import Cluster

STEPS = 4000
"""Enough that a first preview, after a quarter of them, is there long before the image."""


async def until(http: httpx.AsyncClient, request_id: str, look: Callable[[dict[str, Any]], Any]) -> Any:
    """What `look` finds in the request, once it finds something."""
    async with asyncio.timeout(BOUND_S):
        while True:
            if found := look((await http.get(f"/v1/requests/{request_id}")).raise_for_status().json()):
                return found
            await asyncio.sleep(0.05)


def save_as_the_command_does(url: str, request_id: str, out: Path) -> None:
    with httpx.Client(base_url=url, timeout=BOUND_S) as http:
        feed = PreviewFeed(http, out, Show(stderr(), save=True, sheet=None))
        for _ in range(2):  # each is saved once
            feed.take_new(http.get(f"/v1/requests/{request_id}").json())


@pytest.mark.shared_cluster("killed")
def test_partial_images_are_listed_and_sent_while_the_request_runs(
    on_cluster: Callable[..., Any], tmp_path: Path
) -> None:
    async def scenario(cluster: Cluster) -> None:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=BOUND_S) as http:
            body = {"prompt": "x", "seed": 3, "num_inference_steps": STEPS, "partial_images": 3}
            answer = await http.post("/v1/images/generations", json=body, headers={"Prefer": "respond-async"})
            id_ = answer.raise_for_status().json()["id"]
            preview, *_ = await until(http, id_, lambda request: request["units"][0]["previews"])
            assert (preview["step"], preview["artifact"]["name"]) == (STEPS // 4, f"{id_}_0.{STEPS // 4}.png")
            file = await http.get(preview["artifact"]["url"])
            assert file.headers["content-type"] == "image/png"
            assert Image.open(io.BytesIO(file.content)).size == (64, 64)
            await asyncio.to_thread(save_as_the_command_does, cluster.url, id_, tmp_path / "x.png")
            assert (tmp_path / f"x.step-{STEPS // 4}.png").read_bytes() == file.content
            await http.delete(f"/v1/requests/{id_}")
            await until(http, id_, lambda request: request["terminal"])
            assert (await http.delete(f"/v1/requests/{id_}")).json()["deleted"]
            assert (await http.get(preview["artifact"]["url"])).status_code == 404, "it went with its request"

    on_cluster(scenario)


@pytest.mark.shared_cluster("killed")
def test_an_image_with_previews_is_the_image_without(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        plain = await cluster.generate("a red circle", seed=4, steps=20)
        previewed = await cluster.generate("a red circle", seed=4, steps=20, partial_images=3)
        assert np.array_equal(pixels(plain), pixels(previewed))

    on_cluster(scenario)
