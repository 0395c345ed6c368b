"""The classic partition: stages of a pipeline that is one function, and knows nothing of stages.

Each stage runs the same `__call__`, with the components that it owns and stubs of the others. The encoder keeps
what encoding methods return, and is done when the run comes to a stub. In the denoiser those methods return what
they returned there, and the run ends at the VAE. In the decoder the loop has no steps, so the run comes to the VAE at
once, with latents of the right shape, in whose place those of the denoiser are decoded; what the pipeline does with
the image then is its own code.

Some pipelines cannot be run without a step: they read what only their loop makes, decode in each round, or have no
VAE that is one component. Of those the denoiser runs all that is not encoding, and the decoder passes on what it made.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch

from triptych.engines.parameters.serving_config import load_index
from triptych.engines.partition.introspection import ClassicPartition, classic_partition
from triptych.engines.partition.stages import Stage
from triptych.engines.partition.strategy import classic_class
from triptych.engines.partition.stubs import StubError
from triptych.engines.pipelines.classic_call import (
    CallDenoising,
    ClassicLoader,
    accepted,
    call_pipeline,
    intercept,
    schedulers,
    signature,
    wants_latents,
)
from triptych.engines.pipelines.guidance import request_copy
from triptych.engines.pipelines.random_state import GENERATOR, seeded_generator
from triptych.engines.pipelines.record_replay import (
    ArgumentInjector,
    BoundaryStub,
    CallRecorder,
    StageBoundary,
    first_argument,
)
from triptych.engines.pipelines.stepping import Denoising
from triptych.engines.weights.placement import Placement

FINAL_RESULT: Final = "made"
"""The name in a payload of what the pipeline has made, where the denoiser ran it to its end."""


class NonIteratingTimesteps(torch.Tensor):
    """Timesteps that can be counted and read, since some pipelines do, but a loop over them has no steps."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(())

    def __deepcopy__(self, memo: object) -> NonIteratingTimesteps:
        return self.clone().as_subclass(NonIteratingTimesteps)


