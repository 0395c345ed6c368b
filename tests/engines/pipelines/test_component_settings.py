"""What a request sets of the parts of a pipeline gives the image that the same settings give in plain diffusers."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ModularPipeline, guiders
from diffusers.hooks import LayerSkipConfig
from msgspec.structs import replace
from safetensors.torch import save_file

from tests.engines.classic_models import Models, expected, finish, plain, request
from tests.engines.results import media, same, seeded_generator
from triptych.engines.codec.codec import pack, unpack
from triptych.engines.model_options import DEFAULTS, ComponentOptions, EmbeddingFile, ModelOptions
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import InputError, ModelError, Stage
from triptych.tools.families.stage_processes import CPU

SDXL = {"prompt": "a red ship", "height": 64, "width": 64, "num_inference_steps": 4, "negative_prompt": "grey"}
WAN = {"prompt": "a cat", "height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 4, "negative_prompt": "x"}


LOADED: dict[tuple[Path, Stage, str], StagePipeline] = {}


def stage(model: Path, which: Stage, options: ModelOptions = DEFAULTS) -> StagePipeline:
    key = (model, which, str(options))
    if key not in LOADED:
        LOADED[key] = StagePipeline.load(model, (which,), dtype=torch.float32, device=CPU, options=options)
    return LOADED[key]


def crossed(state: dict[str, object]) -> dict[str, object]:
    packed = pack(state)
    memory = torch.zeros(max(packed.nbytes, 1), dtype=torch.uint8)
    packed.copy_to(memory)
    return unpack(packed.manifest, memory, CPU)


def served(model: Path, inputs: dict[str, Any], seed: int, options: ModelOptions = DEFAULTS) -> Any:
    """The image of three parts of a pipeline, one with each stage."""
    state = crossed(stage(model, Stage.ENCODER, options).encode(inputs, seed))
    state = crossed(finish(stage(model, Stage.DENOISER, options).denoise(state)))
    return media(stage(model, Stage.DECODER, options).decode(state))


@cache
def blocks(model: Path) -> Any:
    pipeline = ModularPipeline.from_pretrained(str(model))
    pipeline.load_components(dtype=torch.float32)
    return pipeline


def modular(model: Path, inputs: dict[str, Any], seed: int, **components: Any) -> Any:
    """What plain diffusers makes with some components in the place of its own."""
    pipeline = blocks(model)
    before = {name: getattr(pipeline, name) for name in components}
    pipeline.update_components(**components)
    try:
        return media(pipeline(generator=seeded_generator(seed), **inputs))
    finally:
        pipeline.update_components(**before)


def test_a_scheduler_of_a_request_is_that_of_diffusers(models: Models) -> None:
    model = models("sdxl")
    wanted = {
        "scheduler": "dpm++",
        "scheduler_options": {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
    }
    config = blocks(model).scheduler.config
    own = diffusers.DPMSolverMultistepScheduler.from_config(config, **wanted["scheduler_options"])
    as_blocks = ModelOptions(route="modular")  # with their defaults, not those of the class that the index names
    ours = served(model, {**SDXL, **wanted}, 3, as_blocks)
    assert same(ours, modular(model, SDXL, 3, scheduler=own))
    assert not same(ours, served(model, SDXL, 3, as_blocks))
    # The one that all share is as it was.
    assert same(served(model, SDXL, 3, as_blocks), modular(model, SDXL, 3))


def test_options_alone_change_the_scheduler_of_the_model(models: Models) -> None:
    model = models("flux-kl")
    inputs = {"prompt": "a ship", "height": 64, "width": 64, "num_inference_steps": 3, "max_sequence_length": 16}
    scheduler = blocks(model).scheduler
    own = type(scheduler).from_config(scheduler.config, use_dynamic_shifting=False, shift=5.0)
    ours = served(model, {**inputs, "scheduler_options": {"use_dynamic_shifting": False, "shift": 5.0}}, 3)
    assert same(ours, modular(model, inputs, 3, scheduler=own))
    assert not same(ours, served(model, inputs, 3))


def test_a_scheduler_reaches_all_stages_of_a_classic_pipeline(models: Models) -> None:
    model = models("pixart")
    inputs = request(model, num_inference_steps=4, guidance_scale=2.0)
    pipeline = plain(model, torch.float32)
    own = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    ours = served(model, {**inputs, "scheduler": "euler", "scheduler_options": {"timestep_spacing": "trailing"}}, 3)
    before, pipeline.scheduler = pipeline.scheduler, own
    try:
        assert same(ours, expected(model, inputs, 3))
    finally:
        pipeline.scheduler = before
    assert not same(ours, expected(model, inputs, 3))


def test_a_topology_sets_them_for_all_requests(models: Models) -> None:
    model = models("sdxl")
    options = ModelOptions(
        scheduler=ComponentOptions.of({"class": "UniPCMultistepScheduler", "use_karras_sigmas": True}),
        guider=ComponentOptions.of({"class": "apg", "guidance_scale": 4.0, "eta": 0.5}),
    )
    pipeline = blocks(model)
    scheduler = diffusers.UniPCMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    guider = guiders.AdaptiveProjectedGuidance.from_config(pipeline.guider.config, guidance_scale=4.0, eta=0.5)
    theirs = modular(model, SDXL, 3, scheduler=scheduler, guider=guider)
    assert same(served(model, SDXL, 3, options), theirs)
    parameters = {each.name: each for each in stage(model, Stage.ENCODER, options).signature.parameters}
    assert parameters["scheduler"].default == "UniPCMultistepScheduler"
    assert parameters["guider"].default == "AdaptiveProjectedGuidance"
    assert parameters["guidance_scale"].default == 4.0


@pytest.mark.parametrize(
    "wanted",
    [
        {"guider": "AdaptiveProjectedGuidance", "guider_options": {"adaptive_projected_guidance_momentum": -0.5}},
        {"guider": "slg", "guider_options": {"skip_layer_guidance_layers": (0,), "skip_layer_guidance_stop": 0.9}},
        {"guider": "AutoGuidance", "guider_options": {"auto_guidance_layers": 0, "dropout": 1.0}},
        {"guider": "ClassifierFreeZeroStarGuidance"},
        {"guider_options": {"start": 0.3, "stop": 0.8}},
    ],
)
def test_a_guider_of_a_request_is_that_of_diffusers(wanted: dict[str, Any], models: Models) -> None:
    model = models("wan")
    pipeline = blocks(model)
    names = {"slg": "SkipLayerGuidance"}
    name = wanted.get("guider", "ClassifierFreeGuidance")
    options = dict(wanted.get("guider_options", {}))
    if options.pop("skip_layer_guidance_layers", None):
        options["skip_layer_config"] = LayerSkipConfig([0])
    if "auto_guidance_layers" in options:
        options = {"auto_guidance_config": LayerSkipConfig([0], dropout=options["dropout"])}
    guider = getattr(guiders, names.get(name, name)).from_config(pipeline.guider.config, **options)
    ours = served(model, {**WAN, **wanted}, 3)
    assert same(ours, modular(model, WAN, 3, guider=guider))
    assert not same(ours, served(model, WAN, 3))
    assert same(served(model, WAN, 3), modular(model, WAN, 3))


def test_guidance_can_be_rescaled(models: Models) -> None:
    model = models("sdxl")
    guider = blocks(model).guider.new(guidance_rescale=0.7, guidance_scale=6.0)
    ours = served(model, {**SDXL, "guidance_rescale": 0.7, "guidance_scale": 6.0}, 3)
    assert same(ours, modular(model, SDXL, 3, guider=guider))
    assert not same(ours, served(model, {**SDXL, "guidance_scale": 6.0}, 3))


def test_the_second_guider_has_a_scale_of_its_own(models: Models) -> None:
    model = models("wan22")
    pipeline = blocks(model)
    first, second = pipeline.guider.new(guidance_scale=4.0), pipeline.guider_2.new(guidance_scale=2.0)
    ours = served(model, {**WAN, "guidance_scale": 4.0, "guidance_scale_2": 2.0}, 3)
    assert same(ours, modular(model, WAN, 3, guider=first, guider_2=second))
    one = served(model, {**WAN, "guidance_scale": 4.0}, 3)
    assert same(one, modular(model, WAN, 3, guider=first, guider_2=pipeline.guider_2.new(guidance_scale=4.0)))
    assert not same(ours, one)


def test_a_guider_leaves_nothing_on_a_model_whose_forward_failed(models: Models, monkeypatch: Any) -> None:
    model = models("wan")
    pipeline = stage(model, Stage.DENOISER)
    wanted = {"guider": "slg", "guider_options": {"skip_layer_guidance_layers": (0,), "skip_layer_guidance_stop": 0.9}}
    state = stage(model, Stage.ENCODER).encode({**WAN, **wanted}, 3)
    transformer = pipeline._runner.pipeline.transformer
    calls = 0
    forward = transformer.forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if any(block._diffusers_hook.hooks for block in transformer.blocks if hasattr(block, "_diffusers_hook")):
            raise RuntimeError("no more memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(transformer, "forward", fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        finish(pipeline.denoise(state))
    monkeypatch.undo()
    assert calls > 1
    assert same(served(model, WAN, 3), modular(model, WAN, 3))


@pytest.mark.parametrize("family", ["flux-kl", "wan"])
def test_a_vae_in_tiles_is_that_of_diffusers_and_the_shared_one_stays(family: str, models: Models) -> None:
    model = models(family)
    large = {**WAN, "height": 64, "width": 64}
    if family == "wan":
        sizes = {"tile_sample_min_height": 32, "tile_sample_min_width": 32}
        sizes |= {"tile_sample_stride_height": 24, "tile_sample_stride_width": 24}
        wanted: dict[str, Any] = {"vae_tiling": True, "vae_tiling_options": sizes}
    else:
        large = {"prompt": "a ship", "height": 256, "width": 256, "num_inference_steps": 1, "max_sequence_length": 16}
        sizes, wanted = {}, {"vae_tiling": True, "vae_slicing": True}
    ours = served(model, {**large, **wanted}, 3)
    vae = copy.copy(blocks(model).vae)
    vae.enable_tiling(**sizes)
    assert same(ours, modular(model, large, 3, vae=vae))
    assert not same(ours, served(model, large, 3))
    tiled = ModelOptions(vae_tiling=True, vae_tiling_options=tuple(sorted(sizes.items())))
    assert same(ours, served(model, large, 3, tiled))
    assert same(served(model, {**large, "vae_tiling": False}, 3, tiled), served(model, large, 3))


def test_null_is_none_where_a_pipeline_can_do_without_its_default(models: Models) -> None:
    model = models("sana")
    inputs = request(model, num_inference_steps=2)
    ours = served(model, {**inputs, "complex_human_instruction": None}, 3)
    assert same(ours, expected(model, {**inputs, "complex_human_instruction": None}, 3))
    assert not same(ours, served(model, inputs, 3))
    words = ["Say it in", "other words:"]
    theirs = expected(model, {**inputs, "complex_human_instruction": words}, 3)
    assert same(served(model, {**inputs, "complex_human_instruction": words}, 3), theirs)
    # Of others, null is what it always was: left out.
    assert same(served(model, {**inputs, "eta": None}, 3), served(model, inputs, 3))


def test_a_textual_inversion_is_that_of_diffusers(models: Models, tmp_path: Path) -> None:
    model = models("sdxl")
    whole = ModularPipeline.from_pretrained(str(model))
    whole.load_components(dtype=torch.float32)
    widths = {"clip_l": whole.text_encoder.config.hidden_size, "clip_g": whole.text_encoder_2.config.hidden_size}
    vectors = {name: torch.randn(2, width, generator=seeded_generator(4)) for name, width in widths.items()}
    save_file(vectors, tmp_path / "ink.safetensors")
    for name, end in (("clip_l", ""), ("clip_g", "_2")):
        parts = {part: getattr(whole, f"{part}{end}") for part in ("text_encoder", "tokenizer")}
        whole.load_textual_inversion(vectors[name], token="<ink>", **parts)
    inputs = {**SDXL, "prompt": "a ship in <ink>"}
    as_blocks = ModelOptions(route="modular")  # with their defaults, not those of the class that the index names
    options = replace(as_blocks, embeddings=(EmbeddingFile("<ink>", tmp_path / "ink.safetensors"),))
    ours = served(model, inputs, 3, options)
    assert same(ours, media(whole(generator=seeded_generator(3), **inputs)))
    assert not same(ours, served(model, inputs, 3, as_blocks))
    save_file({"emb_params": torch.zeros(2, 5)}, tmp_path / "other.safetensors")
    for name, family, sentence in (
        ("other.safetensors", "sdxl", "vectors of 5 numbers"),
        ("other.bin", "sdxl", "others are not read"),
        ("none.safetensors", "sdxl", "cannot be read"),
        ("ink.safetensors", "wan", "loads no embeddings into"),
    ):
        options = ModelOptions(embeddings=(EmbeddingFile("<ink>", tmp_path / name),))
        with pytest.raises(ModelError, match=sentence):
            StagePipeline.load(models(family), (Stage.ENCODER,), dtype=torch.float32, device=CPU, options=options)


def test_what_an_encoder_may_read_is_told_from_what_it_cannot(models: Models) -> None:
    encodes = stage(models("sdxl"), Stage.ENCODER).signature.encodes
    assert {"guider", "guider_options"} <= set(encodes)
    assert not {"scheduler", "scheduler_options", "vae_tiling"} & set(encodes)


def test_what_an_encoder_made_does_for_another_scheduler(models: Models) -> None:
    model = models("sdxl")
    first, second = {**SDXL, "scheduler": "ddim"}, {**SDXL, "vae_tiling": True}
    state = stage(model, Stage.ENCODER).encode(first, 3)
    rebound = stage(model, Stage.ENCODER).rebind(state, second, 3)
    made = media(stage(model, Stage.DECODER).decode(finish(stage(model, Stage.DENOISER).denoise(rebound))))
    assert same(made, served(model, second, 3))


def test_what_cannot_be_set_is_refused_in_words(models: Models) -> None:
    model = models("sdxl")
    encoder = stage(model, Stage.ENCODER)
    for wanted, sentence in (
        ({"scheduler": "Fast"}, "scheduler must be one of"),
        ({"scheduler_options": {"use_karass_sigmas": True}}, "did you mean use_karras_sigmas"),
        ({"scheduler_options": {"use_karras_sigmas": "yes"}}, "use_karras_sigmas, which must be true or false"),
        ({"scheduler_options": {"timestep_spacing": "wide"}}, "must be one of linspace, leading, trailing"),
        ({"scheduler_options": {"num_train_timesteps": 10**9}}, "num_train_timesteps, which must be 1 to 10000"),
        ({"scheduler_options": {"use_karras_sigmas": True, "use_beta_sigmas": True}}, "Only one of"),
        ({"guider": "slg"}, "skip_layer_guidance_layers"),
        ({"guider_options": {"stop": 2.0}}, "ClassifierFreeGuidance cannot be made of these options"),
    ):
        with pytest.raises(InputError, match=sentence):
            encoder.encode({**SDXL, **wanted}, 1)
    for options, sentence in (
        (ModelOptions(scheduler=ComponentOptions.of({"class": "Fast"})), "scheduler must be one of"),
        (ModelOptions(guider=ComponentOptions.of({"strength": 1.0})), "strength, which is not an option of"),
    ):
        with pytest.raises(ModelError, match=sentence):
            StagePipeline.load(model, (Stage.ENCODER,), dtype=torch.float32, device=CPU, options=options)
    options = ModelOptions(vae_tiling_options=(("tile_sample_min_height", 8),), vae_tiling=True)
    with pytest.raises(ModelError, match="the VAE of this model takes no options"):
        StagePipeline.load(models("flux"), (Stage.ENCODER,), dtype=torch.float32, device=CPU, options=options)
