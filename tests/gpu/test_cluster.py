"""Processes on a GPU: an encoder, two denoisers and a decoder against diffusers in one process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpu.requirements import BY_PROCESSES, require

require(*BY_PROCESSES)

from tests.engines.classic_models import request
from tests.engines.results import media, seeded_generator
from tests.engines.stage_pipelines import Models
from triptych.actors.supervision import NO_CUDA, PRELOAD
from triptych.api.launch import Cluster, launch

ROOT = Path(__file__).parents[2]
BOUND_S = 240.0  # torch and diffusers are imported anew by each process on a GPU
TOML = """
[model]
path = "{model}"
dtype = "float32"
prompt_cache = "0"
[state]
path = "state"
[transfer]
pool_size = "64MiB"
[[roles]]
kind = "encoder"
device = "{device}"
[[roles]]
kind = "denoiser"
count = 2
device = "{device}"
[[roles]]
kind = "decoder"
device = "{device}"
"""

FORK = """
import importlib, os, sys
from pathlib import Path
for module in sys.argv[1:]:
    importlib.import_module(module)
from triptych.actors.supervision.zygote import fork_problem
assert fork_problem() == "", fork_problem()
opened = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and "nvidia" in os.readlink(link)]
assert not opened, opened
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
import torch
from triptych.actors import Component, StartError
from triptych.roles.worker.devices import usable_device
role = Component(name="encoder-0", kind="encoder", address="", port=0)
assert usable_device(role) == torch.device("cpu")
assert torch.ones(3).sum() == 3
os._exit(0)
"""


def test_the_zygote_does_not_open_the_driver_and_forks_roles_on_the_cpu(device: torch.device) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, *PRELOAD],
        cwd=ROOT, env={**os.environ, **NO_CUDA}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


BAD_FORK = """
import os, sys, torch
assert torch.cuda.is_available()
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
from triptych.actors import Component, StartError
from triptych.roles.worker.devices import usable_device
try:
    usable_device(Component(name="encoder-0", kind="encoder", address="", port=0, device="cuda:0"))
except StartError as failure:
    os._exit(0 if "was forked" in str(failure) else 1)
os._exit(2)
"""


def test_a_fork_that_cannot_use_the_gpu_says_so(gpu: torch.device) -> None:
    done = subprocess.run([sys.executable, "-c", BAD_FORK], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def topology(tmp_path: Path, device: torch.device, models: Models) -> Path:
    path = tmp_path / "gpu.toml"
    path.write_text(TOML.format(model=models("flux"), device=device.type))
    return path


@pytest.mark.timeout(600)
def test_processes_on_a_gpu_make_the_image_of_one_process_and_survive_a_kill(
    topology: Path, device: torch.device, models: Models
) -> None:
    expected = plain(models("flux"), device, seed=7)

    async def scenario() -> None:
        async with launch(topology, {"api": {"port": 0}}, ready_timeout_s=BOUND_S) as cluster:
            first = await cluster.generate("a red ship", seed=7, steps=2)
            assert np.array_equal(pixels(first.data), expected)
            actors = {actor["name"]: actor for actor in (await cluster.status())["actors"]}
            gpus = max(torch.cuda.device_count(), 1)
            for index in (0, 1):
                wanted = "cpu" if device.type == "cpu" else f"cuda:{index % gpus}"
                assert actors[f"denoiser-{index}.stream"]["facts"]["device"] == wanted
            if device.type == "cuda":
                pins = {name: actor["facts"].get("pin_failure", "") for name, actor in actors.items()}
                assert set(pins.values()) == {""}, pins
                await only_roles_have_the_gpu(cluster)
            await killed_under_way(cluster, expected)

    asyncio.run(scenario())


def plain(model: Path, device: torch.device, seed: int) -> Any:
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(str(model), dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    asked = request(model, num_inference_steps=2)
    return media(pipeline(**asked, generator=seeded_generator(seed), output_type="pil"))[0]


def pixels(data: bytes) -> Any:
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


async def only_roles_have_the_gpu(cluster: Cluster) -> None:
    def has_gpu(pid: int) -> bool:
        return any("nvidia" in str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink())

    seen = {name: has_gpu(child.pid) for name, child in (await cluster.children()).items()}
    assert {name for name, has in seen.items() if has} == {"encoder-0", "denoiser-0", "denoiser-1", "decoder-0"}


async def killed_under_way(cluster: Cluster, expected: Any) -> None:
    children = await cluster.children()
    steps = 50  # the most that this model takes
    undisturbed = (await cluster.generate("a red ship", seed=7, steps=steps)).data
    asked = [asyncio.create_task(cluster.generate("a red ship", seed=7, steps=steps)) for _ in range(4)]
    async with asyncio.timeout(BOUND_S):
        while not (await cluster.status())["head"]["states"].get("DENOISING_RUNNING"):
            pass
    os.kill(children["denoiser-0"].pid, signal.SIGKILL)
    assert [(await one).data for one in asked] == [undisturbed] * 4
    async with asyncio.timeout(BOUND_S):
        while (await cluster.children())["denoiser-0"].generation == children["denoiser-0"].generation:
            pass
    await cluster.wait_ready(BOUND_S)
    again = await cluster.generate("a red ship", seed=7, steps=2)
    assert np.array_equal(pixels(again.data), expected)
