"""What both training stages share: a clock that paces them, averaged weights, checkpoints."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

WARM_UP = 0.03
LAST_RATE = 0.01


def learning_rate(peak: float, share: float) -> float:
    """Give the rate at a share (0 to 1) of the training: a linear rise, then a cosine to 1% of the peak."""
    if share < WARM_UP:
        return peak * (share / WARM_UP * 0.95 + 0.05)
    fallen = (share - WARM_UP) / (1.0 - WARM_UP)
    return peak * (LAST_RATE + (1.0 - LAST_RATE) * 0.5 * (1.0 + math.cos(math.pi * min(fallen, 1.0))))


class WeightAverage:
    """An exponential moving average of a model's weights; young averages forget faster."""

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, steps: int) -> None:
        """Take in the weights of a model after so many steps."""
        decay = min(self.decay, (1.0 + steps) / (10.0 + steps))
        mine: list[torch.Tensor] = list(self.model.parameters())
        theirs: list[torch.Tensor] = list(model.parameters())
        torch._foreach_lerp_(mine, theirs, 1.0 - decay)


class TrainingRun:
    """One training stage that is paced by the clock and survives being stopped.

    Args:
        name: the checkpoint's name and the bar's label.
        folder: where the checkpoint lies; None keeps none.
        seconds: how long the stage trains, all its runs together.
        model: the model in training; its checkpoint and average are kept along.
        optimizer: its optimizer; its rate follows `learning_rate`.

    """

    def __init__(
        self,
        name: str,
        folder: Path | None,
        seconds: float,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        save_every_s: float = 60.0,
    ) -> None:
        self.name = name
        self.path = None if folder is None else folder / f"{name}.safetensors"
        self.seconds = seconds
        self.model = model
        self.optimizer = optimizer
        self.average = WeightAverage(model)
        self.steps = 0
        self.elapsed = 0.0
        self.loss = 0.0
        self.save_every_s = save_every_s
        self._peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self._resume()
        self._bar = _progress()
        self._task = self._bar.add_task(name, total=seconds, step=self.steps, loss=self.loss)

    def __iter__(self) -> Iterator[float]:
        """Yield the share done, once per step to take; saves now and then and at the end."""
        saved = last = time.monotonic()
        with self._bar:
            while self.elapsed < self.seconds:
                yield self.elapsed / self.seconds
                now = time.monotonic()
                self.elapsed += now - last
                last = now
                self._bar.update(self._task, completed=self.elapsed, step=self.steps, loss=self.loss)
                if now - saved >= self.save_every_s:
                    self.save()
                    saved = last = time.monotonic()
        self.save()

    def learn(self, loss: torch.Tensor) -> None:
        """Take one step against a scalar loss: backward, clipped gradients, optimizer, average."""
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = learning_rate(peak, self.elapsed / self.seconds)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1
        self.average.update(self.model, self.steps)
        if self.steps % 20 == 0:
            self.loss = float(loss.detach())

    def save(self) -> None:
        """Write weights, average and optimizer state; a reader sees the old file or the new one."""
        if not self._bar.console.is_terminal:
            self._bar.console.print(f"{self.name}: {self.elapsed:.0f} s, step {self.steps}, loss {self.loss:.5f}")
        if self.path is None:
            return
        tensors = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        tensors |= {f"average.{key}": value for key, value in self.average.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
        notes = json.dumps({"steps": self.steps, "elapsed": self.elapsed})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".draft")
        whole = {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()
        }
        save_file(whole, draft, {"notes": notes})
        draft.replace(self.path)

    def _resume(self) -> None:
        if self.path is None or not self.path.exists():
            return
        with safe_open(self.path, framework="pt") as file:
            notes = json.loads(file.metadata()["notes"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        self.steps, self.elapsed = int(notes["steps"]), float(notes["elapsed"])
        self.model.load_state_dict(_part(tensors, "model."))
        self.average.model.load_state_dict(_part(tensors, "average."))
        whole = self.optimizer.state_dict()
        whole["state"] = _optimizer_state(_part(tensors, "optimizer."))
        self.optimizer.load_state_dict(whole)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("step {task.fields[step]}  loss {task.fields[loss]:.5f}"),
        console=Console(stderr=True),
        refresh_per_second=2,
    )


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _optimizer_state(tensors: dict[str, torch.Tensor]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return state
