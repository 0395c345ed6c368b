"""Tensors of a request do what they do in plain diffusers, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load

from tests.engines.classic_models import Models, finish, plain, request
from tests.engines.pipelines.test_component_settings import blocks, crossed, modular, served, stage
from tests.engines.results import media, same, seeded_generator
from triptych.engines.parameters.declarations import tensor_inputs_of_call
from triptych.engines.parameters.schema import Parameter, ParameterKind, Signature
from triptych.engines.parameters.serving_config import ServingConfig
from triptych.engines.parameters.validation import ParameterError, check_tensors
from triptych.engines.stages import InputError, Stage
from triptych.roles.head.output import resolve_output
from triptych.roles.media.decoded import MediaError, to_media
from triptych.roles.media.writers import default_format, encode
from triptych.roles.messages.common import Output, Tensors, Upload

SIZE = {"height": 64, "width": 64, "num_inference_steps": 2}
FLUX = {**SIZE, "max_sequence_length": 16}


def theirs(model: Any, inputs: dict[str, Any], seed: int) -> Any:
    return media(plain(model, torch.float32)(**inputs, generator=seeded_generator(seed)))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(99))


def embeds(model: Any, prompt: str, **more: Any) -> tuple[Any, ...]:
    with torch.no_grad():
        return tuple(plain(model, torch.float32).encode_prompt(prompt, **more))


def choices(model: Any) -> tuple[str, ...]:
    parameter = stage(model, Stage.ENCODER).signature.parameter("tensors")
    assert parameter is not None
    assert parameter.kind is ParameterKind.TENSORS
    return parameter.choices


def test_flux(models: Models) -> None:
    model = models("flux-kl")
    pipeline = plain(model, torch.float32)
    assert choices(model) == ("latents", "pooled_prompt_embeds", "prompt_embeds")
    shape = pipeline.prepare_latents(1, pipeline.transformer.config.in_channels // 4, 64, 64, torch.float32, "cpu",
                                     seeded_generator(1))[0].shape  # fmt: skip
    encoded = embeds(model, "a cat", prompt_2=None, max_sequence_length=16)
    made = {"prompt_embeds": encoded[0], "pooled_prompt_embeds": encoded[1]}
    latents = {"latents": noise(*shape)}
    assert same(served(model, {**FLUX, **latents, "prompt": "a ship"}, 3),
                theirs(model, {**FLUX, **latents, "prompt": "a ship"}, 4))  # fmt: skip
    ours = served(model, {**FLUX, **latents, **made}, 3)
    assert same(ours, theirs(model, {**FLUX, **latents, **made}, 3))
    assert same(ours, served(model, {**FLUX, **latents, "prompt": "a cat"}, 3))
    with pytest.raises(InputError, match="tensors must have pooled_prompt_embeds beside prompt_embeds"):
        stage(model, Stage.ENCODER).encode({**FLUX, "prompt_embeds": made["prompt_embeds"]}, 3)
    with pytest.raises(InputError, match="takes no hint"):
        stage(model, Stage.ENCODER).encode({**FLUX, "prompt": "x", "hint": noise(1)}, 3)


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
    encoder = stage(model, Stage.ENCODER)
    state = encoder.encode({**SIZE, "prompt": "x", "latents": latents}, 3)
    rebound = encoder.rebind(state, {**SIZE, "prompt": "x", "num_inference_steps": 3}, 4)
    assert torch.equal(rebound["latents"], latents)  # type: ignore[arg-type]


def test_a_classic_pipeline(models: Models) -> None:
    model = models("pixart")
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


def latents_of(model: Any, inputs: dict[str, Any], seed: int) -> torch.Tensor:
    state = crossed(stage(model, Stage.ENCODER).encode({**inputs, "output_type": "latent"}, seed))
    state = crossed(finish(stage(model, Stage.DENOISER).denoise(state)))
    made = stage(model, Stage.DECODER).decode(state)
    file = encode(to_media(made), "safetensors", 0.0)
    assert default_format(to_media(made)) == "safetensors"
    (latents,) = load(file).values()
    return latents


def test_latents_of_blocks_are_those_of_diffusers(models: Models) -> None:
    model = models("flux-kl")
    inputs = {**FLUX, "prompt": "a ship"}
    with torch.no_grad():
        theirs = blocks(model)(**inputs, generator=seeded_generator(3), output="latents")
        assert torch.equal(
            theirs, blocks(model)(**inputs, generator=seeded_generator(3), output_type="latent", output="images")
        )
    assert torch.equal(latents_of(model, inputs, 3), theirs)


def test_latents_of_one_request_begin_another(models: Models) -> None:
    model = models("sdxl")
    inputs = {**SIZE, "prompt": "a ship"}
    guided = {"guidance_scale": blocks(model).guider.config.guidance_scale}
    with torch.no_grad():
        first = blocks(model)(**inputs, generator=seeded_generator(3), output="latents")
    ours = latents_of(model, {**inputs, **guided}, 3)
    assert torch.equal(ours, first)
    again = {**inputs, "prompt": "a cat"}
    assert same(served(model, {**again, **guided, "latents": ours}, 5), modular(model, {**again, "latents": first}, 5))


def test_latents_of_a_classic_pipeline_are_those_of_diffusers(models: Models) -> None:
    model = models("pixart")
    inputs = request(model, num_inference_steps=2)
    first = plain(model, torch.float32)(**inputs, generator=seeded_generator(3), output_type="latent").images
    ours = latents_of(model, inputs, 3)
    assert torch.equal(ours, first)
    again = {**inputs, "prompt": "a cat"}
    assert same(served(model, {**again, "latents": ours}, 5), theirs(model, {**again, "latents": first}, 5))


def test_latents_are_put_into_a_file_that_can_hold_them() -> None:
    latent = {"output_type": "latent"}
    assert resolve_output(Output(), Signature(), {}, latent) == Output("safetensors")
    with pytest.raises(ParameterError, match="output_type cannot be latent beside a file of the format mp4"):
        resolve_output(Output("mp4"), Signature(), {}, latent)
    with pytest.raises(ParameterError, match="output_type must be latent, or left out"):
        resolve_output(Output(), Signature(), {}, {"output_type": "pt"})
    with pytest.raises(MediaError, match="latents, which a file of the format png cannot hold"):
        encode(to_media({"latents": noise(1, 2)}), "png", 0.0)


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

    assert tensor_inputs_of_call(call) == ("latents", "noise")


def test_a_request_gives_tensors_that_the_pipeline_takes() -> None:
    def given(*names: str, **more: object) -> dict[str, object]:
        return {"tensors": Tensors(Upload(f"{'a' * 64}.safetensors", 8), names), **more}

    taken = Parameter("tensors", ParameterKind.TENSORS, choices=("latents", "prompt_embeds"))
    assert check_tensors(given("latents"), (), taken) == {}
    assert check_tensors(given("prompt_embeds", prompt="x"), (), taken) == {"prompt": "prompt_embeds"}
    with pytest.raises(
        ParameterError, match="tensors has hint, which the pipeline does not take; it takes latents, prompt"
    ):
        check_tensors(given("hint"), (), taken)
    with pytest.raises(ParameterError, match="which replaces prompt"):
        check_tensors(given("prompt_embeds"), ("prompt",), None)


def test_a_serving_config_asks_for_no_prompt_beside_embeddings() -> None:
    parameters = [
        Parameter("prompt", ParameterKind.TEXT, required=True),
        Parameter("negative_prompt", ParameterKind.TEXT),
        Parameter("tensors", ParameterKind.TENSORS, choices=("latents", "negative_prompt_embeds", "prompt_embeds")),
    ]
    serving_config = ServingConfig(name="m", defaults={"negative_prompt": "grey"})
    tensors = Tensors(Upload("a.safetensors", 8), ("negative_prompt_embeds", "prompt_embeds"))
    assert serving_config.apply({"tensors": tensors}, parameters) == {"tensors": tensors}
    with pytest.raises(ParameterError, match="prompt is required"):
        serving_config.apply({"tensors": Tensors(Upload("a.safetensors", 8), ("latents",))}, parameters)
    with pytest.raises(ParameterError, match="tensors must be a safetensors file"):
        serving_config.apply({"tensors": "x"}, parameters)
