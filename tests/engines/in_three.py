"""Run a request through three processes, a panel in each, and look at what comes out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from engines.panels import Panel

sys.path.insert(0, str(Path(__file__).parent))
from panel_process import CPU, read_state, write_state

__all__ = ["CPU", "Processes", "ask", "media", "run_in_three", "same", "seeded", "three_processes"]

Processes = dict[Panel, tuple[BinaryIO, BinaryIO]]


@contextmanager
def three_processes() -> Iterator[Processes]:
    """Start the processes; they end when the context does."""
    ours: Processes = {}
    theirs: list[int] = []
    for panel in Panel:
        requests_out, requests_in = os.pipe()
        answers_out, answers_in = os.pipe()
        ours[panel] = (os.fdopen(requests_in, "wb"), os.fdopen(answers_out, "rb"))
        theirs += [requests_out, answers_in]
    command = [sys.executable, str(Path(__file__).with_name("panel_process.py")), *map(str, theirs)]
    with subprocess.Popen(command, pass_fds=theirs) as process:
        for pipe in theirs:
            os.close(pipe)
        yield ours
        for requests, _ in ours.values():
            requests.close()
        assert process.wait(30) == 0
    for _, answers in ours.values():
        answers.close()


def ask(pipes: tuple[BinaryIO, BinaryIO], request: dict[str, object]) -> dict[str, Any]:
    write_state(pipes[0], request)
    answer = read_state(pipes[1])
    assert answer is not None, "the process has ended"
    return answer


def run_in_three(
    processes: Processes, model: Path, inputs: dict[str, Any], seed: int, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    base = {"model": str(model), "dtype": dtype}
    answers = [ask(processes[Panel.ENCODER], {**base, "inputs": inputs, "seed": seed})]
    for panel in (Panel.DENOISER, Panel.DECODER):
        answers.append(ask(processes[panel], {**base, "state": answers[-1]["state"]}))
    return answers[-1]["state"], answers


def seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def media(result: Any) -> np.ndarray[Any, Any]:
    """The pixels of a result, [picture or video, ...], of either kind of pipeline or of ours."""
    values = result if isinstance(result, dict) else vars(result)
    values = values.get("values", values)
    for name in ("images", "videos", "frames"):
        if values.get(name) is not None:
            return np.stack([np.asarray(item) for item in values[name]])
    raise AssertionError(f"no media in {sorted(values)}")


def same(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()
