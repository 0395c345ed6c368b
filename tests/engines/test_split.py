from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderTiny, PriorTransformer, WanBlocks
from safetensors.torch import load_file, save_file

from triptych.engines.guidance import private
from triptych.engines.panels import ModelError, Panel
from triptych.engines.pipeline import InputError, PanelPipeline
from triptych.engines.shadows import Shadow, ShadowError, shadow
from triptych.engines.split import KWARGS_MAPPING, crossing, cut, load_split, pipeline_class, prune
from triptych.tools.make_model import Family, make_model

CPU = torch.device("cpu")
FAMILIES = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("ModularPipeline") and getattr(getattr(diffusers, name), "default_blocks_name", None)
)
Models = Callable[[str], Path]


def load(model: Path, *panels: Panel, dtype: torch.dtype = torch.float32) -> PanelPipeline:
    return PanelPipeline.load(model, panels, dtype=dtype, device=CPU)


@pytest.fixture
def copied(models: Models, tmp_path: Path) -> Path:
    """A tiny Flux model that the test may spoil."""
    return Path(shutil.copytree(models("flux"), tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# The rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_diffusers_is_cut_by_the_one_rule(family: str) -> None:
    whole = getattr(diffusers, getattr(diffusers, family).default_blocks_name)()
    for task in ("", "any"):
        blocks = prune(whole, task)
        parts = cut(blocks)
        assert [name for part in parts.values() for name in part.sub_blocks] == list(blocks.sub_blocks)
        assert all(part.sub_blocks for part in parts.values())
        scheduling = {panel for panel, part in parts.items() if "scheduler" in part.component_names}
        assert scheduling <= {Panel.DENOISER}
    assert set(parts[Panel.DECODER].intermediate_output_names) & set(whole.output_names)


def test_the_first_task_needs_only_a_prompt_and_another_can_be_named() -> None:
    whole = diffusers.FluxAutoBlocks()
    encoder = cut(prune(whole, ""))[Panel.ENCODER]
    assert "vae" not in encoder.component_names
    for task in ("image-to-image", "image2image", "any"):
        assert "vae" in cut(prune(whole, task))[Panel.ENCODER].component_names
    with pytest.raises(ModelError, match='The task "text-to-music" is not one of this pipeline: choose of text2image'):
        prune(whole, "text-to-music")


def test_what_each_request_gives_or_the_model_lacks_leaves_out_the_block_that_would_compute_it() -> None:
    whole = diffusers.LTX2AutoBlocks()
    predicts = prune(whole, "text-to-video")
    assert "duration_head" in predicts.component_names
    for blocks in (
        prune(whole, "text-to-video", given={"num_frames": 9}),
        prune(whole, "text-to-video", missing={"duration_head"}),
    ):
        assert "num_frames" in blocks.input_names
        assert "duration_head" not in blocks.component_names
        assert set(predicts.sub_blocks) - set(blocks.sub_blocks) == {"duration"}
    # No input stands for a text encoder: it stays, and loading says that it is not there.
    assert "text_encoder" in prune(whole, "text-to-video", missing={"text_encoder"}).component_names


def test_a_request_may_still_give_what_a_block_would_make_for_it(models: Models) -> None:
    blocks = prune(diffusers.LTX25AutoBlocks(), "text-to-video")
    assert {"num_frames", "min_seconds"} <= set(blocks.input_names)
    # It chooses anew for each request.
    chosen = [blocks.sub_blocks["duration"].get_execution_blocks(num_frames=number) for number in (None, 9)]
    assert [block is None for block in chosen] == [False, True]
    encoder = load(models("ltx25"), Panel.ENCODER)
    assert "num_frames" in encoder.signature.encodes, "what it encodes depends on whether there is one"
    inputs = {"prompt": "a ship", "height": 32, "width": 32, "min_seconds": 0.3, "max_seconds": 0.8}
    assert encoder.encode({**inputs, "num_frames": 9}, 1)["num_frames"] == 9
    assert encoder.encode(inputs, 1)["num_frames"] == 17


def test_blocks_without_one_denoise_are_not_cut() -> None:
    whole = WanBlocks()
    whole.sub_blocks = {name: block for name, block in whole.sub_blocks.items() if name != "denoise"}
    with pytest.raises(ModelError, match="one `denoise` block: its blocks are text_encoder, decode"):
        cut(whole)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({"_class_name": "FluxPipeline"}, "FluxModularPipeline"),
        ({"_class_name": "FluxModularPipeline"}, "FluxModularPipeline"),
        ({"_class_name": "WanPipeline"}, "WanModularPipeline"),
        ({"_class_name": "WanPipeline", "boundary_ratio": 0.9}, "Wan22ModularPipeline"),
        ({"_class_name": "WanImageToVideoPipeline"}, "WanImage2VideoModularPipeline"),
        ({"_class_name": "LTX2Pipeline"}, "LTX2ModularPipeline"),
        ({"_class_name": "LTX2ImageToVideoPipeline"}, "LTX2ModularPipeline"),
        ({"_class_name": "HunyuanVideo15Pipeline"}, "HunyuanVideo15ModularPipeline"),
        ({"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "StableDiffusionXLModularPipeline"),
        ({"_class_name": "QwenImagePipeline"}, "QwenImageModularPipeline"),
    ],
)
def test_a_classic_index_finds_its_modular_pipeline(index: dict[str, object], expected: str) -> None:
    assert pipeline_class(index, Path("model")).__name__ == expected


def test_only_inputs_of_later_blocks_cross_with_their_groups() -> None:
    parts = cut(prune(diffusers.StableDiffusionXLAutoBlocks(), ""))
    values = {
        "prompt": "a",
        "prompt_embeds": 1,
        "extra": 2,
        "latents": 3,
        "num_inference_steps": 4,
        "output_type": "pil",
    }
    groups = {"denoiser_input_fields": ["prompt_embeds", "extra", "extra"], "other": ["prompt"]}
    crosses = crossing(values, groups, [parts[Panel.DENOISER], parts[Panel.DECODER]])
    assert "prompt" not in crosses
    assert {"prompt_embeds", "num_inference_steps", "latents", "output_type"} <= crosses.keys()
    # The group is asked for as a whole, so a name that no block declares crosses as its member.
    assert crosses["extra"] == 2
    assert crosses[KWARGS_MAPPING] == {"denoiser_input_fields": ["prompt_embeds", "extra"], "other": []}
    assert crossing(values, groups, [parts[Panel.DECODER]]).keys() == {"latents", "output_type", KWARGS_MAPPING}


# What is loaded ---------------------------------------------------------------------------------------------------


def test_each_panel_loads_its_own_and_shadows_the_rest(models: Models) -> None:
    panels = {panel: load(models("flux"), panel, dtype=torch.bfloat16) for panel in Panel}
    assert panels[Panel.ENCODER].components == {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    assert panels[Panel.DENOISER].components == {"transformer", "scheduler"}
    assert panels[Panel.DECODER].components == {"vae"}
    for panel, pipeline in panels.items():
        inner = pipeline._parts.pipeline
        assert inner.device == CPU
        weights = {name for name, value in vars(inner).items() if isinstance(value, torch.nn.Module)}
        assert weights == {name for name in pipeline.components if "token" not in name and name != "scheduler"}
        assert all(not isinstance(value, Shadow) for value in inner.components.values()), panel
        assert inner.vae.config.block_out_channels == [16, 16, 16]
        assert inner.vae.dtype is torch.bfloat16
        assert inner.vae_scale_factor == 4
        assert inner.num_channels_latents == 4
        assert inner.text_encoder_2.config.d_model == 32


def test_without_shadows_the_picture_has_another_size(models: Models) -> None:
    inputs = {"prompt": "a cat", "height": 64, "width": 64, "num_inference_steps": 1, "max_sequence_length": 8}
    state = load(models("flux"), Panel.ENCODER).encode(inputs, 1)
    shapes = []
    for remove in (False, True):
        denoiser = load(models("flux"), Panel.DENOISER)
        if remove:
            del denoiser._parts.pipeline.vae
        denoising = denoiser.denoise(state)
        denoising.advance()
        latents = denoising.result()["latents"]
        assert isinstance(latents, torch.Tensor)
        shapes.append(tuple(latents.shape))
    assert shapes == [(1, 4, 16, 16), (1, 4, 8, 8)]


def test_the_encoder_of_wan_has_its_guider_and_so_has_every_panel(models: Models) -> None:
    for panel in Panel:
        pipeline = load(models("wan"), panel)
        assert pipeline._parts.pipeline.guider.guidance_scale == 5.0
        assert {"guidance_scale", "negative_prompt", "num_frames"} <= pipeline.accepted


def test_a_shadow_reads_but_does_not_compute(tmp_path: Path) -> None:
    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1)).save_pretrained(tmp_path)  # fmt: skip
    stand_in = shadow("vae", AutoencoderTiny, tmp_path, torch.bfloat16, CPU)
    assert isinstance(stand_in, Shadow)
    assert not isinstance(stand_in, torch.nn.Module)
    assert (stand_in.dtype, stand_in.device) == (torch.bfloat16, CPU)
    assert stand_in.latent_magnitude == 3
    assert all(parameter.is_meta for parameter in stand_in.parameters())
    assert stand_in._supports_gradient_checkpointing is True, "some geometry has private names"
    assert not hasattr(stand_in, "nothing")
    assert not hasattr(stand_in, "_nothing")
    assert copy.copy(stand_in).latent_magnitude == 3
    for name in ("encode", "decode", "forward"):
        with pytest.raises(ShadowError, match=rf"`vae\.{name}` was called"):
            getattr(stand_in, name)


def test_a_shadow_has_the_statistics_that_are_in_the_weights_file(tmp_path: Path) -> None:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )
    vae.bn.running_mean.copy_(torch.arange(16.0))
    vae.save_pretrained(tmp_path)
    stand_in: Any = shadow("vae", AutoencoderKLFlux2, tmp_path, torch.bfloat16, CPU)
    assert torch.equal(stand_in.bn.running_mean, torch.arange(16.0).bfloat16())
    assert stand_in.bn.num_batches_tracked.dtype is torch.int64
    assert stand_in.encoder.conv_in.weight.is_meta


