"""A running system records what its processes do, and a tool makes one trace of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import BOUND_S
from triptych.api.launch import Cluster
from triptych.tools import trace
from triptych.tools.trace import Slice, TraceError, read_timelines, select, slices_of

STEPS = 3
PATH = [
    ("encoder", "stage", "encoder"),
    ("encoder", "transfer", "store"),
    ("denoiser", "transfer", "load"),
    ("denoiser", "stage", "denoiser"),
    ("denoiser", "transfer", "store"),
    ("decoder", "transfer", "load"),
    ("decoder", "stage", "decoder"),
    ("decoder", "transfer", "save"),
]
"""Kind of process, track and name of each slice of one image."""


async def recorded(state_dir: Path, request_id: str) -> list[tuple[str, Slice]]:
    """The slices of a request, with the kind of their process, once the processes have written all of them."""
    async with asyncio.timeout(BOUND_S):
        while True:
            try:
                runs = read_timelines(state_dir)
                rows = select(slices_of(runs), request=request_id)
            except TraceError:
                rows = runs = []
            found = [(run.process.kind, each) for run, row in zip(runs, rows, strict=True) for each in row]
            if {(kind, each.track, each.name) for kind, each in found} >= {*PATH, ("head", "job", "DECODER_RUNNING")}:
                return sorted(found, key=lambda entry: entry[1].began)
            await asyncio.sleep(0.05)


@pytest.mark.shared_cluster("flux")
def test_a_request_is_followed_through_every_process(on_cluster: Callable[..., Any], tmp_path: Path) -> None:
    async def scenario(cluster: Cluster) -> None:
        image = await cluster.generate("a prompt that the timeline alone has", seed=1, steps=STEPS)
        found = await recorded(cluster.topology.state_dir, image.request_id)
        path = [(kind, each.track, each.name) for kind, each in found if each.track in ("stage", "transfer")]
        assert path == PATH
        (denoise,) = [each for _, each in found if each.name == "denoiser"]
        steps = [each for _, each in found if each.track == "compute"]
        assert [each.args["step"] for each in steps] == [f"{number} of {STEPS}" for number in (1, 2, 3)]
        assert all(denoise.began <= each.began <= each.ended <= denoise.ended for each in steps)
        states = [each.name for _, each in found if each.track == "job"]
        assert states[-1] == "DECODER_RUNNING"
        assert "DENOISING_RUNNING" in states
        out = tmp_path / "trace.json"
        assert trace.main([str(cluster.topology.state_dir), "--request", image.request_id, "-o", str(out)]) == 0
        events = json.loads(out.read_bytes())["traceEvents"]
        assert [event["ph"] for event in events if event["ph"] in "stf"] == ["s", *"t" * 6, "f"]
        assert len({event["pid"] for event in events if event["ph"] in "stf"}) == 3

    on_cluster(scenario)
