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

from triptych.engines.partition.blocks import (
    KWARGS_MAPPING,
    cut_blocks,
    load_modular_partition,
    pipeline_class,
    prune,
    values_needed_later,
)
from triptych.engines.pipelines.guidance import request_copy
from triptych.engines.pipelines.pipeline import InputError, StagePipeline
from triptych.engines.stages import ModelError, Stage
from triptych.engines.weights.stubs import Stub, StubError, make_stub

CPU = torch.device("cpu")
FAMILIES = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("ModularPipeline") and getattr(getattr(diffusers, name), "default_blocks_name", None)
)
Models = Callable[[str], Path]


def load(model: Path, *stages: Stage, dtype: torch.dtype = torch.float32) -> StagePipeline:
    return StagePipeline.load(model, stages, dtype=dtype, device=CPU)


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
        parts = cut_blocks(blocks)
        assert [name for part in parts.values() for name in part.sub_blocks] == list(blocks.sub_blocks)
        assert all(part.sub_blocks for part in parts.values())
        scheduling = {stage for stage, part in parts.items() if "scheduler" in part.component_names}
        assert scheduling <= {Stage.DENOISER}
    assert set(parts[Stage.DECODER].intermediate_output_names) & set(whole.output_names)


def test_the_first_task_needs_only_a_prompt_and_another_can_be_named() -> None:
    whole = diffusers.FluxAutoBlocks()
    encoder = cut_blocks(prune(whole, ""))[Stage.ENCODER]
    assert "vae" not in encoder.component_names
    for task in ("image-to-image", "image2image", "any"):
        assert "vae" in cut_blocks(prune(whole, task))[Stage.ENCODER].component_names
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
    encoder = load(models("ltx25"), Stage.ENCODER)
    assert "num_frames" in encoder.signature.encodes, "what it encodes depends on whether there is one"
    inputs = {"prompt": "a ship", "height": 32, "width": 32, "min_seconds": 0.3, "max_seconds": 0.8}
    assert encoder.encode({**inputs, "num_frames": 9}, 1)["num_frames"] == 9
    assert encoder.encode(inputs, 1)["num_frames"] == 17


def test_blocks_without_one_denoise_are_not_cut() -> None:
    whole = WanBlocks()
    whole.sub_blocks = {name: block for name, block in whole.sub_blocks.items() if name != "denoise"}
    with pytest.raises(ModelError, match="one `denoise` block: its blocks are text_encoder, decode"):
        cut_blocks(whole)


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
    parts = cut_blocks(prune(diffusers.StableDiffusionXLAutoBlocks(), ""))
    values = {
        "prompt": "a",
        "prompt_embeds": 1,
        "extra": 2,
        "latents": 3,
        "num_inference_steps": 4,
        "output_type": "pil",
    }
    groups = {"denoiser_input_fields": ["prompt_embeds", "extra", "extra"], "other": ["prompt"]}
    crosses = values_needed_later(values, groups, [parts[Stage.DENOISER], parts[Stage.DECODER]])
    assert "prompt" not in crosses
    assert {"prompt_embeds", "num_inference_steps", "latents", "output_type"} <= crosses.keys()
    # The group is asked for as a whole, so a name that no block declares crosses as its member.
    assert crosses["extra"] == 2
    assert crosses[KWARGS_MAPPING] == {"denoiser_input_fields": ["prompt_embeds", "extra"], "other": []}
    assert values_needed_later(values, groups, [parts[Stage.DECODER]]).keys() == {
        "latents",
        "output_type",
        KWARGS_MAPPING,
    }


# What is loaded ---------------------------------------------------------------------------------------------------


