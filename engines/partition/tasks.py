"""The tasks of a classic pipeline class, from the images that it requires."""

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
"""The task that stands for all that a model can do."""
_PAINTED: Final = frozenset({"image", "mask_image"})
_CONTROLS: Final = ("control_image", "control_video", "conditioning_frames", "image")
"""Names of the image of a ControlNet, the most specific first."""
_NEEDS: Final[tuple[tuple[Mapping[str, Any], tuple[str, ...], frozenset[str]], ...]] = (
    (AUTO_INPAINT_PIPELINES_MAPPING, ("Inpaint",), _PAINTED),
    (AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, ("Img2Img",), frozenset({"image"})),
    (AUTO_IMAGE2VIDEO_PIPELINES_MAPPING, ("ImageToVideo", "Image2Video"), frozenset({"image"})),
    (AUTO_VIDEO2VIDEO_PIPELINES_MAPPING, ("VideoToVideo", "Video2Video"), frozenset({"video"})),
)
"""The tables of diffusers with classes that require images, words in the names of unlisted classes, and the images."""
_SAME: Final = {
    "img2img": "image2image",
    "image_conditioned": "image2image",
    "inpaint": "inpainting",
    "image_conditioned_inpainting": "inpainting",
}


@dataclass(frozen=True)
class ClassRequirements:
    """The inputs of the class that an index names, by the names that blocks have for them.

    Attributes:
        required: The names of the images that it requires, even if it declares them as optional.
        taken: The names of all its inputs.
        defaults: The defaults by name, without those that are None.
        aliases: The names of blocks, by different names of the class.
    """

    required: frozenset[str]
    taken: frozenset[str]
    defaults: Mapping[str, object]
    aliases: Mapping[str, str] = field(default_factory=dict)


def classic_class(index: Mapping[str, object], options: ModelOptions = DEFAULTS) -> Any:
    """Return the classic pipeline class that an index names.

    Args:
        index: The index of the model.
        options: The options of the topology, which may allow code in the model's folder.

    Raises:
        ModelError: There is no such class, it needs a package that is not installed, or it is code that may not be run.
    """
    name = str(index["_class_name"])
    if MODULE in index:
        return custom_class(Path(str(index[MODULE])), name, options)
    try:
        # One of them raises SystemExit if a package is not installed.
        found = getattr(diffusers, name, None)
    except (ImportError, RuntimeError, SystemExit) as error:
        raise ModelError(f"The pipeline {name} cannot be imported: {error}") from error
    if isinstance(found, type) and issubclass(found, diffusers.ModularPipeline):
        raise ModelError(f'The model is for {name}, which has only blocks: leave out [model] route = "classic".')
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        needs = ", ".join(getattr(found, "_backends", ()))
        missing = f"needs {needs}" if needs else f"is not one of diffusers {diffusers.__version__}"
        raise ModelError(f"The model is for {name}, which {missing}.")
    return found


def required_by(cls: Any) -> frozenset[str]:
    """Return the names of the images that a class requires, even if it declares them as optional, as most do."""
    names = inspect.signature(cls.__call__).parameters.keys()
    if "Control" in cls.__name__:
        control = [name for name in _CONTROLS if name in names][:1]
        return _required_by_name(cls, names).union(control, {"control_mask"} & names)
    if cls in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values():
        return frozenset()
    listed = next((needed for table, _, needed in _NEEDS if cls in table.values()), None)
    return _required_by_name(cls, names) if listed is None else listed & names


def requirements_of(cls: Any) -> ClassRequirements:
    """Return the inputs of a class, by the names that blocks have for them."""
    parameters = inspect.signature(cls.__call__).parameters
    required = set(required_by(cls))
    empty = inspect.Parameter.empty
    required |= {name for name, item in parameters.items() if item.default is empty and name in ("image", "video")}
    taken = set(parameters)
    aliases = {}
    if "ControlNet" in cls.__name__:
        if "control_image" not in taken:
            # The only image is that of the ControlNet; in blocks, `image` is the image to be changed.
            aliases = {"image": "control_image"}
            taken = (taken - {"image"}) | {"control_image"}
            required = (required - {"image"}) | {"control_image"}
        required |= {"control_mode"} & taken if "Union" in cls.__name__ else set()
    defaults = {name: item.default for name, item in parameters.items() if item.default not in (empty, None)}
    return ClassRequirements(frozenset(required), frozenset(taken), defaults, aliases)


def class_tasks(cls: Any, medium: Medium) -> tuple[Task, ...]:
    """Return the tasks of a class, from its inputs: one, or two if its image is optional."""
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
    """Return the name of the task of a pipeline that requires some images, such as "image2video"."""
    if "mask_image" in images:
        return "inpainting"
    if "video" in images:
        return f"video2{medium}"
    if "image" in images:
        return f"image2{medium}"
    return f"text2{medium}" if prompt else f"unconditional_{medium}"


def task_names(task: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the tasks that a topology or a serving config names, as a tuple."""
    return (task,) if isinstance(task, str) and task else tuple(task)


def is_same(task: str, other: str) -> bool:
    """Whether two names mean the same task, such as "image-to-image", "img2img" and "image2image"."""
    return _plain(task) == _plain(other)


def class_task_problem(cls: Any, named: tuple[str, ...], medium: Medium) -> str:
    """Say which of some tasks a class does not do; "" if it does all."""
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