def test_a_shadow_has_the_parameters_that_are_in_no_layer(tmp_path: Path) -> None:
    prior = PriorTransformer(num_attention_heads=1, attention_head_dim=4, num_layers=1, embedding_dim=4)
    prior.clip_mean.data.copy_(torch.arange(4.0))
    prior.save_pretrained(tmp_path)
    stand_in: Any = shadow("prior", PriorTransformer, tmp_path, torch.float32, CPU)
    latents = torch.ones(1, 4)
    assert torch.equal(stand_in.post_process_latents(latents), prior.post_process_latents(latents))
    assert stand_in.proj_in.weight.is_meta


# Requests ---------------------------------------------------------------------------------------------------------


def test_what_the_pipeline_accepts(models: Models) -> None:
    accepted = load(models("flux"), Panel.DECODER).accepted
    assert {"prompt", "height", "width", "num_inference_steps", "guidance_scale", "max_sequence_length"} <= accepted
    assert not {"generator", "num_images_per_prompt", "image", "negative_prompt"} & accepted
    with pytest.raises(InputError, match="takes no colour, seed"):
        load(models("flux"), Panel.ENCODER).encode({"prompt": "x", "seed": 1, "colour": 2}, 1)


def test_defaults_are_those_of_the_pipeline(models: Models) -> None:
    state = load(models("flux"), Panel.ENCODER).encode({"prompt": "a cat", "max_sequence_length": 8}, 1)
    # Of the class that the index names; its blocks alone would take 50 steps.
    assert (state["num_inference_steps"], state["guidance_scale"], state["output_type"]) == (28, 3.5, "pil")
    assert "prompt" not in state


