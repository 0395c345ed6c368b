"""Which code makes the actors of each kind of component, by name, so that nothing is imported before its time."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, cast

import msgspec

from triptych.actors.errors import StartError

if TYPE_CHECKING:
    from pathlib import Path

    from triptych.actors.runtime.actor import Actor
    from triptych.actors.topology.generator import ModelSummary
    from triptych.actors.topology.sections import ModelSection
    from triptych.actors.topology.topology import Component, Model, Topology

Builder = Callable[["Component", "Topology"], "list[Actor]"]
"""Makes the actors of a component. The first is the component itself, the others are called NAME.something."""


class ComponentSpec(NamedTuple):
    """How a kind of component is made."""

    build: str
    """Its `Builder`, as "module:function"."""
    forked: bool = False
    """Whether it is forked from the zygote, which has imported the large libraries; else a fresh interpreter."""


COMPONENT_SPECS: Final[Mapping[str, ComponentSpec]] = {
    "pool": ComponentSpec("triptych.roles.pool.pool:build"),
    "encoder": ComponentSpec("triptych.roles.worker.instance:build", forked=True),
    "denoiser": ComponentSpec("triptych.roles.worker.instance:build", forked=True),
    "decoder": ComponentSpec("triptych.roles.worker.instance:build", forked=True),
    "monolithic": ComponentSpec("triptych.roles.worker.instance:build", forked=True),
    "head": ComponentSpec("triptych.roles.head.head:build"),
    "api": ComponentSpec("triptych.api.server:build"),
}
"""The components of Triptych."""

PRELOAD: Final = (
    "triptych.engines",
    "torch",
    "diffusers",
    "transformers",
    "triptych.engines.pipelines.pipeline",
    "triptych.roles.worker.instance",
    "triptych.roles.worker.stream_worker",
    "triptych.roles.worker.transfer",
)
"""What the zygote imports for the parts that are forked; most of diffusers comes in only with what uses it.

`engines` is first, because it keeps the others quiet.
"""


CHECK_MODEL: Final = "triptych.roles.worker.model_check:check_model"
"""Finds what is wrong with a model; it imports the large libraries."""


class ModelProblem(msgspec.Struct, frozen=True):
    """Something that a person should know of a model before it is served."""

    where: str
    """A component, a LoRA, "index", "card" or "dry run"."""
    problem: str
    """One sentence, with what to do about it."""
    fatal: bool
    """Whether the model cannot be served."""


class ModelReport(msgspec.Struct, frozen=True):
    """What is known of a model before it is served."""

    name: str
    """As `Model.name`."""
    path: str
    """Its folder."""
    sentence: str
    """How it would be served, "" where that cannot be told."""
    problems: tuple[ModelProblem, ...]
    """Everything that was found, in the order of the model's index."""
    dry_run: str
    """What came of a tiny request, or why there was none; "" where something fatal was found."""
    seconds: dict[str, float]
    """What each part of the check took."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found that prevents serving."""
        return not any(problem.fatal for problem in self.problems)


class CheckModel(Protocol):
    """Finds what is wrong with a model."""

    def __call__(
        self, model: Model, components: Sequence[Component], *, dry_run: bool, say: Callable[[str], None]
    ) -> ModelReport:
        """Look at a model that these components serve, and tell what is being done."""


def load_check() -> CheckModel:
    """`CHECK_MODEL`; raises `StartError` when it cannot be imported."""
    return cast(CheckModel, load_builder(CHECK_MODEL))


MODEL_SUMMARY: Final = "triptych.roles.worker.model_summary:summarize_model"
"""Looks at a model for `triptych add`; it imports the large libraries."""


def load_model_summary() -> Callable[[ModelSection, Path], tuple[ModelSummary, str]]:
    """`MODEL_SUMMARY`; raises `StartError` when it cannot be imported."""
    return cast("Callable[[ModelSection, Path], tuple[ModelSummary, str]]", load_builder(MODEL_SUMMARY))


def load_builder(name: str) -> Builder:
    """The builder called "module:function"; raises `StartError` when it cannot be imported."""
    module, _, function = name.partition(":")
    try:
        return cast(Builder, getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError) as error:
        raise StartError(f"{name} cannot be imported ({error}): install what it needs") from error
