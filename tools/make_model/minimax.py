"""MiniMax H3, which makes videos with their sound, and Music 3, which makes songs."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMiniMaxH3Audio,
    FlowMatchEulerDiscreteScheduler,
    MiniMaxH3Scheduler,
    MiniMaxH3Transformer3DModel,
    MiniMaxMusic3ConditionEncoder,
    MiniMaxMusic3RVQDepthDecoder,
    MiniMaxMusic3Transformer1DModel,
    MiniMaxMusic3Vocoder,
)
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3VLForConditionalGeneration

from triptych.tools.make_model import text
from triptych.tools.make_model.recipe import Component, Recipe
from triptych.tools.make_model.text import WIDTH

_CODEBOOKS = 3
_LATENTS = 8
_WIDTH = 16
# The pipeline has the numbers of its codes inside.
_VOCABULARY_SIZE = 151675 + 16384


def h3() -> Recipe:
    """Videos of five seconds and more, of text, of their first and last frame, or of other media."""
    components: dict[str, Component | None] = {
        "tokenizer": lambda: text.chat_tokenizer(),
        "processor": text.qwen3_vl_processor,
        # It reads the states of the 50th layer.
        "text_encoder": lambda: text.qwen3_vl(Qwen3VLForConditionalGeneration, layers=51),
        "transformer": _transformer,
        "transformer_ref": _transformer,
        "scheduler": lambda: MiniMaxH3Scheduler(shift=12.0),
        "audio_scheduler": lambda: MiniMaxH3Scheduler(shift=3.0),
        "vae": lambda: AutoencoderKLMiniMaxH3(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            # Half the originals: images are 8 times as large as latents.
            spatial_downsample_factors=(2, 2, 2, 1),
            temporal_downsample_factors=(1, 2, 2, 1),
            norm_num_groups=4,
            decoder_num_layers=1,
            decoder_num_attention_heads=2,
            decoder_attention_head_dim=16,
            latents_mean=(0.1, -0.2, 0.3, 0.0),
            latents_std=(1.5, 1.2, 0.8, 1.1),
        ),
        "audio_vae": lambda: AutoencoderKLMiniMaxH3Audio(
            encoder_dim=4,
            encoder_rates=(2, 5),
            latent_dim=16,
            latent_channels=4,
            num_attention_heads=2,
            decoder_dim=16,
            decoder_rates=(5, 2),
            decoder_kernel_sizes=(9, 4),
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1, 3),),
            sampling_rate=400,  # Its sounds are 10 times as long as latents, of which there are 40 in a second.
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 1.2, 0.8, 1.1],
        ),
    }
    defaults: dict[str, float] = {"height": 32, "width": 32, "num_frames": 124, "num_inference_steps": 4}
    settings: dict[str, object] = {
        "canvas_short_edge": 32,
        "canvas_max_pixels": 32 * 64,
        "reference_image_short_edge": 48,
    }
    ranges = {"height": [16, 256, 16], "width": [16, 256, 16], "num_frames": [124, 345]}
    return Recipe("MiniMaxH3ModularPipeline", "t2va", components, defaults, ranges, settings)


def _transformer() -> MiniMaxH3Transformer3DModel:
    return MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=WIDTH,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=2 * WIDTH,
        in_channels=4,
        audio_in_channels=4,
        text_dim=WIDTH,
        freq_dim=WIDTH,
        time_embed_hidden_dim=WIDTH,
        time_embed_dim=WIDTH,
        rope_freq_dim=2,
    )


def music3() -> Recipe:
    """Songs of a description and lyrics."""
    components: dict[str, Component | None] = {
        "tokenizer": lambda: text.chat_tokenizer(),
        "language_model": _language_model,
        "rvq_depth_decoder": lambda: MiniMaxMusic3RVQDepthDecoder(
            hidden_size=_WIDTH,
            num_layers=1,
            num_attention_heads=2,
            intermediate_size=2 * _WIDTH,
            audio_vocab_size=64,
            num_codebooks=_CODEBOOKS,
        ),
        # Twice as many frames in a second, of half the length, as the original has.
        "condition_encoder": lambda: MiniMaxMusic3ConditionEncoder(
            condition_hidden_dim=_WIDTH,
            num_condition_layers=_CODEBOOKS,
            out_dim=_WIDTH,
            input_hop_length=480,
            output_hop_length=256,
        ),
        "transformer": lambda: MiniMaxMusic3Transformer1DModel(
            in_channels=_LATENTS,
            condition_dim=_WIDTH,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            ff_inner_dim=2 * _WIDTH,
            rotary_dim=4,
            fourier_embedding_dim=16,
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, invert_sigmas=True),
        "vocoder": lambda: MiniMaxMusic3Vocoder(
            latent_channels=_LATENTS,
            decoder_input_dim=16,
            decoder_hidden_dim=16,
            upsampling_ratios=(8, 8, 4),
        ),
    }
    defaults = {"audio_duration": 1.0, "num_inference_steps": 4}
    return Recipe("MiniMaxMusic3ModularPipeline", "", components, defaults)


def _language_model() -> Qwen3ForCausalLM:
    config = text.decoder_config(
        vocab_size=_VOCABULARY_SIZE,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        head_dim=8,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(Qwen3Config(**config))
