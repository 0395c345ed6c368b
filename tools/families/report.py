"""Show the families: a table, Markdown, or one record for each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from rich.table import Table

from triptych.tools.families.compare import Comparison
from triptych.tools.families.rows import PipelineRow

_COLUMNS = ("family", "task", "route", "encoder to denoiser", "denoiser to decoder", "identical", "reason")


@dataclass(frozen=True)
class Result:
    """A row and the result of its run.

    Attributes:
        row: The row.
        outcome: None where it was not run.
        failed: Whether it was run and raised.
    """

    row: PipelineRow
    outcome: Comparison | None = None
    failed: bool = False

    @property
    def bad(self) -> bool:
        """Whether it ran and is not identical."""
        return self.failed or (self.outcome is not None and not self.outcome.identical)

    def record(self) -> dict[str, Any]:
        """Return the row as a JSON object; the payload is the observed one if it ran, else what the blocks declare."""
        to_denoiser, to_decoder = self._crossing()
        return {
            "family": self.row.family,
            "task": self.row.task,
            "route": self.row.route,
            "identical": self.outcome.identical if self.outcome else None,
            "max_abs_diff": self.outcome.max_abs_diff if self.outcome else None,
            "reason": self.row.reason,
            "outputs": self.outcome.outputs if self.outcome else {},
            "encoder_to_denoiser": to_denoiser,
            "denoiser_to_decoder": to_decoder,
        }

    def _crossing(self) -> tuple[dict[str, str], dict[str, str]]:
        return self.outcome.crossed if self.outcome else (self.row.to_denoiser, self.row.to_decoder)

    def cells(self) -> tuple[str, ...]:
        """Return the cells of a table."""
        to_denoiser, to_decoder = (_listed(kinds) for kinds in self._crossing())
        row = self.row
        needs = f"needs {' and '.join(row.case.needs)}" if row.case and row.case.needs else ""
        reason = row.reason or needs
        return (row.family, row.task or "-", row.route, to_denoiser, to_decoder, self._verdict(), reason)

    def _verdict(self) -> str:
        if self.failed:
            return "failed"
        if self.outcome is None:
            return "-"
        return "yes" if self.outcome.identical else f"no ({self.outcome.max_abs_diff})"


def table(results: Sequence[Result]) -> Table:
    """Return a table for a terminal, with a line that counts the rows."""
    shown = Table(caption=summary(results), show_lines=True)
    for column in _COLUMNS:
        shown.add_column(column, overflow="fold")
    for result in results:
        shown.add_row(*result.cells(), style="red" if result.bad else None)
    return shown


def summary(results: Sequence[Result]) -> str:
    """Say how many rows there are, how many ran, and how many of those are identical."""
    ran = [result for result in results if result.outcome or result.failed]
    identical = sum(1 for result in ran if not result.bad)
    pipelines = len({result.row.family for result in results})
    return f"{pipelines} pipelines, {len(results)} rows; {len(ran)} ran, {identical} of those identical"


def markdown(results: Sequence[Result]) -> str:
    """Return the part of `docs/families.md` with a row for every task of Modular Diffusers."""
    lines = [
        "Every pipeline of Modular Diffusers and every task of it, split by the one rule of",
        "`engines/partition/blocks.py`: what comes before the block named `denoise` is the",
        "encoder, the block is the denoiser, the rest is the decoder.",
        "",
        f"Made by `python -m triptych.tools.families blocks --run --markdown docs/families.md` with diffusers"
        f" {diffusers.__version__}, transformers {transformers.__version__} and torch {torch.__version__}.",
        "",
        "For each row that has a tiny model, the tool makes it with random weights, runs one request through three",
        "processes that each load one stage (all that passes between them is the bytes of `engines/codec/codec.py`),",
        "runs the same request with the same seed through the whole pipeline as diffusers loads it, and compares every",
        "output. `identical` is `yes` where all bytes are the same. What crosses is what was seen in that run; where",
        "there was none, what the blocks declare. `height`, `prompt` and other inputs of the request cross as well",
        "where later blocks take them.",
        "",
        "Running these rows has found what the rule now minds:",
        "",
        "- A tensor keeps its layout in memory: a convolution rounds otherwise for another layout.",
        "- Weights want gradients as those of the plain pipeline do: where they do not, a product of matrices of",
        "  some layouts takes another way and rounds otherwise. (None are computed in either case.)",
        "- A stage's guiders and settings are those of the whole pipeline: blocks of one family declare the same",
        "  guider with different scales.",
        "- A block that a model has no component for is left out where an input of the request takes its place.",
        "  Where the model has it, each request chooses: LTX-2.5 guesses the number of frames if it is not told.",
        "- Some geometry has private names.",
        "",
        "Some rows need more than a serving config and a prompt. An IP adapter is loaded from",
        "`ip_adapter/*.safetensors` in the model's folder, for the tasks that are named after it; the encoder of such",
        "a task loads the UNet too, because its block asks the UNet what the adapter looks like.",
        "Cosmos 3 wants a safety checker, which is loaded by hand from a package of its own: here",
        "each request fails unless the index says",
        '`"enable_safety_checker": false`, as that of the tiny model does. Wan-Animate-2 compiles a mask when it',
        "first runs, and needs a C++ compiler for that. Requests for LTX-2 `condition` and `in_context`, for the",
        "actions of Cosmos 3 and for MiniMax H3 `ref2va` carry objects of diffusers: the stages take them, but",
        "the HTTP API has no words for them.",
        "",
        f"{summary(results)}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{' --- |' * len(_COLUMNS)}",
    ]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in result.cells())} |" for result in results]
    return "\n".join(lines) + "\n"


def _listed(kinds: dict[str, str]) -> str:
    by_kind: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        by_kind.setdefault(kind, []).append(name)
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in by_kind.items())
