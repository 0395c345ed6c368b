"""Rows `qwen`, `wan`, `attention` and `compile`: seconds of a step of a denoiser at its true shapes."""

from __future__ import annotations

from typing import Final

import torch

from triptych.tools.gpu_report import models
from triptych.tools.gpu_report.bench import Bench
from triptych.tools.gpu_report.child import in_a_line

BATCHES: Final = (1, 2, 4, 8, 16)
BACKENDS: Final = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3", "sage")
"""Attention backends of diffusers that need no download."""
CPU_BACKENDS: Final = ("native", "_native_math", "_native_flash", "flash")


@torch.no_grad()
def qwen(bench: Bench) -> None:
    """Measure a step of Qwen-Image at 512 x 512 for each batch."""
    transformer = models.qwen_transformer(bench)
    models.prepare(transformer, bench)
    single = 0.0
    for batch in BATCHES if bench.full else BATCHES[:2]:
        seconds = bench.median(models.qwen_step(transformer, bench, batch))
        single = single or seconds
        note = (
            f"two passes of {models.QWEN_TEXT} text tokens; {batch * single / seconds:.2f} times the pictures a second"
        )
        bench.value(f"a step at batch {batch}", seconds, "s", note)
    bench.peak("Qwen-Image's transformer")


@torch.no_grad()
def wan(bench: Bench) -> None:
    """Measure a step and the decoding of videos of Wan2.1-1.3B."""
    transformer = models.wan_transformer(bench)
    models.prepare(transformer, bench)
    for video in models.videos(bench):
        bench.forget_peak()
        bench.value(f"a step of {video.name}", bench.median(models.wan_step(transformer, bench, video), 2), "s")
        bench.peak(f"denoising {video.name}")
    del transformer
    vae = models.wan_vae(bench)
    for video in models.videos(bench):
        bench.forget_peak()
        latents = torch.randn(video.latents(16), device=bench.device)
        seconds = bench.median(lambda latents=latents: vae.decode(latents, return_dict=False), 1)  # type: ignore[misc]
        bench.value(f"decoding {video.name}", seconds, "s", "float32")
        bench.peak(f"decoding {video.name}")


@torch.no_grad()
def attention(bench: Bench) -> None:
    """Measure a step of Flux with each attention backend that there is here."""
    transformer = models.flux_transformer(bench)
    step = models.flux_step(transformer, bench)
    plain = step()
    for backend in BACKENDS if bench.cuda else CPU_BACKENDS:
        try:
            transformer.set_attention_backend(backend)
            difference = _difference(step(), plain)
        except Exception as error:  # noqa: BLE001 - what a library that is missing or too old raises is its own
            bench.value(f"backend {backend}", "not offered here", note=in_a_line(error))
            continue
        bench.value(f"a step with {backend}", bench.median(step), "s", f"differs from native by {difference:.1e}")


@torch.no_grad()
def compiled(bench: Bench) -> None:
    """Measure a step of Flux before and after its repeated blocks are compiled."""
    transformer = models.flux_transformer(bench)
    if bench.settings.attention:
        transformer.set_attention_backend(bench.settings.attention)
    step = models.flux_step(transformer, bench)
    bench.value("a step, eager", bench.median(step), "s")
    plain = step()
    models.compile_blocks(transformer, bench)
    note = "" if bench.cuda else "only traced on the CPU"
    bench.value("first step, with compilation", bench.clock(step), "s", note)
    difference = _difference(step(), plain)
    bench.value("a step, compiled", bench.median(step), "s", f"differs from eager by {difference:.1e}")


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max())
