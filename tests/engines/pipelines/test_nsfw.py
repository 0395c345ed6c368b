"""What the safety checker of a pipeline finds is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from tests.engines.classic_models import Models, expected, finish, part, request
from tests.engines.results import media, same
from triptych.engines.parameters.media import NSFW
from triptych.engines.stages import Stage
from triptych.roles.media.decoded import nsfw_flag

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def with_checker(model: Path, into: Path, concepts: float) -> Path:
    shutil.copytree(model, into)
    shutil.rmtree(into / "controlnet")
    config = CLIPConfig(
        text_config={**TINY, "vocab_size": 64}, vision_config={**TINY, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(concepts)
    checker.save_pretrained(into / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(into / "feature_extractor")
    index = json.loads((into / "model_index.json").read_text())
    del index["controlnet"]
    index |= {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (into / "model_index.json").write_text(json.dumps(index))
    return into


@pytest.mark.parametrize("found", [True, False])
def test_what_the_safety_checker_finds_is_beside_the_black_image(found: bool, models: Models, tmp_path: Path) -> None:
    # Nothing is farther from a concept than one: above its weight nothing is found, below it everything.
    model = with_checker(models("sd_controlnet"), tmp_path / "checked", -2.0 if found else 2.0)
    inputs = request(model, num_inference_steps=1)
    encoder, denoiser, decoder = (part(model, stage) for stage in Stage)
    made = decoder.decode(finish(denoiser.denoise(encoder.encode(inputs, 3))))
    assert made[NSFW] == [found]
    assert nsfw_flag(made) is found
    assert same(media(made), expected(model, inputs, 3))
    assert media(made).any() != found
