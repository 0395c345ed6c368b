"""What is known of a model before it is served: for `triptych init` and `triptych check --model`."""

from __future__ import annotations

import msgspec


class ModelSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What `triptych init` needs to know of a model to write a topology for it."""

    pipeline: str
    """Its class."""
    disaggregated: bool
    """Whether it can run in three processes."""
    sentence: str
    """How it would be served."""
    config: str = ""
    """Folder or repository whose configurations fit a checkpoint, where the topology names none."""
    defaults: dict[str, object] = {}
    """Defaults of its parameters, by name."""
    weights: dict[str, int] = {}
    """Bytes of the weight files of each component."""
    elements: dict[str, int] = {}
    """How many numbers the weights of each component have; of a checkpoint in one file, all of them under its name."""
    stages: dict[str, tuple[str, ...]] = {}
    """Names of the components that each stage loads."""
    gpus: tuple[int, ...] = ()
    """Bytes of memory of each CUDA device of this machine; 0 where it is not known."""


class ModelProblem(msgspec.Struct, frozen=True):
    """Something wrong with a model, or worth knowing before it is served."""

    where: str
    """A component, a LoRA, "index", "serving config", "cache" or "dry run"."""
    problem: str
    """One sentence, with what to do about it."""
    fatal: bool
    """Whether the model cannot be served."""


class ModelReport(msgspec.Struct, frozen=True):
    """What `triptych check --model` found."""

    name: str
    """As `Model.name`."""
    path: str
    """Its folder."""
    sentence: str
    """How it would be served, "" where that cannot be told."""
    problems: tuple[ModelProblem, ...]
    """All problems, in the order of the model's index."""
    dry_run: str
    """Result of a tiny request, or why there was none; "" after a fatal problem."""
    seconds: dict[str, float]
    """Duration of each part of the check."""

    @property
    def ok(self) -> bool:
        """Whether no problem prevents serving."""
        return not any(problem.fatal for problem in self.problems)
