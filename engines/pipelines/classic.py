"""The classic partition: run the stages of a pipeline whose `__call__` is one function, without changing its code.

Each stage calls the same `__call__`, with its own components and stubs for the others:

- The encoder records what encoding methods return. Its run ends at the first stub that would compute.
- The denoiser replays those results. Its run ends where it would decode, and the latents are the result.
- The decoder replays them, too, with a loop without steps, so that its run arrives at the VAE at once. There the
  latents of the denoiser replace its own. What follows is the pipeline's own code.

Some pipelines cannot run without a step: they read variables that only their loop sets, decode in each iteration, or do
not have exactly one VAE. For them the denoiser runs all but the encoding, and the decoder returns the result.
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
from triptych.engines.stages import Stage
from triptych.engines.steps.denoising import Denoising
from triptych.engines.weights.loading import ClassicLoader
from triptych.engines.weights.placement import Placement
from triptych.engines.weights.stubs import COMPUTE_METHODS, Stub, StubError

FINAL_RESULT: Final = "made"
"""The key in a payload of the pipeline's result, if the denoiser ran it to its end."""


class NonIteratingTimesteps(torch.Tensor):
    """Timesteps over which a loop has no iterations; pipelines can still count and read them."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(())

    def __deepcopy__(self, memo: object) -> NonIteratingTimesteps:
        return self.clone().as_subclass(NonIteratingTimesteps)


class ClassicRunner:
    """Runs some stages of a classic pipeline."""

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
        """Run the pipeline until it needs a component of another stage.

        Returns:
            The "inputs", the "calls" of encoding methods with their results, and the "generator" before them.
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
        raise RuntimeError("The pipeline ran to its end in the encoder.")

    def seed_independent(self, payload: Mapping[str, object]) -> bool:
        """Whether the generator was unused when the last encoding method returned."""
        return all(made["generator"] is None for made in cast("list[dict[str, Any]]", payload["calls"]))

    def rebind(self, payload: Mapping[str, object], inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Replace the unused generator of a payload; the inputs are the same."""
        return {**payload, GENERATOR: seeded_generator(seed)}

    def denoise(self, payload: Mapping[str, object], *, parks: bool = False) -> Denoising:
        """Prepare a run of the pipeline up to where it decodes."""
        inputs, generator = _request(payload)
        pipeline = self._stage_view(Stage.DENOISER, inputs, parks=parks)
        self._replay_encoders(pipeline, payload, generator)
        # For a request for latents, a pipeline ends before it decodes.
        if not self._partition.has_decoder_stage or wants_latents(inputs):
            return CallDenoising(
                lambda: {FINAL_RESULT: self._run_to_end(pipeline, inputs, generator)}, pipeline, generator
            )
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
            raise RuntimeError("The pipeline ran to its end in the denoiser.")

        return CallDenoising(work, pipeline, generator)

    def decode(self, payload: Mapping[str, object]) -> dict[str, object]:
        """Run the pipeline without steps, and decode the "latents" of the payload instead of its own."""
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
            raise RuntimeError("The pipeline ran to its end and decoded nothing.")
        return media

    def _run_to_end(self, pipeline: Any, inputs: Mapping[str, object], generator: torch.Generator) -> dict[str, object]:
        try:
            return call_pipeline(pipeline, inputs, generator)
        except StageBoundary as boundary:
            raise _missing_component_error(boundary, Stage.DENOISER) from None

    def _stage_view(self, stage: Stage, inputs: Mapping[str, object], *, parks: bool = False) -> Any:
        """Copy the pipeline for a run, with stubs for what the stage does not need, even if it is loaded."""
        pipeline = request_copy(self.pipeline, inputs, parks=parks)
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
    """Load the components of some stages of a classic pipeline, and stubs for the others.

    Raises:
        ModelError: The model cannot be served; the message says why.
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
    """Give a private pipeline its own VAE, which shares the weights, so that its methods can be replaced."""
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
    """Raised to end a run that calls a component of another stage.

    A `BaseException`, because pipelines catch some exceptions.

    Attributes:
        name: The name of the component, or "" for a method of the pipeline.
        method: The name of the method that was called.
        value: Its first argument.
    """

    def __init__(self, name: str, method: str, value: object) -> None:
        super().__init__(f"{name}.{method}")
        self.name = name
        self.method = method
        self.value = value


class BoundaryStub(Stub):
    """A stub that ends the run when the pipeline computes with it.

    A copy can be cast without changing the original. `isinstance` sees the class of the component, since pipelines
    distinguish one ControlNet from several in this way.
    """

    _hf_hook: Final = None
    """Makes a pipeline that looks for the device of its hooks go on to the next component."""

    def __init__(self, stub: Stub) -> None:
        super().__init__(stub._name, stub._component, stub.dtype, stub.device)
        if isinstance(self._component, torch.nn.Module):
            # Some pipelines read the dtype from a weight.
            for parameter in self._component.parameters():
                parameter.data = parameter.data.to(self.dtype)

    @property  # type: ignore[misc]  # that of object can be set, which nobody does
    def __class__(self) -> Any:
        """The class of the component."""
        return type(vars(self).get("_component", self))

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Raise `StageBoundary`."""
        raise StageBoundary(self._name, "forward", first_argument(args, kwargs))

    def __getattr__(self, attribute: str) -> Any:
        if attribute in COMPUTE_METHODS:
            return functools.partial(self._reach_boundary, attribute)
        return super().__getattr__(attribute)

    def to(self, *args: object, **kwargs: object) -> BoundaryStub:
        """Cast the stub to a dtype; a device is ignored."""
        dtype = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)), None)
        if dtype is not None and isinstance(self._component, torch.nn.Module):
            self._component = copy.deepcopy(self._component).to(dtype)
            self.dtype = dtype
        return self

    def _reach_boundary(self, method: str, *args: object, **kwargs: object) -> Any:
        raise StageBoundary(self._name, method, first_argument(args, kwargs))


class CallRecorder:
    """Records the results of encoding methods in the order of their calls, and replays them.

    Each call has the state of the generator after it, or None while the generator is unused.

    Args:
        generator: The generator of the request.
        calls: The calls of an earlier run, to be replayed; they are not changed.
    """

    def __init__(self, generator: torch.Generator, calls: Iterable[dict[str, Any]] = ()) -> None:
        self.calls: list[dict[str, Any]] = []
        self._generator = generator
        self._fresh = generator.get_state()
        self._ahead = list(calls)
        self._inside = False

    def record(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method so that its results are recorded. Calls inside of it are not."""

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
            # Compare with the state before the run: an argument may come from what was drawn before the call.
            state = None if torch.equal(self._fresh, after) else after
            self.calls.append({"method": name, "result": result, "generator": state})
            return result

        return recorded

    def replay(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method so that it returns the result of the earlier run."""

        @functools.wraps(method)
        def played(*args: Any, **kwargs: Any) -> Any:
            if not self._ahead or self._ahead[0]["method"] != name:
                return method(*args, **kwargs)
            call = self._ahead.pop(0)
            if call["generator"] is not None:
                self._generator.set_state(call["generator"])
            # Copy the result: a pipeline may change it in place, but not the payload.
            return copy.deepcopy(call["result"])

        return played


class ArgumentInjector:
    """Replaces the first argument of the first call of a method.

    Args:
        value: The new argument.
        before: Is called before the method.

    Attributes:
        used: Whether the argument has been replaced.
    """

    def __init__(self, value: object, before: Callable[[], object]) -> None:
        self._value = value
        self._before = before
        self._inside = False
        self.used = False

    def inject(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method. Calls of wrapped methods inside of it are not changed."""

        @functools.wraps(method)
        def injected(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return method(*args, **kwargs)
            if self.used:
                raise RuntimeError("This pipeline decodes in more than one call, so it cannot be served in stages.")
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
    """Return the first argument of a call."""
    return next(iter((*args, *kwargs.values())), None)
