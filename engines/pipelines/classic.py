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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch

from triptych.engines.parameters.media import wants_latents
from triptych.engines.parameters.serving_config import load_index
from triptych.engines.partition.introspection import ClassicPartition, classic_partition
from triptych.engines.partition.strategy import classic_class
from triptych.engines.pipelines.classic_call import (
    CallDenoising,
    accepted,
    call_pipeline,
    intercept,
    schedulers,
    signature,
)
from triptych.engines.pipelines.component_settings import configure
from triptych.engines.pipelines.guidance import request_copy
from triptych.engines.pipelines.random_state import GENERATOR, seeded_generator
from triptych.engines.pipelines.stepping import Denoising
from triptych.engines.stages import Stage
from triptych.engines.weights.loading import ClassicLoader
from triptych.engines.weights.placement import Placement
from triptych.engines.weights.stubs import COMPUTE_METHODS, Stub, StubError

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
    configure(pipeline, placement.options)
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


# Record and replay --------------------------------------------------------------------------------------------


class StageBoundary(BaseException):
    """A run has come to a component of another stage.

    Not an `Exception`, because pipelines catch some of those.

    Attributes:
        name: Of the component, or "" for a method of the pipeline.
        method: What was called.
        value: The first argument.
    """

    def __init__(self, name: str, method: str, value: object) -> None:
        super().__init__(f"{name}.{method}")
        self.name = name
        self.method = method
        self.value = value


class BoundaryStub(Stub):
    """A stub that ends the run when something is to be computed with it.

    A copy of it can be cast without a change of the original. `isinstance` takes it for one of the class of its
    component, since pipelines choose so between one ControlNet and several.
    """

    _hf_hook: Final = None
    """There, so that a pipeline that looks for the device of its hooks goes on to the next component."""

    def __init__(self, stub: Stub) -> None:
        super().__init__(stub._name, stub._component, stub.dtype, stub.device)
        if isinstance(self._component, torch.nn.Module):
            # Some pipelines read the dtype off a weight.
            for parameter in self._component.parameters():
                parameter.data = parameter.data.to(self.dtype)

    @property  # type: ignore[misc]  # object's own may be written, which nobody does
    def __class__(self) -> Any:
        """That of the component."""
        return type(vars(self).get("_component", self))

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """End the run."""
        raise StageBoundary(self._name, "forward", first_argument(args, kwargs))

    def __getattr__(self, attribute: str) -> Any:
        if attribute in COMPUTE_METHODS:
            return functools.partial(self._reach_boundary, attribute)
        return super().__getattr__(attribute)

    def to(self, *args: object, **kwargs: object) -> BoundaryStub:
        """Cast it; it stays where it is."""
        dtype = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)), None)
        if dtype is not None and isinstance(self._component, torch.nn.Module):
            self._component = copy.deepcopy(self._component).to(dtype)
            self.dtype = dtype
        return self

    def _reach_boundary(self, method: str, *args: object, **kwargs: object) -> Any:
        raise StageBoundary(self._name, method, first_argument(args, kwargs))


class CallRecorder:
    """What encoding methods returned, in the order of their calls, with the generator as each of them left it.

    As long as nothing has been drawn from the generator, None is kept in its place.

    Args:
        generator: Of the request.
        calls: Of an earlier run, to be played back; they are not changed.
    """

    def __init__(self, generator: torch.Generator, calls: Iterable[dict[str, Any]] = ()) -> None:
        self.calls: list[dict[str, Any]] = []
        self._generator = generator
        self._fresh = generator.get_state()
        self._ahead = list(calls)
        self._inside = False

    def record(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method so that its results are kept."""

        @functools.wraps(method)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return method(*args, **kwargs)
            self._inside = True
            try:
                result = method(*args, **kwargs)
            finally:
                self._inside = False
            after = self._generator.get_state()
            # What was drawn before the call counts as well: an argument may have been made of it.
            state = None if torch.equal(self._fresh, after) else after
            self.calls.append({"method": name, "result": result, "generator": state})
            return result

        return recorded

    def replay(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method so that it returns what it did in the earlier run."""

        @functools.wraps(method)
        def played(*args: Any, **kwargs: Any) -> Any:
            if not self._ahead or self._ahead[0]["method"] != name:
                return method(*args, **kwargs)
            call = self._ahead.pop(0)
            if call["generator"] is not None:
                self._generator.set_state(call["generator"])
            # What a pipeline changes in place must not change the payload that it came in.
            return copy.deepcopy(call["result"])

        return played


class ArgumentInjector:
    """Puts a value that crossed in the place of one that a run without steps has made.

    Args:
        value: Becomes the first argument of the first call.
        before: Called first.
    """

    def __init__(self, value: object, before: Callable[[], object]) -> None:
        self._value = value
        self._before = before
        self._inside = False
        self.used = False

    def inject(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method; calls of others inside of it are left alone."""

        @functools.wraps(method)
        def injected(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return method(*args, **kwargs)
            if self.used:
                raise RuntimeError("This pipeline decodes in more than one call, so it cannot be served in parts.")
            self.used = True
            self._before()
            self._inside = True
            try:
                if args:
                    return method(self._value, *args[1:], **kwargs)
                return method(**{**kwargs, next(iter(kwargs)): self._value})
            finally:
                self._inside = False

        return injected


def first_argument(args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """The first argument of a call."""
    return next(iter((*args, *kwargs.values())), None)
