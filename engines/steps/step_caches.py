"""Step caches: reuse outputs of earlier denoising steps, with a state for each request and each branch of guidance.

diffusers has the caches as hooks on the blocks of a denoiser. Their state is in the hooks, which all requests share,
and is told apart at most by the name of a context ("cond", "uncond"). Here the state belongs to the run of a request:
it is put into the hooks while one call of the run is computed, and taken out after it. So runs that alternate compute
what each would compute alone, and a run that ends leaves nothing behind. Outside of such a call the hooks do nothing:
the modules compute as if there were no cache.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.guiders import BaseGuidance
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_faster_cache,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS, _ATTENTION_CLASSES
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.hooks.faster_cache import _FASTER_CACHE_DENOISER_HOOK
from diffusers.hooks.hooks import CacheContext, ModelHook, StateManager
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from diffusers.hooks.taylorseer_cache import _TRANSFORMER_BLOCK_IDENTIFIERS

from triptych.engines.stages import ModelError, one_line
from triptych.engines.step_cache_options import KINDS, StepCacheOptions, Value, parse_step_cache
from triptych.engines.steps.checkpoint import CheckpointError, freeze, thaw

if TYPE_CHECKING:
    from triptych.engines.steps.denoiser_calls import DenoiserCall

NO_TIMESTEP: Final = math.inf
"""The timestep of a call in which nothing may be reused: it is in no range of timesteps."""


@dataclass(frozen=True)
class StepPosition:
    """Where in the loop of a run a call is.

    Attributes:
        loop: The number of the loop in the run, from 0: some pipelines have a loop for each chunk of a video.
        index: The number of the step in the loop, from 0.
        steps: The number of steps of the loop; 0 if it is unknown.
        skipped: The number of timesteps before those of the loop, of a run that starts from an image.
        t: The timestep, 0 to 1000; `NO_TIMESTEP` if it is unknown.
    """

    loop: int = 0
    index: int = 0
    steps: int = 0
    skipped: int = 0
    t: float = NO_TIMESTEP


class StepCache:
    """The hooks of a step cache on the denoisers of a model.

    Args:
        modules: The denoisers by name, as `cacheable` returns them.
        options: The cache.

    Attributes:
        options: The cache.
        calls: The number of calls of cached modules while the cache was on.
        computed: The number of those that were computed, and not reused.

    Raises:
        ModelError: A denoiser does not take the cache; the message says which ones it takes.
    """

    def __init__(self, modules: Mapping[str, Any], options: StepCacheOptions) -> None:
        self.options = options
        self.calls = 0
        self.computed = 0
        self._hooks: dict[int, _ModuleHooks] = {}
        if not modules:
            raise ModelError(f'cache = "{options.text}" needs a transformer or a UNet, and this pipeline has none.')
        for name, module in modules.items():
            try:
                self._hooks[id(module)] = _ModuleHooks(name, module, options, self._count)
            except _NotCacheableError as error:
                raise ModelError(_sentence(name, module, options, str(error))) from error

    def state(self) -> StepCacheState:
        """Return the empty state of a new run."""
        return StepCacheState(self.options.text, self._hooks)

    def stats(self) -> dict[str, int]:
        """Return how many calls of cached modules there were, and how many of them were reused."""
        return {"step_cache_calls": self.calls, "step_cache_reused": self.calls - self.computed}

    def reuse_eagerly(self) -> None:
        """Make the hooks reuse from the second call on wherever they can, whatever the image; for checks, for good."""
        for hooks in self._hooks.values():
            hooks.reuse_eagerly()

    def _count(self, calls: int, computed: int) -> None:
        self.calls += calls
        self.computed += computed


class StepCacheState:
    """What a step cache keeps for one run; it is freed with the run."""

    def __init__(self, cache: str, hooks: Mapping[int, _ModuleHooks]) -> None:
        self._cache = cache
        self._hooks = hooks
        self._states: dict[str, _ModuleStates] = {}
        self._locator = _Locator()
        self._loop = 0

    @contextlib.contextmanager
    def of(self, call: DenoiserCall) -> Iterator[None]:
        """Let a call of a run's denoiser, computed inside of this context, reuse what earlier calls have computed.

        Args:
            call: The call. Modules without hooks compute as they are.
        """
        hooks = self._hooks.get(id(call.module))
        if hooks is None:
            yield
            return
        position = self._locator.locate(call.run)
        if position.loop != self._loop:
            # A new chunk of a video begins with noise again: what was computed at the end of the last one is no guide.
            self._loop = position.loop
            self._states.clear()
        states = self._states.setdefault(hooks.name, _ModuleStates())
        with hooks.using(states, branch_of(call), position):
            yield

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors that it keeps."""
        return _nbytes([states.attributes() for states in self._states.values()])

    def save(self) -> dict[str, object]:
        """Return a copy of all that it keeps, which `engines.codec` can pack.

        Raises:
            CheckpointError: A hook keeps something that cannot be saved.
        """
        states = {
            name: freeze(states.attributes(), {}, f"the cache of the {name}") for name, states in self._states.items()
        }
        return {"cache": self._cache, "states": states}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Put back what `save` has returned, in any process with the same model.

        Raises:
            CheckpointError: It is of another cache.
        """
        by_name = {hooks.name: hooks for hooks in self._hooks.values()}
        if saved["cache"] != self._cache or not saved["states"].keys() <= by_name.keys():
            raise CheckpointError(f"The snapshot is of the step cache {saved['cache']!r}; here it is {self._cache!r}.")
        self._states = {name: by_name[name].restored(thaw(kept, None, None)) for name, kept in saved["states"].items()}
        self._locator, self._loop = _Locator(), 0


def cacheable(components: Mapping[str, object]) -> dict[str, Any]:
    """Return the components that denoise: transformers and UNets of diffusers, not ControlNets."""
    return {
        name: component
        for name, component in components.items()
        if isinstance(component, ModelMixin) and ("transformer" in name or "unet" in name)
    }


def install(components: Mapping[str, object], text: str) -> StepCache | None:
    """Install the step cache of a topology on the loaded components of a pipeline.

    Args:
        components: The components by name.
        text: The cache, as `parse_step_cache` takes it.

    Returns:
        The cache; None for "".

    Raises:
        ModelError: The pipeline does not take it.
        StepCacheError: The text is wrong.
    """
    options = parse_step_cache(text)
    return None if options is None else StepCache(cacheable(components), options)


def possible_caches(module: Any) -> tuple[str, ...]:
    """Return the kinds of caches that the structure of a denoiser takes; some can still fail when it computes.

    Args:
        module: A model of diffusers. It is not changed.
    """
    return tuple(kind for kind in KINDS if not _problem_on_copy(module, kind))


def branch_of(call: DenoiserCall) -> str:
    """Return which branch of guidance a call is for, such as "pred_cond"; calls of a run are alike if it is the same.

    It is what the pipeline says with `cache_context`, else what its guiders predict, else the number of the call in its
    step.
    """
    if call.cache_context is not None:
        return call.cache_context.name
    # All guiders, since one that is not in use stays where it is.
    guiders = [part for part in vars(call.run.pipeline).values() if isinstance(part, BaseGuidance)]
    predicted = "/".join(_prediction(guider) for guider in guiders)
    return predicted.strip("/") or f"call {call.number}"


def _prediction(guider: BaseGuidance) -> str:
    names, prepared = guider._input_predictions or [], guider._count_prepared
    return names[prepared - 1] if 0 < prepared <= len(names) else ""


# The place of a call in its run ------------------------------------------------------------------------------


class _Locator:
    """Finds out where in its loops a run is, from its private scheduler.

    Schedulers that do not count their steps (DDIM, DDPM, PNDM) are taken to be where the run is.
    """

    def __init__(self) -> None:
        self._loop = -1
        self._index = 0
        self._first_step = 0
        self._timesteps: Any = None
        self._values: list[float] = []

    def locate(self, run: Any) -> StepPosition:
        scheduler: Any = vars(run.pipeline).get("scheduler")
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, torch.Tensor):
            return StepPosition(0, run.step, run.total_steps or 0)
        if timesteps is not self._timesteps:
            # Read them once: each read of a value would wait for the device.
            self._timesteps, self._values = timesteps, timesteps.flatten().tolist()
            self._loop, self._index, self._first_step = self._loop + 1, 0, run.step
        count = len(self._values)
        skipped = count - run.total_steps if run.total_steps else (getattr(scheduler, "begin_index", None) or 0)
        skipped = skipped if 0 <= skipped < count else 0
        reached = getattr(scheduler, "step_index", None)
        index = run.step - self._first_step if reached is None else max(reached - skipped, 0)
        if index < self._index:
            self._loop += 1
        self._index = index
        t = self._values[skipped + index] if skipped + index < count else NO_TIMESTEP
        return StepPosition(self._loop, index, count - skipped, skipped, t)


# The hooks of a module --------------------------------------------------------------------------------------


class _NotCacheableError(Exception):
    """A module does not take a kind of cache; `str()` says why, as the rest of a sentence."""


class _ModuleStates:
    """The states of a module's hooks for one run, by hook and branch."""

    def __init__(self, managers: int = 0, plain: int = 0) -> None:
        self.managed: list[dict[str, Any]] = [{} for _ in range(managers)]
        self.plain: list[dict[str, Any]] = [{} for _ in range(plain)]

    def attributes(self) -> list[dict[str, object]]:
        """Return the attributes of each state, by branch, for each hook."""
        return [{branch: vars(state) for branch, state in each.items()} for each in (*self.managed, *self.plain)]