def test_an_encoder_guides_if_either_it_or_the_request_does(models: Models) -> None:
    encoder = load(models("wan"), Panel.ENCODER)
    inputs = {"prompt": "a cat", "negative_prompt": "grey", "max_sequence_length": 8}
    usual = encoder.encode(inputs, 1)["negative_prompt_embeds"]
    unguided = encoder.encode({**inputs, "guidance_scale": 1.0}, 1)["negative_prompt_embeds"]
    encoder._parts.pipeline.guider = encoder._parts.pipeline.guider.new(guidance_scale=1.0)
    guided = encoder.encode({**inputs, "guidance_scale": 3.0}, 1)["negative_prompt_embeds"]
    assert isinstance(usual, torch.Tensor)
    assert isinstance(unguided, torch.Tensor)
    assert isinstance(guided, torch.Tensor)
    assert torch.equal(usual, unguided)
    assert torch.equal(usual, guided)


def test_guidance_that_is_switched_off_is_on_for_who_asks(models: Models) -> None:
    pipeline = load(models("wan"), Panel.DENOISER)._parts.pipeline
    pipeline.guider = pipeline.guider.new(enabled=False)
    scales = (None, 1.0, 2.0)
    assert [private(pipeline, {"guidance_scale": scale}).guider.num_conditions for scale in scales] == [1, 1, 2]
    assert private(pipeline).guider is not pipeline.guider
    assert private(pipeline).scheduler is not pipeline.scheduler
    assert private(pipeline).transformer is pipeline.transformer


def test_a_panel_that_is_not_here_is_not_run(models: Models) -> None:
    encoder = load(models("flux"), Panel.ENCODER)
    for call in (encoder.denoise, encoder.decode):
        with pytest.raises(RuntimeError, match="was not loaded here, only: encoder"):
            call({})


# What cannot be served --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("panel", Panel)
@pytest.mark.parametrize("missing", ["text_encoder", "transformer", "vae"])
def test_a_missing_component_folder_is_a_model_error(copied: Path, panel: Panel, missing: str) -> None:
    shutil.rmtree(copied / missing)
    with pytest.raises(ModelError, match=rf"incomplete: there is no folder .*/{missing} for its {missing}\."):
        load(copied, panel)


def test_a_folder_that_is_no_model_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a diffusers model"):
        load(tmp_path, Panel.ENCODER)
    with pytest.raises(ModelError, match="There is no model folder"):
        load(tmp_path / "nowhere", Panel.ENCODER)


