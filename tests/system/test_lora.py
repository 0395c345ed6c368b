"""Requests with different adapters at the same time, through real processes: each image is that of its adapter."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.engines.results import same
from tests.engines.stage_pipelines import expected, plain
from tests.system.conftest import FREE_PORTS, MODELS, STAGES
from tests.system.reference import pixels_of_answer
from triptych.api.launch import Cluster, launch
from triptych.engines.parameters.serving_config import load_serving_config
from triptych.tools.make_lora import make_lora

ASKED: list[dict[str, Any]] = [
    {"lora": "ink", "seed": 1},
    {"seed": 1},
    {"lora": "clay.v2", "seed": 1},
    {"lora": "ink", "lora_scale": 2, "seed": 1},
    {"lora": "", "seed": 2},
    {"lora": "clay.v2", "seed": 2},
]


def write(folder: Path, model: Path, roles: str, **loras: float) -> Path:
    entries = [f'[model]\npath = "{model}"\ndtype = "float32"\n[state]\npath = "{folder / "state"}"']
    entries.append('[transfer]\npool_size = "16MiB"')
    for number, (name, scale) in enumerate(loras.items()):
        make_lora(model, folder / f"{name}.safetensors", seed=number)
        entries.append(f'[[model.lora]]\nname = "{name}"\npath = "{name}.safetensors"\nscale = {scale}')
    path = folder / "topology.toml"
    path.write_text("\n".join([*entries, roles]) + "\n")
    return path


@pytest.mark.shared_cluster("models")
def test_concurrent_requests_with_adapters_and_without(
    on_cluster: Callable[..., Any], models: Callable[[str], Path]
) -> None:
    async def scenario(cluster: Cluster) -> tuple[Path, list[np.ndarray[Any, Any]]]:
        section = next(model.section for model in cluster.topology.models if model.name == "adapters")
        return Path(section.lora[0].path).parent, await made(cluster, model="adapters")

    compare(models("flux"), *on_cluster(scenario))


def test_one_offloaded_process_serves_adapters_and_there_is_no_pool(
    tmp_path: Path, models: Callable[[str], Path]
) -> None:
    model = models("flux")
    offloaded = '[[roles]]\nkind = "monolithic"\nslots = 4\noffload = "model"'
    loras = MODELS["adapters"].loras
    path = write(tmp_path, model, offloaded, **loras)

    async def scenario() -> list[np.ndarray[Any, Any]]:
        async with launch(path, FREE_PORTS) as cluster:
            assert (await cluster.status())["pools"] == []
            return await made(cluster)

    compare(model, tmp_path, asyncio.run(scenario()))


async def made(cluster: Cluster, **model: str) -> list[np.ndarray[Any, Any]]:
    """The image of each of `ASKED`, made at the same time."""
    async with httpx.AsyncClient(base_url=cluster.url, timeout=90) as http:
        await what_is_not_there_is_refused(http, **model)
        bodies = [{"prompt": "a red ship", **model, **asked} for asked in ASKED]
        answers = await asyncio.gather(*(http.post("/v1/images/generations", json=body) for body in bodies))
        return [pixels_of_answer(answer)[None] for answer in answers]


def compare(model: Path, folder: Path, ours: list[np.ndarray[Any, Any]]) -> None:
    """Compare images with those that diffusers makes with the adapters of that folder."""
    pipeline = plain(model)
    for asked, image in zip(ASKED, ours, strict=True):
        if name := asked.get("lora"):
            pipeline.load_lora_weights(str(folder / f"{name}.safetensors"), adapter_name="only")
            pipeline.set_adapters("only", asked.get("lora_scale", MODELS["adapters"].loras[name]))
        assert same(image, expected(pipeline, model, asked["seed"])), asked
        pipeline.unload_lora_weights()
    assert len({image.tobytes() for image in ours}) == len(ASKED)


async def what_is_not_there_is_refused(http: httpx.AsyncClient, **model: str) -> None:
    for more, param, sentence in (
        ({"lora": "chalk"}, "lora", "lora must be one of clay.v2, ink: there is no adapter 'chalk'."),
        ({"lora": "ink", "lora_scale": 40}, "lora_scale", "lora_scale must be -4 to 4."),
    ):
        answer = await http.post("/v1/images/generations", json={"prompt": "x", **model, **more})
        assert answer.status_code == 422
        error = answer.json()["error"]
        assert (error["param"], sentence in error["message"]) == (param, True)


@pytest.mark.long
def test_eight_bits_take_less_and_make_nearly_the_same(tmp_path: Path, models: Callable[[str], Path]) -> None:
    model = models("flux")
    path = write(tmp_path, model, "\n".join(f'[[roles]]\nkind = "{kind}"\nquantization = "int8"' for kind in STAGES))

    async def through_processes() -> np.ndarray[Any, Any]:
        async with launch(path, FREE_PORTS) as cluster, httpx.AsyncClient(base_url=cluster.url, timeout=90) as http:
            answer = await http.post("/v1/images/generations", json={"prompt": "a red ship", "seed": 1})
            return pixels_of_answer(answer)[None]

    ours = asyncio.run(through_processes())
    exact = expected(plain(model), model, 1)
    difference = np.abs(ours.astype(float) - exact.astype(float)).mean() / 255
    assert 0 < difference < 0.02
    assert load_serving_config(model).defaults["height"] == ours.shape[1]
