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
from tests.system.reference import diffusers_reference
from tests.system.test_recovery import BOUND_S, back
from tests.system.test_text_to_image import FREE_PORTS, pixels
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


@pytest.mark.parametrize("engine", ["shm", "mooncake"])
def test_the_second_request_of_a_prompt_visits_no_encoder_and_its_image_is_identical(
    engine: str, topology_file: Callable[..., Path], models: Callable[[str], Path]
) -> None:
    async def scenario() -> tuple[np.ndarray, np.ndarray]:
        path = topology_file(transfer={"engine": engine, "trusted_network": True})
        async with launch(path, FREE_PORTS) as cluster:
            first, unit = await made(cluster, 11)
            assert not skipped(unit)
            second, unit = await made(cluster, 12, steps=3, size="48x32")
            assert skipped(unit)
            again, unit = await made(cluster, 11)
            assert skipped(unit)
            assert np.array_equal(first, again)
            other, unit = await made(cluster, 12, "a small green square")
            assert not skipped(unit)
            assert not np.array_equal(other, second)
            seen = await cache(cluster)
            assert (seen["entries"], seen["hits"], seen["misses"]) == (2, 2, 2)
            assert 0 < seen["nbytes"] <= seen["capacity"] == 4 << 20
            return first, second

    first, second = asyncio.run(scenario())
    model = models("flux")
    defaults = load_serving_config(model).defaults
    changed = defaults | {"num_inference_steps": 3, "height": 32, "width": 48}
    assert np.array_equal(first, diffusers_reference("flux", model, PROMPT, 11, **defaults))
    assert np.array_equal(second, diffusers_reference("flux", model, PROMPT, 12, **changed))


def test_a_classic_pipeline_is_encoded_once_for_all_seeds(
    models: Callable[[str], Path], topology_of: Callable[..., Path]
) -> None:
    model = models("pixart")

    async def scenario() -> np.ndarray:
        async with launch(topology_of(model), FREE_PORTS) as cluster:
            assert not skipped((await made(cluster, 11))[1])
            image, unit = await made(cluster, 12)
            assert skipped(unit)
            return image

    ours = asyncio.run(scenario())
    plain = DiffusionPipeline.from_pretrained(model)(
        PROMPT, generator=seeded_generator(12), **load_serving_config(model).defaults
    )
    assert np.array_equal(ours, np.asarray(plain.images[0]))


def test_what_is_asked_for_at_once_is_encoded_once(topology_file: Callable[..., Path]) -> None:
    async def scenario() -> None:
        path = topology_file(roles={"encoder": 2, "denoiser": 1, "decoder": 1})
        async with (
            launch(path, FREE_PORTS) as cluster,
            httpx.AsyncClient(base_url=cluster.url, timeout=60) as http,
        ):
            body = {"prompt": PROMPT, "n": 4, "seed": 5}
            answer = (await http.post("/v1/images/generations", json=body)).raise_for_status().json()
            units = (await cluster.request(answer["id"]))["units"]
            assert [skipped(unit) for unit in units] == [False, True, True, True]
            assert await stages_run(cluster, "encoder") == 1
            several = await asyncio.gather(*(made(cluster, seed, "another prompt") for seed in range(6)))
            assert [skipped(unit) for _, unit in several].count(False) == 1
            assert await stages_run(cluster, "encoder") == 2

    asyncio.run(scenario())


async def stages_run(cluster: Cluster, kind: str) -> int:
    actors = {actor["name"]: actor for actor in (await cluster.status())["actors"]}
    workers = [c.name for c in cluster.topology.components if c.kind == kind]
    return sum(actors[f"{name}.stream"]["facts"]["panels_run"] for name in workers)


def test_without_a_cache_every_request_is_encoded(topology_file: Callable[..., Path]) -> None:
    async def scenario() -> None:
        async with launch(topology_file(model={"prompt_cache": "0"}), FREE_PORTS) as cluster:
            first, unit = await made(cluster, 3)
            again, unit_again = await made(cluster, 3)
            assert not skipped(unit)
            assert not skipped(unit_again)
            assert np.array_equal(first, again)
            assert set((await cache(cluster)).values()) == {0}
            (pool,) = (await cluster.status())["pools"]
            assert pool["leased"] == 0

    asyncio.run(scenario())


def test_what_died_with_its_pool_is_encoded_anew_and_no_encoder_is_missed_for_the_rest(
    topology_file: Callable[..., Path],
) -> None:
    async def scenario() -> None:
        async with launch(topology_file(), FREE_PORTS) as cluster:
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

    asyncio.run(scenario())


async def only_the_cache_holds_blocks(cluster: Cluster) -> None:
    async with asyncio.timeout(BOUND_S):
        while True:
            seen = await cluster.status()
            (pool,) = seen["pools"]
            kept = seen["head"]["prompt_cache"]
            if kept["entries"] == 1 and pool["leased"] == kept["nbytes"]:
                return


def test_a_pool_that_is_full_of_what_is_kept_gives_way(topology_file: Callable[..., Path]) -> None:
    async def scenario() -> None:
        # Half of the pool is all that encoders may fill: when the cache has it, there is nothing left for them.
        sections = {"model": {"prompt_cache": "64KiB"}, "transfer": {"pool_size": "128KiB"}}
        async with launch(topology_file(**sections), FREE_PORTS) as cluster:
            for k in range(6):
                _, unit = await made(cluster, 3, f"prompt {k}")
                assert unit["attempts"] == 1
            kept = await cache(cluster)
            assert 1 <= kept["entries"] < 6 == kept["misses"]
            assert kept["nbytes"] <= kept["capacity"] == 64 << 10

    asyncio.run(scenario())
