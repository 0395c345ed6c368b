"""ClassicFamily pipelines with several encoders: GLM-Image, whose language model writes first, and Kandinsky 5."""

from __future__ import annotations

import pytest
import torch

from tests.engines.classic_models import Models, expected, request
from tests.engines.results import media, same
from triptych.engines.partition.strategy import PartitionStrategy, strategy_for
from triptych.tools.families.stage_processes import StageProcesses

STAGE_COMPONENTS = {
    "glm_image": [
        ["processor", "text_encoder", "tokenizer", "vision_language_encoder"],
        # It may start from images, with which it runs its transformer before the loop: no decoder could do that.
        ["scheduler", "transformer", "vae"],
        [],
    ],
    "kandinsky5": [
        ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"],
        ["scheduler", "transformer"],
        ["vae"],
    ],
}


@pytest.mark.parametrize("family", STAGE_COMPONENTS)
def test_three_processes_make_the_image_of_one(family: str, models: Models, processes: StageProcesses) -> None:
    model = models(family)
    assert strategy_for(model) is PartitionStrategy.CLASSIC
    inputs = request(model, num_inference_steps=2)
    ours, answers = processes.run(model, inputs, seed=11)
    assert [answer["components"] for answer in answers] == STAGE_COMPONENTS[family]
    assert same(media(ours), expected(model, inputs, 11))
    assert not same(media(ours), expected(model, inputs, 12))
    assert not same(media(ours), expected(model, {**inputs, "prompt": "a blue ship"}, 11))


@pytest.mark.parametrize("family", STAGE_COMPONENTS)
def test_bfloat16_without_guidance_is_identical_too(family: str, models: Models, processes: StageProcesses) -> None:
    model = models(family)
    inputs = request(model, num_inference_steps=1, guidance_scale=1.0)
    ours, _ = processes.run(model, inputs, seed=3, dtype=torch.bfloat16)
    assert same(media(ours), expected(model, inputs, 3, torch.bfloat16))
