"""Textual inversion: new tokens for the text encoders of a pipeline, each from a file with embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors import SafetensorError
from safetensors.torch import load_file

from triptych.engines.model_options import EmbeddingFile
from triptych.engines.stages import ModelError
from triptych.engines.weights.stubs import Stub

SUFFIX: Final = ".safetensors"
_OF_TWO_ENCODERS: Final = {"clip_l": "", "clip_g": "_2"}
"""The tensors in a file for two text encoders, with the suffixes of their components."""


def load_textual_inversions(pipeline: Any, files: tuple[EmbeddingFile, ...]) -> None:
    """Load textual inversions into the text encoders that are loaded here.

    Args:
        pipeline: A pipeline of diffusers, just loaded.
        files: The files, of distinct tokens.

    Raises:
        ModelError: The pipeline takes no embeddings, or a file is missing, broken or not for this model.
    """
    if files and not isinstance(pipeline, TextualInversionLoaderMixin):
        name = type(pipeline).__name__
        raise ModelError(f"diffusers loads no embeddings into a {name}: leave out [[model.embeddings]].")
    for file in files:
        for end, tensor in _tensors(file).items():
            encoder, tokenizer = (getattr(pipeline, f"{part}{end}", None) for part in ("text_encoder", "tokenizer"))
            if isinstance(encoder, Stub):
                continue
            if encoder is None or tokenizer is None:
                raise ModelError(f"The embedding {file.path} is for a text encoder that this model does not have.")
            _load(pipeline, file, tensor, encoder, tokenizer)


def _load(pipeline: Any, file: EmbeddingFile, tensor: torch.Tensor, encoder: Any, tokenizer: Any) -> None:
    width = encoder.get_input_embeddings().weight.shape[-1]
    if tensor.shape[-1] != width:
        raise ModelError(f"The embedding {file.path} has vectors of {tensor.shape[-1]} numbers, this model of {width}.")
    try:
        pipeline.load_textual_inversion(tensor, token=file.token, text_encoder=encoder, tokenizer=tokenizer)
    except Exception as error:  # two libraries may raise anything for a token; report it as one sentence
        raise ModelError(f"The embedding {file.path} cannot be loaded as {file.token!r}: {error}") from error


def _tensors(file: EmbeddingFile) -> Mapping[str, torch.Tensor]:
    """Return the embeddings in a file, shape [tokens, width], by the suffix of their components."""
    if file.path.suffix != SUFFIX:
        raise ModelError(
            f"The embedding {file.path} is not a {SUFFIX} file; others are not read, since they can run code."
        )
    try:
        tensors = load_file(file.path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"The embedding {file.path} cannot be read: {error}") from error
    found = dict(_by_suffix(tensors))
    if not found or any(tensor.dim() not in (1, 2) for tensor in found.values()):
        names = ", ".join(sorted(tensors)) or "nothing"
        raise ModelError(f"The embedding {file.path} has {names}: it must be one tensor, or clip_l and clip_g.")
    return found


def _by_suffix(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    if tensors.keys() <= _OF_TWO_ENCODERS.keys():
        yield from ((_OF_TWO_ENCODERS[name], tensor) for name, tensor in tensors.items())
    elif len(tensors) == 1:
        yield "", next(iter(tensors.values()))
