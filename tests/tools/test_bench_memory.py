"""The benchmark of memory: how it reads the kernel, reports, and measures a real cluster of a tiny model."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from triptych.tools import procfs
from triptych.tools.bench import memory
from triptych.tools.bench.memory_report import (
    ALL,
    CONVERTED,
    DISAGGREGATED,
    MAPPED,
    MONOLITHIC,
    MemoryRun,
    ProcessSample,
    case,
    rows,
)
from triptych.tools.procfs import ProcessMemory

ROLES = ("encoder-0", "denoiser-0", "decoder-0")
SETTINGS = {
    "bench": "memory", "case": "settings", "weights": {"vae": 160, "tokenizer": 0}, "size": "512x512",
    "num_inference_steps": 2, "images": 2, "rounds": 1, "torch": "2", "diffusers": "0", "transformers": "5",
}  # fmt: skip


def held(mib: float) -> ProcessSample:
    return ProcessSample(
        ("vae",), mib, ProcessMemory(mib, mib, mib, mib), ProcessMemory(2 * mib, mib, mib / 2, 3 * mib)
    )


def runs(rounds: int = 1) -> list[MemoryRun]:
    """A denoiser holds 300 MiB of 600, and the n-th round has n - 1 more in each process."""
    stages = {"encoder-0": 200.0, "denoiser-0": 300.0, "decoder-0": 100.0, "pool": 50.0}
    sizes = {
        memory.memory_report.DISAGGREGATED: stages,
        memory.memory_report.MORE_DENOISERS: {**stages, "denoiser-1": 300.0},
        memory.memory_report.MONOLITHIC: {"monolithic-0": 600.0},
        memory.memory_report.MORE_MONOLITHIC: {"monolithic-0": 600.0, "monolithic-1": 600.0},
    }
    return [
        MemoryRun(weights, side, {name: held(mib + more) for name, mib in found.items()})
        for more in range(rounds)
        for weights in (MAPPED, CONVERTED)
        for side, found in sizes.items()
    ]


def test_a_row_for_each_process_their_sum_and_the_comparisons() -> None:
    found = {row["case"]: row for row in rows(runs())}
    denoiser = found[case(MAPPED, DISAGGREGATED, "denoiser-0")]
    assert (denoiser["weights"], denoiser["rss"], denoiser["peak_rss"]) == (300, 600, 900)
    assert found[case(MAPPED, DISAGGREGATED, ALL)]["pss"] == 650
    assert found[case(CONVERTED, MONOLITHIC, ALL)]["pss"] == 600
    largest = found[f"largest role, {MAPPED} weights: peak_rss"]
    assert (largest["ours"], largest["peer_value"], largest["ratio"]) == (900, 1800, 2)
    more = found[f"one more denoiser, {CONVERTED} weights: uss"]
    assert (more["ours"], more["peer_value"], more["ratio"]) == (150, 300, 2)


def test_the_values_are_medians_over_the_rounds() -> None:
    found = {row["case"]: row for row in rows(runs(rounds=3))}
    assert found[case(MAPPED, DISAGGREGATED, "denoiser-0")]["pss"] == 301
    assert found[case(MAPPED, DISAGGREGATED, ALL)]["pss"] == 654


def test_the_page_has_the_numbers_of_the_rows() -> None:
    page = memory.markdown([SETTINGS, *rows(runs())])
    assert "| denoiser-0 | vae | 300 | 300 | 300 | 600 | 900 |" in page
    assert "| one more denoiser, converted weights: uss | 150 | 300 | 50 % |" in page
    assert "in MiB: vae 160." in " ".join(page.split())
    assert "1100 MiB" in page  # 650 for one of each, and three more denoisers
    assert max(len(line) for line in page.splitlines() if not line.startswith("|")) <= 120


def test_the_kernels_words_are_read() -> None:
    sizes = {"Rss": 2048, "Pss": 1024, "Pss_Anon": 512, "Private_Clean": 512, "Private_Dirty": 256}
    lines = "".join(f"{name}:    {kib} kB\n" for name, kib in sizes.items())
    rollup = f"00400000-7fff rw-p 00000000 00:00 0 [rollup]\n{lines}"
    assert procfs.parse(rollup, "Name:\tpython\nVmHWM:\t    4096 kB\n") == ProcessMemory(2, 1, 0.75, 4)


def test_memory_that_is_touched_is_seen_and_its_peak_stays() -> None:
    before = procfs.process_memory(os.getpid())
    with mmap.mmap(-1, 64 << 20) as block:
        block.write(b"x" * len(block))
        during = procfs.process_memory(os.getpid())
    after = procfs.process_memory(os.getpid())
    assert during.pss - before.pss > 60
    assert during.uss - before.uss > 60
    assert after.rss < during.rss <= after.peak_rss


def test_a_process_has_its_children() -> None:
    assert os.getpid() in procfs.children_of(os.getppid())
    assert os.getppid() not in procfs.children_of(os.getpid())


@pytest.mark.long
def test_every_process_of_a_cluster_is_measured_after_its_work(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SIZE", "64x64")
    place = memory._Model(models("flux"), memory._weights(models("flux")))
    run = asyncio.run(memory._run(tmp_path / "cluster", place, MAPPED, DISAGGREGATED))
    assert run.held.keys() == {*ROLES, "pool", "head", "api", "supervisor", "zygote"}
    loaded = {name: held.components for name, held in run.held.items() if held.components}
    assert loaded == {
        "encoder-0": ("text_encoder", "text_encoder_2"),
        "denoiser-0": ("transformer",),
        "decoder-0": ("vae",),
    }
    assert all(held.weights > 0 for name, held in run.held.items() if name in ROLES)
    assert all(0 < held.done.pss <= held.done.rss <= held.done.peak_rss for held in run.held.values())
