"""What a run draws from torch's global generators follows from its seed alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import cast

import torch

from tests.engines.classic_models import Models, finish, load, request
from triptych.engines.pipelines.random_state import GlobalRngGuard, seeded_generator
from triptych.engines.stages import Stage
from triptych.engines.steps.denoising import Denoising


def drawn(rng: GlobalRngGuard, count: int) -> list[float]:
    with rng:
        values: list[float] = torch.rand(count).tolist()
    return values


def test_a_run_draws_what_it_would_draw_alone() -> None:
    alone = drawn(GlobalRngGuard(7, "denoiser"), 6)
    one, other = GlobalRngGuard(7, "denoiser"), GlobalRngGuard(8, "denoiser")
    mixed = drawn(one, 2)
    drawn(other, 5)
    torch.rand(3)
    mixed += drawn(one, 4)
    assert mixed == alone
    assert drawn(GlobalRngGuard(8, "denoiser"), 6) != alone


def test_what_is_drawn_is_unrelated_to_the_noise_of_the_request_and_to_other_stages() -> None:
    made = [
        drawn(GlobalRngGuard(7, "encoder"), 4),
        drawn(GlobalRngGuard(7, "denoiser"), 4),
        torch.rand(4, generator=seeded_generator(7)).tolist(),
    ]
    assert made[0] != made[1] != made[2] != made[0]


def test_the_generators_of_others_are_left_as_they_were() -> None:
    before = torch.get_rng_state()
    drawn(GlobalRngGuard(7, "encoder"), 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_that_draws_or_seeds_is_told_from_one_that_does_neither() -> None:
    def sample(draws: int) -> None:
        torch.manual_seed(11)
        torch.rand(draws)

    with GlobalRngGuard(3, "encoder") as rng:
        torch.rand(3, generator=seeded_generator(11))
    assert not rng.was_used
    for draws in (2, 2, 0, 3):
        with GlobalRngGuard(3, "encoder") as rng:
            sample(draws)
        assert rng.was_used
    with GlobalRngGuard(3, "encoder") as rng:
        torch.rand(1)
    assert rng.was_used


def test_a_scheduler_that_takes_no_generator_follows_the_seed(models: Models, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(models("flux"), model)
    settings = model / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "stochastic_sampling": True}))
    pipeline = load(model, Stage.ENCODER, Stage.DENOISER)
    inputs = request(model, num_inference_steps=3)

    def begun(seed: int) -> Denoising:
        return pipeline.denoise(pipeline.encode(inputs, seed))

    alone = [cast(torch.Tensor, finish(begun(seed))["latents"]) for seed in (3, 4)]
    one, other = begun(3), begun(4)
    while one.advance() | other.advance():
        torch.rand(1)
    assert torch.equal(one.result()["latents"], alone[0])
    assert torch.equal(other.result()["latents"], alone[1])
    assert not torch.equal(*alone)
