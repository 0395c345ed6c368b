from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.roles.worker.stream_worker_harness import (
    stream_worker,
)
from triptych.engines.steps.denoising import Denoising


@pytest.fixture
def on_worker(
    run: Any, make_topology: Any, local_cluster: Any, inbox: Any, scripted_head: Any, tiny_model: Path
) -> Any:
    """Run a test with a monolithic instance's stream worker, which has every stage."""

    def start(body: Any, **options: Any) -> None:
        async def all_of_it() -> None:
            async with local_cluster(make_topology(tiny_model, kind="monolithic")) as h:
                component = msgspec.structs.replace(h.topology.component("monolithic-0"), **options)
                await body(*await stream_worker(h, component, inbox(), scripted_head()))

        run(all_of_it())

    return start


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], Any]:
    """What to call inside of a run, counted as they are prepared, when it has taken so many steps."""
    runs: list[Denoising] = []
    calls: dict[tuple[int, int], Any] = {}
    prepare, pause = Denoising.__init__, Denoising.pause

    def prepared(self: Denoising, *arguments: Any, **named: Any) -> None:
        prepare(self, *arguments, **named)
        runs.append(self)

    def paused(self: Denoising) -> None:
        calls.get((runs.index(self), self.step), lambda: None)()
        pause(self)

    monkeypatch.setattr(Denoising, "__init__", prepared)
    monkeypatch.setattr(Denoising, "pause", paused)
    return calls
