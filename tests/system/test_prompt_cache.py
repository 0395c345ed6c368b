"""The second request of a prompt visits no encoder, and its image is the one that it would have been."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from diffusers import DiffusionPipeline

from tests.engines.results import seeded_generator
from tests.system.conftest import BOUND_S, FREE_PORTS, back
from tests.system.reference import diffusers_reference, pixels
from triptych.api.client import ClientError
from triptych.api.launch import Cluster, launch
from triptych.engines.parameters.serving_config import load_serving_config

PROMPT = "a large red circle on the left of a blue background"
NO_ENCODER = ["ENCODER_WAITING", "ENCODER_DONE", "DENOISING_WAITING", "DENOISING_RUNNING"]


async def made(cluster: Cluster, seed: int, prompt: str = PROMPT, **inputs: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """An image, and how it came about."""
    image = await cluster.generate(prompt, seed=seed, **inputs)
    (unit,) = (await cluster.request(image.request_id))["units"]
    return pixels(image), unit


def skipped(unit: dict[str, Any]) -> bool:
    """Whether no encoder had to do with it, by all that is said of it."""
    moves = [move["state"] for move in unit["history"]]
    said = {
        "encoder" not in unit["instances"],
        "encoder" not in unit["stage_seconds"],
        moves[:4] == NO_ENCODER,
        any(move["reason"] == "prompt cache" for move in unit["history"]),
    }
    assert len(said) == 1, unit
    return said == {True}


async def cache(cluster: Cluster) -> dict[str, Any]:
    return dict((await cluster.status())["head"]["prompt_cache"])


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("shm", marks=pytest.mark.shared_cluster("flux")),
        pytest.param("mooncake", marks=pytest.mark.shared_cluster("mooncake")),
    ],
)
def test_the_second_request_of_a_prompt_visits_no_encoder_and_its_image_is_identical(
    engine: str, on_cluster: Callable[..., Any], models: Callable[[str], Path]
) -> None:
    prompt = f"a large blue triangle, {engine}"

    async def scenario(cluster: Cluster) -> tuple[np.ndarray, np.ndarray]:
        before = await cache(cluster)
        first, unit = await made(cluster, 11, prompt)
        assert not skipped(unit)
        second, unit = await made(cluster, 12, prompt, steps=3, size="48x32")
        assert skipped(unit)
        again, unit = await made(cluster, 11, prompt)
        assert skipped(unit)
        assert np.array_equal(first, again)
        other, unit = await made(cluster, 12, f"a small green square, {engine}")
        assert not skipped(unit)
        assert not np.array_equal(other, second)
        seen = await cache(cluster)
        assert [seen[name] - before[name] for name in ("entries", "hits", "misses")] == [2, 2, 2]
        assert 0 < seen["nbytes"] <= seen["capacity"] == 4 << 20
        return first, second

    first, second = on_cluster(scenario)
    model = models("flux")
    defaults = load_serving_config(model).defaults
    changed = defaults | {"num_inference_steps": 3, "height": 32, "width": 48}
    assert np.array_equal(first, diffusers_reference("flux", model, prompt, 11, **defaults))
    assert np.array_equal(second, diffusers_reference("flux", model, prompt, 12, **changed))


@pytest.mark.shared_cluster("models")
def test_a_classic_pipeline_is_encoded_once_for_all_seeds(
    models: Callable[[str], Path], on_cluster: Callable[..., Any]
) -> None:
    async def scenario(cluster: Cluster) -> np.ndarray:
        assert not skipped((await made(cluster, 11, model="pixart"))[1])
        image, unit = await made(cluster, 12, model="pixart")
        assert skipped(unit)
        return image

    ours = on_cluster(scenario)
    model = models("pixart")
    plain = DiffusionPipeline.from_pretrained(model)(
        PROMPT, generator=seeded_generator(12), **load_serving_config(model).defaults
    )
    assert np.array_equal(ours, np.asarray(plain.images[0]))


@pytest.mark.shared_cluster("flux")
def test_equal_prompts_at_the_same_time_are_encoded_once(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
            before = await stages_run(cluster, "encoder")
            body = {"prompt": "four at once", "n": 4, "seed": 5}
            answer = (await http.post("/v1/images/generations", json=body)).raise_for_status().json()
            units = (await cluster.request(answer["id"]))["units"]
            assert [skipped(unit) for unit in units] == [False, True, True, True]
            assert await stages_run(cluster, "encoder") == before + 1
            several = await asyncio.gather(*(made(cluster, seed, "six at once") for seed in range(6)))
            assert [skipped(unit) for _, unit in several].count(False) == 1
            assert await stages_run(cluster, "encoder") == before + 2

    on_cluster(scenario)


async def stages_run(cluster: Cluster, kind: str) -> int:
    actors = {actor["name"]: actor for actor in (await cluster.status())["actors"]}
    workers = [c.name for c in cluster.topology.components if c.kind == kind]
    return sum(actors[f"{name}.stream"]["facts"]["stages_run"] for name in workers)


async def every_request_is_encoded(cluster: Cluster) -> None:
    """What holds without a cache."""
    first, unit = await made(cluster, 3)
    again, unit_again = await made(cluster, 3)
    assert not skipped(unit)
    assert not skipped(unit_again)
    assert np.array_equal(first, again)
    assert set((await cache(cluster)).values()) == {0}
    (pool,) = (await cluster.status())["pools"]
    assert pool["leased"] == 0


@pytest.mark.shared_cluster("killed")
def test_outputs_lost_with_their_pool_are_encoded_again_and_cached_ones_need_no_encoder(
    on_cluster: Callable[..., Any],
) -> None:
    async def scenario(cluster: Cluster) -> None:
        first, _ = await made(cluster, 3)
        pool = (await cluster.children())["pool"]
        os.kill(pool.pid, signal.SIGKILL)
        await back(cluster, "pool", after_generation=pool.generation)
        await cluster.wait_ready(BOUND_S)
        again, unit = await made(cluster, 3)
        assert not skipped(unit)
        assert np.array_equal(first, again)

        head = (await cluster.children())["head"]
        os.kill(head.pid, signal.SIGKILL)
        await back(cluster, "head", after_generation=head.generation)
        await cluster.wait_ready(BOUND_S)
        await made(cluster, 3)
        await only_the_cache_holds_blocks(cluster)

        encoder = (await cluster.children())["encoder-0"]
        os.kill(encoder.pid, signal.SIGSTOP)
        try:
            again, unit = await made(cluster, 3)
            assert skipped(unit)
            assert np.array_equal(first, again)
        finally:
            os.kill(encoder.pid, signal.SIGCONT)

    on_cluster(scenario)


async def only_the_cache_holds_blocks(cluster: Cluster) -> None:
    async with asyncio.timeout(BOUND_S):
        while True:
            seen = await cluster.status()
            (pool,) = seen["pools"]
            kept = seen["head"]["prompt_cache"]
            if kept["entries"] == 1 and pool["leased"] == kept["nbytes"]:
                return


def test_a_small_pool_serves_many_by_waiting_and_by_keeping_less_and_refuses_what_never_fits(
    topology_file: Callable[..., Path],
) -> None:
    async def scenario() -> None:
        # Half of the pool is all that encoders may fill: when the cache has it, there is nothing left for them.
        sections = {"model": {"prompt_cache": "32KiB"}, "transfer": {"pool_size": "64KiB"}}
        async with launch(topology_file(**sections), FREE_PORTS) as cluster:
            for k in range(6):
                _, unit = await made(cluster, 3, f"prompt {k}")
                assert unit["attempts"] == 1
            kept = await cache(cluster)
            assert 1 <= kept["entries"] < 6 == kept["misses"]
            assert kept["nbytes"] <= kept["capacity"] == 32 << 10

            images = await asyncio.gather(*(cluster.generate(PROMPT, seed=k % 3) for k in range(12)))
            assert len({image.data for image in images}) == 3

            with pytest.raises(ClientError, match=r"pool gives at most 32768: raise \[transfer\] pool_size"):
                await cluster.generate(PROMPT, size="256x256")

    asyncio.run(scenario())
