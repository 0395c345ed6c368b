"""Components of a tiny size by the name of their class, and a model made of them as diffusers writes it."""

from __future__ import annotations

import inspect
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from triptych.tools.families.classes import Sample
from triptych.tools.make_model import randomise_zero_layers, text, vaes

MAKERS: Final[dict[str, Callable[[], Any]]] = {
    "AutoencoderKL": lambda: vaes.kl(quant=True, shift=None),
    "AutoencoderKLFlux2": vaes.flux2,
    "AutoencoderKLQwenImage": vaes.qwen,
    "AutoencoderKLWan": vaes.wan_full,
    "AutoencoderTiny": vaes.tiny,
    "CLIPImageProcessor": text.clip_images,
    "CLIPImageProcessorPil": text.clip_images,
    "CLIPTextModel": lambda: text.clip_text(max_position_embeddings=77),
    "CLIPTextModelWithProjection": lambda: text.clip_text(projection=True, max_position_embeddings=77),
    "CLIPTokenizer": lambda: text.tokenizer(start=True, length=77),
    "CLIPVisionModel": text.clip_vision,
    "CLIPVisionModelWithProjection": text.clip_vision_projection,
    "KarrasDiffusionSchedulers": lambda: diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
    "Qwen2_5_VLForConditionalGeneration": text.qwen2_5_vl,
    "Qwen2Tokenizer": text.chat_tokenizer,
    "Qwen2TokenizerFast": text.chat_tokenizer,
    "SchedulerMixin": lambda: diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
    "T5EncoderModel": text.t5,
    "T5Tokenizer": lambda: text.tokenizer(start=False),
    "T5TokenizerFast": lambda: text.tokenizer(start=False),
    "UMT5EncoderModel": text.umt5,
}
"""How a component is made whose class a type hint names, where a sample does not say."""


def make(sample: Sample, folder: Path, seed: int = 0) -> None:
    """Make the model of a sample, with random weights, in the layout of diffusers.

    Args:
        sample: It.
        folder: Where; made if need be.
        seed: Of the weights.

    Raises:
        ValueError: A parameter of the class has no maker.
    """
    cls = getattr(diffusers, sample.pipeline)
    given = {}
    for name, maker in _makers(cls, sample):
        # Each component has its own seed, so that a change of one leaves the others as they are.
        torch.manual_seed(seed + zlib.crc32(name.encode()))
        given[name] = maker() if callable(maker) else maker
        for component in given[name] if isinstance(given[name], (list, tuple)) else [given[name]]:
            randomise_zero_layers(component)
    cls(**given).save_pretrained(str(folder))


def _makers(cls: Any, sample: Sample) -> Iterator[tuple[str, Any]]:
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        hint = str(parameter.annotation)
        if parameter.name in sample.parts:
            yield parameter.name, sample.parts[parameter.name]
        elif parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD:
            continue
        elif (maker := _by_hint(hint)) is not None:
            yield parameter.name, maker
        elif "None" in hint or "Optional" in hint:
            yield parameter.name, None
        else:
            raise ValueError(f"there is no tiny {hint} for its {parameter.name}")


def _by_hint(hint: str) -> Callable[[], Any] | None:
    for name in re.findall(r"\w+", hint):
        if name in MAKERS:
            return MAKERS[name]
        found = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
        if isinstance(found, type) and issubclass(found, SchedulerMixin):
            return found
    return None
