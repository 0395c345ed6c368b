"""What a pipeline takes and makes, in words that any process can read. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Final, Literal, TypeAlias

import msgspec

Default: TypeAlias = bool | int | float | str | tuple[int | float | str, ...] | None
Medium: TypeAlias = Literal["image", "video", "audio"]


class ParameterKind(StrEnum):
    """What a value of a parameter is."""

    TEXT = "text"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    NUMBERS = "numbers"
    """A list of numbers."""
    PAIR = "pair"
    """Two whole numbers, of a size or a place; pipelines get a tuple."""
    IMAGE = "image"
    """One image."""
    IMAGES = "images"
    """One image, or several in order: a video is its frames."""
    IMAGE_LIST = "image_list"
    """The same, but pipelines get a list even of one."""
    TEXTS = "texts"
    """A text, or several in a list."""
    JSON = "json"
    """Whatever JSON can say, such as lists in a list, or an object."""
    OPTIONS = "options"
    """An object: options by name, each a scalar, null or a list of numbers."""
    TENSORS = "tensors"
    """A safetensors file. Pipelines get each tensor in it as an input, by its name."""


KIND_DESCRIPTIONS: Final[Mapping[ParameterKind, str]] = {
    ParameterKind.TEXT: "text",
    ParameterKind.INTEGER: "a whole number",
    ParameterKind.NUMBER: "a number",
    ParameterKind.BOOLEAN: "true or false",
    ParameterKind.NUMBERS: "a list of numbers",
    ParameterKind.PAIR: "two whole numbers",
    ParameterKind.IMAGE: "an image",
    ParameterKind.IMAGES: "an image, or several",
    ParameterKind.IMAGE_LIST: "an image, or several",
    ParameterKind.TEXTS: "a text, or a list of texts",
    ParameterKind.JSON: "a list or an object",
    ParameterKind.OPTIONS: "an object of options by name",
    ParameterKind.TENSORS: "a safetensors file",
}
TENSORS: Final = "tensors"
"""The parameter that is a safetensors file."""
REPLACES: Final = {"prompt_embeds": "prompt", "negative_prompt_embeds": "negative_prompt"}
"""Tensors, and the parameters that they make needless."""
OUTPUT_TYPE: Final = "output_type"
"""The parameter that asks for latents in place of media, as in diffusers."""
LATENT: Final = "latent"
"""Its one value."""
IMAGE_KINDS: Final = frozenset({ParameterKind.IMAGE, ParameterKind.IMAGES, ParameterKind.IMAGE_LIST})
MASKS: Final = frozenset({"mask", "mask_image"})
"""Inputs that are one image of where to paint, white for yes: 8 bits a pixel."""
FRAME_RATE_NAMES: Final = ("fps", "frame_rate")
"""What the frames per second of a video are called."""
KNOWN_KINDS: Final[Mapping[str, ParameterKind]] = {
    **dict.fromkeys(("prompt", "prompt_2", "prompt_3", "prompt_4", "lyrics"), ParameterKind.TEXT),
    **dict.fromkeys(
        ("negative_prompt", "negative_prompt_2", "negative_prompt_3", "negative_prompt_4"), ParameterKind.TEXT
    ),
    **dict.fromkeys(
        ("height", "width", "num_frames", "num_inference_steps", "max_sequence_length"), ParameterKind.INTEGER
    ),
    **dict.fromkeys(("clip_skip", "padding_mask_crop"), ParameterKind.INTEGER),
    **dict.fromkeys(("guidance_scale", "true_cfg_scale", "strength", "frame_rate", "fps"), ParameterKind.NUMBER),
    **dict.fromkeys(("denoising_start", "denoising_end", "decode_noise_scale"), ParameterKind.NUMBER),
    **dict.fromkeys(("sigmas", "timesteps", "control_mode"), ParameterKind.NUMBERS),
    **dict.fromkeys(
        ("original_size", "target_size", "negative_original_size", "negative_target_size"), ParameterKind.PAIR
    ),
    **dict.fromkeys(("image", "control_image", "reference_images", "ip_adapter_image"), ParameterKind.IMAGES),
    **dict.fromkeys(("mask_image", "last_image"), ParameterKind.IMAGE),
    **dict.fromkeys(("video", "driving_video", "memory_images"), ParameterKind.IMAGE_LIST),
    **dict.fromkeys(("scheduler", "guider"), ParameterKind.TEXT),
    **dict.fromkeys(("lora", "complex_human_instruction"), ParameterKind.TEXTS),
    **dict.fromkeys(("scheduler_options", "guider_options", "vae_tiling_options"), ParameterKind.OPTIONS),
    **dict.fromkeys(("vae_tiling", "vae_slicing"), ParameterKind.BOOLEAN),
    **dict.fromkeys(("guidance_rescale", "guidance_scale_2"), ParameterKind.NUMBER),
    TENSORS: ParameterKind.TENSORS,
}
"""Kinds of inputs by name: many are declared without a type, and until a model is loaded none are known."""


class Option(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An option that a class takes when it is made."""

    name: str
    kinds: tuple[ParameterKind, ...]
    """A value is of one of these."""
    choices: tuple[str, ...] = ()
    """The only texts that it may be; () where any will do."""
    nullable: bool = False
    """Whether it may be null."""