def test_each_stage_loads_its_own_and_stubs_the_rest(models: Models) -> None:
    stages = {stage: load(models("flux"), stage, dtype=torch.bfloat16) for stage in Stage}
    assert stages[Stage.ENCODER].components == {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    assert stages[Stage.DENOISER].components == {"transformer", "scheduler"}
    assert stages[Stage.DECODER].components == {"vae"}
    for stage, pipeline in stages.items():
        inner = pipeline._runner.pipeline
        assert inner.device == CPU
        weights = {name for name, value in vars(inner).items() if isinstance(value, torch.nn.Module)}
        assert weights == {name for name in pipeline.components if "token" not in name and name != "scheduler"}
        assert all(not isinstance(value, Stub) for value in inner.components.values()), stage
        assert inner.vae.config.block_out_channels == [16, 16, 16]
        assert inner.vae.dtype is torch.bfloat16
        assert inner.vae_scale_factor == 4
        assert inner.num_channels_latents == 4
        assert inner.text_encoder_2.config.d_model == 32


def test_without_stubs_the_image_has_another_size(models: Models) -> None:
    inputs = {"prompt": "a cat", "height": 64, "width": 64, "num_inference_steps": 1, "max_sequence_length": 8}
    state = load(models("flux"), Stage.ENCODER).encode(inputs, 1)
    shapes = []
    for remove in (False, True):
        denoiser = load(models("flux"), Stage.DENOISER)
        if remove:
            del denoiser._runner.pipeline.vae
        denoising = denoiser.denoise(state)
        denoising.advance()
        latents = denoising.result()["latents"]
        assert isinstance(latents, torch.Tensor)
        shapes.append(tuple(latents.shape))
    assert shapes == [(1, 4, 16, 16), (1, 4, 8, 8)]


def test_the_encoder_of_wan_has_its_guider_and_so_has_every_stage(models: Models) -> None:
    for stage in Stage:
        pipeline = load(models("wan"), stage)
        assert pipeline._runner.pipeline.guider.guidance_scale == 5.0
        assert {"guidance_scale", "negative_prompt", "num_frames"} <= pipeline.accepted


def test_a_stub_reads_but_does_not_compute(tmp_path: Path) -> None:
    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1)).save_pretrained(tmp_path)  # fmt: skip
    stub = make_stub("vae", AutoencoderTiny, tmp_path, torch.bfloat16, CPU)
    assert isinstance(stub, Stub)
    assert not isinstance(stub, torch.nn.Module)
    assert (stub.dtype, stub.device) == (torch.bfloat16, CPU)
    assert stub.latent_magnitude == 3
    assert all(parameter.is_meta for parameter in stub.parameters())
    assert stub._supports_gradient_checkpointing is True, "some geometry has private names"
    assert not hasattr(stub, "nothing")
    assert not hasattr(stub, "_no_side_task")
    assert copy.copy(stub).latent_magnitude == 3
    for name in ("encode", "decode", "forward"):
        with pytest.raises(StubError, match=rf"`vae\.{name}` was called"):
            getattr(stub, name)


def test_a_stub_has_the_statistics_that_are_in_the_weights_file(tmp_path: Path) -> None:
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
    stub: Any = make_stub("vae", AutoencoderKLFlux2, tmp_path, torch.bfloat16, CPU)
    assert torch.equal(stub.bn.running_mean, torch.arange(16.0).bfloat16())
    assert stub.bn.num_batches_tracked.dtype is torch.int64
    assert stub.encoder.conv_in.weight.is_meta


def test_a_stub_has_the_parameters_that_are_in_no_layer(tmp_path: Path) -> None:
    prior = PriorTransformer(num_attention_heads=1, attention_head_dim=4, num_layers=1, embedding_dim=4)
    prior.clip_mean.data.copy_(torch.arange(4.0))
    prior.save_pretrained(tmp_path)
    stub: Any = make_stub("prior", PriorTransformer, tmp_path, torch.float32, CPU)
    latents = torch.ones(1, 4)
    assert torch.equal(stub.post_process_latents(latents), prior.post_process_latents(latents))
    assert stub.proj_in.weight.is_meta


# Requests ---------------------------------------------------------------------------------------------------------


def test_what_the_pipeline_accepts(models: Models) -> None:
    accepted = load(models("flux"), Stage.DECODER).accepted
    assert {"prompt", "height", "width", "num_inference_steps", "guidance_scale", "max_sequence_length"} <= accepted
    assert not {"generator", "num_images_per_prompt", "image", "negative_prompt"} & accepted
    with pytest.raises(InputError, match="takes no colour, seed"):
        load(models("flux"), Stage.ENCODER).encode({"prompt": "x", "seed": 1, "colour": 2}, 1)


