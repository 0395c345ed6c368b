"""Two models in one system, of which one fits at a time."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.system.conftest import FREE_PORTS, STAGES, back
from tests.system.reference import diffusers_reference, pixels
from tests.system.test_reload import change
from triptych.api.client import GeneratedImage
from triptych.api.launch import Cluster, launch
from triptych.engines.parameters.serving_config import load_serving_config

BOUND_S = 60.0


def write_two(folder: Path, first: Path, second: Path) -> Path:
    """A topology of two models, the first of three roles, the second of one."""
    apart = "".join(f'[[models.roles]]\nkind = "{kind}"\n' for kind in STAGES)
    whole = '[[models.roles]]\nkind = "monolithic"\n'
    entries = [
        f'[[models]]\nname = "{name}"\npath = "{path}"\ndtype = "float32"\nprompt_cache = "0"\n{roles}'
        for name, path, roles in (("first", first, apart), ("second", second, whole))
    ]
    memory = '[memory]\nhost = "1KiB"\nturn_s = 1\n'  # one at a time, however small
    file = folder / "two.toml"
    file.write_text("".join(entries) + memory + f'[state]\npath = "{folder / "state"}"\n')
    return file


async def until(cluster: Cluster, name: str, state: str) -> None:
    """Until a model stands so."""
    async with asyncio.timeout(BOUND_S):
        while True:
            head = (await cluster.status())["head"]
            if head and head["models"][name] == state:
                return
            await asyncio.sleep(0.02)


@pytest.mark.timeout(300)
def test_each_request_gets_the_image_of_its_model_and_a_model_asleep_is_woken(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    paths = {"first": models("flux"), "second": tmp_path / "model"}
    shutil.copytree(paths["first"], paths["second"])
    change(paths["second"])
    defaults = load_serving_config(paths["first"]).defaults
    expected = {name: diffusers_reference("flux", path, "a red circle", 3, **defaults) for name, path in paths.items()}
    assert not np.array_equal(*expected.values())

    async def as_expected(asked: list[tuple[str, asyncio.Task[GeneratedImage]]]) -> None:
        for name, image in asked:
            assert np.array_equal(pixels(await image), expected[name]), name

    async def scenario() -> None:
        async with launch(write_two(tmp_path, paths["first"], paths["second"]), FREE_PORTS) as cluster:

            def ask(*names: str) -> list[tuple[str, asyncio.Task[GeneratedImage]]]:
                return [(n, asyncio.create_task(cluster.generate("a red circle", model=n, seed=3))) for n in names]

            states = (await cluster.status())["head"]["models"]
            assert sorted(states.values()) == ["asleep", "loaded"], "each was loaded once, and one fits at a time"
            await as_expected(ask(*("first", "second") * 3))

            # The process of an instance that sleeps is stopped, so that it is killed while its model wakes.
            await as_expected(ask("second"))
            await until(cluster, "first", "asleep")
            children = await cluster.children()
            os.kill(children["first-denoiser-0"].pid, signal.SIGSTOP)
            asked = ask("first", "second", "first")
            await until(cluster, "first", "waking")
            os.kill(children["head"].pid, signal.SIGKILL)
            await back(cluster, "head", after_generation=children["head"].generation)
            os.kill(children["first-denoiser-0"].pid, signal.SIGKILL)
            await as_expected(asked)

    asyncio.run(scenario())
