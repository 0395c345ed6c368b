"""What pipelines make, how fast it plays and how sound is sampled, as far as diffusers tells."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.engines.families import all_families
from triptych.engines.parameters.media import frames_per_s, medium_of, results_of, with_sampling_rate
from triptych.engines.pipelines.classic_call import media_in, signature
from triptych.engines.pipelines.modular import load_modular
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage
from triptych.engines.weights.placement import Placement
from triptych.roles.media.decoded import VideoFrames, to_media
from triptych.tools.families.rows import blocks_of, pipelines

CPU = torch.device("cpu")
VIDEOS = {
    **dict.fromkeys(("Wan", "WanImage2Video", "Wan22", "Wan22Image2Video", "Wan22Vace"), 16.0),
    **dict.fromkeys(("Helios", "HeliosPyramid", "HeliosPyramidDistilled", "HunyuanVideo15"), 16.0),
    **dict.fromkeys(("LTX2", "LTX25", "Cosmos3Omni", "Cosmos3Distilled"), 24.0),
    **dict.fromkeys(("WanAnimate2", "WanAnimate2Distilled", "MiniMaxH3"), 24.0),
    **dict.fromkeys(("LTX", "Echo"), 25.0),
}


@pytest.mark.parametrize("pipeline", all_families(pipelines()))
def test_every_block_set_says_what_it_makes_and_how_fast(pipeline: str) -> None:
    blocks = blocks_of(pipeline)
    medium = medium_of(blocks.output_names)
    family = pipeline.removesuffix("ModularPipeline")
    assert medium == ("video" if family in VIDEOS else "audio" if family == "MiniMaxMusic3" else "image")
    defaults = {declared.name: declared.default for declared in blocks.inputs}
    made = getattr(diffusers, pipeline)(blocks=blocks)
    assert frames_per_s(medium, defaults, made) == VIDEOS.get(family, 0.0)


def test_a_task_that_makes_images_as_videos_of_one_frame_makes_images() -> None:
    assert medium_of(["videos"], "text2image") == medium_of(["videos"], "text-to-image") == "image"
    assert medium_of(["videos"], "image2video") == medium_of(["videos", "sound"], "any") == "video"


def classic() -> Iterator[type]:
    for name in dir(diffusers):
        # One ends the process where OpenCV is absent.
        if not name.endswith("Pipeline") or "ConsisID" in name or "Modular" in name:
            continue
        found = getattr(diffusers, name)
        if isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline):
            yield found


def test_classic_pipelines_say_it_in_the_class_of_their_results() -> None:
    found = {cls.__name__: results_of(cls.__call__) for cls in classic() if hasattr(cls.__call__, "__wrapped__")}
    media = {name: medium_of(results) for name, results in found.items()}
    assert len(media) > 200
    for name, medium in media.items():
        # TextToVideoZero makes frames, and calls them images.
        if "Zero" not in name and any(word in name for word in ("ToVideo", "AnimateDiff", "LTX", "HunyuanVideo")):
            assert medium == "video", name
        if any(word in name for word in ("Audio", "StableAudio", "AceStep")):
            assert medium == "audio", name
        if any(word in name for word in ("Flux", "StableDiffusionXL", "Img2Img", "QwenImage", "PixArt")):
            assert medium == "image", name
    # It has a processor of videos, and makes images.
    assert media["Cosmos2TextToImagePipeline"] == media["Kandinsky5T2IPipeline"] == "image"


@pytest.mark.parametrize(
    ("cls", "medium", "fps"),
    [
        (diffusers.WanPipeline, "video", 16.0),
        (diffusers.LTXPipeline, "video", 25.0),
        (diffusers.LTX2Pipeline, "video", 24.0),
        (diffusers.StableVideoDiffusionPipeline, "video", 7.0),
        (diffusers.SkyReelsV2DiffusionForcingPipeline, "video", 24.0),
        (diffusers.StableAudioPipeline, "audio", 0.0),
        (diffusers.PixArtSigmaPipeline, "image", 0.0),
    ],
)
def test_the_signature_of_a_classic_pipeline_has_both(cls: Any, medium: str, fps: float) -> None:
    found = signature(cls.__new__(cls))
    assert (found.medium, found.fps) == (medium, fps)


def config(**values: object) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(**values))


@pytest.mark.parametrize(
    ("components", "rate"),
    [
        ({"audio_vae": config(sample_rate=16000), "vocoder": config(output_sampling_rate=24000)}, 24000),
        (
            {"condition_encoder": config(output_sampling_rate=1), "vocoder": config(sampling_rate=44100)},
            44100,
        ),
        ({"unet": config(sample_rate=1), "vae": config(sampling_rate=48000)}, 48000),
        ({"unet": config(sample_rate=16000), "scheduler": None}, 16000),
        ({"vae": config(sampling_rate=None), "vocoder": config()}, None),
    ],
)
def test_the_last_component_that_makes_sound_tells_its_rate(components: dict[str, object], rate: int | None) -> None:
    pipeline = SimpleNamespace(**components)
    made = with_sampling_rate({"audio": 1}, pipeline)
    assert made == ({"audio": 1} if rate is None else {"audio": 1, "sampling_rate": rate})
    assert with_sampling_rate({"videos": 1}, pipeline) == {"videos": 1}
    assert with_sampling_rate({"sound": 1, "sampling_rate": 5}, pipeline)["sampling_rate"] == 5


def run(pipeline: StagePipeline, **inputs: object) -> dict[str, object]:
    denoising = pipeline.denoise(pipeline.encode({"prompt": "a ship", **inputs}, 3))
    while denoising.advance():
        pass
    return pipeline.decode(denoising.result())


@pytest.fixture
def resounding(models: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A model whose vocoder has another rate than the audio VAE, as the large ones have."""

    def copied(family: str) -> Path:
        folder = tmp_path / family
        shutil.copytree(models(family), folder)
        path = folder / "vocoder" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "output_sampling_rate": 24000}))
        return folder

    return copied


