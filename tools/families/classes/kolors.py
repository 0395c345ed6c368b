"""Kolors: a UNet of SDXL with ChatGLM as its text encoder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from triptych.tools.families.cases import input_image
from triptych.tools.families.classes import Sample
from triptych.tools.families.classes.stable_diffusion import FROM_IMAGE, TEXT, xl
from triptych.tools.make_model.text import WIDTH

_SENTENCES = (
    "a large red circle on the left of a blue background",
    "a small green triangle, grey",
    "the quick brown fox",
)


def samples() -> list[Sample]:
    """Those of this module."""
    # Two layers of its text encoder are joined to one embedding.
    unet = {"cross_attention_dim": WIDTH, "encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "text_proj"}
    parts = {
        **xl(**unet, projection_class_embeddings_input_dim=6 * 8 + WIDTH),
        "text_encoder": _chatglm,
        "tokenizer": _pieces,
    }
    needs = ("sentencepiece",)
    text = {**TEXT, "max_sequence_length": 32}
    return [
        Sample("KolorsPipeline", parts, text, needs),
        Sample("KolorsPAGPipeline", parts, text, needs),
        Sample(
            "KolorsImg2ImgPipeline", parts, {**FROM_IMAGE, "image": input_image(), "max_sequence_length": 32}, needs
        ),
    ]


def _pieces() -> Any:
    from diffusers.pipelines.kolors import ChatGLMTokenizer
    from sentencepiece import SentencePieceTrainer

    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "tokenizer"
    SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES),
        model_prefix=str(path),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    made = ChatGLMTokenizer(str(path.with_suffix(".model")))
    # It copies the file when it is saved, so the folder is to live as long.
    made.folder = folder
    return made


def _chatglm() -> Any:
    from diffusers.pipelines.kolors import ChatGLMModel
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    made = ChatGLMModel(
        ChatGLMConfig(
            num_layers=2,
            padded_vocab_size=512,
            hidden_size=WIDTH,
            ffn_hidden_size=2 * WIDTH,
            kv_channels=16,
            num_attention_heads=2,
            seq_length=64,
            multi_query_attention=True,
            multi_query_group_num=2,
            add_qkv_bias=True,
            original_rope=True,
        )
    )
    # Its layers begin as whatever is in memory.
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return made
