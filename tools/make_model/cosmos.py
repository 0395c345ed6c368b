"""Cosmos 3: one language model that makes images, videos, sound and actions, and its distilled form."""

from __future__ import annotations

from diffusers import (
    Cosmos3AVAEAudioTokenizer,
    Cosmos3OmniTransformer,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from triptych.tools.make_model import text, vaes
from triptych.tools.make_model.recipe import Component, Recipe
from triptych.tools.make_model.text import VISION_VOCABULARY_SIZE, WIDTH

_SOUND = 4
_RANGES = {"height": [16, 512, 16], "width": [16, 512, 16], "num_frames": [1, 33]}


def omni() -> Recipe:
    """The one that is guided."""
    components = {**_components(), "scheduler": _unipc, "sound_tokenizer": _sound_tokenizer}
    defaults = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 6.0}
    return Recipe("Cosmos3OmniModularPipeline", "text-to-video", components, defaults, _RANGES, _SETTINGS)


def distilled() -> Recipe:
    """The one whose steps are in its index."""
    components = {**_components(), "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=1.0)}
    defaults: dict[str, float] = {"height": 64, "width": 64, "num_frames": 5}
    settings = {**_SETTINGS, "distilled_sigmas": [1.0, 0.6, 0.3], "is_distilled": True}
    return Recipe("Cosmos3DistilledModularPipeline", "text-to-video", components, defaults, _RANGES, settings)


# Its guardrail is a package of its own, which is not installed.
_SETTINGS: dict[str, object] = {"enable_safety_checker": False}


def _components() -> dict[str, Component | None]:
    return {
        "text_tokenizer": lambda: text.chat_tokenizer(),
        "transformer": lambda: Cosmos3OmniTransformer(
            head_dim=16,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            latent_channel=4,
            latent_patch_size=2,
            patch_latent_dim=4 * 2 * 2,
            num_attention_heads=2,
            num_hidden_layers=2,
            num_key_value_heads=1,
            rope_axes_dim=(4, 2, 2),
            action_dim=32,
            action_gen=True,
            sound_dim=_SOUND,
            sound_gen=True,
            vocab_size=VISION_VOCABULARY_SIZE,
        ),
        "vae": vaes.wan_full,
    }


def _unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _sound_tokenizer() -> Cosmos3AVAEAudioTokenizer:
    return Cosmos3AVAEAudioTokenizer(
        sampling_rate=4800,
        vocoder_input_dim=_SOUND,
        dec_dim=8,
        dec_c_mults=(1, 2),
        dec_strides=(4, 8),
        enc_dim=8,
        enc_num_blocks=1,
        enc_n_fft=16,
        enc_hop_length=4,
        enc_latent_dim=2 * _SOUND,
        enc_c_mults=(1, 2),
        enc_strides=(2, 4),
    )
