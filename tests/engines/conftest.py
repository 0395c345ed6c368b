from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from triptych.tools.families.stage_processes import StageProcesses


@pytest.fixture(scope="session")
def processes() -> Iterator[StageProcesses]:
    """One process for each stage, as those of a cluster; each loads the models that it is asked to run."""
    from triptych.tools.families.stage_processes import start_stage_processes

    with start_stage_processes() as started:
        yield started
