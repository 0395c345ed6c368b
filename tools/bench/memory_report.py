"""Make the rows of the memory benchmark from its samples; pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from triptych.tools.bench.report import compare
from triptych.tools.procfs import ProcessMemory

MAPPED: Final = "mapped"
CONVERTED: Final = "converted"
DISAGGREGATED: Final = "three roles"
MORE_DENOISERS: Final = "three roles, 2 denoisers"
MONOLITHIC: Final = "monolithic"
MORE_MONOLITHIC: Final = "2 monolithic"
ALL: Final = "all processes"
ONE_MORE: Final = "one more denoiser"
LARGEST: Final = "largest role"
MEASURES: Final = {MAPPED: ("weights", "pss", "rss", "peak_rss"), CONVERTED: ("pss",)}


@dataclass(frozen=True)
class ProcessSample:
    """The memory of one process, in MiB.

    Attributes:
        components: That it has loaded.
        weights: Of those, in their files.
        ready: When the cluster was ready.
        done: While it is idle after the images, or measured again where there were none.
    """

    components: tuple[str, ...]
    weights: float
    ready: ProcessMemory
    done: ProcessMemory

    def measures(self) -> dict[str, float]:
        """Return the values as they are in a row."""
        done = self.done
        return {
            "weights": self.weights,
            "pss_ready": self.ready.pss,
            "pss": done.pss,
            "rss": done.rss,
            "uss": done.uss,
            "peak_rss": done.peak_rss,
        }


@dataclass(frozen=True)
class MemoryRun:
    """One run of a cluster: the kind of its weight files, its side, and its processes by name."""

    weights: str
    side: str
    held: dict[str, ProcessSample]


def rows(runs: Sequence[MemoryRun]) -> Iterator[dict[str, Any]]:
    """Yield a row for each process and for their sum, the comparisons after them; medians over the rounds, in MiB."""
    processes = [row for weights, side in _sides(runs) for row in _processes(runs, weights, side)]
    yield from processes
    found = {row["case"]: row for row in processes}
    for weights in dict.fromkeys(run.weights for run in runs):
        yield from _comparisons(found, weights)


def case(weights: str, side: str, process: str) -> str:
    """Return the name of the case of a process."""
    return f"{weights} weights, {side}: {process}"


def _sides(runs: Iterable[MemoryRun]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((run.weights, run.side) for run in runs))


def _processes(runs: Sequence[MemoryRun], weights: str, side: str) -> Iterator[dict[str, Any]]:
    same = [run.held for run in runs if (run.weights, run.side) == (weights, side)]
    for name, held in same[0].items():
        yield {
            "bench": "memory",
            "case": case(weights, side, name),
            "unit": "MiB",
            "components": list(held.components),
            **_medians([run[name].measures() for run in same]),
        }
    # Of `rss` a sum would count what processes share once for each of them.
    totals = [{key: sum(h.measures()[key] for h in run.values()) for key in ("pss_ready", "pss")} for run in same]
    yield {"bench": "memory", "case": case(weights, side, ALL), "unit": "MiB", **_medians(totals)}


def _medians(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(sample[key] for sample in samples), 1) for key in samples[0]}


def _comparisons(found: dict[str, dict[str, Any]], weights: str) -> Iterator[dict[str, Any]]:
    roles = [found[case(weights, DISAGGREGATED, f"{kind}-0")] for kind in ("encoder", "denoiser", "decoder")]
    whole = found[case(weights, MONOLITHIC, "monolithic-0")]
    for measure in MEASURES[weights]:
        largest = max(role[measure] for role in roles)
        yield _compared(f"{LARGEST}, {weights} weights: {measure}", largest, "the monolithic process", whole[measure])
    # What one more of two takes is what is freed with either of them.
    ours, theirs = (
        statistics.mean(found[case(weights, side, f"{kind}-{number}")]["uss"] for number in (0, 1))
        for side, kind in ((MORE_DENOISERS, "denoiser"), (MORE_MONOLITHIC, "monolithic"))
    )
    yield _compared(f"{ONE_MORE}, {weights} weights: uss", ours, "one more monolithic process", theirs)


def _compared(name: str, ours: float, peer: str, theirs: float) -> dict[str, Any]:
    return compare("memory", name, "MiB", ours=[ours], peer=peer, peer_values=[theirs], higher_is_better=False)