class _ModuleHooks:
    """The hooks of a cache on one module and the modules inside of it.

    Hooks keep their state in a `StateManager`, by the name of a context, or in an attribute `state`.
    """

    def __init__(self, name: str, module: Any, options: StepCacheOptions, count: Callable[[int, int], None]) -> None:
        self.name = name
        self._count = count
        self._options = options
        self._t = NO_TIMESTEP
        self._eager = False
        self._on = False
        self._calls = 0
        self._computed = 0
        self._ratios = _ratios(module, options) if options.kind == "magcache" else ()
        found = _apply(module, options, self._ratios, lambda: self._t)
        attributes = (value for hook in found for value in vars(hook).values())
        self._managers = list({id(value): value for value in attributes if isinstance(value, StateManager)}.values())
        self._plain = [hook for hook in found if "state" in vars(hook)]
        self._configured = [hook for hook in found if isinstance(vars(hook).get("config"), MagCacheConfig)]
        self._hooks = found
        self._configs: dict[tuple[int, int], MagCacheConfig] = {}
        for hook in found:
            self._make_switchable(hook.fn_ref)

    @contextlib.contextmanager
    def using(self, states: _ModuleStates, branch: str, position: StepPosition) -> Iterator[None]:
        """Turn the hooks on with the states of a run; afterwards they are off and hold none."""
        if not states.managed and not states.plain:
            states.managed, states.plain = [{} for _ in self._managers], [{} for _ in self._plain]
        where = {"step_index": position.index, "num_inference_steps": position.steps or None}
        for manager, kept in zip(self._managers, states.managed, strict=True):
            manager._state_cache = kept
            manager.set_context(CacheContext(branch, **where))
        # FasterCache fails if it may reuse at its first call.
        is_first = any(branch not in kept for kept in states.plain)
        for hook, kept in zip(self._plain, states.plain, strict=True):
            hook.state = kept.setdefault(branch, type(hook.state)())
        if self._configured and position.steps:
            loop = position.steps, position.skipped
            if loop not in self._configs:
                self._configs[loop] = _mag_config(self._options, self._ratios, *loop)
            for hook in self._configured:
                hook.config = self._configs[loop]
        self._t = NO_TIMESTEP if is_first else self._seen(position.t)
        self._on = True
        try:
            yield
        finally:
            self._on, self._t = False, NO_TIMESTEP
            for manager in self._managers:
                manager._state_cache = {}
                manager.set_context(None)
            for hook in self._plain:
                hook.state = type(hook.state)()
            self._count(self._calls, self._computed)
            self._calls = self._computed = 0

    def restored(self, attributes: list[dict[str, object]]) -> _ModuleStates:
        """Make states of what `_ModuleStates.attributes` has returned."""
        made = _ModuleStates(len(self._managers), len(self._plain))
        makers: list[Callable[[], Any]] = [
            *(functools.partial(each._state_cls, *each._init_args, **each._init_kwargs) for each in self._managers),
            *(type(hook.state) for hook in self._plain),
        ]
        for kept, make, by_branch in zip((*made.managed, *made.plain), makers, attributes, strict=True):
            for branch, values in by_branch.items():
                kept[branch] = make()
                vars(kept[branch]).update(cast("dict[str, object]", values))
        return made

    def reuse_eagerly(self) -> None:
        self._eager = True
        values = {name: _EAGER.get(name, value) for name, value in self._options.values.items()}
        self._options, self._configs = replace(self._options, values=values), {}
        for hook in self._hooks:
            if hasattr(hook, "threshold"):
                hook.threshold = math.inf
            if hasattr(hook, "cache_interval"):
                hook.disable_cache_before_step, hook.cache_interval = 1, 1 << 30

    def _seen(self, t: float) -> float:
        low, high = (cast(float, self._options.values.get(name, 0.0)) for name in ("from_t", "to_t"))
        return (low + high) / 2 if self._eager and t is not NO_TIMESTEP else t

    def _make_switchable(self, reference: Any) -> None:
        """Let a hooked module compute as it is while the cache is off, and count what it computes while it is on."""
        plain, cached = reference.original_forward, reference.forward

        def computed(*args: Any, **kwargs: Any) -> Any:
            self._computed += 1
            return plain(*args, **kwargs)

        def switched(*args: Any, **kwargs: Any) -> Any:
            if not self._on:
                return plain(*args, **kwargs)
            self._calls += 1
            return cached(*args, **kwargs)

        reference.original_forward, reference.forward = computed, switched


