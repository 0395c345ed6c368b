"""Make a tiny model with random weights, for tests and demonstrations: `python -m tools.make_model OUT --family flux`.

Everything is made here from a few numbers, nothing is downloaded. The folder has the layout of diffusers, with
tokenizers that know every byte, and a card. The same seed makes the same files. Its pictures are coloured noise, but
they depend on the prompt, the seed and each parameter as those of a real model do.
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
    AutoencoderKL,
    AutoencoderKLWan,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from engines.card import CARD_NAME

TEXT_LENGTH: Final = 64
"""Tokens, each a byte."""
_WIDTH: Final = 32


class Family(StrEnum):
    """Which pipeline the model is for."""

    FLUX = "flux"
    FLUX_KL = "flux-kl"
    WAN = "wan"


Component = Callable[[], Any]


def make_model(out: Path, family: Family, seed: int = 0) -> None:
    """Make a model.

    Args:
        out: Its folder, made if need be; files of the same names are replaced.
        family: Flux with a tiny VAE and no guidance embedding, or with a KL VAE and guidance as the original has, or
            Wan text-to-video.
        seed: Of the weights.
    """
    pipeline, components, card = {
        Family.FLUX: lambda: _flux(_tiny_vae, guidance_embeds=False),
        Family.FLUX_KL: lambda: _flux(_kl_vae, guidance_embeds=True),
        Family.WAN: _wan,
    }[family]()
    out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()  # One bar is enough.
    index: dict[str, object] = {"_class_name": pipeline}
    for number, (name, make) in enumerate(track(components.items(), "Making components", total=len(components))):
        # Each component has its own seed, so that a change of one leaves the others as they are.
        torch.manual_seed(seed * 1000 + number)
        component = make()
        component.save_pretrained(out / name)
        index[name] = _index_entry(component)
    _write(out / "model_index.json", index)
    _write(out / CARD_NAME, card)


def _flux(vae: Component, *, guidance_embeds: bool) -> tuple[str, dict[str, Component], dict[str, object]]:
    components: dict[str, Component] = {
        "tokenizer": lambda: _tokenizer(start=True),
        "text_encoder": lambda: CLIPTextModel(
            CLIPTextConfig(
                vocab_size=_VOCABULARY_SIZE,
                hidden_size=_WIDTH,
                intermediate_size=2 * _WIDTH,
                projection_dim=_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=TEXT_LENGTH,
                bos_token_id=_START,
                eos_token_id=_END,
                pad_token_id=_PAD,
            )
        ),
        "tokenizer_2": lambda: _tokenizer(start=False),
        "text_encoder_2": lambda: T5EncoderModel(T5Config(**_T5, feed_forward_proj="gated-gelu")),
        "transformer": lambda: FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=_WIDTH,
            pooled_projection_dim=_WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": vae,
    }
    defaults: dict[str, float] = {
        "height": 64,
        "width": 64,
        "num_inference_steps": 4,
        "max_sequence_length": TEXT_LENGTH,
    }
    ranges = {"height": [16, 256, 8], "width": [16, 256, 8], "max_sequence_length": [2, 256]}
    if guidance_embeds:
        defaults["guidance_scale"] = 3.5
    return "FluxPipeline", components, _card("flux", "text-to-image", defaults, ranges)


def _wan() -> tuple[str, dict[str, Component], dict[str, object]]:
    components: dict[str, Component] = {
        "tokenizer": lambda: _tokenizer(start=False),
        "text_encoder": lambda: UMT5EncoderModel(UMT5Config(**_T5)),
        "transformer": lambda: WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=_WIDTH,
            freq_dim=_WIDTH,
            ffn_dim=2 * _WIDTH,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        "scheduler": lambda: UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
        "vae": lambda: AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            scale_factor_spatial=4,
            scale_factor_temporal=2,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 1.2, 0.8, 1.1],
        ),
    }
    defaults: dict[str, float] = {
        "height": 64,
        "width": 64,
        "num_frames": 5,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "max_sequence_length": TEXT_LENGTH,
    }
    ranges = {"height": [16, 256, 8], "width": [16, 256, 8], "num_frames": [1, 33], "max_sequence_length": [2, 256]}
    return "WanPipeline", components, _card("wan", "text-to-video", defaults, ranges)


def _tiny_vae() -> AutoencoderTiny:
    # Three levels, not the usual four: its pictures are 4 times as large as latents, where pipelines assume 8.
    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
        scaling_factor=0.9,
        shift_factor=0.1,
    )


def _kl_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.36,
        shift_factor=0.11,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _card(family: str, task: str, defaults: dict[str, float], ranges: dict[str, list[int]]) -> dict[str, object]:
    return {
        "name": f"tiny-{family}",
        "family": family,
        "task": task,
        "defaults": defaults,
        "ranges": {**ranges, "num_inference_steps": [1, 50]},
    }


# Byte-level: every text has tokens, and different texts have different ones.
_SPECIAL: Final = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
_PAD, _END, _START, _UNKNOWN = range(len(_SPECIAL))
_VOCABULARY_SIZE: Final = len(_SPECIAL) + 256
_T5: Final[dict[str, Any]] = {
    "vocab_size": _VOCABULARY_SIZE,
    "d_model": _WIDTH,
    "d_kv": 16,
    "d_ff": 2 * _WIDTH,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": _PAD,
    "eos_token_id": _END,
}


def _tokenizer(*, start: bool) -> PreTrainedTokenizerFast:
    words = [*_SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if start else "$A </s>", special_tokens=[("<s>", _START), ("</s>", _END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **_SPECIAL,
        model_max_length=TEXT_LENGTH,
        padding_side="right",
    )


def _index_entry(component: object) -> list[str]:
    # Its class has another name in each major version of transformers; this one stays.
    if isinstance(component, PreTrainedTokenizerFast):
        return ["transformers", "PreTrainedTokenizerFast"]
    return [type(component).__module__.split(".")[0], type(component).__name__]


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    family: Annotated[Family, typer.Option(help="The pipeline it is for.")] = Family.FLUX,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Make a tiny model with random weights."""
    make_model(out, family, seed)
    print(f"A tiny {family} model is in {out}.")


if __name__ == "__main__":
    typer.run(main)
