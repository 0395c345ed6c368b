"""Processes that are started import nothing from the current folder: they are told where the actors of tests are."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = str(Path(__file__).parents[1])

os.environ["PYTHONPATH"] = os.pathsep.join(path for path in (_ROOT, os.environ.get("PYTHONPATH", "")) if path)
