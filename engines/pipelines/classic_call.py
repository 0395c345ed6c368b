"""Call a classic pipeline as a whole, one step at a time: its inputs, its results and the steps of its scheduler."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from torch.utils import _pytree

from triptych.engines.parameters.aliases import public_names, with_aliases
from triptych.engines.parameters.declarations import (
    latent_parameter,
    parameters_of_call,
    returns_latents,
    tensor_inputs_of_call,
    tensors_parameter,
)
from triptych.engines.parameters.media import (
    IMAGES,
    LATENTS,
    LAYERS,
    MAPS,
    NSFW,
    SOUNDS,
    VIDEOS,
    frames_per_s,
    medium_of,
    results_of,
    wants_latents,
    with_sampling_rate,
)
from triptych.engines.parameters.schema import OUTPUT_TYPE, REPLACES, Signature
from triptych.engines.parameters.size_constraints import with_size_constraints
from triptych.engines.partition.loop_state import call_problem
from triptych.engines.partition.tasks import class_tasks, required_by
from triptych.engines.pipelines.attention_processors import AttentionProcessorGuard
from triptych.engines.pipelines.component_settings import setting_parameters
from triptych.engines.pipelines.guidance import GUIDANCE_SCALE, guidance, has_guider
from triptych.engines.pipelines.random_state import GENERATOR
from triptych.engines.stages import InputError
from triptych.engines.steps.checkpoint import (
    CheckpointError,
    component_names,
    freeze,
    freeze_attributes,
    thaw,
    thaw_attributes,
)
from triptych.engines.steps.denoiser_calls import CacheContextArguments, parked_components, parking, parks
from triptych.engines.steps.denoising import Denoising

_OURS: Final = frozenset({"self", "output_type", "return_dict", "callback", "callback_steps", "callback_on_step_end"})
STEPS: Final = ("step", "step_pred")
"""The methods of a scheduler that a loop calls once for each timestep."""
_MEDIA: Final = {
    **dict.fromkeys(IMAGES, IMAGES[0]),
    **dict.fromkeys(VIDEOS, VIDEOS[0]),
    **dict.fromkeys(SOUNDS, SOUNDS[0]),
}
"""The names that the results of a pipeline have in ours, by those of diffusers."""


def accepted(pipeline: Any) -> frozenset[str]:
    """Return the names of the inputs of a classic pipeline."""
    parameters = inspect.signature(type(pipeline).__call__).parameters.values()
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = {parameter.name for parameter in parameters if parameter.kind not in kinds}
    names -= {*_OURS, "callback_on_step_end_tensor_inputs"}
    settings = {parameter.name for parameter in setting_parameters(pipeline)}
    latent = {OUTPUT_TYPE} if returns_latents(type(pipeline).__call__) else set()
    return frozenset(names | latent | settings | ({GUIDANCE_SCALE} if has_guider(pipeline) else set()))


def signature(pipeline: Any) -> Signature:
    """Return the inputs and outputs of a classic pipeline; any input may change the outputs of its encoders."""
    function = type(pipeline).__call__
    medium = medium_of(results_of(function))
    defaults = {name: declared.default for name, declared in inspect.signature(function).parameters.items()}
    fps = frames_per_s(medium, defaults, pipeline)
    declared = with_size_constraints(parameters_of_call(function, required_by(type(pipeline))), pipeline)
    declared = (*declared, *tensors_parameter(tensor_inputs_of_call(function)))
    if returns_latents(function):
        declared = (*declared, latent_parameter())
    settings = setting_parameters(pipeline)
    parameters = with_aliases(declared, settings, guided=has_guider(pipeline), guidance=guidance(pipeline), fps=fps)
    inputs = public_names(accepted(pipeline), parameters)
    return Signature(parameters, inputs, medium, fps, inputs, class_tasks(type(pipeline), medium))


def call_pipeline(pipeline: Any, inputs: Mapping[str, object], generator: torch.Generator) -> dict[str, object]:
    """Run a whole classic pipeline.

    Args:
        pipeline: The pipeline, private to the request; it cannot be used afterwards.
        inputs: The inputs of the request by name.
        generator: The generator of its noise.

    Returns:
        As `StagePipeline.decode`.

    Raises:
        InputError: The request is for latents, and the pipeline does not return them.
    """
    names = inspect.signature(type(pipeline).__call__).parameters.keys()
    # Copy tensors: some pipelines write into the latents they get, and a payload must not change.
    given = {name: copy.deepcopy(value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    given = {name: value for name, value in given.items() if name in names}
    for tensor, replaced in REPLACES.items():
        if given.get(tensor) is not None and replaced in names:
            given.setdefault(replaced, None)
    if GENERATOR in names:
        given[GENERATOR] = generator
    latent = wants_latents(inputs)
    if OUTPUT_TYPE in names and not latent:
        # Ask for images only where they are the result: frames are needed as numbers, and sound is not an image.
        results = results_of(type(pipeline).__call__)
        is_image = medium_of(results) == "image" and set(MAPS).isdisjoint(results)
        given[OUTPUT_TYPE] = "pil" if is_image else "np"
    try:
        results = pipeline(**given)
        return latents_in(results) if latent else media_in(results, pipeline)
    finally:
        _break_reference_cycles(pipeline)


def latents_in(results: Any) -> dict[str, object]:
    """Return the latents among the results of a pipeline.

    Raises:
        InputError: There are none.
    """
    found = {name: value for name, value in vars(results).items() if isinstance(value, torch.Tensor)}
    seen = [value for name, value in found.items() if name in (*IMAGES, *VIDEOS)]
    heard = [value for name, value in found.items() if name in SOUNDS]
    if not seen and not heard:
        raise InputError("output_type cannot be latent: this pipeline does not return its latents.")
    return dict(zip(LATENTS if seen else LATENTS[:1], (*seen[:1], *heard[:1]), strict=False))


def media_in(results: Any, pipeline: Any) -> dict[str, object]:
    """Return the media among the results of a pipeline, as `StagePipeline.decode` does."""
    found = {name: value for name, value in vars(results).items() if value is not None}
    made = {
        _MEDIA[name]: np.asarray(value) if name in VIDEOS else value for name, value in found.items() if name in _MEDIA
    }
    for name in found.keys() & set(MAPS):
        made[IMAGES[0]] = _to_images(found[name], type(results).__name__, pipeline)
    if layers := [image for name in LAYERS for image in found.get(name, ())]:
        made[IMAGES[0]] = layers
    if NSFW in found:
        made[NSFW] = [bool(one) for one in found[NSFW]]
    return with_sampling_rate(made, pipeline)


def _to_images(prediction: Any, results: str, pipeline: Any) -> list[Any]:
    """Make images of arrays [image, height, width, channel].

    One channel in 0..1 becomes an image of 16 bits. Three channels are drawn by the image processor of the pipeline.
    """
    if prediction.shape[-1] == 1:
        return [Image.fromarray((values[..., 0] * (2**16 - 1)).astype(np.uint16)) for values in prediction]
    processor = pipeline.image_processor
    draws = (name for name in dir(processor) if name.startswith("visualize_"))
    draw = getattr(processor, next(name for name in draws if name.partition("_")[2] in results.lower()))
    more = {name: getattr(pipeline, name) for name in inspect.signature(draw).parameters if hasattr(pipeline, name)}
    drawn = draw(prediction, **more)
    return [image for item in drawn for image in (item.values() if isinstance(item, dict) else [item])]


def _break_reference_cycles(pipeline: Any) -> None:
    """Break the reference cycles of a private pipeline and its replaced methods, so that tensors are freed at once."""
    for scheduler in schedulers(pipeline):
        vars(scheduler).clear()
    vars(vars(pipeline).get("vae", pipeline)).pop("decode", None)
    for component in list(vars(pipeline).values()):
        if isinstance(component, DiffusionPipeline):
            _break_reference_cycles(component)
    vars(pipeline).clear()


def schedulers(pipeline: Any) -> tuple[Any, ...]:
    """Return the schedulers of a pipeline and of the pipelines inside of it, each once."""
    found: dict[int, Any] = {}
    for component in vars(pipeline).values():
        if isinstance(component, SchedulerMixin):
            found[id(component)] = component
        elif isinstance(component, DiffusionPipeline):
            found |= {id(inner): inner for inner in schedulers(component)}
    return tuple(found.values())


class CallDenoising(Denoising):
    """A run of a whole function that pauses after each step of a scheduler except the last.

    A run that goes on from a snapshot calls the function from its beginning. Until it arrives at the saved step, the
    scheduler returns the saved result, and denoisers return zeros, except for the first call of each shape.

    Args:
        work: The run; returns the payload for the decoder.
        pipeline: The pipeline that it runs, private to the request.
        generator: The generator of the request.
    """

    def __init__(self, work: Callable[[], dict[str, object]], pipeline: Any, generator: torch.Generator) -> None:
        super().__init__(work)
        self.pipeline = pipeline
        self.cannot_resume = call_problem(type(pipeline))
        self._generator = generator
        self._processors = AttentionProcessorGuard(pipeline)
        self._position: object = None
        self._scheduler: Any = None
        self._stepped: Any = None
        """The result of the last step; in a run that goes on, the frozen one of the snapshot."""
        self._zeros: dict[Hashable, Any] = {}
        for scheduler in schedulers(pipeline):
            for name in STEPS:
                if hasattr(scheduler, name):
                    intercept(scheduler, name, functools.partial(self._stepping, pipeline))

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """Set what a computation of this run needs, as `Denoising.surroundings`: its attention processors, too."""
        with super().surroundings(), self._processors:
            yield
        self.edits_modules = self._processors.edited

    def resume(self, snapshot: Mapping[str, Any], *, skip_rest: bool = False) -> None:
        """Go on from a snapshot, as `Denoising.resume`."""
        super().resume(snapshot, skip_rest=skip_rest)
        self._stepped = snapshot["run"].get("result")
        for name, component in list(parked_components(self.pipeline)):
            if not parks(component):
                vars(self.pipeline)[name] = parking(component)

    def park(
        self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], context: CacheContextArguments | None
    ) -> Any:
        """Compute a call of a denoiser, as `Denoising.park`; in a step that is skipped, return zeros of its shape."""
        if not self._skipping:
            return super().park(module, args, kwargs, context)
        shape = (id(module), *map(_outline, _pytree.tree_leaves((args, dict(kwargs)))))
        # The first calls are computed: they may be before the loop, and the shape of the output is not known.
        if self.step == 0 or shape not in self._zeros:
            output = super().park(module, args, kwargs, context)
            self._zeros[shape] = _pytree.tree_map_only(torch.Tensor, torch.zeros_like, output)
            return output
        return _pytree.tree_map_only(torch.Tensor, torch.clone, self._zeros[shape])

    @property
    def _skipping(self) -> bool:
        return self._saved is not None or (self._skips_rest and self.step != self.total_steps)

    def _stepping(self, pipeline: Any, scheduler: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        skipping = self._skipping
        result = thaw(self._stepped, None, pipeline) if skipping else step(*args, **kwargs)
        # Count a timestep once: a loop may call the scheduler for each part of the latents, and a copy of it for sound.
        position = getattr(scheduler, "step_index", None)
        if position is None:
            position = args[1] if len(args) > 1 else kwargs.get("timestep")
        if not skipping and (self._is_same_step(position) or self._scheduler not in (None, scheduler)):
            self.cannot_resume = self.cannot_resume or "It calls schedulers more than once in a step."
        if not skipping and self._is_same_step(position):
            return result
        self._position, self._scheduler = position, scheduler
        if self.step == 0:
            # A run that starts from an image has fewer steps than timesteps; most pipelines have the number.
            self.total_steps = vars(pipeline).get("_num_timesteps") or len(scheduler.timesteps)
        self.step += 1
        if self.total_steps is not None and self.step > self.total_steps:
            # The pipeline has another loop.
            self.total_steps = None
            self.cannot_resume = self.cannot_resume or "It has more than one loop."
        if skipping:
            self._skips(self._thaw)
            return result
        # Do not pause after the last step, so that it also ends the run.
        if self.step != self.total_steps:
            self._stepped = result
            self.pause()
        return result

    def _freeze(self) -> dict[str, object]:
        names, scheduler = component_names(self.pipeline), self._scheduler
        own = {name for name in vars(scheduler) if not isinstance(vars(scheduler)[name], _Interceptor)}
        return {
            "result": freeze(self._stepped, names, "the result of the scheduler"),
            "scheduler": freeze_attributes(scheduler, names, "the scheduler", names=own),
            "class": type(scheduler).__name__,
            "generator": self._generator.clone_state(),
        }

    def _thaw(self, saved: Mapping[str, Any]) -> None:
        if saved["class"] != type(self._scheduler).__name__:
            raise CheckpointError(f"The snapshot is of a {saved['class']}.")
        thaw_attributes(saved["scheduler"], self._scheduler, self.pipeline)
        self._generator.set_state(saved["generator"].get_state())

    def _release(self) -> None:
        super()._release()
        self._scheduler = self._stepped = None
        self._zeros = {}

    def _is_same_step(self, position: object) -> bool:
        # Compare tensors by identity: comparing their values would copy them from the device.
        if isinstance(position, int) and isinstance(self._position, int):
            return position == self._position
        return position is not None and position is self._position


def _outline(value: object) -> Hashable:
    """Return what of an argument may change the shape of a denoiser's output."""
    if isinstance(value, torch.Tensor):
        return (value.shape, value.dtype)
    return (type(value), value if isinstance(value, (bool, str)) else None)


