"""Steps of several requests in one call of the model: an image does not depend on who else was there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.system.conftest import BOUND_S
from triptych.api.launch import Cluster

ASKED: tuple[dict[str, Any], ...] = (
    {"prompt": "a large red circle", "steps": 5, "seed": 1},
    {"prompt": "a small green square", "steps": 8, "seed": 2},
    {"prompt": "a blue triangle on the left", "steps": 8, "seed": 3},
    {"prompt": "a blue triangle on the left", "steps": 12, "seed": 4},
)


async def largest_batch(cluster: Cluster) -> int:
    actors = {actor["name"]: actor for actor in (await cluster.status())["actors"]}
    return int(actors["batched-denoiser-0.stream"]["facts"]["largest_batch"])


@pytest.mark.shared_cluster("models")
def test_an_image_is_the_same_alone_and_in_batches_with_others(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        alone = [(await cluster.generate(**asked, model="batched")).data for asked in ASKED]
        assert await largest_batch(cluster) == 1
        async with asyncio.timeout(BOUND_S):
            while True:
                images = await asyncio.gather(*(cluster.generate(**asked, model="batched") for asked in ASKED))
                assert [image.data for image in images] == alone
                if await largest_batch(cluster) > 1:
                    return

    on_cluster(scenario)
