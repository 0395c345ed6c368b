"""Weights in eight bits: fewer bytes, nearly the same image, adapters on top of them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, ModularPipeline
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import T5Config, T5EncoderModel

from tests.engines.families import all_families
from tests.engines.results import same
from tests.engines.stage_pipelines import Models, Pixels, Stages, expected, lora, plain
from triptych.engines.parameters.lora import LoraFile
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import ModelError, Stage
from triptych.engines.weights.placement import Placement
from triptych.engines.weights.quantization import Quantization, can_be_quantized, method_problem, nbytes
from triptych.tools.families.stage_processes import CPU

STEPS = {"num_inference_steps": 2}
KINDS = ["int8", "float8"]


def off(left: Pixels, right: Pixels) -> float:
    """The mean difference, where white is 1."""
    return float(np.abs(left.astype(np.float32) - right.astype(np.float32)).mean()) / (
        255 if left.dtype == np.uint8 else 1
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", all_families(["flux", "wan", "sana"], ("flux", "sana")))
def test_the_image_is_another_one_a_little(family: str, kind: str, models: Models) -> None:
    model = models(family)
    exact = Stages(model).make(4, **STEPS)
    ours = Stages(model, quantization=kind).make(4, **STEPS)
    assert 0 < off(ours, exact) < 0.02
    assert off(ours, Stages(model).make(5, **STEPS)) > 4 * off(ours, exact)


def test_it_is_the_image_of_a_pipeline_that_torchao_quantized(models: Models, tmp_path: Path) -> None:
    model = models("flux")
    file = lora(tmp_path, model, "a")
    ours = Stages(model, torch.bfloat16, quantization="int8", adapters=(LoraFile("a", file, 0.7),))
    pipeline: ModularPipeline = plain(model, torch.bfloat16, blocks=True)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        quantize_(getattr(pipeline, name), Int8WeightOnlyConfig())
    without = expected(pipeline, model, 6, **STEPS)
    pipeline.load_lora_weights(str(file), adapter_name="a")
    pipeline.set_adapters("a", 0.7)
    adapted = expected(pipeline, model, 6, **STEPS)
    for _ in range(2):
        assert same(ours.make(6, **STEPS), without)
        assert same(ours.make(6, lora="a", **STEPS), adapted)
    assert not same(without, adapted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_component_fall(kind: str) -> None:
    torch.manual_seed(0)
    modules = {
        "transformer": FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=64,
            num_attention_heads=8,
            joint_attention_dim=512,
            pooled_projection_dim=64,
            axes_dims_rope=(16, 24, 24),
        ),
        "text_encoder": T5EncoderModel(T5Config(vocab_size=64, d_model=512, d_kv=64, d_ff=1024, num_layers=2)),
    }
    for name, module in modules.items():
        placement = Placement(torch.bfloat16, CPU, Quantization(kind))
        before = nbytes(module.to(torch.bfloat16))
        placement.prepare(name, module)
        assert placement.read_bytes == before == sum(2 * weight.numel() for weight in {*module.parameters()})
        assert placement.held_bytes == nbytes(module) < 0.6 * before


def test_what_makes_images_of_latents_stays_as_it_is(models: Models) -> None:
    stages = Stages(models("flux"), quantization="int8")
    held = {
        stage: pipeline.placement.held_bytes / pipeline.placement.read_bytes
        for stage, pipeline in stages.pipelines.items()
    }
    assert held[Stage.ENCODER] < 1
    assert held[Stage.DENOISER] < 1
    assert held[Stage.DECODER] == 1
    assert not can_be_quantized("first_stage", AutoencoderKL())
    assert not can_be_quantized("vocoder", torch.nn.Linear(2, 2))
    assert can_be_quantized("text_encoder", torch.nn.Linear(2, 2))


def test_without_torchao_the_sentence_says_what_to_install(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ModelError, match=r'needs torchao: pip install "triptych\[quantization\]"'):
        StagePipeline.load(models("flux"), (Stage.DENOISER,), dtype=torch.float32, device=CPU, quantization="int8")


@pytest.mark.parametrize(
    ("method", "device", "there", "words"),
    [
        ("", "cpu", False, ""),
        ("torchao", "cpu", True, ""),
        ("torchao", "cpu", False, 'torchao, which is not installed: pip install "triptych[quantization]"'),
        ("bitsandbytes", "cpu", True, "computes on a CUDA device and not on cpu"),
        ("bitsandbytes", "cuda", False, "pip install bitsandbytes"),
        ("bitsandbytes", "cuda", True, ""),
        ("awq", "cuda", True, 'was quantized with "awq", which is not supported'),
    ],
)
def test_weights_that_were_quantized_need_their_package_and_device(
    method: str, device: str, there: bool, words: str
) -> None:
    said = method_problem(method, device, installed=lambda _: there)
    assert words in said
    assert bool(words) is bool(said)