# What diffusers takes ---------------------------------------------------------------------------------------

_EAGER: Final[Mapping[str, Value]] = {"threshold": math.inf, "max_skip_steps": 1 << 30, "retention_ratio": 0.0}
"""Parameters with which a cache reuses whatever it can."""


def _apply(
    module: Any, options: StepCacheOptions, ratios: tuple[float, ...], timestep: Callable[[], float]
) -> list[ModelHook]:
    """Add the hooks of a cache to a module; returns those that replace a computation.

    Raises:
        _NotCacheableError: The module does not take the cache. It may have some of the hooks then.
    """
    if problem := _block_problem(module, options):
        raise _NotCacheableError(problem)
    before = {id(hook) for hook in _hooks_in(module)}
    try:
        _ENABLE[options.kind](module, options, ratios, timestep)
    except Exception as error:  # diffusers may raise anything for a model that it does not expect
        raise _NotCacheableError(f"diffusers says: {one_line(error)}") from error
    HookRegistry.check_if_exists_or_initialize(module).invalidate_child_registries_cache()
    found = [hook for hook in _hooks_in(module) if id(hook) not in before]
    if not found:
        raise _NotCacheableError("it has no layers that diffusers would cache")
    return found


def _hooks_in(module: Any) -> Iterator[ModelHook]:
    for inner in module.modules():
        registry = vars(inner).get("_diffusers_hook")
        if registry is not None:
            yield from registry.hooks.values()


