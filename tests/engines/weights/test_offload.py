"""Weights that rest on the host: what is computed is the same, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderOobleck, FluxTransformer2DModel, QwenImageTransformer2DModel
from transformers import T5Config, T5EncoderModel

from tests.engines.classic_models import request
from tests.engines.families import all_families
from tests.engines.results import media, same
from tests.engines.stage_pipelines import Models, Stages, lora
from triptych.engines.parameters.lora import LoraFile
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import ModelError, Stage
from triptych.engines.steps.denoising import Denoising
from triptych.engines.weights.offload import ModelOffloader, Offload, offload, offloads_by_block
from triptych.engines.weights.quantization import Quantization, quantize
from triptych.tools.families.stage_processes import CPU

STEPS = {"num_inference_steps": 2}
HOW = ["model", "group"]
META = torch.device("meta")


def finish(denoising: Denoising) -> dict[str, object]:
    while denoising.advance():
        pass
    return denoising.result()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", all_families(["flux", "wan", "sdxl", "cogvideox", "sana"], ("flux", "sana")))
def test_the_image_stays_the_same(family: str, how: str, models: Models) -> None:
    model = models(family)
    exact = Stages(model).make(7, **STEPS)
    ours = Stages(model, offload=how)
    for _ in range(2):
        assert same(ours.make(7, **STEPS), exact)


@pytest.mark.parametrize("how", HOW)
def test_with_all_stages_in_one_process_and_requests_that_take_turns(how: str, models: Models) -> None:
    model = models("wan")
    loaded = [
        StagePipeline.load(model, tuple(Stage), dtype=torch.float32, device=CPU, offload=x) for x in ("none", how)
    ]
    made = []
    for pipeline in loaded:
        states = [pipeline.encode(request(model, num_inference_steps=2), seed) for seed in (1, 2)]
        turns = [pipeline.denoise(state) for state in states]
        running = list(turns)
        while running:
            running = [denoising for denoising in running if denoising.advance()]
            # Between two steps of another one.
            pipeline.encode(request(model), 3)
        made.append([media(pipeline.decode(denoising.result())) for denoising in turns])
    assert all(same(*pair) for pair in zip(*made, strict=True))


@pytest.mark.parametrize("how", HOW)
def test_with_eight_bits_and_adapters(how: str, models: Models, tmp_path: Path) -> None:
    model = models("flux")
    options: dict[str, Any] = {"adapters": (LoraFile("a", lora(tmp_path, model, "a")),), "quantization": "int8"}
    exact, ours = Stages(model, **options), Stages(model, offload=how, **options)
    for asked in ({"lora": "a"}, {}, {"lora": "a", "lora_scale": -1.0}):
        assert same(ours.make(7, **STEPS, **asked), exact.make(7, **STEPS, **asked))


def test_a_model_without_layers_to_move_says_so() -> None:
    with pytest.raises(ModelError, match=r'The vae is a AutoencoderOobleck, which has no offload = "group"'):
        offload({"vae": AutoencoderOobleck(encoder_hidden_size=8, decoder_channels=8)}, Offload.GROUP, CPU)


def test_transformers_go_block_by_block_and_others_layer_by_layer() -> None:
    with META:
        flux, qwen = FluxTransformer2DModel(), QwenImageTransformer2DModel(num_layers=8)
        text, vae = T5EncoderModel(T5Config()), AutoencoderKL()
    assert [offloads_by_block(module) for module in (flux, qwen, text, vae)] == [True, True, False, False]


# One component at a time ------------------------------------------------------------------------------------------


class Two(torch.nn.Module):
    """With a method that only its inner modules hear of, as text encoders have them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)  # type: ignore[no-any-return]

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def test_a_component_comes_when_something_of_it_is_called_and_goes_for_another() -> None:
    modules = {"one": Two(), "two": Two()}
    one, two = modules.values()
    offloader = ModelOffloader(modules, META)
    x = torch.ones(1, 2, device=META)

    def on_device() -> list[str]:
        return [name for name, module in modules.items() if module.inner.weight.device == META]

    assert on_device() == []
    for call in (one.features, one, one.inner):
        call(x)
        assert on_device() == ["one"] == [offloader.present]
    two(x)
    assert on_device() == ["two"] == [offloader.present]
    one.inner(x)
    assert on_device() == ["one"] == [offloader.present]
    offloader.unload()
    offloader.unload()
    assert on_device() == []
    assert offloader.present == ""


