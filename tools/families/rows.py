"""A row for every family and task: how it is served, and what crosses between its stages."""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

import diffusers

from triptych.engines.partition.blocks import cut_blocks, prune
from triptych.engines.stages import ModelError, Stage
from triptych.tools.families.cases import Case, cases


@dataclass(frozen=True)
class PipelineRow:
    """One family and task.

    Attributes:
        family: The name of its pipeline, without "ModularPipeline".
        task: A workflow; "" where there is just one.
        route: "modular", or "none".
        reason: Why there is no route, or why it is not run here.
        to_denoiser: Kinds of what the encoder makes for the later stages, by name.
        to_decoder: Kinds of what the denoiser makes for the decoder, by name.
        case: The request that shows it; None where there is none.
    """

    family: str
    task: str
    route: str
    reason: str = ""
    to_denoiser: dict[str, str] = field(default_factory=dict)
    to_decoder: dict[str, str] = field(default_factory=dict)
    case: Case | None = None


def rows() -> tuple[PipelineRow, ...]:
    """Return a row for every family and task of the installed diffusers."""
    known = {(case.pipeline, case.task): case for case in cases()}
    return tuple(_row(name, task, known) for name in pipelines() for task in _tasks(name))


def pipelines() -> list[str]:
    """Return the names of all modular pipelines that have blocks of their own."""
    names = [name for name in dir(diffusers) if name.endswith("ModularPipeline")]
    return [name for name in names if getattr(diffusers, name).default_blocks_name]


def blocks_of(pipeline: str) -> Any:
    """Return all blocks of a modular pipeline."""
    return getattr(diffusers, getattr(diffusers, pipeline).default_blocks_name)()


def boundary(before: Iterable[Any], later: Iterable[Any]) -> dict[str, str]:
    """Return what blocks make that later blocks take, as they declare it: kinds by name."""
    made = {output.name: output for part in before for output in part.intermediate_outputs}
    groups = {declared.kwargs_type for part in later for declared in part.inputs if not declared.name}
    wanted = {declared.name: declared for part in later for declared in part.inputs if declared.name}
    crossing: dict[str, str] = {}
    for name, output in sorted(made.items()):
        if name in wanted or (output.kwargs_type and output.kwargs_type in groups):
            hint = output.type_hint or getattr(wanted.get(name), "type_hint", None)
            crossing[name] = kind_of_hint(hint)
    return crossing


def kind_of_hint(hint: Any) -> str:
    """Return a type hint in a word or two; "any" if there is none."""
    if hint is None or hint is Any:
        return "any"
    if isinstance(hint, str):
        return hint.lower()
    arguments = [argument for argument in get_args(hint) if argument not in (type(None), Ellipsis)]
    if isinstance(hint, types.UnionType) or (get_origin(hint) is not None and not isinstance(get_origin(hint), type)):
        return " or ".join(dict.fromkeys(kind_of_hint(argument) for argument in arguments))
    if get_origin(hint) is not None and arguments:
        inner = " or ".join(dict.fromkeys(kind_of_hint(argument) for argument in arguments))
        return f"{get_origin(hint).__name__} of {inner}"
    return str(getattr(hint, "__name__", hint)).lower()


def _row(pipeline: str, task: str, known: dict[tuple[str, str], Case]) -> PipelineRow:
    family = pipeline.removesuffix("ModularPipeline")
    blocks = blocks_of(pipeline)
    try:
        parts = cut_blocks(prune(blocks, task or "any"))
    except ModelError as error:
        return PipelineRow(family, task, "none", str(error))
    case = known.get((pipeline, task))
    later = [parts[Stage.DENOISER], parts[Stage.DECODER]]
    return PipelineRow(
        family,
        task,
        "modular",
        "" if case else "not run: no request for it",
        boundary([parts[Stage.ENCODER]], later),
        boundary([parts[Stage.DENOISER]], [parts[Stage.DECODER]]),
        case,
    )


def _tasks(pipeline: str) -> list[str]:
    return list(blocks_of(pipeline)._workflow_map or [""])