def _blocks(module: Any) -> list[Any]:
    lists = [child for name, child in module.named_children() if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS]
    return [block for each in lists if isinstance(each, torch.nn.ModuleList) for block in each]


def _block_problem(module: Any, options: StepCacheOptions) -> str:
    """Say why a cache that replaces whole blocks cannot work, as the rest of a sentence; "" if it can.

    diffusers would find most of it only when the model computes.
    """
    kind = options.kind
    blocks = _blocks(module)
    returns_one = bool(blocks) and getattr(blocks[-1], "context_pre_only", False)
    if options.values.get("lite") and (returns_one or not hasattr(module, "proj_out")):
        return "lite needs blocks that return the same, and a last layer called proj_out"
    if kind not in ("first_block", "magcache"):
        return ""
    if len(blocks) < (2 if kind == "first_block" else 1):
        return "it has only one transformer block" if blocks else "it has no list of transformer blocks"
    known = {}
    for cls in {type(block) for block in blocks}:
        try:
            metadata = known[cls] = TransformerBlockRegistry.get(cls)
        except ValueError:
            return f"diffusers does not know what a {cls.__name__} takes and returns"
        taken = inspect.signature(cls.forward).parameters
        needed = {"hidden_states"} if kind == "first_block" else {metadata.hidden_states_argument_name}
        if metadata.return_encoder_hidden_states_index is not None:
            needed.add("encoder_hidden_states")
        if lacking := sorted(needed - taken.keys()):
            return f"a {cls.__name__} takes no {lacking[0]}"
    first, last = (known[type(block)].return_encoder_hidden_states_index is None for block in (blocks[0], blocks[-1]))
    if kind == "first_block" and (first != last or returns_one):
        return "its first and its last block do not return the same"
    return ""


def _ratios(module: Any, options: StepCacheOptions) -> tuple[float, ...]:
    given = cast("tuple[float, ...]", options.values["ratios"])
    if given:
        return given
    if isinstance(module, diffusers.FluxTransformer2DModel):
        return tuple(FLUX_MAG_RATIOS.tolist())
    raise _NotCacheableError("its ratios have to be measured, and written as ratios=1.0 1.2 ...")