class _Interceptor:
    """What is called instead of a method of a scheduler and of all its copies."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __deepcopy__(self, memo: object) -> _Interceptor:
        return self


def intercept(scheduler: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method of a scheduler and of all copies of it.

    Args:
        scheduler: A scheduler of diffusers, private to a request.
        name: The name of the method.
        around: Is called with the scheduler or its copy, its method and the arguments.
    """
    # A bound method as an attribute would belong to the original in a copy, too. A subclass would be seen by pipelines
    # that compare the class.
    owner: type = next(cls for cls in type(scheduler).__mro__ if name in vars(cls))
    _make_interceptable(owner, name)
    vars(scheduler)[_interceptor_attribute(name)] = _Interceptor(around)


@functools.cache
def _make_interceptable(cls: type, name: str) -> None:
    """Change a class of diffusers, once, so that its schedulers call their interceptor if they have one."""
    method = getattr(cls, name)

    # Keep the signature, which pipelines inspect.
    @functools.wraps(method)
    def interceptable(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = functools.partial(method, self)
        around = vars(self).get(_interceptor_attribute(name))
        return bound(*args, **kwargs) if around is None else around.call(self, bound, *args, **kwargs)

    setattr(cls, name, interceptable)


def _interceptor_attribute(name: str) -> str:
    return f"_around_{name}"
