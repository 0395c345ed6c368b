"""What does no tensor work starts in a moment and in little memory: it imports no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WITHOUT_TENSORS = ("bus", "actors", "roles.head.head", "roles.pool.pool", "api.server", "actors.command")


def test_what_does_no_tensor_work_starts_without_torch() -> None:
    program = f"import sys, {', '.join(f'triptych.{name}' for name in WITHOUT_TENSORS)}; print('torch' in sys.modules)"
    started = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert started.stdout.strip() == "False"