def _mag_config(options: StepCacheOptions, ratios: tuple[float, ...], steps: int, skipped: int) -> MagCacheConfig:
    """Return the configuration of a loop of `steps` steps, with the ratios of those that it does not skip."""
    values: dict[str, Any] = {name: value for name, value in options.values.items() if name != "ratios"}
    config = MagCacheConfig(**values, num_inference_steps=steps + skipped, mag_ratios=list(ratios))
    config.mag_ratios, config.num_inference_steps = cast(torch.Tensor, config.mag_ratios)[skipped:], steps
    return config


def _first_block(module: Any, options: StepCacheOptions, *_: object) -> None:
    apply_first_block_cache(module, FirstBlockCacheConfig(**options.values))


def _magcache(module: Any, options: StepCacheOptions, ratios: tuple[float, ...], *_: object) -> None:
    apply_mag_cache(module, _mag_config(options, ratios, 28, 0))


def _taylorseer(module: Any, options: StepCacheOptions, *_: object) -> None:
    values = options.values
    # The patterns of diffusers miss attention layers that are not called "attn", such as those of Wan and LTX.
    attention = [re.escape(name) for name, inner in module.named_modules() if isinstance(inner, _ATTENTION_CLASSES)]
    config = TaylorSeerCacheConfig(
        cache_interval=values["interval"],
        disable_cache_before_step=values["warmup"],
        max_order=values["order"],
        taylor_factors_dtype=module.dtype,
        cache_identifiers=None if values["lite"] else [*_TRANSFORMER_BLOCK_IDENTIFIERS, *attention],
        use_lite_mode=values["lite"],
    )
    apply_taylorseer_cache(module, config)


def _pab(module: Any, options: StepCacheOptions, ratios: object, timestep: Callable[[], float]) -> None:
    values = options.values
    reused = (values["from_t"], values["to_t"])
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=values["interval"],
        temporal_attention_block_skip_range=values["interval"],
        cross_attention_block_skip_range=values["cross_interval"] or None,
        spatial_attention_timestep_skip_range=reused,
        temporal_attention_timestep_skip_range=reused,
        cross_attention_timestep_skip_range=reused,
        current_timestep_callback=timestep,
    )
    apply_pyramid_attention_broadcast(module, config)


def _faster(module: Any, options: StepCacheOptions, ratios: object, timestep: Callable[[], float]) -> None:
    values = options.values
    weight, reused = values["weight"], (values["from_t"], values["to_t"])
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=values["interval"],
        temporal_attention_block_skip_range=values["interval"],
        spatial_attention_timestep_skip_range=reused,
        temporal_attention_timestep_skip_range=reused,
        attention_weight_callback=lambda _: weight,
        # Each branch of guidance is a call of its own, or a request has one branch.
        is_guidance_distilled=True,
        current_timestep_callback=timestep,
    )
    apply_faster_cache(module, config)
    # The hook of the whole model skips half of a doubled batch, and nothing of a distilled model.
    HookRegistry.check_if_exists_or_initialize(module).remove_hook(_FASTER_CACHE_DENOISER_HOOK, recurse=False)


_ENABLE: Final[Mapping[str, Callable[..., None]]] = {
    "first_block": _first_block,
    "magcache": _magcache,
    "taylorseer": _taylorseer,
    "pab": _pab,
    "faster": _faster,
}


def _problem_on_copy(module: Any, kind: str) -> str:
    """Say why a module does not take a cache with its defaults; "" if it does. The module is not changed."""
    with init_empty_weights():
        copy = type(module).from_config(module.config)
    options = cast(StepCacheOptions, parse_step_cache(kind))
    try:
        _apply(copy, options, tuple(FLUX_MAG_RATIOS.tolist()), lambda: NO_TIMESTEP)
    except _NotCacheableError as error:
        return str(error)
    return ""


def _sentence(name: str, module: Any, options: StepCacheOptions, problem: str) -> str:
    others = [each for each in possible_caches(module) if each != options.kind]
    instead = f"It may take {', '.join(others)}." if others else "It takes no other cache."
    what = f"the {name}, a {type(module).__name__}"
    return f'cache = "{options.text}" does not work with {what}: {problem}. {instead}'


def _nbytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(_nbytes(item) for item in value.values())
    return sum(_nbytes(item) for item in value) if isinstance(value, (list, tuple)) else 0
