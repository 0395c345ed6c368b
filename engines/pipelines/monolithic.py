"""The monolithic partition: run a pipeline that cannot be cut as a whole, one step at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from triptych.engines.parameters.serving_config import load_index
from triptych.engines.partition.introspection import classic_partition
from triptych.engines.partition.strategy import PartitionStrategy, check_stages, classic_class
from triptych.engines.pipelines.classic_call import CallDenoising, accepted, call_pipeline, signature
from triptych.engines.pipelines.component_settings import configure
from triptych.engines.pipelines.guidance import request_copy
from triptych.engines.pipelines.random_state import GENERATOR, seeded_generator
from triptych.engines.stages import Stage
from triptych.engines.steps.denoising import Denoising
from triptych.engines.weights.loading import ClassicLoader
from triptych.engines.weights.placement import Placement


class MonolithicRunner:
    """Runs a whole pipeline in the denoiser; the other stages return what they are given."""

    def __init__(self, pipeline: Any, components: frozenset[str]) -> None:
        self.pipeline = pipeline
        self.components = components
        self.inputs = accepted(pipeline)
        self.signature = signature(pipeline)

    def encode(self, inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Return the "inputs" of the request and its "generator"."""
        return {"inputs": dict(inputs), GENERATOR: seeded_generator(seed)}

    def seed_independent(self, payload: Mapping[str, object]) -> bool:
        """Return True: nothing is encoded."""
        return True

    def rebind(self, payload: Mapping[str, object], inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Return the payload of the other request."""
        return self.encode(inputs, seed)

    def denoise(self, payload: Mapping[str, object], *, parks: bool = False) -> Denoising:
        """Prepare a run of the whole pipeline."""
        inputs = cast("dict[str, object]", payload["inputs"])
        generator = cast(torch.Generator, payload[GENERATOR]).clone_state()
        pipeline = request_copy(self.pipeline, inputs, parks=parks)
        return CallDenoising(lambda: call_pipeline(pipeline, inputs, generator), pipeline, generator)

    def decode(self, payload: Mapping[str, object]) -> dict[str, object]:
        """Return the result of the pipeline."""
        return dict(payload)


def load_monolithic(model: Path, stages: tuple[Stage, ...], placement: Placement) -> MonolithicRunner:
    """Load a whole pipeline.

    Raises:
        ModelError: `stages` are not all stages, or the model cannot be served.
    """
    index = load_index(model)
    cls = classic_class(index, placement.options)
    check_stages(PartitionStrategy.MONOLITHIC, index, model, stages)
    components = classic_partition(cls, index).components
    pipeline, _ = ClassicLoader(model, cls, index, components, placement.options).pipeline(list(components), placement)
    configure(pipeline, placement.options)
    return MonolithicRunner(pipeline, frozenset(components))
