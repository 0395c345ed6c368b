"""What every test has."""

from __future__ import annotations

import os
from pathlib import Path

# Children are kept from importing out of the current folder, and some of them are made of actors of these tests.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
)