class ClassicRunner:
    """Some stages of a classic pipeline."""

    def __init__(
        self, pipeline: Any, partition: ClassicPartition, components: frozenset[str], stubs: Mapping[str, BoundaryStub]
    ) -> None:
        self.pipeline = pipeline
        self.components = components
        self.inputs = accepted(pipeline)
        self.signature = signature(pipeline)
        self._partition = partition
        self._stubs = stubs

    def encode(self, inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Run the pipeline until it needs more than encoders.

        Returns:
            "inputs", "calls" of encoding methods and the "generator" as it was before them.
        """
        generator = seeded_generator(seed)
        payload: dict[str, object] = {"inputs": dict(inputs), GENERATOR: generator.clone_state()}
        pipeline = self._stage_view(Stage.ENCODER, inputs)
        recorder = CallRecorder(generator)
        for name in self._partition.encodes:
            vars(pipeline)[name] = recorder.record(name, getattr(pipeline, name))
        try:
            call_pipeline(pipeline, inputs, generator)
        except StageBoundary:
            return {**payload, "calls": recorder.calls}
        raise RuntimeError("The pipeline came to its end in the encoder.")

    def seed_independent(self, payload: Mapping[str, object]) -> bool:
        """Whether nothing had been drawn from the generator when the last encoding method returned."""
        return all(made["generator"] is None for made in cast("list[dict[str, Any]]", payload["calls"]))

    def rebind(self, payload: Mapping[str, object], inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Set the generator anew, which nothing has been drawn from in a payload; the inputs are the same."""
        return {**payload, GENERATOR: seeded_generator(seed)}

    def denoise(self, payload: Mapping[str, object]) -> Denoising:
        """Prepare a run of the pipeline until it decodes."""
        inputs, generator = _request(payload)
        pipeline = self._stage_view(Stage.DENOISER, inputs)
        self._replay_encoders(pipeline, payload, generator)
        # Asked for latents, a pipeline comes to its end before it decodes.
        if not self._partition.has_decoder_stage or wants_latents(inputs):
            return CallDenoising(lambda: {FINAL_RESULT: self._run_to_end(pipeline, inputs, generator)}, pipeline)
        for name in self._partition.decodes:
            vars(pipeline)[name] = _interrupt_at("", name, getattr(pipeline, name))
        if self._partition.conditions:
            vae = _copy_vae(pipeline)
            vars(vae)["decode"] = _interrupt_at("vae", "decode", vae.decode)

        def work() -> dict[str, object]:
            try:
                call_pipeline(pipeline, inputs, generator)
            except StageBoundary as boundary:
                if boundary.name and (boundary.name, boundary.method) != ("vae", "decode"):
                    raise _missing_component_error(boundary, Stage.DENOISER) from None
                return {**payload, GENERATOR: generator, "latents": boundary.value}
            raise RuntimeError("The pipeline came to its end in the denoiser.")

        return CallDenoising(work, pipeline)

    def decode(self, payload: Mapping[str, object]) -> dict[str, object]:
        """Run the pipeline without a step, and decode the "latents" of a payload in the place of its own."""
        if FINAL_RESULT in payload:
            return cast("dict[str, object]", payload[FINAL_RESULT])
        inputs, generator = _request(payload)
        after = generator.get_state()
        pipeline = self._stage_view(Stage.DECODER, inputs)
        self._replay_encoders(pipeline, payload, generator)
        for scheduler in schedulers(pipeline):
            intercept(scheduler, "set_timesteps", _without_steps)
        injector = ArgumentInjector(payload["latents"], lambda: generator.set_state(after))
        for name in self._partition.decodes:
            vars(pipeline)[name] = injector.inject(getattr(pipeline, name))
        vae = _copy_vae(pipeline)
        vars(vae)["decode"] = injector.inject(vae.decode)
        try:
            media = call_pipeline(pipeline, inputs, generator)
        except StageBoundary as boundary:
            raise _missing_component_error(boundary, Stage.DECODER) from None
        if not injector.used:
            raise RuntimeError("The pipeline came to its end and decoded nothing.")
        return media

    def _run_to_end(self, pipeline: Any, inputs: Mapping[str, object], generator: torch.Generator) -> dict[str, object]:
        try:
            return call_pipeline(pipeline, inputs, generator)
        except StageBoundary as boundary:
            raise _missing_component_error(boundary, Stage.DENOISER) from None

    def _stage_view(self, stage: Stage, inputs: Mapping[str, object]) -> Any:
        """Copy the pipeline for a run: what a stage does not own, it does not see, even where it is loaded."""
        pipeline = request_copy(self.pipeline, inputs)
        needed = self._partition.needed(stage)
        for name, stub in self._stubs.items():
            if name not in needed:
                vars(pipeline)[name] = copy.copy(stub)
        return pipeline

    def _replay_encoders(self, pipeline: Any, payload: Mapping[str, object], generator: torch.Generator) -> None:
        recorder = CallRecorder(generator, cast("list[dict[str, Any]]", payload["calls"]))
        for name in self._partition.encodes:
            vars(pipeline)[name] = recorder.replay(name, getattr(pipeline, name))


def load_classic(model: Path, stages: tuple[Stage, ...], placement: Placement) -> ClassicRunner:
    """Load what some stages of a classic pipeline own, and stubs of the rest.

    Raises:
        ModelError: The model cannot be served; the sentence says why.
    """
    index = load_index(model)
    cls = classic_class(index, placement.options)
    partition = classic_partition(cls, index)
    wanted = frozenset(name for stage in stages for name in partition.needed(stage))
    pipeline, stubs = ClassicLoader(model, cls, index, partition.components, placement.options).pipeline(
        wanted, placement
    )
    return ClassicRunner(pipeline, partition, wanted, {name: BoundaryStub(stub) for name, stub in stubs.items()})


def _request(payload: Mapping[str, object]) -> tuple[dict[str, object], torch.Generator]:
    generator = cast(torch.Generator, payload[GENERATOR])
    return cast("dict[str, object]", payload["inputs"]), generator.clone_state()


def _copy_vae(pipeline: Any) -> Any:
    """Give a private pipeline a VAE that shares the weights, because its methods must not become those of all."""
    vae = vars(pipeline)["vae"] = copy.copy(pipeline.vae)
    return vae


def _interrupt_at(owner: str, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def left(*args: Any, **kwargs: Any) -> Any:
        raise StageBoundary(owner, name, first_argument(args, kwargs))

    return left


def _without_steps(scheduler: Any, set_timesteps: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    set_timesteps(*args, **kwargs)
    scheduler.timesteps = scheduler.timesteps.as_subclass(NonIteratingTimesteps)


def _missing_component_error(boundary: StageBoundary, stage: Stage) -> StubError:
    return StubError(f"The {stage} of this pipeline needs `{boundary}`, which is not loaded there.")
