"""Let calls of a denoiser wait outside of the run that makes them, so that those of several runs are computed together.

A run's private pipeline gets twins of its denoiser modules. A twin shares the weights, and calling it inside of a run
does not compute: the run is suspended, and the call goes to whoever advances the run (`Denoising.proceed`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import greenlet
import torch
from diffusers import ModelMixin
from diffusers.guiders import BaseGuidance
from diffusers.models.autoencoders.vae import AutoencoderMixin

from triptych.engines.weights.stubs import Stub

if TYPE_CHECKING:
    from triptych.engines.steps.denoising import Denoising

_MODULE: Final = "_triptych_module"
_CONTEXT: Final = "_triptych_cache_context"


@dataclass(frozen=True, slots=True)
class CacheContextArguments:
    """What a pipeline has told its denoiser with `cache_context` around a call."""

    name: str
    where: Mapping[str, Any]


@dataclass(eq=False, slots=True)
class DenoiserCall:
    """One call of a denoiser module by a run, which waits for its output.

    Attributes:
        module: The module that is shared by all runs, not the twin.
        args: The positional arguments.
        kwargs: The arguments by name.
        cache_context: What the pipeline has told the module; None if nothing.
        run: The run that waits.
        number: The number of the call in the step of the run, from 0.
        output: What the run gets, once it is known.
        error: What is raised inside the run instead.
    """

    module: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    cache_context: CacheContextArguments | None
    run: Denoising
    number: int
    output: Any = field(default=None, repr=False)
    error: Exception | None = None

    def compute(self) -> None:
        """Compute this call alone, as the run would have done; an error is kept for the run."""
        try:
            with self.run.surroundings():
                self.output = self.forward(*self.args, **self.kwargs)
        except Exception as error:  # noqa: BLE001 - it is raised inside the run, to which it belongs
            self.error = error

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with other arguments, with the run's step cache, or in the cache context of this call."""
        if self.run.step_cache is not None:
            with self.run.step_cache.of(self):
                return self.module(*args, **kwargs)
        if self.cache_context is None:
            return self.module(*args, **kwargs)
        with self.module.cache_context(self.cache_context.name, **self.cache_context.where):
            return self.module(*args, **kwargs)


class RunGreenlet(greenlet.greenlet):  # type: ignore[misc]
    """The greenlet of a run; twins that are called in it suspend it.

    Args:
        run: What it runs.
        denoising: The run that it belongs to.
    """

    def __init__(self, run: Callable[[], None], denoising: Denoising) -> None:
        super().__init__(run)
        self.denoising = denoising


def parking(module: Any) -> Any:
    """Make a twin of a module: it shares weights, inner modules, hooks and configuration, and its calls wait.

    A call outside of a `RunGreenlet` computes at once. `isinstance`, `config`, `dtype`, `forward` and its signature are
    those of the module. A cache context is recorded and entered when the call is computed, since it is a state of the
    shared hooks and would reach other runs.
    """
    twin = copy.copy(module)
    # `torch.nn.Module` would register the module as a submodule of the twin, and so of itself.
    vars(twin)[_MODULE] = module
    cls: Any = type(module)
    twin.__class__ = _twin_class(cls)
    return twin


def parks(module: Any) -> bool:
    """Whether a module is such a twin."""
    return _MODULE in vars(module)


def parked_components(pipeline: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and modules of a private pipeline whose calls can wait: its denoisers.

    Those are the models of diffusers that are loaded, except autoencoders (text encoders are models of transformers).
    There are none for a guider that adds hooks to the shared module around its call: they would reach other runs.
    """
    if any(isinstance(part, BaseGuidance) and _edits_models(part) for part in vars(pipeline).values()):
        return
    for name, component in vars(pipeline).items():
        if isinstance(component, Stub) or not isinstance(component, torch.nn.Module):
            continue
        if isinstance(component, ModelMixin) and not isinstance(component, AutoencoderMixin):
            yield name, component


def _edits_models(guider: BaseGuidance) -> bool:
    return type(guider).prepare_models is not BaseGuidance.prepare_models


@functools.cache
def _twin_class(cls: Any) -> type:
    """Make the class of the twins of a class; it has the same name, which pipelines and libraries read."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        current = greenlet.getcurrent()
        if not isinstance(current, RunGreenlet):
            return vars(self)[_MODULE](*args, **kwargs)
        return current.denoising.park(vars(self)[_MODULE], args, kwargs, vars(self).get(_CONTEXT))

    @contextlib.contextmanager
    def cache_context(self: Any, name: str, **where: Any) -> Iterator[None]:
        before = vars(self).get(_CONTEXT)
        vars(self)[_CONTEXT] = CacheContextArguments(name, where)
        try:
            yield
        finally:
            vars(self)[_CONTEXT] = before

    def keep_cache(self: Any, recurse: bool = True) -> None:
        """Do nothing: a pipeline resets the caches of a shared module when it ends, and others still run."""

    body: dict[str, Any] = {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    if hasattr(cls, "cache_context"):
        body["cache_context"] = cache_context
    if hasattr(cls, "_reset_stateful_cache"):
        body["_reset_stateful_cache"] = keep_cache
    return type(cls.__name__, (cls,), body)
