"""Several runs advance together: calls of their denoisers are merged, and each run is what it is alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.steps.runs import Models, finish, latents_of, payload, pipeline_of
from triptych.engines.parameters.lora import LoraFile
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage
from triptych.engines.steps.denoising import Denoising
from triptych.engines.steps.executor import StepExecutor
from triptych.tools.families.stage_processes import CPU
from triptych.tools.make_lora import make_lora


def finish_together(runs: Sequence[Denoising], executor: StepExecutor) -> list[torch.Tensor]:
    live = list(runs)
    while live:
        results = executor.advance(live)
        assert [result.error for result in results] == [None] * len(live)
        live = [run for run, result in zip(live, results, strict=True) if result.more]
    return [latents_of(run) for run in runs]


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


# In one call with guidance or in two; items instead of rows; times without dimensions; a classic pipeline.
@pytest.mark.parametrize("family", ["flux-kl", "wan", "sdxl", "z_image", "pixart"])
def test_a_row_has_the_same_bits_whoever_is_beside_it(family: str, models: Models) -> None:
    model = models(family)
    pipeline, executor = pipeline_of(model), StepExecutor()
    payloads = [payload(model, number, prompt="a red ship") for number in range(3)]
    solo = [finish(pipeline.denoise(each)) for each in payloads]
    alone = [finish_together([pipeline.denoise(each, bucket=4)], executor)[0] for each in payloads]
    assert set(executor.group_sizes) == {1}
    runs = [pipeline.denoise(each, bucket=4) for each in payloads]
    executor.advance(runs[1:])
    together = finish_together(runs, executor)
    assert max(executor.group_sizes) == 3
    assert runs[1].batch_key is not None
    for among, by_itself, unpadded in zip(together, alone, solo, strict=True):
        assert torch.equal(among, by_itself)
        assert difference(among, unpadded) < 1e-5
    assert torch.equal(finish_together([pipeline.denoise(payloads[1])], executor)[0], solo[1])


def test_only_calls_of_one_signature_are_merged_and_have_one_key(models: Models) -> None:
    model = models("flux-kl")
    pipeline, executor = pipeline_of(model), StepExecutor()
    kinds: list[dict[str, Any]] = [{}, {"width": 48}, {}, {"width": 48}]
    runs = [pipeline.denoise(payload(model, 0, **kind), bucket=4) for kind in kinds]
    runs.append(pipeline.denoise(payload(model, 0), bucket=2))
    executor.advance(runs)
    assert executor.group_sizes == {2: 2, 1: 1}
    keys = [run.batch_key for run in runs]
    assert keys[0] == keys[2]
    assert keys[1] == keys[3]
    assert len(set(keys)) == 3
    for run in runs:
        run.cancel()


def test_groups_are_no_larger_than_their_bucket(models: Models) -> None:
    model = models("flux-kl")
    executor = StepExecutor()
    runs = [pipeline_of(model).denoise(payload(model, 0), bucket=2) for _ in range(5)]
    executor.advance(runs)
    assert executor.group_sizes == {2: 2, 1: 1}
    for run in runs:
        run.cancel()


def test_requests_with_other_adapters_are_not_merged(models: Models, tmp_path: Path) -> None:
    model = models("flux-kl")
    make_lora(model, tmp_path / "a.safetensors", seed=1, components=("transformer",))
    files = (LoraFile("a", tmp_path / "a.safetensors"),)
    stages = (Stage.ENCODER, Stage.DENOISER)
    pipeline = StagePipeline.load(model, stages, dtype=torch.float32, device=CPU, adapters=files)
    chosen: list[dict[str, Any]] = [{}, {"lora": "a", "lora_scale": 1.0}, {"lora": "a", "lora_scale": 0.5}]
    inputs = {"prompt": "a cat", "height": 32, "width": 32, "max_sequence_length": 16, "num_inference_steps": 2}
    payloads = [pipeline.encode({**inputs, **choice}, 1) for choice in (*chosen, chosen[1])]
    solo = [finish(pipeline.denoise(each)) for each in payloads]
    executor = StepExecutor()
    together = finish_together([pipeline.denoise(each, bucket=2) for each in payloads], executor)
    assert executor.group_sizes[2] == 2  # of two steps
    for among, alone in zip(together, solo, strict=True):
        assert difference(among, alone) < 1e-5
    assert difference(solo[0], solo[1]) > 1e-3


class Doubling(torch.nn.Module):
    """Doubles its rows; fails for a row of sevens, and for more rows than it has memory for."""

    def __init__(self, memory: int = 100) -> None:
        super().__init__()
        self.memory = memory
        self.rows: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(x))
        if len(x) > self.memory:
            raise torch.OutOfMemoryError("the device is full")
        if bool((x == 7).all(dim=1).any()):
            raise ValueError("seven")
        return x * 2


def run_of(module: torch.nn.Module, value: float, bucket: int) -> Denoising:
    """A run of two steps that calls a module in each."""

    def work() -> dict[str, object]:
        x = torch.full((1, 2), value)
        for _ in range(2):
            x = run.park(module, (x,), {}, None)
            run.step += 1
            if run.step < 2:
                run.pause()
        return {"latents": x}

    run = Denoising(work)
    run.bucket = bucket
    return run


def test_an_error_of_one_row_ends_its_run_alone() -> None:
    module, executor = Doubling(), StepExecutor()
    runs = [run_of(module, value, 4) for value in (1.0, 7.0, 2.0)]
    results = executor.advance(runs)
    assert [result.more for result in results] == [True, False, True]
    assert [type(result.error) for result in results] == [type(None), ValueError, type(None)]
    results = executor.advance([runs[0], runs[2]])
    assert [result.error for result in results] == [None, None]
    assert [float(latents_of(run)[0, 0]) for run in (runs[0], runs[2])] == [4.0, 8.0]


def test_an_error_of_the_first_row_ends_its_run_alone() -> None:
    executor = StepExecutor()
    module = Doubling()
    results = executor.advance([run_of(module, value, 4) for value in (7.0, 1.0)])
    assert [type(result.error) for result in results] == [ValueError, type(None)]


def test_out_of_memory_reaches_every_run_of_the_group_and_nothing_is_tried_again() -> None:
    module, executor = Doubling(memory=2), StepExecutor()
    runs = [run_of(module, value, 4) for value in (1.0, 2.0)]
    results = executor.advance(runs)
    assert [type(result.error) for result in results] == [torch.OutOfMemoryError] * 2
    assert module.rows.count(4) == 1


def counting(steps: int) -> Denoising:
    """A run that only counts its steps."""

    def work() -> dict[str, object]:
        run.total_steps = steps
        while True:
            run.step += 1
            if run.step == steps:
                return {}
            run.pause()

    run = Denoising(work)
    return run


@pytest.mark.parametrize(
    ("counts", "seconds", "interrupted", "taken"),
    [
        ((9,), 60.0, lambda: False, 8),  # before the last step
        ((9, 4), 60.0, lambda: False, 3),  # of any of them
        ((9,), 0.0, lambda: False, 1),
        ((9,), 60.0, lambda: True, 1),
        ((1,), 60.0, lambda: False, 1),
    ],
)
def test_short_steps_are_taken_several_at_a_time_until_something_else_is_to_be_done(
    counts: tuple[int, ...], seconds: float, interrupted: Callable[[], bool], taken: int
) -> None:
    executor = StepExecutor()
    runs = [counting(count) for count in counts]
    rounds = executor.advance_for(runs, seconds, interrupted)
    assert [each.steps for each in rounds] == [(step,) * len(runs) for step in range(1, taken + 1)]
    assert [result.more for result in rounds[-1].results] == [taken < count for count in counts]
    assert rounds == sorted(rounds, key=lambda each: each.ended)
    for run in runs:
        run.cancel()


def test_a_run_that_is_cancelled_leaves_the_others() -> None:
    module, executor = Doubling(), StepExecutor()
    runs = [run_of(module, value, 2) for value in (1.0, 2.0)]
    executor.advance(runs)
    runs[0].cancel()
    assert [result.more for result in executor.advance(runs)] == [False, False]
    assert float(latents_of(runs[1])[0, 0]) == 8.0


class Drawing(torch.nn.Module):
    """Adds noise of the global generator."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn(x.shape)


def test_a_module_that_draws_random_numbers_is_called_alone_with_those_of_its_run() -> None:
    from triptych.engines.pipelines.random_state import GlobalRngGuard

    def runs(bucket: int) -> list[Denoising]:
        made = [run_of(Drawing(), value, bucket) for value in (1.0, 2.0)]
        for seed, run in enumerate(made):
            run.surround(lambda: None, GlobalRngGuard(seed, "denoiser"), lambda: None, {})
        return made

    expected = [finish(run) for run in runs(1)]
    for among, alone in zip(finish_together(runs(4), StepExecutor()), expected, strict=True):
        assert torch.equal(among, alone)
