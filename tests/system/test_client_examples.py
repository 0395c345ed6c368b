"""The clients in examples/, against a running system."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.system.conftest import BOUND_S, ROOT
from tests.system.reference import pixels
from triptych.api.launch import Cluster

EXAMPLES = ROOT / "examples"
CLIENTS = EXAMPLES / "clients"
PROMPT = 'a "red" circle'


def load_module(path: Path, name: str) -> ModuleType:
    """Import a file or a package of examples/ as whoever has copied it: by its path."""
    file = path / "__init__.py" if path.is_dir() else path
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(path)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


async def run(command: tuple[str | Path, ...], cluster: Cluster) -> None:
    environment = {**os.environ, "TRIPTYCH_URL": cluster.url, "TRIPTYCH_API_KEY": ""}
    await asyncio.to_thread(
        subprocess.run, command, env=environment, check=True, timeout=BOUND_S, stdout=subprocess.DEVNULL
    )


async def wanted(cluster: Cluster) -> np.ndarray:
    return np.asarray(pixels(await cluster.generate(PROMPT, seed=7)))


@pytest.mark.shared_cluster("flux")
def test_openai_s_client(on_cluster: Callable[..., Any], tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        file = tmp_path / "x.png"
        await run((sys.executable, CLIENTS / "generate.py", PROMPT, file), cluster)
        assert np.array_equal(np.asarray(Image.open(file).convert("RGB")), await wanted(cluster))

    on_cluster(scenario)


@pytest.mark.clients
@pytest.mark.shared_cluster("flux")
@pytest.mark.parametrize("program", ["sh", "node", "go"])
def test_a_client_of_each_language(program: str, on_cluster: Callable[..., Any], tmp_path: Path) -> None:
    ending = {"sh": "sh", "node": "mjs", "go": "go"}[program]
    found = shutil.which(program)
    assert found, "run make test-clients, which installs it"
    begin = (found, "run") if program == "go" else (found,)

    async def scenario(cluster: Cluster) -> None:
        file = tmp_path / "x.png"
        await run((*begin, CLIENTS / f"generate.{ending}", PROMPT, file), cluster)
        assert np.array_equal(np.asarray(Image.open(file).convert("RGB")), await wanted(cluster))

    on_cluster(scenario)


@pytest.mark.shared_cluster("flux")
def test_a_remote_pipeline_is_called_as_one_of_diffusers(on_cluster: Callable[..., Any]) -> None:
    example = load_module(EXAMPLES / "remote_pipeline.py", "remote_pipeline")

    async def scenario(cluster: Cluster) -> None:
        pipeline = example.RemotePipeline(cluster.url, api_key="")
        previews: list[tuple[int, int, tuple[int, int]]] = []

        def seen(index: int, number: int, image: Image.Image) -> None:
            previews.append((index, number, image.size))

        made = await asyncio.to_thread(
            pipeline,
            PROMPT,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(7),
            num_images_per_prompt=2,
            callback_on_preview=seen,
        )
        assert made.seeds == [7, 8]
        for image, seed in zip(made.images, made.seeds, strict=True):
            same = await cluster.generate(PROMPT, seed=seed, steps=4)
            assert np.array_equal(np.asarray(image.convert("RGB")), pixels(same))
        assert all(size == made.images[0].size for _, _, size in previews)
        with pytest.raises(example.RemotePipelineError, match="num_inference_steps must be"):
            await asyncio.to_thread(pipeline, PROMPT, num_inference_steps=-1)

    on_cluster(scenario)


@pytest.mark.shared_cluster("flux")
def test_the_node_of_comfyui_is_as_comfyui_wants_it_and_makes_images(on_cluster: Callable[..., Any]) -> None:
    package = load_module(EXAMPLES / "comfyui_triptych", "comfyui_triptych")
    (name,) = package.NODE_CLASS_MAPPINGS
    assert package.NODE_DISPLAY_NAME_MAPPINGS.keys() == {name}
    node = package.NODE_CLASS_MAPPINGS[name]
    inputs = node.INPUT_TYPES()
    assert inputs.keys() <= {"required", "optional", "hidden"}
    for kind, *options in (entry for group in inputs.values() for entry in group.values()):
        assert kind in {"STRING", "INT", "FLOAT", "BOOLEAN", "IMAGE"}
        assert all(isinstance(option, dict) for option in options)
    # As ComfyUI calls it: widgets by their defaults, by name, on a new instance.
    defaults = {key: entry[1]["default"] for key, entry in inputs["required"].items()}

    async def scenario(cluster: Cluster) -> None:
        call = getattr(node(), node.FUNCTION)
        given = {**defaults, "url": cluster.url, "prompt": PROMPT, "seed": 7, "count": 2}
        result = await asyncio.to_thread(call, **given, parameters='{"num_inference_steps": 4}')
        assert len(result) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        (images,) = result
        assert (images.dtype, images.ndim, images.shape[0], images.shape[-1]) == (torch.float32, 4, 2, 3)
        assert 0.0 <= float(images.min()) <= float(images.max()) <= 1.0
        same = await cluster.generate(PROMPT, seed=8, steps=4)
        assert np.array_equal((images[1].numpy() * 255).round().astype(np.uint8), pixels(same))
        with pytest.raises(RuntimeError, match="image"):
            await asyncio.to_thread(call, **given, image=images[:1])  # this model takes none
        with pytest.raises(RuntimeError, match="is `triptych up` running"):
            await asyncio.to_thread(call, **{**given, "url": "http://127.0.0.1:1"})

    on_cluster(scenario)
