"""Consistency models, UniDiffuser, Shap-E, Kandinsky 6, SANA-WM, and those that make text or proteins."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    CMStochasticIterativeScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    Kandinsky6SRTransformer3DModel,
    Kandinsky6SRVAE,
    Kandinsky6Transformer3DModel,
    PriorTransformer,
    SanaWMTransformer3DModel,
    UNet2DModel,
)
from diffusers.pipelines.deprecated.unidiffuser.modeling_text_decoder import UniDiffuserTextDecoder
from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UniDiffuserModel
from diffusers.pipelines.shap_e.renderer import ShapERenderer
from transformers import Gemma2Config, Gemma2Model

from triptych.tools.families.cases import PROMPT, SIDE, input_image, video_frames
from triptych.tools.families.classes import Sample
from triptych.tools.make_model import ltx_hunyuan, text, vaes
from triptych.tools.make_model.text import VOCABULARY_SIZE, WIDTH


def samples() -> list[Sample]:
    """Those of each."""
    return [
        Sample(
            "ConsistencyModelPipeline",
            {"unet": _pixels, "scheduler": lambda: CMStochasticIterativeScheduler(num_train_timesteps=40)},
            {"num_inference_steps": 2},
        ),
        Sample(
            "UniDiffuserPipeline",
            _unidiffuser(),
            {"prompt": PROMPT, "height": SIDE, "width": SIDE, "num_inference_steps": 2},
        ),
        Sample("ShapEPipeline", _shap_e(), {"prompt": PROMPT, "num_inference_steps": 2, "frame_size": 32}),
        Sample(
            "ShapEImg2ImgPipeline",
            _shap_e_seeing(),
            {"image": input_image(), "num_inference_steps": 2, "frame_size": 32},
        ),
        Sample(
            "Kandinsky6TI2VAPipeline",
            _kandinsky6(),
            {
                "prompt": PROMPT,
                "negative_prompt": "grey",
                "height": 32,
                "width": 32,
                "num_frames": 5,
                "num_inference_steps": 2,
                "sample_audio": False,
            },
        ),
        Sample(
            "Kandinsky6SRPipeline",
            {
                "transformer": lambda: Kandinsky6SRTransformer3DModel(
                    in_visual_dim=4,
                    out_visual_dim=4,
                    time_dim=WIDTH,
                    model_dim=WIDTH,
                    ff_dim=2 * WIDTH,
                    num_visual_blocks=1,
                    axes_dims=(4, 6, 6),
                    nabla_window=(3, 3, 3),
                    tile_sizes=((SIDE, SIDE),),
                ),
                "vae": lambda: Kandinsky6SRVAE(
                    latent_channels=4,
                    encoder_block_out_channels=(16, 16, 16, 16),
                    decoder_block_out_channels=(16, 16, 16, 16),
                    layers_per_block=1,
                ),
                "latent_upscaler": None,
            },
            {"video": video_frames(5), "resolution_scale": 2, "num_inference_steps": 2},
        ),
        Sample(
            "SanaWMPipeline",
            _sana_wm(),
            {
                "prompt": PROMPT,
                "image": input_image(),
                "action": "w-9",
                "intrinsics": [50.0, 50.0, SIDE / 2, SIDE / 2],
                "height": SIDE,
                "width": SIDE,
                "num_frames": 9,
                "num_inference_steps": 2,
            },
        ),
        Sample("LLaDA2Pipeline", unbuilt="it writes text with a language model of custom code, not media"),
        Sample("DiffusionGemmaPipeline", unbuilt="it writes text with a language model of Gemma, not media"),
        Sample("RFD4ProteinaPipeline", unbuilt="it designs proteins of prepared molecular tensors, not media"),
    ]


def _pixels() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )


def _unidiffuser() -> dict[str, Any]:
    return {
        "vae": lambda: vaes.kl(quant=True, shift=None),
        "text_encoder": lambda: text.clip_text(max_position_embeddings=77),
        "image_encoder": text.clip_vision_projection,
        "clip_image_processor": text.clip_images,
        "clip_tokenizer": lambda: text.tokenizer(start=True, length=77),
        "text_decoder": _text_decoder,
        "text_tokenizer": lambda: text.tokenizer(start=False),
        "unet": lambda: UniDiffuserModel(
            text_dim=WIDTH,
            clip_img_dim=WIDTH,
            num_text_tokens=77,
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            norm_num_groups=4,
            sample_size=16,
            patch_size=2,
            activation_fn="gelu",
            num_embeds_ada_norm=1000,
            norm_type="layer_norm",
            block_type="unidiffuser",
            use_timestep_embedding=False,
            use_patch_pos_embed=True,
            ff_final_dropout=True,
            use_data_type_embedding=True,
        ),
        "scheduler": lambda: DPMSolverMultistepScheduler(solver_order=3),
    }


def _text_decoder() -> UniDiffuserTextDecoder:
    made = UniDiffuserTextDecoder(
        prefix_length=77,
        prefix_inner_dim=WIDTH,
        prefix_hidden_dim=WIDTH,
        vocab_size=VOCABULARY_SIZE,
        n_embd=WIDTH,
        n_layer=1,
        n_head=2,
    )
    # Tensors that are one in memory are not written.
    head = made.transformer.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return made


def _shap_e() -> dict[str, Any]:
    return {
        "prior": lambda: PriorTransformer(**_prior()),
        "text_encoder": lambda: text.clip_text(projection=True, max_position_embeddings=77),
        "tokenizer": lambda: text.tokenizer(start=True, length=77),
        "shap_e_renderer": _renderer,
        "scheduler": _heun,
    }


def _shap_e_seeing() -> dict[str, Any]:
    return {
        "prior": lambda: PriorTransformer(**_prior(), embedding_proj_norm_type="layer"),
        "image_encoder": text.clip_vision,
        "image_processor": text.clip_images,
        "shap_e_renderer": _renderer,
        "scheduler": _heun,
    }


def _prior() -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "embedding_dim": 16,
        "num_embeddings": 32,
        "embedding_proj_dim": WIDTH,
        "time_embed_dim": 4 * 16,
        "num_layers": 1,
        "clip_embed_dim": 2 * 16,
        "additional_embeddings": 0,
        "time_embed_act_fn": "gelu",
        "norm_in_type": "layer",
        "encoder_hid_proj_type": None,
        "added_emb_type": None,
    }


def _renderer() -> ShapERenderer:
    return ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)),
        d_latent=16,
        d_hidden=8,
        n_output=12,
        background=(0.1, 0.1, 0.1),
    )


def _heun() -> HeunDiscreteScheduler:
    return HeunDiscreteScheduler(
        beta_schedule="exp",
        num_train_timesteps=1024,
        prediction_type="sample",
        use_karras_sigmas=True,
        clip_sample=True,
        clip_sample_range=1.0,
    )


def _kandinsky6() -> dict[str, Any]:
    return {
        "transformer": lambda: Kandinsky6Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=WIDTH,
            in_text_dim2=WIDTH,
            time_dim=WIDTH,
            model_dim=WIDTH,
            ff_dim=2 * WIDTH,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(4, 6, 6),
            in_audio_dim=4,
            out_audio_dim=4,
            model_dim_a=WIDTH,
            time_dim_a=WIDTH,
            ff_dim_a=2 * WIDTH,
            axes_dims_a=(16,),
        ),
        "vae": lambda: AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        "text_encoder": text.qwen2_5_vl,
        # Of its own, a processor, it uses just the tokenizer where no prompt is rewritten.
        "tokenizer": text.chat_tokenizer,
        "text_encoder_2": lambda: text.clip_text(max_position_embeddings=77),
        "tokenizer_2": lambda: text.tokenizer(start=True, length=77),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=5.0),
        "audio_vae": None,
        "vocoder": None,
    }


def _sana_wm() -> dict[str, Any]:
    return {
        "tokenizer": lambda: text.tokenizer(start=False, length=4096),
        "text_encoder": lambda: Gemma2Model(Gemma2Config(**text.decoder_config(head_dim=16))),
        "vae": ltx_hunyuan.ltx2().components["vae"],
        "transformer": lambda: SanaWMTransformer3DModel(
            in_channels=4,
            num_layers=1,
            hidden_size=2 * 24,
            num_attention_heads=2,
            linear_head_dim=24,
            chunk_plucker_post_attn_blocks=1,
            image_size=SIDE,
            caption_channels=WIDTH,
            mixed_precision="fp32",
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
