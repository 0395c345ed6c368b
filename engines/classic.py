"""The classic route: panels of a pipeline that is one function, and knows nothing of panels.

Each panel runs the same `__call__`, with the components that it owns and shadows of the others. The encoder keeps
what encoding methods return, and is done when the run comes to a shadow. In the denoiser those methods return what
they returned there, and the run ends at the VAE. In the decoder the loop has no steps, so the run comes to the VAE at
once, with latents of the right shape, in whose place those of the denoiser are decoded; what the pipeline does with
the picture then is its own code.

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

from triptych.engines.anatomy import Anatomy, anatomy
from triptych.engines.calling import (
    CallDenoising,
    Components,
    accepted,
    asks_for_latents,
    call,
    intercept,
    schedulers,
    signature,
)
from triptych.engines.card import load_index
from triptych.engines.guidance import private
from triptych.engines.handoff import Elsewhere, Handoff, Recording, Resumption, first
from triptych.engines.panels import Panel
from triptych.engines.placing import Placement
from triptych.engines.routes import classic_class
from triptych.engines.seeds import GENERATOR, seeded
from triptych.engines.shadows import ShadowError
from triptych.engines.stepping import Denoising

MADE: Final = "made"
"""The name in a state of what the pipeline has made, where the denoiser ran it to its end."""


class Unstepped(torch.Tensor):
    """Timesteps that can be counted and read, since some pipelines do, but a loop over them has no steps."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(())

    def __deepcopy__(self, memo: object) -> Unstepped:
        return self.clone().as_subclass(Unstepped)


