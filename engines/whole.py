"""The monolithic route: a pipeline that cannot be cut runs as a whole, still one step at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from triptych.engines.anatomy import anatomy
from triptych.engines.calling import CallDenoising, Components, accepted, call, signature
from triptych.engines.card import load_index
from triptych.engines.guidance import private
from triptych.engines.panels import Panel
from triptych.engines.placing import Placement
from triptych.engines.routes import Route, check_panels, classic_class
from triptych.engines.seeds import GENERATOR, seeded
from triptych.engines.stepping import Denoising


class WholeParts:
    """A whole pipeline. All of it is run by the denoiser; the other panels pass on what they get."""

    def __init__(self, pipeline: Any, components: frozenset[str]) -> None:
        self.pipeline = pipeline
        self.components = components
        self.inputs = accepted(pipeline)
        self.signature = signature(pipeline)

    def encode(self, inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Keep the request: "inputs" and a "generator"."""
        return {"inputs": dict(inputs), GENERATOR: seeded(seed)}

    def seedless(self, state: Mapping[str, object]) -> bool:
        """Nothing was drawn: nothing was encoded."""
        return True

    def renew(self, state: Mapping[str, object], inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Keep another request."""
        return self.encode(inputs, seed)

    def denoise(self, state: Mapping[str, object]) -> Denoising:
        """Prepare a run of the pipeline."""
        inputs = cast("dict[str, object]", state["inputs"])
        generator = cast(torch.Generator, state[GENERATOR]).clone_state()
        pipeline = private(self.pipeline, inputs)
        return CallDenoising(lambda: call(pipeline, inputs, generator), pipeline)

    def decode(self, state: Mapping[str, object]) -> dict[str, object]:
        """Return what the pipeline made."""
        return dict(state)


def load_whole(model: Path, panels: tuple[Panel, ...], placement: Placement) -> WholeParts:
    """Load a whole pipeline.

    Raises:
        ModelError: Not all panels are asked for, or the model cannot be served.
    """
    index = load_index(model)
    cls = classic_class(index, placement.options)
    check_panels(Route.MONOLITHIC, index, model, panels)
    components = anatomy(cls, index).components
    pipeline, _ = Components(model, cls, index, components, placement.options).pipeline(list(components), placement)
    return WholeParts(pipeline, frozenset(components))
