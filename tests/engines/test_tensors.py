"""Tensors of a request do what they do in plain diffusers, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engines.card import ModelCard
from engines.checks import CardError, check_tensors
from engines.panels import InputError, Panel
from engines.parameters import Kind, Parameter
from engines.vocabulary import tensors_of_call
from roles.messages.work import Tensors, Upload
from tests.engines.classics import Models, plain, request
from tests.engines.results import media, same, seeded
from tests.engines.test_settings import panel, served

SIZE = {"height": 64, "width": 64, "num_inference_steps": 2}
FLUX = {**SIZE, "max_sequence_length": 16}


def theirs(model: Any, inputs: dict[str, Any], seed: int) -> Any:
    return media(plain(model, torch.float32)(**inputs, generator=seeded(seed)))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(99))


def embeds(model: Any, prompt: str, **more: Any) -> tuple[Any, ...]:
    with torch.no_grad():
        return tuple(plain(model, torch.float32).encode_prompt(prompt, **more))


def choices(model: Any) -> tuple[str, ...]:
    parameter = panel(model, Panel.ENCODER).signature.parameter("tensors")
    assert parameter is not None
    assert parameter.kind is Kind.TENSORS
    return parameter.choices


def test_flux(models: Models) -> None:
    model = models("flux-kl")
    pipeline = plain(model, torch.float32)
    assert choices(model) == ("latents", "pooled_prompt_embeds", "prompt_embeds")
    shape = pipeline.prepare_latents(1, pipeline.transformer.config.in_channels // 4, 64, 64, torch.float32, "cpu",
                                     seeded(1))[0].shape  # fmt: skip
    encoded = embeds(model, "a cat", prompt_2=None, max_sequence_length=16)
    made = {"prompt_embeds": encoded[0], "pooled_prompt_embeds": encoded[1]}
    latents = {"latents": noise(*shape)}
    assert same(served(model, {**FLUX, **latents, "prompt": "a ship"}, 3),
                theirs(model, {**FLUX, **latents, "prompt": "a ship"}, 4))  # fmt: skip
    ours = served(model, {**FLUX, **latents, **made}, 3)
    assert same(ours, theirs(model, {**FLUX, **latents, **made}, 3))
    assert same(ours, served(model, {**FLUX, **latents, "prompt": "a cat"}, 3))
    with pytest.raises(InputError, match="tensors must have pooled_prompt_embeds beside prompt_embeds"):
        panel(model, Panel.ENCODER).encode({**FLUX, "prompt_embeds": made["prompt_embeds"]}, 3)
    with pytest.raises(InputError, match="takes no hint"):
        panel(model, Panel.ENCODER).encode({**FLUX, "prompt": "x", "hint": noise(1)}, 3)


def test_sdxl(models: Models) -> None:
    model = models("sdxl")
    inputs = {**SIZE, "guidance_scale": 3.0}
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    made = dict(zip(names, embeds(model, "a cat", negative_prompt="grey"), strict=True))
    assert set(names) | {"latents"} <= set(choices(model))
    scale = plain(model, torch.float32).vae_scale_factor
    channels = plain(model, torch.float32).unet.config.in_channels
    latents = {"latents": noise(1, channels, 64 // scale, 64 // scale)}
    ours = served(model, {**inputs, **made, **latents}, 3)
    assert same(ours, theirs(model, {**inputs, **made, **latents}, 3))
    assert same(ours, served(model, {**inputs, **latents, "prompt": "a cat", "negative_prompt": "grey"}, 4))
    # Without negative ones, they are those of no negative prompt.
    only = {name: value for name, value in made.items() if not name.startswith("negative")}
    assert same(served(model, {**inputs, **only}, 3), theirs(model, {**inputs, **only}, 3))


def test_what_an_encoder_made_is_another_requests_with_the_same_tensors(models: Models) -> None:
    model = models("sdxl")
    unet = plain(model, torch.float32).unet
    latents = noise(1, unet.config.in_channels, 32, 32)
    encoder = panel(model, Panel.ENCODER)
    state = encoder.encode({**SIZE, "prompt": "x", "latents": latents}, 3)
    renewed = encoder.renew(state, {**SIZE, "prompt": "x", "num_inference_steps": 3}, 4)
    assert torch.equal(renewed["latents"], latents)  # type: ignore[arg-type]


def test_a_classic_pipeline(classic_models: Models) -> None:
    model = classic_models("pixart")
    pipeline = plain(model, torch.float32)
    inputs = request(model, num_inference_steps=2, guidance_scale=2.0)
    del inputs["prompt"]
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    made = dict(zip(names, embeds(model, "a cat", negative_prompt="grey"), strict=True))
    assert choices(model) == tuple(sorted(("latents", *names)))
    side = inputs["height"] // pipeline.vae_scale_factor
    given = {**inputs, **made, "latents": noise(1, pipeline.transformer.config.in_channels, side, side)}
    before = given["latents"].clone()
    ours = served(model, given, 3)
    # The pipeline's own default of the negative prompt cannot stand beside embeddings.
    assert same(ours, theirs(model, {"negative_prompt": None, **given}, 4))
    assert not same(ours, theirs(model, {"negative_prompt": None, **inputs, **made}, 4))
    assert torch.equal(given["latents"], before)


def test_which_inputs_are_tensors() -> None:
    def call(
        self: Any,
        prompt: str,
        latents: torch.Tensor | None = None,
        adapter_embeds: list[torch.Tensor] | None = None,
        image: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None: ...

    assert tensors_of_call(call) == ("latents", "noise")


def test_a_request_gives_tensors_that_the_pipeline_takes() -> None:
    def given(*names: str, **more: object) -> dict[str, object]:
        return {"tensors": Tensors(Upload(f"{'a' * 64}.safetensors", 8), names), **more}

    taken = Parameter("tensors", Kind.TENSORS, choices=("latents", "prompt_embeds"))
    assert check_tensors(given("latents"), (), taken) == {}
    assert check_tensors(given("prompt_embeds", prompt="x"), (), taken) == {"prompt": "prompt_embeds"}
    with pytest.raises(CardError, match="tensors has hint, which the pipeline does not take; it takes latents, prompt"):
        check_tensors(given("hint"), (), taken)
    with pytest.raises(CardError, match="takes the place of prompt"):
        check_tensors(given("prompt_embeds"), ("prompt",), None)


def test_a_card_asks_for_no_prompt_beside_what_stands_in_its_place() -> None:
    parameters = [
        Parameter("prompt", Kind.TEXT, required=True),
        Parameter("negative_prompt", Kind.TEXT),
        Parameter("tensors", Kind.TENSORS, choices=("latents", "negative_prompt_embeds", "prompt_embeds")),
    ]
    card = ModelCard(name="m", defaults={"negative_prompt": "grey"})
    tensors = Tensors(Upload("a.safetensors", 8), ("negative_prompt_embeds", "prompt_embeds"))
    assert card.apply({"tensors": tensors}, parameters) == {"tensors": tensors}
    with pytest.raises(CardError, match="prompt is required"):
        card.apply({"tensors": Tensors(Upload("a.safetensors", 8), ("latents",))}, parameters)
    with pytest.raises(CardError, match="tensors must be a safetensors file"):
        card.apply({"tensors": "x"}, parameters)
