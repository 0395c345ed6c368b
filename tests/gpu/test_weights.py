"""Weights on a GPU: in eight bits, and resting on the host. What is computed is the same, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpu.requirements import require

require()

from tests.engines.classic_models import finish, request
from tests.engines.results import media, same, seeded_generator
from tests.engines.stage_pipelines import Models
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage
from triptych.engines.weights.placement import OutOfDeviceMemoryError

STEPS = {"num_inference_steps": 2}
GIB = 1 << 30


def load(model: Path, device: torch.device, **options: Any) -> StagePipeline:
    return StagePipeline.load(model, tuple(Stage), dtype=torch.float32, device=device, **options)


def make(part: StagePipeline, model: Path, seed: int = 1) -> np.ndarray[Any, Any]:
    return media(part.decode(finish(part.denoise(part.encode(request(model, **STEPS), seed)))))


def weights(part: StagePipeline) -> list[torch.Tensor]:
    modules = (getattr(part._runner.pipeline, name) for name in part.components)
    return [weight for module in modules if isinstance(module, torch.nn.Module) for weight in module.parameters()]


def test_three_stages_make_the_image_of_the_plain_pipeline(device: torch.device, models: Models) -> None:
    from diffusers import FluxPipeline

    model = models("flux")
    plain = FluxPipeline.from_pretrained(str(model), dtype=torch.float32).to(device)
    plain.set_progress_bar_config(disable=True)
    expected = media(plain(**request(model, **STEPS), generator=seeded_generator(1), output_type="pil"))
    for _ in range(2):
        assert same(make(load(model, device), model), expected)


@pytest.mark.parametrize("how", ["model", "group"])
@pytest.mark.parametrize("family", ["flux", "wan", "sdxl", "sana"])
def test_offloaded_weights_are_on_the_host(device: torch.device, family: str, how: str, models: Models) -> None:
    model = models(family)
    exact, resting = load(model, device), load(model, device, offload=how)
    assert {weight.device for weight in weights(exact)} == {device}
    for seed in (1, 2):
        assert same(make(resting, model, seed), make(exact, model, seed))
        assert {weight.device.type for weight in weights(resting)} == {"cpu"}


@pytest.mark.parametrize("how", ["none", "model", "group"])
@pytest.mark.parametrize("quantization", ["int8", "float8"])
def test_in_eight_bits(device: torch.device, quantization: str, how: str, models: Models) -> None:
    pytest.importorskip("torchao")
    if quantization == "float8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this GPU has no float8")
    model = models("flux")
    exact = make(load(model, device), model).astype(int)
    part = load(model, device, quantization=quantization)
    assert part.placement.held_bytes < part.placement.read_bytes
    made = make(part, model)
    assert np.abs(made.astype(int) - exact).mean() < 255 * 0.05
    assert same(make(load(model, device, quantization=quantization, offload=how), model), made)


def test_an_offloaded_component_leaves_the_gpu_to_others(gpu: torch.device, models: Models) -> None:
    from triptych.roles.worker.devices import free_memory

    model = models("flux")
    before = free_memory(gpu)
    part = load(model, gpu, offload="model")
    make(part, model)
    assert free_memory(gpu) - before < 64 << 20  # workspaces of cuBLAS
    assert torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu) < 64 << 20


def test_weights_that_do_not_fit_say_so(gpu: torch.device, models: Models) -> None:
    model = models("flux")
    from triptych.roles.worker.devices import free_memory

    free_memory(gpu)
    torch.cuda.set_per_process_memory_fraction(1e-6, gpu)
    try:
        with pytest.raises(
            OutOfDeviceMemoryError, match=r"does not fit on cuda:0: with it the weights take .* are free"
        ):
            load(model, gpu)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu)
    assert make(load(model, gpu), model).size


def test_weights_that_slept_on_the_host_compute_the_same(device: torch.device, models: Models) -> None:
    model = models("flux")
    part = load(model, device)
    expected, held = make(part, model), torch.cuda.memory_allocated(device)
    part.to_host()
    assert all(weight.is_pinned() for weight in weights(part))
    assert torch.cuda.memory_allocated(device) < held // 4
    part.to_device()
    assert same(make(part, model), expected)
