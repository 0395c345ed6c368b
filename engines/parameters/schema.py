"""The types that describe the inputs and outputs of a pipeline to all processes. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Final, Literal, TypeAlias

import msgspec

Default: TypeAlias = bool | int | float | str | tuple[int | float | str, ...] | None
Medium: TypeAlias = Literal["image", "video", "audio"]


class ParameterKind(StrEnum):
    """The kind of a parameter's value."""

    TEXT = "text"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    NUMBERS = "numbers"
    """A list of numbers."""
    PAIR = "pair"
    """Two whole numbers, a size or a position; pipelines get a tuple."""
    IMAGE = "image"
    """One image."""
    IMAGES = "images"
    """One image, or several in order, such as the frames of a video."""
    IMAGE_LIST = "image_list"
    """As IMAGES, but pipelines get a list even for one image."""
    TEXTS = "texts"
    """A text, or a list of texts."""
    JSON = "json"
    """Any JSON, such as nested lists or an object."""
    OPTIONS = "options"
    """An object of options by name, each a scalar, null or a list of numbers."""
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
"""Tensors, with the parameters that they replace."""
OUTPUT_TYPE: Final = "output_type"
"""The parameter that asks for latents instead of media, as in diffusers."""
LATENT: Final = "latent"
"""The only value of `OUTPUT_TYPE`."""
IMAGE_KINDS: Final = frozenset({ParameterKind.IMAGE, ParameterKind.IMAGES, ParameterKind.IMAGE_LIST})
MASKS: Final = frozenset({"mask", "mask_image"})
"""Names of masks: one image of 8 bits a pixel, white where to paint."""
FRAME_RATE_NAMES: Final = ("fps", "frame_rate")
"""Names of the frames per second of a video."""
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
    **dict.fromkeys(("vae_tiling", "vae_slicing", "cache"), ParameterKind.BOOLEAN),
    **dict.fromkeys(("guidance_rescale", "guidance_scale_2"), ParameterKind.NUMBER),
    TENSORS: ParameterKind.TENSORS,
}
"""Kinds of inputs by name, for inputs without a type and for models that are not loaded yet."""


class Option(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An option of a class."""

    name: str
    kinds: tuple[ParameterKind, ...]
    """The kinds that its value may have."""
    choices: tuple[str, ...] = ()
    """The texts that it may be; () for any."""
    nullable: bool = False
    """Whether it may be null."""


class Alternative(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A class that can replace a component, such as another scheduler."""

    name: str
    """The name of the class."""
    options: tuple[Option, ...] = ()


class Parameter(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An input of a request."""

    name: str
    """The public name."""
    kind: ParameterKind
    default: Default = None
    """The default of the pipeline; None if it computes one."""
    required: bool = False
    alias_of: str = ""
    """The parameter that this is an alias of; "" for none."""
    description: str = ""
    """The first sentence of the pipeline's documentation, if any."""
    multiple_of: int = 0
    """The value must be a multiple of this; 0 for any."""
    every: int = 0
    """The value must be 1, 1 + every, 1 + 2 * every and so on; 0 for any."""
    many: bool = False
    """Whether the value may also be a list of such numbers, such as one for each ControlNet."""
    choices: tuple[str, ...] = ()
    """The texts that the value may be, such as names of classes; () for any. For tensors, their names."""
    chosen_by: str = ""
    """For options: the parameter that names their class; "" if there is only one class."""
    alternatives: tuple[Alternative, ...] = ()
    """For options: the classes, with their options."""
    nullable: bool = False
    """Whether null means that the pipeline gets None, and not its default."""


class Task(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A task of a model; the inputs of a request decide which task it is for."""

    name: str
    """Such as "text2image"."""
    requires: tuple[str, ...] = ()
    """Names of the inputs that a request for it must have."""
    takes: tuple[str, ...] = ()
    """Those, and the other inputs that only a request for it may have."""


class Signature(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The inputs and outputs of a loaded pipeline."""

    parameters: tuple[Parameter, ...] = ()
    """Its public inputs, sorted by name."""
    encodes: tuple[str, ...] = ()
    """Public names of the inputs that change the outputs of the encoder."""
    medium: Medium = "image"
    """The medium that it makes."""
    fps: float = 0.0
    """The default frames per second of its videos; 0 if it makes none."""
    passes_through: tuple[str, ...] = ()
    """Public names of the inputs that later stages get unchanged, such as images with all their pixels."""
    tasks: tuple[Task, ...] = ()
    """The tasks of the model; if there are several, the inputs of a request decide."""

    def parameter(self, name: str) -> Parameter | None:
        """Return the parameter of a public name, or None."""
        return next((parameter for parameter in self.parameters if parameter.name == name), None)


def names(parameters: Collection[Parameter]) -> frozenset[str]:
    """Return the names of `parameters`."""
    return frozenset(parameter.name for parameter in parameters)
