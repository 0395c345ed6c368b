"""Rows `qwen`, `wan`, `attention` and `compile`: seconds of a step of a denoiser at its true shapes."""

from __future__ import annotations

from typing import Final

import torch

from triptych.tools.gpu_report import models
from triptych.tools.gpu_report.row_context import RowContext
from triptych.tools.gpu_report.row_process import one_line

BATCHES: Final = (1, 2, 4, 8, 16)
BACKENDS: Final = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3", "sage")
"""Attention backends of diffusers that need no download."""
CPU_BACKENDS: Final = ("native", "_native_math", "_native_flash", "flash")


@torch.no_grad()
def qwen(context: RowContext) -> None:
    """Measure a step of Qwen-Image at 512 x 512 for each batch."""
    transformer = models.qwen_transformer(context)
    models.prepare(transformer, context)
    single = 0.0
    for batch in BATCHES if context.full else BATCHES[:2]:
        seconds = context.median(models.qwen_step(transformer, context, batch))
        single = single or seconds
        note = f"two passes of {models.QWEN_TEXT} text tokens; {batch * single / seconds:.2f} times the images a second"
        context.value(f"a step at batch {batch}", seconds, "s", note)
    context.peak("Qwen-Image's transformer")


@torch.no_grad()
def wan(context: RowContext) -> None:
    """Measure a step and the decoding of videos of Wan2.1-1.3B."""
    transformer = models.wan_transformer(context)
    models.prepare(transformer, context)
    for video in models.videos(context):
        context.reset_peak()
        context.value(f"a step of {video.name}", context.median(models.wan_step(transformer, context, video), 2), "s")
        context.peak(f"denoising {video.name}")
    del transformer
    vae = models.wan_vae(context)
    for video in models.videos(context):
        context.reset_peak()
        latents = torch.randn(video.latents(16), device=context.device)
        seconds = context.median(lambda latents=latents: vae.decode(latents, return_dict=False), 1)  # type: ignore[misc]
        context.value(f"decoding {video.name}", seconds, "s", "float32")
        context.peak(f"decoding {video.name}")


@torch.no_grad()
def attention(context: RowContext) -> None:
    """Measure a step of Flux with each attention backend that there is here."""
    transformer = models.flux_transformer(context)
    step = models.flux_step(transformer, context)
    plain = step()
    for backend in BACKENDS if context.cuda else CPU_BACKENDS:
        try:
            transformer.set_attention_backend(backend)
            difference = _difference(step(), plain)
        except Exception as error:  # noqa: BLE001 - what a library that is missing or too old raises is its own
            context.value(f"backend {backend}", "not offered here", note=one_line(error))
            continue
        context.value(f"a step with {backend}", context.median(step), "s", f"differs from native by {difference:.1e}")


@torch.no_grad()
def compiled(context: RowContext) -> None:
    """Measure a step of Flux before and after its repeated blocks are compiled."""
    transformer = models.flux_transformer(context)
    if context.settings.attention:
        transformer.set_attention_backend(context.settings.attention)
    step = models.flux_step(transformer, context)
    context.value("a step, eager", context.median(step), "s")
    plain = step()
    models.compile_blocks(transformer, context)
    note = "" if context.cuda else "only traced on the CPU"
    context.value("first step, with compilation", context.clock(step), "s", note)
    difference = _difference(step(), plain)
    context.value("a step, compiled", context.median(step), "s", f"differs from eager by {difference:.1e}")


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max())