def test_defaults_are_those_of_the_pipeline(models: Models) -> None:
    state = load(models("flux"), Stage.ENCODER).encode({"prompt": "a cat", "max_sequence_length": 8}, 1)
    # Of the class that the index names; its blocks alone would take 50 steps.
    assert (state["num_inference_steps"], state["guidance_scale"], state["output_type"]) == (28, 3.5, "pil")
    assert "prompt" not in state


def test_an_encoder_guides_if_either_it_or_the_request_does(models: Models) -> None:
    encoder = load(models("wan"), Stage.ENCODER)
    inputs = {"prompt": "a cat", "negative_prompt": "grey", "max_sequence_length": 8}
    usual = encoder.encode(inputs, 1)["negative_prompt_embeds"]
    unguided = encoder.encode({**inputs, "guidance_scale": 1.0}, 1)["negative_prompt_embeds"]
    encoder._runner.pipeline.guider = encoder._runner.pipeline.guider.new(guidance_scale=1.0)
    guided = encoder.encode({**inputs, "guidance_scale": 3.0}, 1)["negative_prompt_embeds"]
    assert isinstance(usual, torch.Tensor)
    assert isinstance(unguided, torch.Tensor)
    assert isinstance(guided, torch.Tensor)
    assert torch.equal(usual, unguided)
    assert torch.equal(usual, guided)


def test_guidance_that_is_switched_off_is_on_for_who_asks(models: Models) -> None:
    pipeline = load(models("wan"), Stage.DENOISER)._runner.pipeline
    pipeline.guider = pipeline.guider.new(enabled=False)
    scales = (None, 1.0, 2.0)
    assert [request_copy(pipeline, {"guidance_scale": scale}).guider.num_conditions for scale in scales] == [1, 1, 2]
    assert request_copy(pipeline).guider is not pipeline.guider
    assert request_copy(pipeline).scheduler is not pipeline.scheduler
    assert request_copy(pipeline).transformer is pipeline.transformer


def test_a_stage_that_is_not_here_is_not_run(models: Models) -> None:
    encoder = load(models("flux"), Stage.ENCODER)
    for call in (encoder.denoise, encoder.decode):
        with pytest.raises(RuntimeError, match="was not loaded here, only: encoder"):
            call({})


# What cannot be served --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "missing"),
    [
        (Stage.ENCODER, "text_encoder"),
        (Stage.DENOISER, "transformer"),
        (Stage.DECODER, "vae"),
        (Stage.ENCODER, "vae"),  # of which it has a stub
    ],
)
def test_a_missing_component_folder_is_a_model_error(copied: Path, stage: Stage, missing: str) -> None:
    shutil.rmtree(copied / missing)
    with pytest.raises(ModelError, match=rf"incomplete: there is no folder .*/{missing} for its {missing}\."):
        load(copied, stage)


def test_a_folder_that_is_no_model_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a diffusers model"):
        load(tmp_path, Stage.ENCODER)
    with pytest.raises(ModelError, match="There is no model folder"):
        load(tmp_path / "nowhere", Stage.ENCODER)


def test_broken_weights_are_a_model_error(copied: Path) -> None:
    path = copied / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"The vae in .* cannot be loaded"):
        load(copied, Stage.DECODER)


@pytest.mark.parametrize(
    ("name", "stage"),
    [("text_encoder", Stage.ENCODER), ("transformer", Stage.DENOISER), ("vae", Stage.DECODER)],
)
def test_weights_that_are_incomplete_are_a_model_error(copied: Path, name: str, stage: Stage) -> None:
    (path,) = (copied / name).glob("*.safetensors")
    weights = load_file(path)
    weights.pop(next(key for key in weights if key.endswith("weight")))
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"The {name} in .* lack some of the weights"):
        load(copied, stage)


