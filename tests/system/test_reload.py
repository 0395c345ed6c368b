"""A model whose files change while it is served."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.system.conftest import STAGES
from tests.system.reference import diffusers_reference
from triptych.api.launch import Cluster
from triptych.engines.parameters.serving_config import load_serving_config

BOUND_S = 60.0


async def reload(cluster: Cluster, model: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "triptych.actors.command", "reload", str(cluster.topology.path), model),
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(BOUND_S):
        _, said = await process.communicate()
    assert process.returncode == 0, said.decode()


async def refused(cluster: Cluster, name: str) -> list[str]:
    """Until the cluster says that it turns an instance away."""
    async with asyncio.timeout(BOUND_S):
        while True:
            reasons: list[str] = (await cluster.status())["reasons"]
            if any(reason.startswith(f"{name} has other weights") for reason in reasons):
                return reasons
            await asyncio.sleep(0.05)


def change(model: Path) -> None:
    """Give the text encoder and the transformer other weights."""
    for path in (model / "text_encoder_2" / "model.safetensors", *model.glob("transformer/*.safetensors")):
        tensors = {name: tensor.flip(0) for name, tensor in load_file(path).items()}
        path.unlink()  # whoever has mapped the old file keeps it
        save_file(tensors, path, {"format": "pt"})


@pytest.mark.shared_cluster("models")
def test_a_changed_model_is_not_mixed_with_the_old_one_and_a_reload_takes_it(on_cluster: Callable[..., Any]) -> None:
    name = "changed"

    async def made(cluster: Cluster) -> np.ndarray:
        return np.asarray((await cluster.generate("a red circle", model=name, seed=3)).image())

    def expected(model: Path) -> np.ndarray:
        return diffusers_reference("flux", model, "a red circle", 3, **load_serving_config(model).defaults)

    async def scenario(cluster: Cluster) -> None:
        model = next(model.path for model in cluster.topology.models if model.name == name)
        old = await made(cluster)
        assert np.array_equal(old, expected(model))
        before = await cluster.children()
        change(model)
        os.kill(await cluster.pid_of(f"{name}-denoiser-1"), signal.SIGKILL)
        await refused(cluster, f"{name}-denoiser-1")
        assert np.array_equal(await made(cluster), old)
        under_way = [asyncio.create_task(cluster.generate("a ship", model=name, seed=k, steps=8)) for k in range(6)]
        await reload(cluster, name)
        await asyncio.gather(*under_way)
        new = await made(cluster)
        assert not np.array_equal(new, old)
        assert np.array_equal(new, expected(model))
        after = await cluster.children()
        restarted = {child for child in after if after[child].restarts > before[child].restarts}
        assert restarted == {child for child in after if child.startswith(f"{name}-")}
        assert {after[f"{name}-{stage}-0"].restarts for stage in STAGES} == {1}

    on_cluster(scenario)
