"""The context of a row: device, shapes, clock, and the output of results."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from triptych.tools.gpu_report.report import Measured

if TYPE_CHECKING:
    import torch


class RowSkippedError(Exception):
    """A row cannot be measured here; the sentence says why."""


class RowFailedError(Exception):
    """A row found a wrong result; the sentence says which."""


class Settings(msgspec.Struct, frozen=True):
    """The settings of the process of a row."""

    device: str
    """"cpu" or "cuda:N"."""
    full: bool
    """Whether models have the shapes of their originals, or tiny ones."""
    scratch: str
    """A folder for large files that the rows of a run share."""
    seconds: float
    """How long the row may take."""
    attention: str = ""
    """The attention backend of denoisers, as diffusers names it; "" is diffusers' own choice."""
    compile: bool = False
    """Whether the repeated blocks of denoisers are compiled."""


@dataclass
class RowContext:
    """The context of one row.

    Attributes:
        settings: Of the run.
        emit: Takes each result when it is there.
    """

    settings: Settings
    emit: Callable[[Measured], None]
    began: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        """The device on which models compute."""
        import torch

        return torch.device(self.settings.device)

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.settings.device.startswith("cuda")

    @property
    def full(self) -> bool:
        """Whether models have the shapes of their originals."""
        return self.settings.full

    @property
    def scratch(self) -> Path:
        """The folder that the rows of a run share."""
        return Path(self.settings.scratch)

    @property
    def left_s(self) -> float:
        """Seconds that are left for the row."""
        return self.settings.seconds - (time.monotonic() - self.began)

    def value(self, what: str, value: float | str, unit: str = "", note: str = "") -> None:
        """Report a result; numbers are cut to four digits."""
        self.emit(Measured(what, value if isinstance(value, str) else float(f"{value:.4g}"), unit, note))

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""
        import torch

        if self.cuda:
            torch.cuda.synchronize(self.device)

    def clock(self, function: Callable[[], object]) -> float:
        """Return the seconds from the call to the end of the work on the device."""
        self.synchronize()
        begun = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - begun

    def median(self, function: Callable[[], object], times: int = 3) -> float:
        """Return the median seconds of some calls after one that warms up; fewer, at least one, when time is short."""
        taken = [self.clock(function)]
        for _ in range(times):
            if self.left_s < 2 * taken[-1] + 5:
                break
            taken.append(self.clock(function))
        return statistics.median(taken[1:] or taken)

    def needs(self, gib: float) -> None:
        """Raise RowSkippedError if the GPU has less memory than that."""
        if not self.cuda:
            return
        import torch

        free, total = (nbytes / 2**30 for nbytes in torch.cuda.mem_get_info(self.device))
        if free < gib:
            raise RowSkippedError(f"It takes {gib:.0f} GiB of the GPU, and {free:.0f} of {total:.0f} are free.")

    def peak(self, what: str) -> None:
        """Report the most memory of the GPU that this process has had since `reset_peak`."""
        if not self.cuda:
            return
        import torch

        allocated, reserved = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        note = f"peak allocated; reserved {reserved / 2**30:.2f} GiB"
        self.value(f"memory: {what}", allocated / 2**30, "GiB", note)

    def reset_peak(self) -> None:
        """Reset the peak of memory."""
        import torch

        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