def test_weights_want_gradients_as_those_of_the_plain_pipeline_do(models: Models) -> None:
    # Where they do not, `torch.matmul` takes another way for some layouts, and rounds otherwise.
    vae = load(models("flux"), Stage.DECODER)._runner.pipeline.vae
    plain = AutoencoderTiny.from_pretrained(models("flux") / "vae")
    assert [weight.requires_grad for weight in vae.parameters()] == [
        weight.requires_grad for weight in plain.parameters()
    ]


def test_weights_as_pickles_are_not_read(copied: Path) -> None:
    path = copied / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(ModelError, match=r"The vae in .* has its weights as .*\.bin, a pickle, which could run code"):
        load(copied, Stage.DECODER)


def test_a_broken_configuration_of_another_stage_is_a_model_error(copied: Path) -> None:
    (copied / "vae" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"The configuration of vae in .* cannot be read"):
        load(copied, Stage.DENOISER)


def test_a_pipeline_that_diffusers_does_not_have_is_a_model_error(copied: Path) -> None:
    edit(copied / "model_index.json", _class_name="WishfulPipeline")
    with pytest.raises(ModelError, match=r"is for WishfulPipeline, which is not one of diffusers"):
        load(copied, Stage.ENCODER)
    with pytest.raises(ModelError, match=r"WishfulPipeline, which diffusers .* cannot run in blocks"):
        load_modular_partition(copied)


def test_an_index_that_leaves_a_needed_component_out_is_a_model_error(copied: Path) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    del index["vae"]
    (copied / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="has no vae, which FluxModularPipeline needs"):
        load(copied, Stage.DECODER)


def test_a_component_that_the_index_calls_null_is_left_out(copied: Path) -> None:
    edit(copied / "model_index.json", text_encoder=[None, None], image_encoder=[None, None])
    assert load(copied, Stage.ENCODER).components == {"text_encoder_2", "tokenizer", "tokenizer_2"}
    assert load(copied, Stage.DENOISER).components == {"transformer", "scheduler"}


def test_a_vae_of_another_scale_than_the_blocks_reckon_with_is_a_model_error(models: Models, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models("wan"), tmp_path / "model"))
    edit(model / "vae" / "config.json", scale_factor_spatial=16)
    edit(model / "model_index.json", _class_name="WanModularPipeline")
    for stage in Stage:
        with pytest.raises(ModelError, match="scales by 16, but WanModularPipeline assumes 4"):
            load(model, stage)


def test_a_task_of_the_serving_config_decides_what_is_loaded(copied: Path) -> None:
    edit(copied / "triptych.json", task="image-to-image")
    assert "vae" in load(copied, Stage.ENCODER).components
    assert "image" in load(copied, Stage.DECODER).accepted
    edit(copied / "triptych.json", task="text-to-music")
    with pytest.raises(ModelError, match="text-to-music"):
        load(copied, Stage.ENCODER)


def test_the_split_names_what_the_decoder_makes(models: Models) -> None:
    assert load_modular_partition(models("flux")).outputs == ("images",)
    assert load_modular_partition(models("wan")).outputs == ("videos",)


def test_guiders_and_settings_are_those_of_the_whole_pipeline(models: Models, tmp_path: Path) -> None:
    shutil.copytree(models("wan22"), tmp_path, dirs_exist_ok=True)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "boundary_ratio": 0.5}))
    whole = diffusers.Wan22ModularPipeline(pretrained_model_name_or_path=str(tmp_path))
    declared = cut_blocks(prune(diffusers.Wan22Blocks(), ""))[Stage.DENOISER].expected_components
    assert {spec.name: spec for spec in declared}["guider"].config["guidance_scale"] != whole.guider.guidance_scale
    for stage in Stage:
        part = StagePipeline.load(tmp_path, (stage,), dtype=torch.float32, device=torch.device("cpu"))._runner.pipeline
        assert part.guider.guidance_scale == whole.guider.guidance_scale
        assert part.guider_2.guidance_scale == whole.guider_2.guidance_scale
        assert part.config.boundary_ratio == 0.5