def test_broken_weights_are_a_model_error(copied: Path) -> None:
    path = copied / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"The vae in .* cannot be loaded"):
        load(copied, Panel.DECODER)


@pytest.mark.parametrize(
    ("name", "panel"),
    [("text_encoder", Panel.ENCODER), ("transformer", Panel.DENOISER), ("vae", Panel.DECODER)],
)
def test_weights_that_are_incomplete_are_a_model_error(copied: Path, name: str, panel: Panel) -> None:
    (path,) = (copied / name).glob("*.safetensors")
    weights = load_file(path)
    weights.pop(next(key for key in weights if key.endswith("weight")))
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"The {name} in .* lack some of the weights"):
        load(copied, panel)


def test_weights_want_gradients_as_those_of_the_plain_pipeline_do(models: Models) -> None:
    # Where they do not, `torch.matmul` takes another way for some layouts, and rounds otherwise.
    vae = load(models("flux"), Panel.DECODER)._parts.pipeline.vae
    plain = AutoencoderTiny.from_pretrained(models("flux") / "vae")
    assert [weight.requires_grad for weight in vae.parameters()] == [
        weight.requires_grad for weight in plain.parameters()
    ]


def test_weights_as_pickles_are_not_read(copied: Path) -> None:
    path = copied / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(ModelError, match=r"The vae in .* has its weights as .*\.bin, a pickle, which could run code"):
        load(copied, Panel.DECODER)


def test_a_broken_configuration_of_another_panel_is_a_model_error(copied: Path) -> None:
    (copied / "vae" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"The configuration of vae in .* cannot be read"):
        load(copied, Panel.DENOISER)


def test_a_pipeline_that_diffusers_does_not_have_is_a_model_error(copied: Path) -> None:
    edit(copied / "model_index.json", _class_name="WishfulPipeline")
    with pytest.raises(ModelError, match=r"is for WishfulPipeline, which is not one of diffusers"):
        load(copied, Panel.ENCODER)
    with pytest.raises(ModelError, match=r"WishfulPipeline, which diffusers .* cannot run in parts"):
        load_split(copied)


def test_an_index_that_leaves_a_needed_component_out_is_a_model_error(copied: Path) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    del index["vae"]
    (copied / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="has no vae, which FluxModularPipeline needs"):
        load(copied, Panel.DECODER)


def test_a_component_that_the_index_calls_null_is_left_out(copied: Path) -> None:
    edit(copied / "model_index.json", text_encoder=[None, None], image_encoder=[None, None])
    assert load(copied, Panel.ENCODER).components == {"text_encoder_2", "tokenizer", "tokenizer_2"}
    assert load(copied, Panel.DENOISER).components == {"transformer", "scheduler"}


def test_a_vae_of_another_scale_than_the_blocks_reckon_with_is_a_model_error(models: Models, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models("wan"), tmp_path / "model"))
    edit(model / "vae" / "config.json", scale_factor_spatial=16)
    edit(model / "model_index.json", _class_name="WanModularPipeline")
    for panel in Panel:
        with pytest.raises(ModelError, match="scales by 16, but WanModularPipeline reckons with 4"):
            load(model, panel)


def test_a_task_of_the_card_decides_what_is_loaded(copied: Path) -> None:
    edit(copied / "triptych.json", task="image-to-image")
    assert "vae" in load(copied, Panel.ENCODER).components
    assert "image" in load(copied, Panel.DECODER).accepted
    edit(copied / "triptych.json", task="text-to-music")
    with pytest.raises(ModelError, match="text-to-music"):
        load(copied, Panel.ENCODER)


def test_the_split_names_what_the_decoder_makes(models: Models) -> None:
    assert load_split(models("flux")).outputs == ("images",)
    assert load_split(models("wan")).outputs == ("videos",)


def test_guiders_and_settings_are_those_of_the_whole_pipeline(tmp_path: Path) -> None:
    make_model(tmp_path, Family.WAN22, progress=False)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "boundary_ratio": 0.5}))
    whole = diffusers.Wan22ModularPipeline(pretrained_model_name_or_path=str(tmp_path))
    declared = cut(prune(diffusers.Wan22Blocks(), ""))[Panel.DENOISER].expected_components
    assert {spec.name: spec for spec in declared}["guider"].config["guidance_scale"] != whole.guider.guidance_scale
    for panel in Panel:
        part = PanelPipeline.load(tmp_path, (panel,), dtype=torch.float32, device=torch.device("cpu"))._parts.pipeline
        assert part.guider.guidance_scale == whole.guider.guidance_scale
        assert part.guider_2.guidance_scale == whole.guider_2.guidance_scale
        assert part.config.boundary_ratio == 0.5
