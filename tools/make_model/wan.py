"""Wan 2.1 and 2.2, and Helios, which is made of the same parts."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DPMSolverMultistepScheduler,
    HeliosDMDScheduler,
    HeliosScheduler,
    HeliosTransformer3DModel,
    UniPCMultistepScheduler,
    WanAnimate2Transformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)

from triptych.tools.make_model import text, vaes
from triptych.tools.make_model.recipe import Component, Recipe, image_defaults, size_ranges
from triptych.tools.make_model.text import TEXT_LENGTH, WIDTH

_RANGES = {**size_ranges(8), "num_frames": [1, 33]}


def t2v(*, experts: int = 1) -> Recipe:
    """Video of text; with two experts it is Wan 2.2."""
    components, settings = _experts(lambda: WanTransformer3DModel(**_transformer()), experts)
    return Recipe("WanPipeline", "text-to-video", _with_text(components), _defaults(), _RANGES, settings)


def i2v(*, experts: int = 1) -> Recipe:
    """Video of an image and text; with two experts it is Wan 2.2, which reads the image with its VAE alone."""
    # Latents, a mask of as many channels as a latent has frames, and the image's latents.
    changes: dict[str, Any] = {"in_channels": 4 + 2 + 4}
    if experts == 1:
        changes |= {"image_dim": WIDTH, "added_kv_proj_dim": 24}
    components, settings = _experts(lambda: WanTransformer3DModel(**_transformer(**changes)), experts)
    eyes: dict[str, Component | None] = {
        "image_encoder": text.clip_vision if experts == 1 else None,
        "image_processor": text.clip_images if experts == 1 else None,
    }
    pipeline, task = ("WanImageToVideoPipeline", "image-to-video")
    return Recipe(pipeline, task, {**_with_text(components), **eyes}, _defaults(), _RANGES, settings)


def flf2v() -> Recipe:
    """Video between two images."""
    # Both images are read as one: four patches and the whole of each.
    changes: dict[str, Any] = {
        "in_channels": 4 + 2 + 4,
        "image_dim": WIDTH,
        "added_kv_proj_dim": 24,
        "pos_embed_seq_len": 2 * 5,
    }
    made = i2v()
    components = {**made.components, "transformer": lambda: WanTransformer3DModel(**_transformer(**changes))}
    return Recipe(made.pipeline, "flf2v", components, made.defaults, made.ranges)


def vace() -> Recipe:
    """Wan 2.2 that follows another video."""
    # Twice the latents of the video, and a mask of as many channels as a latent has pixels.
    changes = {"vace_layers": [0, 1], "vace_in_channels": 2 * 4 + 4 * 4}
    components, settings = _experts(lambda: WanVACETransformer3DModel(**_transformer(**changes)), experts=2)
    return Recipe("Wan22VaceModularPipeline", "", _with_text(components), _defaults(), _RANGES, settings)


def animate2(*, distilled: bool) -> Recipe:
    """Wan-Animate-2, which moves a character as another video does, or the distilled one."""
    components: dict[str, Component | None] = {
        "transformer": lambda: WanAnimate2Transformer3DModel(
            text_len=TEXT_LENGTH,
            in_dim=4 + 2 * 4,  # The latents, a mask of as many channels as a latent has frames, and the image's.
            dim=24,
            ffn_dim=2 * WIDTH,
            freq_dim=WIDTH,
            text_dim=WIDTH,
            out_dim=4,
            num_heads=2,
            num_layers=2,
        ),
        "scheduler": lambda: DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        # The transformer counts on the width, the pipeline on the size.
        "image_encoder": lambda: text.clip_vision(
            hidden_size=1280, num_hidden_layers=1, num_attention_heads=16, image_size=224, patch_size=16
        ),
    }
    name = "WanAnimate2DistilledModularPipeline" if distilled else "WanAnimate2ModularPipeline"
    defaults = {**image_defaults(text=TEXT_LENGTH), "segment_frame_length": 5}
    return Recipe(name, "", {**_with_text(components), "vae": vaes.wan_full}, defaults, size_ranges(16))


def helios(pipeline: str, scheduler: Component) -> Recipe:
    """Long video in chunks; `pipeline` is one of its three."""
    components = _with_text(
        {
            "transformer": lambda: HeliosTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=WIDTH,
                freq_dim=WIDTH,
                ffn_dim=2 * WIDTH,
                num_layers=2,
                rope_dim=(4, 4, 4),
            ),
            "scheduler": scheduler,
        }
    )
    components["vae"] = vaes.wan_full
    defaults = {**_defaults(), "num_frames": 33, "num_inference_steps": 2}
    return Recipe(pipeline, "text-to-video", components, defaults, {**size_ranges(16), "num_frames": [1, 132]})


def helios_flat() -> HeliosScheduler:
    """The scheduler of the Helios that works at one size."""
    return HeliosScheduler(stages=1, stage_range=[0, 1])


def helios_pyramid() -> HeliosScheduler:
    """The scheduler of the Helios that works at three sizes, one after the other."""
    # At the default, a third, the matrix that its noise is made with is singular, and some processors find it so.
    return HeliosScheduler(gamma=0.3)


def helios_distilled() -> HeliosDMDScheduler:
    """The same, for the distilled one."""
    return HeliosDMDScheduler(gamma=0.3)


def _defaults() -> dict[str, float]:
    return {**image_defaults(text=TEXT_LENGTH), "num_frames": 5, "guidance_scale": 5.0}


def _experts(transformer: Component, experts: int) -> tuple[dict[str, Component | None], dict[str, object]]:
    components: dict[str, Component | None] = {"transformer": transformer, "scheduler": _scheduler}
    if experts == 1:
        return components, {}
    return {**components, "transformer_2": transformer}, {"boundary_ratio": 0.875}


def _with_text(components: dict[str, Component | None]) -> dict[str, Component | None]:
    encoder: dict[str, Component | None] = {
        "tokenizer": lambda: text.tokenizer(start=False),
        "text_encoder": text.umt5,
    }
    return {**encoder, **components, "vae": vaes.wan}


def _transformer(**changes: Any) -> dict[str, Any]:
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": WIDTH,
        "freq_dim": WIDTH,
        "ffn_dim": 2 * WIDTH,
        "num_layers": 2,
        "rope_max_seq_len": 32,
        **changes,
    }


def _scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
