"""Those that make sound."""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import (
    AceStepTransformer1DModel,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderOobleck,
    AutoencoderSAME,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
    StableAudio3DiTModel,
    StableAudioDiTModel,
    StableAudioProjectionModel,
    UNet1DModel,
    UNet2DConditionModel,
)
from diffusers.pipelines.ace_step import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer, AceStepConditionEncoder
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder
from tokenizers import pre_tokenizers
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapTextConfig,
    ClapTextModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Model,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Tokenizer,
)

from triptych.tools.families.cases import PROMPT
from triptych.tools.families.classes import Sample
from triptych.tools.families.classes.image_transformers import t5_gemma
from triptych.tools.make_model import text, vaes
from triptych.tools.make_model.recipe import Component
from triptych.tools.make_model.text import VOCABULARY_SIZE, WIDTH

_MELS = 8
_SAID: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2}
_LATENTS = 8


def samples() -> list[Sample]:
    """Those of each."""
    guided = {**_SAID, "negative_prompt": "silence"}
    ldm = {**guided, "audio_length_in_s": 0.02}
    wave = torch.sin(torch.linspace(0, 60, 64)).repeat(2, 1)
    same = {**_SAID, "duration": 1.0}
    return [
        Sample("AudioLDMPipeline", _ldm(_clap_text), ldm),
        Sample("MusicLDMPipeline", {**_ldm(_clap), "feature_extractor": _clap_features}, ldm),
        Sample("AudioLDM2Pipeline", _ldm2(), {**ldm, "max_new_tokens": 4}),
        Sample("StableAudioPipeline", _stable(), {**guided, "audio_end_in_s": 0.4}),
        Sample("StableAudio3Pipeline", _stable3(), same),
        Sample(
            "StableAudio3AudioToAudioPipeline",
            _stable3(),
            {**same, "audio": wave[None, :, :16], "init_noise_level": 0.5},
        ),
        Sample(
            "StableAudio3InpaintPipeline",
            _stable3(),
            {**same, "audio": wave[None, :, :16], "mask_start_seconds": 0.25, "mask_end_seconds": 0.75},
        ),
        Sample("AceStepPipeline", _ace(), {**_SAID, "lyrics": "[verse]\nOh ship", "audio_duration": 0.4}),
        Sample(
            "DanceDiffusionPipeline",
            {"unet": _dance, "scheduler": IPNDMScheduler},
            {"num_inference_steps": 2, "audio_length_in_s": 0.02},
        ),
        Sample("LongCatAudioDiTPipeline", _longcat(), {**guided, "audio_duration_s": 0.01}),
    ]


def _ldm(encoder: Component) -> dict[str, Any]:
    return {
        "vae": _mel_vae,
        "text_encoder": encoder,
        "tokenizer": lambda: text.tokenizer(start=True, length=77),
        "unet": lambda: UNet2DConditionModel(
            sample_size=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
            class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=WIDTH,
            class_embeddings_concat=True,
        ),
        "scheduler": _ddim,
        "vocoder": _vocoder,
    }


def _ldm2() -> dict[str, Any]:
    return {
        "vae": _mel_vae,
        "text_encoder": _clap,
        "tokenizer": _roberta,
        "feature_extractor": _clap_features,
        "text_encoder_2": text.t5,
        "tokenizer_2": _t5_tokenizer,
        "language_model": _gpt2,
        "projection_model": lambda: AudioLDM2ProjectionModel(
            text_encoder_dim=WIDTH, text_encoder_1_dim=WIDTH, langauge_model_dim=16
        ),
        "unet": lambda: AudioLDM2UNet2DConditionModel(
            sample_size=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            # Of each block: itself, what the language model says, the states of T5.
            cross_attention_dim=((None, 16, WIDTH),) * 2,
        ),
        "scheduler": _ddim,
        "vocoder": _vocoder,
    }


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False)


def _mel_vae() -> Any:
    return vaes.kl(quant=True, shift=None, levels=2, in_channels=1, out_channels=1)


def _clap_words() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": 128,
        "projection_dim": WIDTH,
        "bos_token_id": text.START,
        "eos_token_id": text.END,
        "pad_token_id": text.PAD,
    }


def _clap_text() -> ClapTextModelWithProjection:
    return ClapTextModelWithProjection(ClapTextConfig(**_clap_words()))


def _clap() -> ClapModel:
    heard = {
        "spec_size": 8,
        "window_size": 4,
        "num_mel_bins": 8,
        "intermediate_size": WIDTH,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "patch_embeds_hidden_size": 16,
        "projection_dim": WIDTH,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embed_input_channels": 4,
    }
    return ClapModel(ClapConfig(text_config=_clap_words(), audio_config=heard, projection_dim=WIDTH))


def _clap_features() -> ClapFeatureExtractor:
    return ClapFeatureExtractor(feature_size=8, hop_length=7900)


# The class asks its tokenizers of what kind they are.
def _roberta() -> RobertaTokenizer:
    words = [*text.SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return RobertaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77)


