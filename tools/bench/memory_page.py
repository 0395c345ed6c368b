"""Make the page `docs/memory.md` from the rows of the memory benchmark; pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from triptych.tools.bench.memory_report import (
    ALL,
    CONVERTED,
    DISAGGREGATED,
    LARGEST,
    MAPPED,
    MONOLITHIC,
    ONE_MORE,
    case,
)

_WIDTH: Final = 120
_COLUMNS: Final = {
    "weights": "weights",
    "pss_ready": "PSS when ready",
    "pss": "PSS",
    "rss": "RSS",
    "peak_rss": "peak RSS",
}
_LEGEND: Final = """
In MiB, weights mapped. PSS when ready is before the first image, when mapped weights have not been read yet; PSS and
RSS are at rest after the images. PSS counts a page that n processes share as 1/n of it for each. RSS counts all of it
for each: the imports that roles share with the zygote, and the 256 MiB of the pool, which every role maps. USS counts
only pages that no other process has: what one more of two equal processes takes.
"""

Found = dict[str, dict[str, Any]]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the page as Markdown."""
    found = {row["case"]: row for row in rows}
    texts = [_introduction(found["settings"]), *_findings(found)]
    paragraphs = [textwrap.fill(" ".join(text.split()), _WIDTH, break_on_hyphens=False) for text in texts]
    return "\n\n".join(["# Memory", *paragraphs, _processes(found), _LEGEND.strip(), _comparisons(rows)]) + "\n"


def _introduction(settings: dict[str, Any]) -> str:
    weights = ", ".join(f"{name} {mib}" for name, mib in settings["weights"].items() if mib)
    libraries = ", ".join(f"{name} {settings[name]}" for name in ("torch", "diffusers", "transformers"))
    return f"""
    What each process of a served model holds in memory, against a monolithic process that holds the whole pipeline.
    `make bench-memory` makes this page in some five minutes, with 10 GiB of memory and 3 GB of disk. The model is a
    Flux with random weights in bfloat16, in MiB: {weights}. It is served on the CPU and makes {settings["images"]}
    images of {settings["size"]} in {settings["num_inference_steps"]} steps, more until each instance has worked.
    Rounds: {settings["rounds"]} (`--rounds`). {libraries}.
    """


def _findings(found: Found) -> Iterator[str]:
    largest, peak = (found[f"{LARGEST}, {MAPPED} weights: {measure}"] for measure in ("pss", "peak_rss"))
    mapped, converted = (found[f"{ONE_MORE}, {weights} weights: uss"] for weights in (MAPPED, CONVERTED))
    stages, whole = (found[case(CONVERTED, side, ALL)]["pss"] for side in (DISAGGREGATED, MONOLITHIC))
    yield f"""
    The largest role holds {_share(largest)} of what the monolithic process holds, and {_share(peak)} of its peak. One
    of each role takes more than one monolithic process, for the pool and for what each process has besides weights:
    {stages:.0f} MiB against {whole:.0f}, all processes counted and weights not shared.
    """
    yield f"""
    Where each process has weights of its own, here because they are converted as they are loaded, one more denoiser
    takes {converted["ours"]:.0f} MiB and one more monolithic process {converted["peer_value"]:.0f}. So four denoisers
    beside one encoder and one decoder come to {stages + 3 * converted["ours"]:.0f} MiB, four monolithic processes to
    {whole + 3 * converted["peer_value"]:.0f}. On a GPU processes have weights of their own, too; that is not measured
    here.
    """
    yield f"""
    On the CPU, weights that are saved in the dtype that is served are mapped from their files, and all processes of a
    host share them. There one more denoiser takes {mapped["ours"]:.0f} MiB and one more monolithic process
    {mapped["peer_value"]:.0f}, mostly what the allocator keeps of a computation, which differs from run to run.
    """


def _processes(found: Found) -> str:
    heading = f"| process | components | {' | '.join(_COLUMNS.values())} |\n| --- | --- |{' ---: |' * len(_COLUMNS)}"
    return "\n".join([heading, *_side(found, DISAGGREGATED), *_side(found, MONOLITHIC)])


def _side(found: Found, side: str) -> Iterator[str]:
    start = case(MAPPED, side, "")
    for name, row in found.items():
        if name.startswith(start):
            process = name.removeprefix(start)
            label = f"**{side}: {ALL}**" if process == ALL else process
            cells = [f"{row[key]:.0f}" if row.get(key) else "" for key in _COLUMNS]
            yield f"| {label} | {', '.join(row.get('components', ()))} | {' | '.join(cells)} |"


def _comparisons(rows: Iterable[dict[str, Any]]) -> str:
    compared = [row for row in rows if "ratio" in row]
    cells = [(row["case"], f"{row['ours']:.0f}", f"{row['peer_value']:.0f}", _share(row)) for row in compared]
    return "\n".join(
        ["| | ours | monolithic | ours / monolithic |", "| --- | ---: | ---: | ---: |"]
        + [f"| {' | '.join(row)} |" for row in cells]
    )


def _share(row: dict[str, Any]) -> str:
    return f"{100 * row['ours'] / row['peer_value']:.0f} %"
