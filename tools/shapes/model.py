"""The parts of the demo model, made from small configurations, and the folder that holds them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from triptych.tools.shapes.scenes import EDGE, vocabulary

SEQUENCE_LENGTH = 16
LATENT_CHANNELS = 16
LATENT_EDGE = EDGE // 8
STEPS = 4
_PAD, _EOS, _UNK = range(3)
_SPECIAL = ("<pad>", "</s>", "<unk>")
_VAE_WIDTH = 32
_TEXT_WIDTH = 64
_CARD = {
    "name": "shapes",
    "family": "flux",
    "task": "text-to-image",
    "defaults": {
        "height": EDGE,
        "width": EDGE,
        "num_inference_steps": STEPS,
        "max_sequence_length": SEQUENCE_LENGTH,
        "guidance_scale": 1.0,
    },
    "ranges": {
        "num_inference_steps": [1, 50],
        "max_sequence_length": [1, SEQUENCE_LENGTH],
        "height": [EDGE, EDGE, 8],
        "width": [EDGE, EDGE, 8],
    },
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make one token per word of the captions; case and punctuation are dropped, other words are `<unk>`."""
    words = {word: index for index, word in enumerate((*_SPECIAL, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=_SPECIAL[_UNK]))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z]+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", _EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_SPECIAL[_PAD],
        eos_token=_SPECIAL[_EOS],
        unk_token=_SPECIAL[_UNK],
        model_max_length=SEQUENCE_LENGTH,
    )


def make_autoencoder() -> AutoencoderTiny:
    """Make an autoencoder, (3, 64, 64) in [-1, 1] <-> (16, 8, 8); most of its blocks see few pixels."""
    return AutoencoderTiny(
        encoder_block_out_channels=(_VAE_WIDTH,) * 4,
        decoder_block_out_channels=(_VAE_WIDTH,) * 4,
        num_encoder_blocks=(0, 1, 2, 3),
        num_decoder_blocks=(4, 3, 2, 0),
        latent_channels=LATENT_CHANNELS,
    )


class TextToLatents(nn.Module):
    """The two text encoders and the transformer: they are trained together."""

    def __init__(self) -> None:
        super().__init__()
        words = len(_SPECIAL) + len(vocabulary())
        self.words = T5EncoderModel(
            T5Config(
                vocab_size=words,
                d_model=_TEXT_WIDTH,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                pad_token_id=_PAD,
                eos_token_id=_EOS,
                use_cache=False,
                is_encoder_decoder=False,
            )
        )
        self.sentence = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=words,
                hidden_size=_TEXT_WIDTH,
                intermediate_size=128,
                projection_dim=_TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=SEQUENCE_LENGTH,
                pad_token_id=_PAD,
                bos_token_id=None,
                eos_token_id=_EOS,
            )
        )
        self.transformer = FluxTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=2,
            num_single_layers=4,
            num_attention_heads=4,
            attention_head_dim=32,
            joint_attention_dim=_TEXT_WIDTH,
            pooled_projection_dim=_TEXT_WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(8, 12, 12),
        )

    def forward(self, latents: torch.Tensor, tokens: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """Predict the velocity (noise minus image).

        Args:
            latents: packed latents, (batch, 16, 64).
            tokens: token ids, int64 (batch, SEQUENCE_LENGTH).
            sigmas: share of noise in the latents, (batch,), 0 to 1.

        Returns:
            A velocity of the latents' shape.

        """
        side = LATENT_EDGE // 2
        grid = torch.zeros(side, side, 3, device=latents.device)
        grid[..., 1] = torch.arange(side, device=latents.device)[:, None]
        grid[..., 2] = torch.arange(side, device=latents.device)[None, :]
        velocity: torch.Tensor = self.transformer(
            hidden_states=latents,
            encoder_hidden_states=self.words(tokens)[0],
            pooled_projections=self.sentence(tokens).pooler_output,
            timestep=sigmas,
            img_ids=grid.reshape(-1, 3),
            txt_ids=torch.zeros(tokens.shape[1], 3, device=latents.device),
            return_dict=False,
        )[0]
        return velocity


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Make a scheduler of evenly spaced noise shares: 1, 3/4, 1/2, 1/4 for four steps."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """(batch, 16, 8, 8) -> (batch, 16 patches, 64), in the order of Flux."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack_latents(patches: torch.Tensor) -> torch.Tensor:
    """Undo `pack_latents`."""
    side = LATENT_EDGE // 2
    latents = patches.view(-1, side, side, LATENT_CHANNELS, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(-1, LATENT_CHANNELS, LATENT_EDGE, LATENT_EDGE)


def save_model(folder: Path, autoencoder: AutoencoderTiny, painter: TextToLatents) -> None:
    """Write a Flux folder of float16 weights that loads as float32, and its serving config.

    The models themselves are left as they are.
    """
    autoencoder, painter = (copy.deepcopy(one).to("cpu", torch.float16) for one in (autoencoder, painter))
    tokenizer = make_tokenizer()
    pipe = FluxPipeline(
        scheduler=make_scheduler(),
        vae=autoencoder,
        text_encoder=painter.sentence,
        tokenizer=tokenizer,
        text_encoder_2=painter.words,
        tokenizer_2=tokenizer,
        transformer=painter.transformer,
    )
    pipe.save_pretrained(folder)
    _make_portable(folder)
    (folder / "triptych.json").write_text(json.dumps(_CARD, indent=2) + "\n")


def _make_portable(folder: Path) -> None:
    """Name the tokenizers' class as all supported releases do, and float32 as what to load weights as."""
    for part in ("text_encoder", "text_encoder_2"):
        _edit(folder / part / "config.json", {"dtype": "float32"})
    tokenizer = {"tokenizer": ["transformers", "PreTrainedTokenizerFast"]}
    _edit(folder / "model_index.json", {**tokenizer, "tokenizer_2": tokenizer["tokenizer"]})
    for part in ("tokenizer", "tokenizer_2"):
        _edit(folder / part / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def _edit(path: Path, changes: dict[str, Any]) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content, indent=2) + "\n")