class Alternative(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A class that can take the place of a component, such as another scheduler."""

    name: str
    """Of the class."""
    options: tuple[Option, ...] = ()


class Parameter(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An input that a request may give."""

    name: str
    """The public one."""
    kind: ParameterKind
    default: Default = None
    """What the pipeline uses where a request gives none; None where it works one out."""
    required: bool = False
    alias_of: str = ""
    """The parameter that this is another name of; "" where it is none."""
    description: str = ""
    """One sentence of the pipeline's own, where it has one."""
    multiple_of: int = 0
    """A whole number is a multiple of this; 0 where any will do."""
    every: int = 0
    """A whole number is 1, 1 + every, 1 + 2 * every and so on; 0 where any will do."""
    many: bool = False
    """Whether a list of such numbers will do as well, one for each of several images, ControlNets or the like."""
    choices: tuple[str, ...] = ()
    """The names, of classes for one, of which a text is one; () where it is no name. Of tensors: those taken."""
    chosen_by: str = ""
    """Of options: the parameter that names the class which takes them, or "" where there is just one class."""
    alternatives: tuple[Alternative, ...] = ()
    """Of options: the classes that take some."""
    nullable: bool = False
    """Null means none of it, not the default: its default is something, and the pipeline can do without."""


class Task(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One thing that a model can be asked for; the inputs of a request tell which."""

    name: str
    """Such as "text2image"."""
    requires: tuple[str, ...] = ()
    """Names of the inputs that a request for it gives."""
    takes: tuple[str, ...] = ()
    """Those, and others that no request for another task gives."""


class Signature(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a loaded pipeline takes and makes."""

    parameters: tuple[Parameter, ...] = ()
    """By name."""
    encodes: tuple[str, ...] = ()
    """Public names of the inputs that change what the encoder makes."""
    medium: Medium = "image"
    """What it makes."""
    fps: float = 0.0
    """Frames per second of its videos where a request asks for no other; 0 where it makes none."""
    passes_through: tuple[str, ...] = ()
    """Public names of the inputs that later stages get as they came, images with all their pixels."""
    tasks: tuple[Task, ...] = ()
    """What requests may be for: one, or several among which their inputs decide."""

    def parameter(self, name: str) -> Parameter | None:
        """Find one by its public name."""
        return next((parameter for parameter in self.parameters if parameter.name == name), None)


def names(parameters: Collection[Parameter]) -> frozenset[str]:
    """Of parameters."""
    return frozenset(parameter.name for parameter in parameters)
