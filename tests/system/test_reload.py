"""A model whose files change while it is served."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from tests.system.conftest import FREE_PORTS, STAGES
from tests.system.reference import diffusers_reference
from triptych.api.launch import Cluster, launch
from triptych.engines.parameters.serving_config import load_serving_config

BOUND_S = 60.0


async def reload(cluster: Cluster) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "triptych.actors.command", "reload", str(cluster.topology.path)),
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


def test_a_changed_model_is_not_mixed_with_the_old_one_and_a_reload_takes_it(
    topology_of: Callable[..., Path], models: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(models("flux"), model)

    async def made(cluster: Cluster) -> np.ndarray:
        return np.asarray((await cluster.generate("a red circle", seed=3)).image())

    def expected() -> np.ndarray:
        return diffusers_reference("flux", model, "a red circle", 3, **load_serving_config(model).defaults)

    async def scenario() -> None:
        path = topology_of(model, roles={**dict.fromkeys(STAGES, 1), "denoiser": 2})
        async with launch(path, FREE_PORTS) as cluster:
            old = await made(cluster)
            assert np.array_equal(old, expected())
            change(model)
            os.kill(await cluster.pid_of("denoiser-1"), signal.SIGKILL)
            await refused(cluster, "denoiser-1")
            assert np.array_equal(await made(cluster), old)
            under_way = [asyncio.create_task(cluster.generate("a ship", seed=k, steps=8)) for k in range(6)]
            await reload(cluster)
            await asyncio.gather(*under_way)
            new = await made(cluster)
            assert not np.array_equal(new, old)
            assert np.array_equal(new, expected())
            children = await cluster.children()
            assert {name: children[f"{name}-0"].restarts for name in STAGES} == dict.fromkeys(STAGES, 1)

    asyncio.run(scenario())
