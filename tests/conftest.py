"""Processes that are started import nothing from the current folder: they are told where the actors of tests are."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = str(Path(__file__).parents[1])

# For tiny tensors a second thread costs more than it computes, and what is compared is computed on as many threads.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in (_ROOT, os.environ.get("PYTHONPATH", "")) if path)
