"""Processes start in a moment and in little memory: they do not import what they do not use, or not yet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WITHOUT_TENSORS = (
    "bus",
    "actors",
    "roles.head.head",
    "roles.timeline",
    "roles.media.artifacts",
    "roles.pool.pool",
    "api.server",
    "actors.command",
)


def test_what_does_no_tensor_work_starts_without_torch_and_ffmpeg_and_nothing_with_opentelemetry() -> None:
    modules = ", ".join(f"triptych.{name}" for name in WITHOUT_TENSORS)
    program = f"import sys, {modules}; print({{'torch', 'av', 'opentelemetry'}} & sys.modules.keys())"
    started = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert started.stdout.strip() == "set()"