def _t5_tokenizer() -> T5Tokenizer:
    words = [*text.SPECIAL.values(), "\u2581", *string.ascii_lowercase]
    return T5Tokenizer(vocab=[(word, -1.0) for word in words], extra_ids=0, model_max_length=77)


def _gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(n_embd=16, n_head=1, n_layer=1, vocab_size=VOCABULARY_SIZE, n_positions=128)
    config.max_new_tokens = 4
    return GPT2LMHeadModel(config)


def _vocoder() -> SpeechT5HifiGan:
    return SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=_MELS,
            sampling_rate=16000,
            upsample_initial_channel=16,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3, 5]],
            normalize_before=False,
        )
    )


def _stable() -> dict[str, Any]:
    return {
        "transformer": lambda: StableAudioDiTModel(
            sample_size=4,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            out_channels=4,
            cross_attention_dim=8,
            time_proj_dim=8,
            global_states_input_dim=16,
            cross_attention_input_dim=8,
        ),
        "scheduler": lambda: EDMDPMSolverMultistepScheduler(
            prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
        "vae": lambda: _oobleck(4),
        "text_encoder": text.t5,
        "tokenizer": lambda: text.tokenizer(start=False),
        "projection_model": lambda: StableAudioProjectionModel(
            text_encoder_dim=WIDTH, conditioning_dim=8, min_value=0, max_value=32
        ),
    }


def _oobleck(channels: int) -> AutoencoderOobleck:
    return AutoencoderOobleck(
        encoder_hidden_size=2 * channels,
        downsampling_ratios=[1, 2],
        decoder_channels=4,
        decoder_input_channels=channels,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=16,
    )


def _stable3() -> dict[str, Any]:
    return {
        "transformer": lambda: StableAudio3DiTModel(
            io_channels=_LATENTS,
            patch_size=1,
            embed_dim=WIDTH,
            depth=1,
            num_heads=2,
            cond_token_dim=WIDTH,
            global_cond_dim=WIDTH,
            local_add_cond_dim=_LATENTS + 1,
            timestep_features_dim=16,
            ff_mult=2,
            num_memory_tokens=3,
            use_differential_attention=False,
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        "vae": lambda: AutoencoderSAME(
            audio_channels=2,
            patch_size=2,
            encoder_channels=8,
            encoder_c_mults=(2,),
            encoder_strides=(2,),
            encoder_transformer_depths=(1,),
            latent_dim=_LATENTS,
            use_differential_attention=False,
            dim_heads=4,
            ff_mult=2,
            sampling_rate=16,
        ),
        "text_encoder": t5_gemma,
        "tokenizer": lambda: text.tokenizer(start=False),
        "duration_embedder": lambda: StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=16),
    }


def _ace() -> dict[str, Any]:
    heads = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 16,
    }
    pooled = {
        **heads,
        "audio_acoustic_hidden_dim": _LATENTS,
        "pool_window_size": 2,
        "num_attention_pooler_hidden_layers": 1,
    }
    return {
        "transformer": lambda: AceStepTransformer1DModel(
            **heads,
            num_hidden_layers=2,
            in_channels=3 * _LATENTS,
            audio_acoustic_hidden_dim=_LATENTS,
            patch_size=2,
        ),
        "condition_encoder": lambda: AceStepConditionEncoder(
            **heads,
            text_hidden_dim=WIDTH,
            timbre_hidden_dim=_LATENTS,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
        ),
        "vae": lambda: _oobleck(_LATENTS),
        "text_encoder": lambda: text.qwen3(Qwen3Model),
        "tokenizer": text.chat_tokenizer,
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        "audio_tokenizer": lambda: AceStepAudioTokenizer(
            **pooled, fsq_dim=WIDTH, fsq_input_levels=[4, 4, 4], fsq_input_num_quantizers=1
        ),
        "audio_token_detokenizer": lambda: AceStepAudioTokenDetokenizer(**pooled),
    }


def _dance() -> UNet1DModel:
    return UNet1DModel(
        block_out_channels=(32, 32),
        extra_in_channels=2 * 32,
        sample_size=512,
        sample_rate=16000,
        in_channels=2,
        out_channels=2,
        flip_sin_to_cos=True,
        use_timestep_embedding=False,
        time_embedding_type="fourier",
        mid_block_type="UNetMidBlock1D",
        down_block_types=("DownBlock1DNoSkip", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1DNoSkip"),
    )


def _longcat() -> dict[str, Any]:
    return {
        "vae": lambda: LongCatAudioDiTVae(
            in_channels=1,
            channels=16,
            c_mults=[1, 2],
            strides=[2],
            latent_dim=_LATENTS,
            encoder_latent_dim=2 * _LATENTS,
            downsampling_ratio=2,
            sample_rate=24000,
        ),
        "text_encoder": text.umt5,
        "tokenizer": lambda: text.tokenizer(start=False),
        "transformer": lambda: LongCatAudioDiTTransformer(
            dit_dim=2 * WIDTH,
            dit_depth=1,
            dit_heads=2,
            dit_text_dim=WIDTH,
            latent_dim=_LATENTS,
            text_conv=False,
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(),
    }
