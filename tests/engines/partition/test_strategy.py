"""Which way a pipeline is cut, and which stage owns what, read off its class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

from triptych.engines.model_options import DEFAULTS, ModelOptions
from triptych.engines.partition.introspection import classic_partition
from triptych.engines.partition.strategy import (
    PartitionStrategy,
    classic_class,
    describe_serving,
    strategy_for,
    strategy_of,
)
from triptych.engines.stages import ModelError, Stage

TEXT = ["transformers", "T5EncoderModel"]
TOKENIZER = ["transformers", "T5Tokenizer"]
VAE = ["diffusers", "AutoencoderKL"]
PLAIN: dict[str, Any] = {
    "tokenizer": TOKENIZER,
    "text_encoder": TEXT,
    "transformer": ["diffusers", "Transformer2DModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "vae": VAE,
}


def index(name: str, **more: Any) -> dict[str, Any]:
    return {"_class_name": f"{name}Pipeline", **PLAIN, **more}


@pytest.mark.parametrize(
    ("name", "more", "route"),
    [
        ("Flux", {}, "modular"),
        ("FluxModular", {}, "modular"),
        ("Wan", {}, "modular"),
        ("StableDiffusionXL", {}, "modular"),
        ("PixArtAlpha", {}, "classic"),
        ("PixArtSigma", {}, "classic"),
        ("Sana", {}, "classic"),
        ("Chroma", {}, "classic"),
        ("CogVideoX", {}, "classic"),
        ("HunyuanVideo", {}, "classic"),
        ("GlmImage", {"vision_language_encoder": ["transformers", "GlmImageForConditionalGeneration"]}, "classic"),
        ("Kandinsky5T2V", {}, "classic"),
        ("StableDiffusion", {"unet": ["diffusers", "UNet2DConditionModel"]}, "classic"),
        # Nothing to decode, and two things to decode: the denoiser runs to the end.
        ("IF", {}, "classic"),
        ("Kandinsky6TI2VA", {"audio_vae": VAE}, "classic"),
        # Nothing to encode.
        ("DiT", {"text_encoder": [None, None]}, "monolithic"),
        ("KandinskyV22", {"movq": ["diffusers", "VQModel"]}, "monolithic"),
        # A model that leaves its text encoder out has nothing to encode with.
        ("PixArtSigma", {"text_encoder": [None, None]}, "monolithic"),
    ],
)
def test_the_best_partition_strategy_is_chosen(name: str, more: dict[str, Any], route: str) -> None:
    assert strategy_of(index(name, **more)) is PartitionStrategy(route)


@pytest.mark.parametrize("name", ["Wishful", "UNet2DModel", "Diffusion_"])
def test_what_is_no_pipeline_is_a_model_error(name: str) -> None:
    with pytest.raises(ModelError, match=f"is for {name}Pipeline, which is not one of diffusers"):
        strategy_of(index(name))


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("FluxPriorRedux", "prompt_embeds and pooled_prompt_embeds"),
        ("WuerstchenPrior", "image_embeddings"),
        ("LLaDA2", "sequences and texts"),
    ],
)
def test_what_makes_no_medium_is_a_model_error(name: str, made: str) -> None:
    with pytest.raises(ModelError, match=f"{name}Pipeline makes {made}, which are not images, video or sound"):
        strategy_of(index(name))


def test_what_a_pipeline_needs_is_said() -> None:
    missing = [
        name
        for name in dir(diffusers)
        if name.endswith("Pipeline") and "note_seq" in getattr(getattr(diffusers, name, None), "_backends", ())
    ]
    if not missing:
        pytest.skip("note_seq is installed")
    with pytest.raises(ModelError, match=r"SpectrogramDiffusionPipeline, which needs .*note_seq"):
        classic_class({"_class_name": missing[0]})


def owned(name: str, **more: Any) -> dict[str, set[str]]:
    found = index(name, **more)
    build = classic_partition(classic_class(found), found)
    return {stage.value: set(build.needed(stage)) for stage in Stage}


def test_stages_own_what_they_compute_with() -> None:
    assert owned("PixArtSigma") == {
        "encoder": {"tokenizer", "text_encoder"},
        "denoiser": {"transformer", "scheduler"},
        "decoder": {"vae"},
    }


def test_a_safety_checker_is_the_decoders_and_a_processor_goes_where_it_is_read() -> None:
    parts = owned(
        "StableDiffusion",
        unet=["diffusers", "UNet2DConditionModel"],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
    )
    assert parts == {
        "encoder": {"tokenizer", "text_encoder", "image_encoder", "feature_extractor"},
        "denoiser": {"unet", "scheduler", "feature_extractor"},
        "decoder": {"vae", "safety_checker", "feature_extractor"},
    }


def test_what_cannot_be_run_without_a_step_has_its_vae_where_its_loop_is() -> None:
    assert owned("LatentConsistencyModel", unet=["diffusers", "UNet2DConditionModel"]) == {
        "encoder": {"tokenizer", "text_encoder"},
        "denoiser": {"unet", "scheduler", "vae"},
        "decoder": set(),
    }


def test_an_index_may_name_a_folder_of_pipelines_for_what_encodes() -> None:
    parts = owned(
        "GlmImage",
        processor=["glm_image", "GlmImageProcessor"],
        vision_language_encoder=["glm_image", "GlmImageForConditionalGeneration"],
    )
    assert parts["encoder"] == {"tokenizer", "text_encoder", "processor", "vision_language_encoder"}
    assert "image_encoder"


def test_a_tokenizer_is_also_where_what_a_pipeline_keeps_of_it_is_read() -> None:
    # On which side it pads decides how embeddings are read; without a tokenizer the pipeline would take the other side.
    assert "tokenizer" in owned("LTX2Condition", connectors=["ltx2", "LTX2TextConnectors"])["denoiser"]
    assert "tokenizer" not in owned("Chroma")["denoiser"]


def test_what_encodes_in_each_round_is_where_the_rounds_are() -> None:
    assert {"text_encoder", "tokenizer", "transformer"} <= owned("LTXI2VLongMultiPrompt")["denoiser"]


def test_an_encoder_that_is_run_beside_the_encoding_methods_is_where_that_is_run_too() -> None:
    parts = owned("StableDiffusionGLIGEN", unet=["diffusers", "UNet2DConditionModel"])
    assert all({"text_encoder", "tokenizer"} <= names for names in parts.values())


def test_what_only_encoding_methods_read_is_the_encoders() -> None:
    parts = owned("AudioLDM2", projection_model=["audioldm2", "AudioLDM2ProjectionModel"], vocoder=TEXT)
    assert "projection_model" in parts["encoder"]
    assert parts["decoder"] == {"vae", "vocoder"}


def test_an_entry_that_the_pipeline_does_not_take_is_left_out() -> None:
    assert owned("PixArtSigma", tokenizer_2=TOKENIZER, requires_safety_checker=True) == owned("PixArtSigma")


def test_what_diffusers_loads_from_no_folder_is_no_component() -> None:
    # The class makes a scheduler of its own; `save_pretrained` writes none.
    assert owned("LongCatAudioDiT") == {
        "encoder": {"tokenizer", "text_encoder"},
        "denoiser": {"transformer"},
        "decoder": {"vae"},
    }


def test_a_processor_that_a_pipeline_reads_when_it_is_made_is_everywhere() -> None:
    parts = owned("LongCatImageEdit", text_processor=["transformers", "Qwen2VLProcessor"])
    assert all("text_processor" in names for names in parts.values())
    assert "tokenizer" not in parts["denoiser"]


def test_the_encoder_of_a_vae_may_be_run_by_a_method_that_gets_the_vae_as_an_argument() -> None:
    assert "vae" in owned("HunyuanVideo15ImageToVideo")["denoiser"]
    assert "vae" not in owned("HunyuanVideo15")["denoiser"]


def test_methods_are_found_by_what_they_work_with() -> None:
    found = index("CogVideoX")
    assert classic_partition(classic_class(found), found).encodes == {"encode_prompt"}
    assert classic_partition(classic_class(found), found).decodes == {"decode_latents"}
    found = index("GlmImage", vision_language_encoder=["transformers", "GlmImageForConditionalGeneration"])
    assert classic_partition(classic_class(found), found).encodes == {"encode_prompt", "generate_prior_tokens"}
    assert classic_partition(classic_class(found), found).decodes == frozenset()


@pytest.mark.parametrize(
    "named", [["torch.hub", "load"], ["nolib", "Thing"], ["diffusers", "NoSuch"], ["diffusers", 5]]
)
def test_an_index_that_names_no_component_is_a_sentence(tmp_path: Path, named: list[object]) -> None:
    vae = tmp_path / "vae"
    vae.mkdir()
    (vae / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text(
        json.dumps(index("Flux", vae=named, text_encoder_2=TEXT, tokenizer_2=TEXT))
    )
    sentence, problem = describe_serving(tmp_path, DEFAULTS, disaggregated=True)
    assert sentence == ""
    assert str(tmp_path) in problem


def test_a_topology_chooses_between_the_blocks_and_the_class(models: Callable[[str], Path], tmp_path: Path) -> None:
    for route in ("modular", "classic"):
        assert strategy_for(models("flux"), ModelOptions(route=route)) is PartitionStrategy(route)
    (tmp_path / "model_index.json").write_text(json.dumps(index("PixArtSigma")))
    with pytest.raises(ModelError, match=r"is for PixArtSigmaPipeline, which diffusers .* cannot run in blocks"):
        strategy_for(tmp_path, ModelOptions(route="modular"))
    (tmp_path / "model_index.json").write_text(json.dumps(index("FluxModular")))
    with pytest.raises(ModelError, match="is for FluxModularPipeline, which has only blocks"):
        strategy_for(tmp_path, ModelOptions(route="classic"))
