"""What the class that an index names is for: which images it needs, and so which task it does."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import diffusers
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_IMAGE2VIDEO_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    AUTO_VIDEO2VIDEO_PIPELINES_MAPPING,
)

from triptych.engines.model_options import DEFAULTS, ModelOptions
from triptych.engines.parameters.schema import Medium, Task
from triptych.engines.stages import ModelError
from triptych.engines.weights.custom_code import MODULE, custom_class

ANY: Final = "any"
"""The task of a model that serves all that its folder can do."""
_PAINTED: Final = frozenset({"image", "mask_image"})
_CONTROLS: Final = ("control_image", "control_video", "conditioning_frames", "image")
"""What the image that a ControlNet looks at is called, the most telling name first."""
_NEEDS: Final[tuple[tuple[Mapping[str, Any], tuple[str, ...], frozenset[str]], ...]] = (
    (AUTO_INPAINT_PIPELINES_MAPPING, ("Inpaint",), _PAINTED),
    (AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, ("Img2Img",), frozenset({"image"})),
    (AUTO_IMAGE2VIDEO_PIPELINES_MAPPING, ("ImageToVideo", "Image2Video"), frozenset({"image"})),
    (AUTO_VIDEO2VIDEO_PIPELINES_MAPPING, ("VideoToVideo", "Video2Video"), frozenset({"video"})),
)
"""Where diffusers lists the classes that need an image, words of their names where it lists them nowhere, and what
they need."""
_SAME: Final = {
    "img2img": "image2image",
    "image_conditioned": "image2image",
    "inpaint": "inpainting",
    "image_conditioned_inpainting": "inpainting",
}


@dataclass(frozen=True)
class ClassRequirements:
    """What the class that an index names takes, in the words of blocks.

    Attributes:
        required: Names of the images without which it does not run, though it may declare them as optional.
        taken: Names of all its inputs.
        defaults: Their defaults, by name; None is left out.
        aliases: Names of the class for what blocks call otherwise.
    """

    required: frozenset[str]
    taken: frozenset[str]
    defaults: Mapping[str, object]
    aliases: Mapping[str, str] = field(default_factory=dict)


def classic_class(index: Mapping[str, object], options: ModelOptions = DEFAULTS) -> Any:
    """Find the pipeline that an index names.

    Args:
        index: Of the model.
        options: How it is read; they say whether code that comes with it may be run.

    Raises:
        ModelError: There is none, or it needs a package that is not installed, or it is code that may not be run.
    """
    name = str(index["_class_name"])
    if MODULE in index:
        return custom_class(Path(str(index[MODULE])), name, options)
    try:
        # One of them ends the process where a package that it needs is absent.
        found = getattr(diffusers, name, None)
    except (ImportError, RuntimeError, SystemExit) as error:
        raise ModelError(f"The pipeline {name} cannot be imported: {error}") from error
    if isinstance(found, type) and issubclass(found, diffusers.ModularPipeline):
        raise ModelError(f'The model is for {name}, which has blocks alone: leave out [model] route = "classic".')
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        needs = ", ".join(getattr(found, "_backends", ()))
        missing = f"needs {needs}" if needs else f"is not one of diffusers {diffusers.__version__}"
        raise ModelError(f"The model is for {name}, which {missing}.")
    return found


def required_by(cls: Any) -> frozenset[str]:
    """Names of the images that a class needs although it declares them as optional: so do nearly all."""
    names = inspect.signature(cls.__call__).parameters.keys()
    if "Control" in cls.__name__:
        control = [name for name in _CONTROLS if name in names][:1]
        return _required_by_name(cls, names).union(control, {"control_mask"} & names)
    if cls in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values():
        return frozenset()
    listed = next((needed for table, _, needed in _NEEDS if cls in table.values()), None)
    return _required_by_name(cls, names) if listed is None else listed & names


def requirements_of(cls: Any) -> ClassRequirements:
    """Say what a class takes, with the names that blocks have for it."""
    parameters = inspect.signature(cls.__call__).parameters
    required = set(required_by(cls))
    empty = inspect.Parameter.empty
    required |= {name for name, item in parameters.items() if item.default is empty and name in ("image", "video")}
    taken = set(parameters)
    aliases = {}
    if "ControlNet" in cls.__name__:
        if "control_image" not in taken:
            # Its only image is that of the ControlNet; blocks have `image` for what is to be changed.
            aliases = {"image": "control_image"}
            taken = (taken - {"image"}) | {"control_image"}
            required = (required - {"image"}) | {"control_image"}
        required |= {"control_mode"} & taken if "Union" in cls.__name__ else set()
    defaults = {name: item.default for name, item in parameters.items() if item.default not in (empty, None)}
    return ClassRequirements(frozenset(required), frozenset(taken), defaults, aliases)


def class_tasks(cls: Any, medium: Medium) -> tuple[Task, ...]:
    """Name what a class does, by what it needs and takes: one task, or two where its image is optional."""
    parameters = inspect.signature(cls.__call__).parameters
    empty = inspect.Parameter.empty
    images = required_by(cls) | {
        name for name in ("image", "video", "mask_image") if name in parameters and parameters[name].default is empty
    }
    prompt = {"prompt"} & parameters.keys()
    control = next((name for name in _CONTROLS if name in images), None) if "Control" in cls.__name__ else None
    prefix = "controlnet_" if control else ""
    needed = images - {control}
    first = prefix + task_name(needed, medium, prompt=bool(prompt))
    tasks = [Task(first, tuple(sorted(images | prompt)), tuple(sorted(images | prompt)))]
    for name in ("image", "video"):
        if not images and name in parameters:
            names = tuple(sorted({name} | prompt))
            tasks.append(Task(task_name({name}, medium), names, names))
    return tuple(tasks)


def task_name(images: Collection[str], medium: Medium, *, prompt: bool = True) -> str:
    """Name the task of a pipeline that needs some images, such as "image2video"."""
    if "mask_image" in images:
        return "inpainting"
    if "video" in images:
        return f"video2{medium}"
    if "image" in images:
        return f"image2{medium}"
    return f"text2{medium}" if prompt else f"unconditional_{medium}"


def task_names(task: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the tasks that a topology or a serving config names: none, one or several."""
    return (task,) if isinstance(task, str) and task else tuple(task)


def is_same(task: str, other: str) -> bool:
    """Whether two names are of one task: "image-to-image", "img2img" and "image2image" are."""
    return _plain(task) == _plain(other)


def class_task_problem(cls: Any, named: tuple[str, ...], medium: Medium) -> str:
    """Say that a class does not do a task that is named; "" where it does all of them."""
    tasks = class_tasks(cls, medium)
    for name in named:
        if name != ANY and not any(is_same(name, task.name) for task in tasks):
            has = " and ".join(task.name for task in tasks)
            return f'{cls.__name__} does {has}, not "{name}": leave out [model] task.'
    return ""


def _required_by_name(cls: Any, names: Collection[str]) -> frozenset[str]:
    found = next((needed for _, words, needed in _NEEDS if any(word in cls.__name__ for word in words)), frozenset())
    return found & frozenset(names)


def _plain(task: str) -> str:
    name = task.lower().replace("-to-", "2")
    return _SAME.get(name, name)