@pytest.mark.parametrize(
    ("family", "inputs"),
    [("ltx2", {"num_inference_steps": 1}), ("echo", {"sigmas": [1.0, 0.0], "image": None})],
)
def test_sound_comes_with_the_rate_of_the_vocoder(
    family: str, inputs: dict[str, object], resounding: Callable[[str], Path]
) -> None:
    from triptych.tools.families.cases import input_image

    if "image" in inputs:
        inputs = {**inputs, "image": input_image()}
    pipeline = StagePipeline.load(resounding(family), tuple(Stage), dtype=torch.float32, device=CPU)
    made = run(pipeline, height=64, width=64, num_frames=9, **inputs)
    parts = pipeline._runner.pipeline
    assert parts.audio_vae.config.sample_rate != 24000, "or this would tell nothing"
    assert made["sampling_rate"] == 24000
    video = to_media(made)
    assert isinstance(video, VideoFrames)
    assert video.frames.shape == (9, 64, 64, 3)
    assert video.sound is not None
    assert video.sound.rate == 24000
    assert (pipeline.signature.medium, pipeline.signature.fps) == ("video", {"ltx2": 24.0, "echo": 25.0}[family])


def test_a_decoder_alone_knows_the_rate_too(resounding: Callable[[str], Path]) -> None:
    parts = load_modular(resounding("ltx2"), (Stage.DECODER,), Placement(torch.float32, CPU))
    assert with_sampling_rate({"audio": 1}, parts.pipeline)["sampling_rate"] == 24000


def test_maps_are_drawn_as_the_image_processor_of_the_pipeline_does_it() -> None:
    from diffusers.pipelines.marigold import MarigoldDepthOutput, MarigoldNormalsOutput
    from diffusers.pipelines.marigold.marigold_image_processing import MarigoldImageProcessor

    pipeline = SimpleNamespace(image_processor=MarigoldImageProcessor())
    depth = np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 3, 4, 1)
    (drawn,) = media_in(MarigoldDepthOutput(depth, None, None), pipeline)["images"]
    assert drawn.mode == "I;16"
    assert np.array_equal(np.asarray(drawn), (depth[0, ..., 0] * 65535).astype(np.uint16))
    normals = np.zeros((1, 3, 4, 3), np.float32)
    (drawn,) = media_in(MarigoldNormalsOutput(normals, None, None), pipeline)["images"]
    assert (drawn.mode, drawn.size, drawn.getpixel((0, 0))) == ("RGB", (4, 3), (127, 127, 127))


def test_images_of_one_place_are_layers() -> None:
    results = SimpleNamespace(
        rgb=[Image.new("RGB", (2, 2))], depth=[Image.new("I;16", (2, 2))], nsfw_content_detected=None
    )
    assert [image.mode for image in media_in(results, SimpleNamespace())["images"]] == ["RGB", "I;16"]
