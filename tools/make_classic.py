"""Make a tiny model of a pipeline without blocks: `python -m tools.make_classic OUT --family pixart`.

Random weights, made here from a few numbers; nothing is downloaded. The folder has the layout of diffusers, with a
tokenizer that knows every byte, and a card. The same seed makes the same files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import transformers
import typer
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    ChromaTransformer2DModel,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from engines.card import CARD_NAME

TEXT_LENGTH: Final = 32
"""Tokens, each a byte."""
_WIDTH: Final = 32
_SPECIAL: Final = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}

Component = Callable[[], Any]
Recipe = tuple[str, dict[str, Component], dict[str, object]]
"""The pipeline's class, its components, and what the card says beside the usual."""


class Classic(StrEnum):
    """Which pipeline the model is for."""

    PIXART = "pixart"
    SANA = "sana"
    CHROMA = "chroma"
    COGVIDEOX = "cogvideox"


def make_classic(out: Path, family: Classic, seed: int = 0) -> None:
    """Make a model.

    Args:
        out: Its folder, made if need be; files of the same names are replaced.
        family: PixArt-Sigma, Sana or Chroma, which make pictures, or CogVideoX, which makes videos.
        seed: Of the weights.
    """
    recipes = {
        Classic.PIXART: _pixart,
        Classic.SANA: _sana,
        Classic.CHROMA: _chroma,
        Classic.COGVIDEOX: _cogvideox,
    }
    pipeline, components, card = recipes[family]()
    transformers.utils.logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    index: dict[str, object] = {"_class_name": pipeline}
    for number, (name, make) in enumerate(components.items()):
        # Each component has its own seed, so that a change of one leaves the others as they are.
        torch.manual_seed(seed * 1000 + number)
        component = make()
        if isinstance(component, torch.nn.Module):
            _enliven(component)
        component.save_pretrained(out / name)
        index[name] = _index_entry(component)
    _write(out / "model_index.json", index)
    _write(out / CARD_NAME, {"name": f"tiny-{family}", "family": str(family), **card})


def _pixart() -> Recipe:
    components: dict[str, Component] = {
        "tokenizer": _tokenizer,
        "text_encoder": _t5,
        "transformer": lambda: PixArtTransformer2DModel(
            sample_size=32,
            num_layers=2,
            patch_size=2,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=_WIDTH,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=_WIDTH,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        ),
        "scheduler": lambda: DPMSolverMultistepScheduler(),
        "vae": _kl_vae,
    }
    more = {"guidance_scale": 4.5, "use_resolution_binning": False, "clean_caption": False}
    return "PixArtSigmaPipeline", components, _picture_card(16, **more)


def _sana() -> Recipe:
    blocks: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 16),
            "layers_per_block": (1, 1),
            "qkv_multiscales": ((), (5,)),
        }.items()
    }
    components: dict[str, Component] = {
        "tokenizer": _tokenizer,
        "text_encoder": lambda: Gemma2Model(
            Gemma2Config(
                vocab_size=_vocabulary_size(),
                hidden_size=_WIDTH,
                intermediate_size=2 * _WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                query_pre_attn_scalar=16,
                pad_token_id=0,
            )
        ),
        "transformer": lambda: SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=_WIDTH,
            caption_channels=_WIDTH,
            sample_size=16,
        ),
        "scheduler": lambda: DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "vae": lambda: AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            scaling_factor=0.41,
            **blocks,
        ),
    }
    more = {"guidance_scale": 4.5, "use_resolution_binning": False}
    return "SanaPipeline", components, _picture_card(32, **more)


def _chroma() -> Recipe:
    components: dict[str, Component] = {
        "tokenizer": _tokenizer,
        "text_encoder": _t5,
        "transformer": lambda: ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=_WIDTH,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=_WIDTH,
            approximator_layers=1,
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": _kl_vae,
    }
    return "ChromaPipeline", components, _picture_card(16, guidance_scale=5.0)


def _cogvideox() -> Recipe:
    components: dict[str, Component] = {
        "tokenizer": _tokenizer,
        "text_encoder": _t5,
        "transformer": lambda: CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=_WIDTH,
            num_layers=1,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            temporal_compression_ratio=2,
            max_text_seq_length=TEXT_LENGTH,
            use_rotary_positional_embeddings=True,
        ),
        "scheduler": lambda: CogVideoXDPMScheduler(prediction_type="v_prediction"),
        "vae": lambda: AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 3,
            up_block_types=("CogVideoXUpBlock3D",) * 3,
            block_out_channels=(8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            temporal_compression_ratio=2,
            sample_height=32,
            sample_width=32,
        ),
    }
    card = _picture_card(8, height=32, width=32, num_frames=5, guidance_scale=6.0)
    card["task"] = "text-to-video"
    return "CogVideoXPipeline", components, card


def _kl_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.36,
        shift_factor=0.11,
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=_vocabulary_size(),
            d_model=_WIDTH,
            d_kv=16,
            d_ff=2 * _WIDTH,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def _vocabulary() -> list[str]:
    return [*_SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]


def _vocabulary_size() -> int:
    return len(_vocabulary())


def _tokenizer() -> PreTrainedTokenizerFast:
    # Byte-level: every text has tokens, and different texts have different ones.
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(_vocabulary())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **_SPECIAL, model_max_length=TEXT_LENGTH, padding_side="right"
    )


def _enliven(module: torch.nn.Module) -> None:
    # Some layers begin as zeros, so that neither prompt nor step would change the picture.
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


def _picture_card(multiple: int, **defaults: object) -> dict[str, object]:
    sizes = {name: [multiple, 256, multiple] for name in ("height", "width")}
    usual = {"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": TEXT_LENGTH}
    return {
        "task": "text-to-image",
        "defaults": {**usual, **defaults},
        "ranges": {**sizes, "num_inference_steps": [1, 50], "max_sequence_length": [2, 256]},
    }


def _index_entry(component: object) -> list[str]:
    # Its class has another name in each major version of transformers; this one stays.
    if isinstance(component, PreTrainedTokenizerFast):
        return ["transformers", "PreTrainedTokenizerFast"]
    return [type(component).__module__.split(".")[0], type(component).__name__]


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    family: Annotated[Classic, typer.Option(help="The pipeline it is for.")] = Classic.PIXART,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Make a tiny model with random weights."""
    make_classic(out, family, seed)
    print(f"A tiny {family} model is in {out}.")


if __name__ == "__main__":
    typer.run(main)
