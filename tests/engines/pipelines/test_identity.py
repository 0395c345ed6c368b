"""Three stages in three processes make, bit for bit, the image of the plain diffusers pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, ModularPipeline

from tests.engines.results import media, same, seeded_generator
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage
from triptych.tools.families.stage_processes import CPU, StageProcesses

PROMPT = "a large red circle on the left of a blue background"
INPUTS: dict[str, dict[str, Any]] = {
    "flux": {"height": 64, "width": 48, "num_inference_steps": 4, "max_sequence_length": 32},
    "flux-kl": {"height": 64, "width": 64, "num_inference_steps": 3, "max_sequence_length": 16, "guidance_scale": 5.0},
    "wan": {
        "height": 32,
        "width": 48,
        "num_frames": 5,
        "num_inference_steps": 4,
        "max_sequence_length": 32,
        "negative_prompt": "grey",
    },
}
OWNED = {
    "flux": (
        ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"],
        ["scheduler", "transformer"],
        ["vae"],
    ),
    "wan": (["text_encoder", "tokenizer"], ["scheduler", "transformer"], ["vae"]),
}
OWNED["flux-kl"] = OWNED["flux"]


@cache
def classic(model: Path, dtype: torch.dtype) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(str(model), dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def modular(model: Path, dtype: torch.dtype) -> Any:
    pipeline = ModularPipeline.from_pretrained(str(model))
    pipeline.load_components(dtype=dtype)
    return pipeline


@pytest.mark.parametrize("family", INPUTS)
def test_three_processes_make_the_image_of_one(
    family: str, models: Callable[[str], Path], processes: StageProcesses
) -> None:
    model = models(family)
    inputs = {"prompt": PROMPT, **INPUTS[family]}
    ours, answers = processes.run(model, inputs, seed=11)
    assert [answer["components"] for answer in answers] == list(OWNED[family])
    assert len({os.getpid(), *(answer["pid"] for answer in answers)}) == 4

    whole = modular(model, torch.float32)(generator=seeded_generator(11), **inputs)
    assert same(media(ours), media(whole))
    plain = classic(model, torch.float32)(generator=seeded_generator(11), **inputs)
    assert same(media(ours), media(plain))
    other = modular(model, torch.float32)(generator=seeded_generator(12), **inputs)
    assert not same(media(ours), media(other))


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_bfloat16_is_identical_too(family: str, models: Callable[[str], Path], processes: StageProcesses) -> None:
    model = models(family)
    inputs = {"prompt": PROMPT, **INPUTS[family], "num_inference_steps": 2}
    ours, _ = processes.run(model, inputs, seed=3, dtype=torch.bfloat16)
    whole = modular(model, torch.bfloat16)(generator=seeded_generator(3), **inputs)
    assert same(media(ours), media(whole))


def test_guidance_scale_reaches_the_guider_and_the_argument_alike(
    models: Callable[[str], Path], processes: StageProcesses
) -> None:
    for family, scale in (("wan", 2.5), ("wan", 1.0), ("flux-kl", 1.5)):
        model = models(family)
        inputs = {"prompt": PROMPT, **INPUTS[family], "guidance_scale": scale}
        ours, _ = processes.run(model, inputs, seed=5)
        plain = classic(model, torch.float32)(generator=seeded_generator(5), **inputs)
        assert same(media(ours), media(plain)), (family, scale)
        default, _ = processes.run(model, {"prompt": PROMPT, **INPUTS[family]}, seed=5)
        assert not same(media(ours), media(default)), (family, scale)


def test_all_stages_in_one_process_make_it_as_well(models: Callable[[str], Path], processes: StageProcesses) -> None:
    model = models("wan")
    inputs = {"prompt": PROMPT, **INPUTS["wan"]}
    alone = StagePipeline.load(model, tuple(Stage), dtype=torch.float32, device=CPU)
    assert sorted(alone.components) == sorted(name for part in OWNED["wan"] for name in part)
    denoising = alone.denoise(alone.encode(inputs, 8))
    while denoising.advance():
        pass
    ours, _ = processes.run(model, inputs, seed=8)
    assert same(media(alone.decode(denoising.result())), media(ours))


def test_a_folder_that_a_modular_pipeline_saved_is_served(
    models: Callable[[str], Path], processes: StageProcesses, tmp_path: Path
) -> None:
    modular(models("flux"), torch.float32).save_pretrained(str(tmp_path), overwrite_modular_index=True)
    assert (tmp_path / "modular_model_index.json").is_file()
    inputs = {"prompt": PROMPT, **INPUTS["flux"]}
    saved, _ = processes.run(tmp_path, inputs, seed=2)
    plain, _ = processes.run(models("flux"), inputs, seed=2)
    assert same(media(saved), media(plain))
