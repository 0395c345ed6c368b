"""Figures that others publish for the same cases; not measured again here."""

from __future__ import annotations

from typing import Final, NamedTuple


class Figure(NamedTuple):
    """A published figure."""

    value: str
    owner: str
    """Its source and hardware."""
    source: str
    """The URL."""


_SGLANG_FLUX: Final = "https://github.com/sgl-project/sglang/issues/19673"
_SGLANG_QWEN: Final = "https://github.com/sgl-project/sglang/issues/22183"

FIGURES: Final[dict[tuple[str, str], Figure]] = {
    ("flux", "an image, diffusers alone"): Figure("5.58 s", "diffusers by SGLang-Diffusion, H200", _SGLANG_FLUX),
    ("flux", "an image, our engine"): Figure("3.82 s", "SGLang-Diffusion, H200", _SGLANG_FLUX),
    ("roles", "an image"): Figure("3.82 s", "SGLang-Diffusion, one process, H200", _SGLANG_FLUX),
    ("qwen", "a step at batch 1"): Figure("0.167 s", "SGLang-Diffusion, H200", _SGLANG_QWEN),
    ("qwen", "a step at batch 4"): Figure("0.240 s", "SGLang-Diffusion, H200", _SGLANG_QWEN),
    ("wan", "a step of 1024 x 1024, 81 frames"): Figure(
        "6.26 s", "SGLang-Diffusion disaggregated, H200: 312.8 s for 50 steps", "SGLang-Diffusion's benchmarks"
    ),
    ("wan", "decoding 1024 x 1024, 81 frames"): Figure(
        "7.1 s", "SGLang-Diffusion disaggregated, H200", "SGLang-Diffusion's benchmarks"
    ),
    ("compile", "a step, compiled"): Figure("0.154 s", "diffusers, compiled, H200: 4.32 s for 28 steps", _SGLANG_FLUX),
    ("attention", "a step with _flash_3"): Figure(
        "0.133 s", "diffusers, flash attention 3 and compiled, H200: 3.73 s for 28 steps", _SGLANG_FLUX
    ),
}
"""The figures by row and result, for full shapes only."""
