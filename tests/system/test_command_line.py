"""Commands against a running system, as they are typed: on a terminal, in a pipe, ended by Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tests.actors.command.terminal import KITTY, NEITHER, Screen, run_on_terminal
from tests.system.conftest import BOUND_S
from triptych.actors.command._draw import read_image
from triptych.api.launch import Cluster

COMMAND = (sys.executable, "-P", "-m", "triptych.actors.command")


async def output_of(*arguments: str, until: Callable[[list[str]], bool] | None = None) -> tuple[int, list[str]]:
    """Run a command in a pipe, and interrupt it once its lines are as wanted."""
    process = await asyncio.create_subprocess_exec(*COMMAND, *arguments, stdout=asyncio.subprocess.PIPE)
    lines: list[str] = []
    assert process.stdout is not None
    async with asyncio.timeout(BOUND_S):
        async for line in process.stdout:
            lines.append(line.decode().rstrip("\n"))
            if until is not None and until(lines):
                process.send_signal(signal.SIGINT)
                until = None
        return await process.wait(), lines


@pytest.mark.shared_cluster("flux")
def test_an_image_is_drawn_in_the_terminal_while_it_is_made(on_cluster: Callable[..., Any], tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        file = tmp_path / "x.png"
        arguments = ("generate", "a red circle", "--url", cluster.url, "--seed", "3", "-o", str(file))
        output, code = await asyncio.to_thread(run_on_terminal, (*COMMAND, *arguments), KITTY)
        assert (code, "saved" in output) == (0, True), output
        screen = Screen().feed(output)
        ((_, drawn),) = screen.images.items()
        assert np.array_equal(drawn, np.asarray(Image.open(file).convert("RGB"))), "the last one is the result"
        assert screen.drawn == len(screen.sizes) >= 1

    on_cluster(scenario)


@pytest.mark.shared_cluster("flux")
def test_a_load_is_measured_and_ctrl_c_shows_what_was_measured(on_cluster: Callable[..., Any], tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        picture = tmp_path / "load.svg"
        load = ("bench", cluster.url, "--rate", "50", "--steps", "1", "--json")
        code, lines = await output_of(*load, "-n", "3", "--svg", str(picture))
        *results, last = map(json.loads, lines)
        assert (code, last["summary"]["outcomes"]) == (0, {"done": 3}), lines
        assert sorted(result["number"] for result in results) == [0, 1, 2]
        assert all(result["seconds"] > 0 and result["request_id"] for result in results)
        assert len(ElementTree.parse(picture).findall(".//{*}circle")) == 3 + 1
        code, lines = await output_of(*load, "--seconds", "999", until=lambda lines: len(lines) == 2)
        summary = json.loads(lines[-1])["summary"]
        assert (code, summary["interrupted"]) == (130, True)
        assert sum(summary["outcomes"].values()) == len(lines) - 1

    on_cluster(scenario)


@pytest.mark.shared_cluster("flux")
def test_status_is_watched_line_by_line_until_ctrl_c(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        code, lines = await output_of(
            "status", "--url", cluster.url, "--watch", until=lambda lines: "steps/s" in lines[-1]
        )
        assert (code, lines[0].startswith("ready, ")) == (0, True), lines
        assert "0 jobs wait, 0 run" in lines[0]

    on_cluster(scenario)


@pytest.mark.shared_cluster("flux")
def test_logs_are_those_of_the_system_that_runs(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        file = str(cluster.topology.path)
        made = await cluster.generate("what is logged", steps=1)
        wanted = ("logs", "api", "--topology", file, "-f", "--json")
        code, lines = await output_of(*wanted, until=lambda lines: any(made.request_id in line for line in lines))
        assert (code, {json.loads(line)["process"] for line in lines} <= {"api", "supervisor"}) == (0, True), lines

    on_cluster(scenario)


@pytest.mark.shared_cluster("models")
def test_videos_are_drawn_and_measured_too(on_cluster: Callable[..., Any], tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        file = tmp_path / "x.mp4"
        few = ("--model", "wan", "--steps", "1", "--set", "num_frames=5")
        arguments = ("generate", "a red circle", "--url", cluster.url, *few, "-o", str(file))
        output, code = await asyncio.to_thread(run_on_terminal, (*COMMAND, *arguments), NEITHER)
        assert code == 0, output
        first = read_image(file.read_bytes())
        assert first is not None
        drawn = Screen().feed(output).block_pixels()
        height, width, _ = drawn.shape
        assert np.array_equal(drawn, np.asarray(first.resize((width, height)))), "its first frame"
        code, lines = await output_of("bench", cluster.url, "--videos", "-n", "1", "--json", *few)
        assert (code, json.loads(lines[-1])["summary"]["outcomes"]) == (0, {"done": 1}), lines

    on_cluster(scenario)
