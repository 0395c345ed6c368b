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
from tests.system.conftest import FREE_PORTS, STAGES
from tests.system.reference import pixels_of_answer
from triptych.api.launch import launch
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
        entries.append(
            f'[[model.lora]]\nname = "{name.replace("_", ".")}"\npath = "{name}.safetensors"\nscale = {scale}'
        )
    path = folder / "topology.toml"
    path.write_text("\n".join([*entries, roles]) + "\n")
    return path


def stages(more: str = "") -> str:
    return "\n".join(f'[[roles]]\nkind = "{kind}"\nslots = 4\n{more}' for kind in STAGES)


@pytest.mark.parametrize("roles", ["stages", "monolithic"])
def test_concurrent_requests_with_adapters_and_without(
    roles: str, tmp_path: Path, models: Callable[[str], Path]
) -> None:
    model = models("flux")
    offloaded = '[[roles]]\nkind = "monolithic"\nslots = 4\noffload = "model"'
    path = write(tmp_path, model, stages() if roles == "stages" else offloaded, ink=0.6, clay_v2=1.0)

    async def through_processes() -> tuple[dict[str, Any], list[np.ndarray[Any, Any]]]:
        async with launch(path, FREE_PORTS) as cluster, httpx.AsyncClient(base_url=cluster.url, timeout=90) as http:
            await what_is_not_there_is_refused(http)
            bodies = [{"prompt": "a red ship", **asked} for asked in ASKED]
            posts = [http.post("/v1/images/generations", json=body) for body in bodies]
            return await cluster.status(), [pixels_of_answer(answer)[None] for answer in await asyncio.gather(*posts)]

    status, ours = asyncio.run(through_processes())
    assert [pool["name"] for pool in status["pools"]] == (["pool"] if roles == "stages" else [])
    pipeline = plain(model)
    for asked, made in zip(ASKED, ours, strict=True):
        if name := asked.get("lora"):
            file = tmp_path / f"{name.replace('.', '_')}.safetensors"
            pipeline.load_lora_weights(str(file), adapter_name="only")
            pipeline.set_adapters("only", asked.get("lora_scale", 0.6 if name == "ink" else 1.0))
        assert same(made, expected(pipeline, model, asked["seed"])), asked
        pipeline.unload_lora_weights()
    assert len({made.tobytes() for made in ours}) == len(ASKED)


async def what_is_not_there_is_refused(http: httpx.AsyncClient) -> None:
    for more, param, sentence in (
        ({"lora": "chalk"}, "lora", "lora must be one of clay.v2, ink: there is no adapter 'chalk'."),
        ({"lora": "ink", "lora_scale": 40}, "lora_scale", "lora_scale must be -4 to 4."),
    ):
        answer = await http.post("/v1/images/generations", json={"prompt": "x", **more})
        assert answer.status_code == 422
        error = answer.json()["error"]
        assert (error["param"], sentence in error["message"]) == (param, True)


@pytest.mark.long
def test_eight_bits_take_less_and_make_nearly_the_same(tmp_path: Path, models: Callable[[str], Path]) -> None:
    model = models("flux")
    path = write(tmp_path, model, stages('quantization = "int8"'))

    async def through_processes() -> np.ndarray[Any, Any]:
        async with launch(path, FREE_PORTS) as cluster, httpx.AsyncClient(base_url=cluster.url, timeout=90) as http:
            answer = await http.post("/v1/images/generations", json={"prompt": "a red ship", "seed": 1})
            return pixels_of_answer(answer)[None]

    ours = asyncio.run(through_processes())
    exact = expected(plain(model), model, 1)
    difference = np.abs(ours.astype(float) - exact.astype(float)).mean() / 255
    assert 0 < difference < 0.02
    assert load_serving_config(model).defaults["height"] == ours.shape[1]
