"""Pipelines without blocks: three stages in three processes make, bit for bit, the image of the plain pipeline."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, ControlNetModel, LCMScheduler, MultiControlNetModel, UNet2DConditionModel
from PIL import Image

from tests.engines.classic_models import (
    FAMILIES,
    STAGE_COMPONENTS,
    Models,
    edit,
    expected,
    finish,
    load,
    part,
    plain,
    request,
)
from tests.engines.results import media, same, seeded_generator
from triptych.engines.partition.strategy import PartitionStrategy
from triptych.engines.pipelines.pipeline import InputError
from triptych.engines.stages import ModelError, Stage
from triptych.engines.weights.stubs import StubError
from triptych.tools.families.stage_processes import StageProcesses

NULL = [None, None]


# Identity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_three_processes_make_the_image_of_one(family: str, models: Models, processes: StageProcesses) -> None:
    model = models(family)
    inputs = request(model)
    ours, answers = processes.run(model, inputs, seed=11)
    assert [answer["components"] for answer in answers] == STAGE_COMPONENTS
    assert len({os.getpid(), *(answer["pid"] for answer in answers)}) == 4
    assert same(media(ours), expected(model, inputs, 11))
    assert not same(media(ours), expected(model, inputs, 12))
    assert not same(media(ours), expected(model, {**inputs, "prompt": "a blue ship"}, 11))


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_on_and_off(family: str, models: Models, processes: StageProcesses) -> None:
    model = models(family)
    made = []
    for scale in (1.0, 2.5):
        inputs = request(model, guidance_scale=scale, negative_prompt="grey", num_inference_steps=2)
        ours, _ = processes.run(model, inputs, seed=5)
        assert same(media(ours), expected(model, inputs, 5)), scale
        made.append(media(ours))
    assert not same(*made)


@pytest.mark.parametrize("family", ["chroma", "cogvideox"])
def test_bfloat16_is_identical_too(family: str, models: Models, processes: StageProcesses) -> None:
    model = models(family)
    inputs = request(model, num_inference_steps=2)
    ours, _ = processes.run(model, inputs, seed=3, dtype=torch.bfloat16)
    assert same(media(ours), expected(model, inputs, 3, torch.bfloat16))


def test_what_a_pipeline_does_after_its_vae_is_its_own(models: Models, processes: StageProcesses) -> None:
    model = models("pixart")
    # It paints at the nearest size it was trained for, and cuts that to the size asked for.
    inputs = request(model, use_resolution_binning=True, height=48, width=64, num_inference_steps=1)
    ours, answers = processes.run(model, inputs, seed=4)
    assert answers[1]["state"]["latents"].shape[2:] != (12, 16)
    assert media(ours).shape == (1, 48, 64, 3)
    assert same(media(ours), expected(model, inputs, 4))


@pytest.mark.parametrize("stages", [(Stage.ENCODER, Stage.DENOISER), (Stage.DENOISER, Stage.DECODER)])
def test_stages_may_share_a_process(stages: tuple[Stage, ...], models: Models) -> None:
    model = models("sana")
    pipeline = part(model, *stages)
    assert pipeline.strategy is PartitionStrategy.CLASSIC
    owned = dict(zip(Stage, STAGE_COMPONENTS, strict=True))
    assert sorted(pipeline.components) == sorted(name for stage in stages for name in owned[stage])
    (rest,) = set(Stage) - set(stages)
    by = dict.fromkeys(stages, pipeline) | {rest: part(model, rest)}
    inputs = request(model, num_inference_steps=3)
    state = finish(by[Stage.DENOISER].denoise(by[Stage.ENCODER].encode(inputs, 8)))
    for _ in range(2):
        assert same(media(by[Stage.DECODER].decode(state)), expected(model, inputs, 8))


def test_with_all_stages_in_one_process_the_pipeline_is_not_cut(models: Models) -> None:
    model = models("sana")
    pipeline = load(model, *Stage)
    assert pipeline.strategy is PartitionStrategy.MONOLITHIC
    inputs = request(model, num_inference_steps=3)
    assert same(
        media(pipeline.decode(finish(pipeline.denoise(pipeline.encode(inputs, 8))))), expected(model, inputs, 8)
    )


def test_blocks_that_would_make_the_wrong_size_are_not_used(
    models: Models, processes: StageProcesses, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(models("wan"), tmp_path / "model"))
    # As the large VAE of Wan 2.2, which works on patches of pixels.
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        is_residual=True,
        scale_factor_spatial=8,
        scale_factor_temporal=2,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 1.2, 0.8, 1.1],
    )
    shutil.rmtree(model / "vae")
    vae.save_pretrained(model / "vae")
    edit(model, expand_timesteps=True)
    inputs = request(model, num_inference_steps=2)
    ours, answers = processes.run(model, inputs, seed=9)
    assert [answer["components"] for answer in answers] == STAGE_COMPONENTS
    assert media(ours).shape == (1, 5, 64, 64, 3)
    assert same(media(ours), expected(model, inputs, 9))


def test_a_pipeline_that_asks_for_the_class_of_a_component_gets_it_from_a_stub(models: Models) -> None:
    model = models("sd_controlnet")
    lines = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    inputs = request(model, image=lines, num_inference_steps=2)
    encoder, denoiser, decoder = (load(model, stage) for stage in Stage)
    assert "controlnet" not in encoder.components | decoder.components
    made = decoder.decode(finish(denoiser.denoise(encoder.encode(inputs, 11))))
    assert same(media(made), expected(model, inputs, 11))
    assert not same(media(made), expected(model, {**inputs, "image": Image.new("RGB", (64, 64))}, 11))


@pytest.fixture
def sd(models: Models, tmp_path: Path) -> Path:
    """A tiny Stable Diffusion 1.5 that the test may change into one of its relatives."""
    model = Path(shutil.copytree(models("sd_controlnet"), tmp_path / "model"))
    edit(model, _class_name="StableDiffusionPipeline", controlnet=None)
    return model


def test_what_reads_what_only_its_loop_makes_is_decoded_where_the_loop_is(sd: Path) -> None:
    edit(sd, _class_name="LatentConsistencyModelPipeline", scheduler=["diffusers", "LCMScheduler"], image_encoder=NULL)
    LCMScheduler().save_pretrained(sd / "scheduler")
    torch.manual_seed(0)
    config = UNet2DConditionModel.load_config(sd / "unet")
    UNet2DConditionModel.from_config(config, time_cond_proj_dim=8).save_pretrained(sd / "unet")
    encoder, denoiser, decoder = (load(sd, stage) for stage in Stage)
    assert (sorted(denoiser.components), decoder.components) == (["scheduler", "unet", "vae"], frozenset())
    inputs = request(sd, num_inference_steps=2)
    denoising = denoiser.denoise(encoder.encode(inputs, 11))
    assert denoising.advance()
    assert (denoising.step, denoising.total_steps) == (1, 2)
    assert same(media(decoder.decode(finish(denoising))), expected(sd, inputs, 11))


def test_a_scheduler_that_is_copied_for_each_view_makes_the_image_of_the_plain_pipeline(sd: Path) -> None:
    edit(sd, _class_name="StableDiffusionPanoramaPipeline", image_encoder=NULL)
    encoder, denoiser, decoder = (load(sd, stage) for stage in Stage)
    assert decoder.components == {"vae"}
    inputs = request(sd, width=128, height=64, num_inference_steps=3)
    denoising = denoiser.denoise(encoder.encode(inputs, 11))
    made = decoder.decode(finish(denoising))
    assert (denoising.step, denoising.total_steps) == (3, 3)
    assert same(media(made), expected(sd, inputs, 11))


def test_several_controlnets_are_one_component(models: Models, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models("sd_controlnet"), tmp_path / "model"))
    nets = []
    for number in range(2):
        torch.manual_seed(number)
        nets.append(ControlNetModel.from_config(ControlNetModel.load_config(model / "controlnet")))
        for parameter in nets[-1].parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    shutil.rmtree(model / "controlnet")
    MultiControlNetModel(nets).save_pretrained(str(model / "controlnet"))
    edit(model, controlnet=["diffusers", "MultiControlNetModel"])
    lines = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    scales = [0.5, 1.5]
    both = {"image": [lines, lines.rotate(90)], "controlnet_conditioning_scale": scales}
    inputs = request(model, num_inference_steps=2, **both)
    encoder, denoiser, decoder = (load(model, stage) for stage in Stage)
    assert "controlnet" in denoiser.components
    made = decoder.decode(finish(denoiser.denoise(encoder.encode(inputs, 11))))
    assert same(media(made), expected(model, inputs, 11))
    other = {**inputs, "controlnet_conditioning_scale": scales[::-1]}
    assert not same(media(made), expected(model, other, 11))


@pytest.mark.parametrize(
    ("family", "name", "given"),
    [("chroma", "ChromaImg2ImgPipeline", "image"), ("cogvideox", "CogVideoXVideoToVideoPipeline", "video")],
)
def test_a_denoiser_that_starts_from_an_image_has_the_vae_too(
    family: str, name: str, given: str, models: Models, processes: StageProcesses, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(models(family), tmp_path / "model"))
    edit(model, _class_name=name)
    inputs = {name: value for name, value in request(model, strength=0.6).items() if name != "num_frames"}
    frames = [Image.fromarray(np.full((32, 32, 3), 30 * n, np.uint8)) for n in range(5)]
    inputs |= {"height": 32, "width": 32, given: frames if given == "video" else frames[2]}
    ours, answers = processes.run(model, inputs, seed=13)
    assert [answer["components"] for answer in answers] == [
        STAGE_COMPONENTS[0],
        [*STAGE_COMPONENTS[1], "vae"],
        STAGE_COMPONENTS[2],
    ]
    output_type = "np" if given == "video" else "pil"
    made = media(plain(model, torch.float32)(**inputs, generator=seeded_generator(13), output_type=output_type))
    assert same(media(ours), made)


# Requests and models that cannot be served ------------------------------------------------------------------------


def test_what_the_pipeline_accepts(models: Models) -> None:
    pipeline = part(models("pixart"), Stage.ENCODER)
    assert {"prompt", "negative_prompt", "height", "guidance_scale", "max_sequence_length"} <= pipeline.accepted
    assert not {"self", "generator", "return_dict", "kwargs", "num_images_per_prompt"} & pipeline.accepted
    with pytest.raises(InputError, match="takes no colour"):
        pipeline.encode({"prompt": "x", "colour": 2}, 1)
    with pytest.raises(ValueError, match="divisible by 8"):
        pipeline.encode(request(models("pixart"), height=63), 1)
    with pytest.raises(RuntimeError, match="was not loaded here, only: encoder"):
        pipeline.denoise({})


@pytest.fixture
def copied(models: Models, tmp_path: Path) -> Path:
    """A tiny PixArt model that the test may spoil."""
    return Path(shutil.copytree(models("pixart"), tmp_path / "model"))


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


@pytest.mark.parametrize(("name", "stage"), [("text_encoder", Stage.ENCODER), ("vae", Stage.DECODER)])
def test_broken_weights_are_a_model_error(copied: Path, name: str, stage: Stage) -> None:
    (path,) = (copied / name).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=rf"The {name} in .* cannot be loaded"):
        load(copied, stage)


def test_an_index_that_leaves_a_needed_component_out_is_a_model_error(copied: Path) -> None:
    edit(copied, transformer=None)
    with pytest.raises(ModelError, match="has no transformer, which PixArtSigmaPipeline needs"):
        load(copied, Stage.DECODER)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (["os", "PathLike"], "which is code that came with the model"),
        (["diffusers", "Wishful"], "and diffusers .* has no such class"),
        (["diffusers", "logging"], "which is not installed"),
    ],
)
def test_nothing_but_components_of_the_two_libraries_is_imported(copied: Path, entry: list[str], why: str) -> None:
    edit(copied, transformer=entry)
    with pytest.raises(ModelError, match=rf"The transformer is a {entry[1]} of {entry[0]}, {why}"):
        load(copied, Stage.DENOISER)


def test_a_pipeline_that_cannot_be_cut_is_not_served_in_stages(copied: Path) -> None:
    edit(copied, text_encoder=[None, None], tokenizer=[None, None])
    for stages in ((Stage.ENCODER,), (Stage.DENOISER, Stage.DECODER)):
        with pytest.raises(ModelError, match=r'cannot be cut into stages: give .* kind="monolithic" instead of'):
            load(copied, *stages)


def test_a_pipeline_that_cannot_be_cut_runs_in_one_process(copied: Path) -> None:
    edit(copied, text_encoder=[None, None], tokenizer=[None, None])
    pipeline = load(copied, *Stage)
    assert pipeline.strategy is PartitionStrategy.MONOLITHIC
    assert pipeline.components == {"transformer", "scheduler", "vae"}
    inputs = {
        "prompt_embeds": torch.ones(1, 3, 32),
        "prompt_attention_mask": torch.ones(1, 3),
        "negative_prompt": None,
        "height": 32,
        "width": 32,
        "guidance_scale": 1.0,
        "use_resolution_binning": False,
        "num_inference_steps": 3,
    }
    running, doomed = (pipeline.denoise(pipeline.encode(inputs, 6)) for _ in range(2))
    assert doomed.advance()
    assert [running.advance() for _ in range(3)] == [True, True, False]
    assert (running.step, running.total_steps) == (3, 3)
    doomed.cancel()
    assert doomed.cancelled
    assert same(media(pipeline.decode(running.result())), expected(copied, inputs, 6))


def test_a_stage_that_needs_what_another_has_says_so(models: Models) -> None:
    model = models("chroma")
    # With tokenizers, so that it comes to the text encoder.
    pipeline, decoder = part(model), part(model, Stage.ENCODER, Stage.DECODER)
    state = pipeline.encode(request(model), 1)
    denoising = pipeline.denoise({**state, "calls": []})
    with pytest.raises(StubError, match=r"The denoiser of this pipeline needs `text_encoder\.forward`, which is not"):
        denoising.advance()
    latents = finish(pipeline.denoise(state))
    with pytest.raises(StubError, match=r"The decoder of this pipeline needs `text_encoder\.forward`, which is not"):
        decoder.decode({**latents, "calls": []})