class ClassicParts:
    """Some panels of a classic pipeline."""

    def __init__(
        self, pipeline: Any, build: Anatomy, components: frozenset[str], shadows: Mapping[str, Elsewhere]
    ) -> None:
        self.pipeline = pipeline
        self.components = components
        self.inputs = accepted(pipeline)
        self.signature = signature(pipeline)
        self._anatomy = build
        self._shadows = shadows

    def encode(self, inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Run the pipeline until it needs more than encoders.

        Returns:
            "inputs", "calls" of encoding methods and the "generator" as it was before them.
        """
        generator = seeded(seed)
        state: dict[str, object] = {"inputs": dict(inputs), GENERATOR: generator.clone_state()}
        pipeline = self._view(Panel.ENCODER, inputs)
        recording = Recording(generator)
        for name in self._anatomy.encodes:
            vars(pipeline)[name] = recording.record(name, getattr(pipeline, name))
        try:
            call(pipeline, inputs, generator)
        except Handoff:
            return {**state, "calls": recording.calls}
        raise RuntimeError("The pipeline came to its end in the encoder.")

    def seedless(self, state: Mapping[str, object]) -> bool:
        """Whether nothing had been drawn from the generator when the last encoding method returned."""
        return all(made["generator"] is None for made in cast("list[dict[str, Any]]", state["calls"]))

    def renew(self, state: Mapping[str, object], inputs: Mapping[str, object], seed: int) -> dict[str, object]:
        """Set the generator anew, which nothing has been drawn from in a state; the inputs are the same."""
        return {**state, GENERATOR: seeded(seed)}

    def denoise(self, state: Mapping[str, object]) -> Denoising:
        """Prepare a run of the pipeline until it decodes."""
        inputs, generator = _request(state)
        pipeline = self._view(Panel.DENOISER, inputs)
        self._play(pipeline, state, generator)
        # Asked for latents, a pipeline comes to its end before it decodes.
        if not self._anatomy.decodes_apart or asks_for_latents(inputs):
            return CallDenoising(lambda: {MADE: self._to_its_end(pipeline, inputs, generator)}, pipeline)
        for name in self._anatomy.decodes:
            vars(pipeline)[name] = _leaving("", name, getattr(pipeline, name))
        if self._anatomy.conditions:
            vae = _own_vae(pipeline)
            vars(vae)["decode"] = _leaving("vae", "decode", vae.decode)

        def work() -> dict[str, object]:
            try:
                call(pipeline, inputs, generator)
            except Handoff as handoff:
                if handoff.name and (handoff.name, handoff.method) != ("vae", "decode"):
                    raise _misplaced(handoff, Panel.DENOISER) from None
                return {**state, GENERATOR: generator, "latents": handoff.value}
            raise RuntimeError("The pipeline came to its end in the denoiser.")

        return CallDenoising(work, pipeline)

    def decode(self, state: Mapping[str, object]) -> dict[str, object]:
        """Run the pipeline without a step, and decode the "latents" of a state in the place of its own."""
        if MADE in state:
            return cast("dict[str, object]", state[MADE])
        inputs, generator = _request(state)
        after = generator.get_state()
        pipeline = self._view(Panel.DECODER, inputs)
        self._play(pipeline, state, generator)
        for scheduler in schedulers(pipeline):
            intercept(scheduler, "set_timesteps", _without_steps)
        resumption = Resumption(state["latents"], lambda: generator.set_state(after))
        for name in self._anatomy.decodes:
            vars(pipeline)[name] = resumption.resume(getattr(pipeline, name))
        vae = _own_vae(pipeline)
        vars(vae)["decode"] = resumption.resume(vae.decode)
        try:
            media = call(pipeline, inputs, generator)
        except Handoff as handoff:
            raise _misplaced(handoff, Panel.DECODER) from None
        if not resumption.used:
            raise RuntimeError("The pipeline came to its end and decoded nothing.")
        return media

    def _to_its_end(self, pipeline: Any, inputs: Mapping[str, object], generator: torch.Generator) -> dict[str, object]:
        try:
            return call(pipeline, inputs, generator)
        except Handoff as handoff:
            raise _misplaced(handoff, Panel.DENOISER) from None

    def _view(self, panel: Panel, inputs: Mapping[str, object]) -> Any:
        """Copy the pipeline for a run: what a panel does not own, it does not see, even where it is loaded."""
        pipeline = private(self.pipeline, inputs)
        needed = self._anatomy.needed(panel)
        for name, shadow in self._shadows.items():
            if name not in needed:
                vars(pipeline)[name] = copy.copy(shadow)
        return pipeline

    def _play(self, pipeline: Any, state: Mapping[str, object], generator: torch.Generator) -> None:
        recording = Recording(generator, cast("list[dict[str, Any]]", state["calls"]))
        for name in self._anatomy.encodes:
            vars(pipeline)[name] = recording.play(name, getattr(pipeline, name))


def load_classic(model: Path, panels: tuple[Panel, ...], placement: Placement) -> ClassicParts:
    """Load what some panels of a classic pipeline own, and shadows of the rest.

    Raises:
        ModelError: The model cannot be served; the sentence says why.
    """
    index = load_index(model)
    cls = classic_class(index, placement.options)
    build = anatomy(cls, index)
    wanted = frozenset(name for panel in panels for name in build.needed(panel))
    pipeline, shadows = Components(model, cls, index, build.components, placement.options).pipeline(wanted, placement)
    return ClassicParts(pipeline, build, wanted, {name: Elsewhere(shadow) for name, shadow in shadows.items()})


def _request(state: Mapping[str, object]) -> tuple[dict[str, object], torch.Generator]:
    generator = cast(torch.Generator, state[GENERATOR])
    return cast("dict[str, object]", state["inputs"]), generator.clone_state()


def _own_vae(pipeline: Any) -> Any:
    """Give a private pipeline a VAE that shares the weights, because its methods must not become those of all."""
    vae = vars(pipeline)["vae"] = copy.copy(pipeline.vae)
    return vae


def _leaving(owner: str, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def left(*args: Any, **kwargs: Any) -> Any:
        raise Handoff(owner, name, first(args, kwargs))

    return left


def _without_steps(scheduler: Any, set_timesteps: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    set_timesteps(*args, **kwargs)
    scheduler.timesteps = scheduler.timesteps.as_subclass(Unstepped)


def _misplaced(handoff: Handoff, panel: Panel) -> ShadowError:
    return ShadowError(f"The {panel} of this pipeline needs `{handoff}`, which is not loaded there.")
