"""The rows of the report, the most important first: the last ones are skipped when time runs out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from triptych.tools.gpu_report.row_context import RowContext


@dataclass(frozen=True)
class ReportRow:
    """One row of the report.

    Attributes:
        name: As `--only` takes it.
        title: For the page.
        function: Module of this package and the name of a function that takes a `RowContext`.
        cuda_s: Seconds that it is expected to take on a GPU; it is not begun with less.
        cpu_s: The same on the CPU, with tiny shapes.
        random: Whether its model has random weights.
    """

    name: str
    title: str
    function: str
    cuda_s: float
    cpu_s: float
    random: bool = False

    def titled(self, *, full: bool) -> str:
        """Return the title, with a remark about the model."""
        return f"{self.title}, random weights, {'full' if full else 'tiny'} shapes" if self.random else self.title

    def estimate_s(self, device: str) -> float:
        """Return the seconds that it is expected to take on a device, "cuda:0" or "cpu"."""
        return self.cpu_s if device == "cpu" else self.cuda_s

    def limit_s(self, device: str) -> float:
        """Return the seconds after which it counts as hung."""
        return 2.0 * self.estimate_s(device) + 30.0

    def load(self) -> Callable[[RowContext], None]:
        """Import the function only when it is run: other rows work without its libraries."""
        module, _, name = self.function.partition(":")
        function: Callable[[RowContext], None] = getattr(importlib.import_module(f"{__package__}.{module}"), name)
        return function


ROWS: Final = (
    ReportRow("machine", "The machine", "machine:machine", 15, 10),
    ReportRow("image", "An image of the demo model through three processes", "clusters:image", 45, 25),
    ReportRow("tests", "Tests that need a GPU", "gpu_tests:tests", 60, 20),
    ReportRow("hop", "Tensors from device to device through the pool", "transfers:hop", 20, 8),
    ReportRow("overlap", "The next load behind compute", "transfers:overlap", 15, 8),
    ReportRow("kill", "kill -9 of a denoiser in the middle of its steps", "clusters:kill", 40, 20),
    ReportRow("flux", "FLUX.1-dev in one process", "flux:one_process", 90, 12, random=True),
    ReportRow("roles", "FLUX.1-dev in three processes", "flux:three_processes", 100, 25, random=True),
    ReportRow("qwen", "Qwen-Image by batch", "denoise_steps:qwen", 35, 8, random=True),
    ReportRow("wan", "Wan2.1-1.3B video", "denoise_steps:wan", 60, 10, random=True),
    ReportRow("attention", "Attention backends, a step of FLUX.1-dev", "denoise_steps:attention", 30, 8, random=True),
    ReportRow("compile", "Regional compile, a step of FLUX.1-dev", "denoise_steps:compiled", 60, 10, random=True),
)


def chosen(names: str) -> tuple[ReportRow, ...]:
    """Return the rows of some names with commas between them, all for ""; raises ValueError for an unknown one."""
    if not names:
        return ROWS
    known = {row.name: row for row in ROWS}
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise ValueError(f"there is no row {name!r}: choose of {', '.join(known)}")
    return tuple(row for row in ROWS if row.name in wanted)