def test_weights_go_back_to_the_memory_they_came_from() -> None:
    class Tied(Two):
        def __init__(self) -> None:
            super().__init__()
            self.again = torch.nn.Linear(2, 2)
            self.again.weight = self.inner.weight
            self.recurrent = torch.nn.LSTM(2, 2)

    modules: dict[str, torch.nn.Module] = {
        "tied": Tied(), "eight bits": torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False)),
    }  # fmt: skip
    quantize("transformer", modules["eight bits"], Quantization.INT8, CPU)
    before = {name: state(module) for name, module in modules.items()}
    offloader = ModelOffloader(modules, META)
    for name in modules:
        offloader.onload(name)
        assert {weight.device for weight in modules[name].parameters()} == {META}
    offloader.unload()
    # Of a device without memory nothing could be copied back.
    assert {name: state(module) for name, module in modules.items()} == before
    modules["tied"].recurrent(torch.ones(1, 1, 2))


def state(module: torch.nn.Module) -> dict[str, tuple[int, list[float]]]:
    """Where each weight is, and what it is."""
    inner = {name: getattr(weight, "qdata", weight) for name, weight in module.named_parameters(remove_duplicate=False)}
    return {name: (weight.data_ptr(), weight.flatten().tolist()) for name, weight in inner.items()}


def test_a_component_that_does_not_fit_leaves_nothing_on_the_device() -> None:
    class Large(Two):
        def to(self, device: Any) -> Any:  # type: ignore[override]
            self.inner.weight = torch.nn.Parameter(self.inner.weight.to(device))
            raise torch.OutOfMemoryError("CUDA out of memory.")

    modules: dict[str, torch.nn.Module] = {"large": Large(), "small": Two()}
    before = state(modules["large"])
    offloader = ModelOffloader(modules, META)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            offloader.onload("large")
        assert (offloader.present, state(modules["large"])) == ("", before)
    offloader.onload("small")
    assert offloader.present == "small"


def test_what_was_written_on_the_device_comes_back() -> None:
    module = Two()
    offloader = ModelOffloader({"one": module}, torch.device("cpu", 0))
    offloader.onload("one")
    with torch.no_grad():
        module.inner.weight.fill_(3)
    module.register_buffer("made", torch.ones(2))
    offloader.unload()
    assert module.inner.weight.eq(3).all()
    assert module.made.eq(1).all()


def test_inputs_that_are_on_the_host_come_along() -> None:
    modules = {"one": Two()}
    ModelOffloader(modules, META)
    assert modules["one"](torch.ones(1, 2)).device.type == "meta"


@pytest.mark.parametrize(("family", "stage"), [("flux", Stage.ENCODER), ("sana", Stage.DENOISER)])
def test_the_pipeline_computes_on_the_device_it_was_given(family: str, stage: Stage, models: Models) -> None:
    model = models(family)
    for how in HOW:
        part = StagePipeline.load(model, (stage,), dtype=torch.float32, device=torch.device("cpu", 0), offload=how)
        pipeline = part._runner.pipeline
        assert pipeline._execution_device == torch.device("cpu", 0)
        assert {name for name in part.components if hasattr(getattr(pipeline, name), "state_dict")}


def test_nothing_is_left_on_the_device_however_a_stage_ends(models: Models) -> None:
    model = models("flux")
    part = StagePipeline.load(model, tuple(Stage), dtype=torch.float32, device=CPU, offload="model")
    offloader = part._offloader
    assert offloader is not None
    state = part.encode(request(model), 1)
    assert offloader.present == ""
    denoising = part.denoise(state)
    denoising.advance()
    assert offloader.present == "transformer"
    denoising.cancel()
    assert offloader.present == ""
    denoising = part.denoise({**state, "prompt_embeds": torch.ones(1, 3)})
    with pytest.raises(Exception):  # noqa: B017  whatever the transformer makes of that
        denoising.advance()
    assert offloader.present == ""
    part.decode(finish(part.denoise(state)))
    assert offloader.present == ""
