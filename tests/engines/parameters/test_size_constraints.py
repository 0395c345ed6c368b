"""Sizes and numbers of frames that pipelines say that they can make, and make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.engines.results import media
from triptych.engines.parameters.schema import Parameter, ParameterKind
from triptych.engines.parameters.serving_config import ParameterError, ServingConfig
from triptych.engines.parameters.size_constraints import size_multiple, with_size_constraints
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage

CPU = torch.device("cpu")
FAMILIES = ("flux", "flux2", "wan", "qwenimage", "sd3", "sdxl", "ltx", "z_image", "ernie_image")


@pytest.mark.parametrize(("default", "every"), [(None, 4), (81, 4), (132, 0)])
def test_numbers_of_frames_follow_from_the_vae_unless_the_default_contradicts(default: int | None, every: int) -> None:
    frames, prompt = Parameter("num_frames", ParameterKind.INTEGER, default), Parameter("prompt", ParameterKind.TEXT)
    pipeline = SimpleNamespace(vae_scale_factor_temporal=4)
    assert [item.every for item in with_size_constraints((frames, prompt), pipeline)] == [every, 0]
    assert with_size_constraints((frames, prompt), SimpleNamespace()) == (frames, prompt)


@pytest.mark.parametrize(
    ("factor", "transformer", "vae", "step"),
    [
        (8, {"patch_size": 1, "in_channels": 64}, {"latent_channels": 16, "block_out_channels": [1, 2, 4, 8]}, 16),
        (8, {"patch_size": 2, "in_channels": 64}, {"z_dim": 16}, 16),
        (8, {"patch_size": [1, 2, 2], "in_channels": 16}, {"z_dim": 16}, 16),
        (32, {"patch_size": 1, "in_channels": 128}, {"latent_channels": 128}, 32),
        (16, {"patch_size": 1, "in_channels": 64}, {"latent_channels": 16, "block_out_channels": [1, 2, 4, 8]}, 16),
        (8, {"in_channels": 4}, {"latent_channels": 4}, 8),
    ],
    ids=["flux", "qwen-image", "wan", "ltx", "ernie-image", "sdxl"],
)
def test_sizes_follow_from_the_vae_and_what_a_token_is(
    factor: int, transformer: dict[str, object], vae: dict[str, object], step: int
) -> None:
    parts = {"transformer": SimpleNamespace(config=transformer), "vae": SimpleNamespace(config=vae)}
    assert size_multiple(SimpleNamespace(vae_scale_factor=factor, **parts)) == step


@pytest.mark.parametrize(
    "family", ["flux", "wan", "qwenimage", "sd3", "sdxl", "ltx", "z_image", "ernie_image", "flux2"]
)
def test_a_size_that_is_taken_is_made_and_the_next_smaller_step_is_not_one(
    family: str, models: Callable[[str], Path]
) -> None:
    pipeline = StagePipeline.load(models(family), tuple(Stage), dtype=torch.float32, device=CPU)
    parameter = pipeline.signature.parameter("height")
    assert parameter
    step = parameter.multiple_of
    height, width = step * (64 // step + 1), step * max(64 // step, 1)
    inputs = {"prompt": "a ship", "height": height, "width": width, "num_inference_steps": 1}
    if every := getattr(pipeline.signature.parameter("num_frames"), "every", 0):
        inputs["num_frames"] = 1 + every
    denoising = pipeline.denoise(pipeline.encode(inputs, 1))
    while denoising.advance():
        pass
    assert media(pipeline.decode(denoising.result())).shape[-3:-1] == (height, width)
    taken = ServingConfig().apply({"height": height}, [parameter])
    assert taken == {"height": height}
    with pytest.raises(ParameterError, match=f"a multiple of {step}"):
        ServingConfig().apply({"height": height - step // 2}, [parameter])


def test_the_serving_config_goes_before_sizes_that_were_worked_out() -> None:
    height = Parameter("height", ParameterKind.INTEGER, multiple_of=16)
    assert ServingConfig(ranges={"height": (64, 128, 8)}).limits(height) == (64, 128, 8)
    assert ServingConfig(ranges={"height": (64, 128)}).limits(height) == (64, 128, 16)
    assert ServingConfig().limits(height)[2] == 16


def test_a_number_of_frames_that_cannot_be_made_is_refused_with_those_that_can() -> None:
    frames = [Parameter("num_frames", ParameterKind.INTEGER, every=4)]
    assert ServingConfig().apply({"num_frames": 81}, frames) == {"num_frames": 81}
    with pytest.raises(ParameterError, match="1 more than a multiple of 4, such as 77 or 81"):
        ServingConfig().apply({"num_frames": 80}, frames)
