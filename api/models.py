"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any, Final, Literal, cast

import msgspec
from msgspec import UNSET, UnsetType

from triptych.api.errors import not_found
from triptych.api.operations import operation
from triptych.api.responses import JSONResponse
from triptych.api.services import ApiRequest
from triptych.engines.parameters.schema import Option, Parameter, ParameterKind
from triptych.roles.messages.requests import ModelDescription

_LIMITS: Final = ("minimum", "maximum", "multiple_of")
_KIND_NAMES: Final = {ParameterKind.IMAGE_LIST: ParameterKind.IMAGES}
"""A client need not know whether one image makes a list."""


class ParameterObject(msgspec.Struct):
    """A parameter: its kind, whether it is required, its limits."""

    name: str
    kind: str
    default: bool | int | float | str | tuple[int | float | str, ...] | None
    required: bool
    minimum: int | float | UnsetType = UNSET
    maximum: int | float | UnsetType = UNSET
    multiple_of: int | float | UnsetType = UNSET
    one_more_than_multiple_of: int | UnsetType = UNSET
    video: bool | UnsetType = UNSET
    """True, of images: a video file will do as well; its frames are the images."""
    many: bool | UnsetType = UNSET
    """Whether a list of such numbers will do as well."""
    choices: tuple[str, ...] | UnsetType = UNSET
    """Of a text: the names that it may be."""
    nullable: bool | UnsetType = UNSET
    """True: null means none of it, not the default."""
    options: dict[str, dict[str, str | list[str]]] | UnsetType = UNSET
    """Of options: for each class their names, with what each is: a kind, or its choices."""
    alias_of: str | UnsetType = UNSET
    description: str | UnsetType = UNSET


class TaskObject(msgspec.Struct):
    """A task, and the parameters that a request for it gives."""

    name: str
    requires: tuple[str, ...]


class ModelObject(msgspec.Struct):
    """OpenAI's model object, with what the model makes and what it takes."""

    id: str
    created: int
    """Unix seconds."""
    family: str
    task: str | UnsetType
    """The one that it serves, or "any" of several; absent until that is known."""
    dtype: str
    medium: str
    """image, video or audio."""
    state: Literal["starting", "loaded", "asleep", "waking"]
    """A request for one that is asleep wakes it."""
    parameters: list[ParameterObject]
    tasks: list[TaskObject] | UnsetType = UNSET
    """What requests may be for; which one, their inputs tell. Absent until the model is loaded."""
    fps: float | UnsetType = UNSET
    """Of videos, where a request asks for no other."""
    object: Literal["model"] = "model"
    owned_by: str = "triptych"


class ModelList(msgspec.Struct):
    """OpenAI's list of models."""

    data: list[ModelObject]
    object: Literal["list"] = "list"


def model_object(description: ModelDescription) -> ModelObject:
    """Describe the model."""
    return ModelObject(
        id=description.name,
        created=int(description.created_at),
        family=description.family,
        task=description.task or UNSET,
        dtype=description.dtype,
        medium=description.medium,
        state=cast(Any, description.state),
        parameters=[
            parameter_object(parameter, description.ranges.get(parameter.name, ()))
            for parameter in description.parameters
        ],
        tasks=[TaskObject(task.name, task.requires) for task in description.tasks] or UNSET,
        fps=description.fps or UNSET,
    )


def parameter_object(parameter: Parameter, limits: tuple[float, ...]) -> ParameterObject:
    """Describe a parameter."""
    whole = parameter.kind in (ParameterKind.INTEGER, ParameterKind.PAIR)
    bounds = [int(limit) if whole else limit for limit in limits]
    return ParameterObject(
        parameter.name,
        _KIND_NAMES.get(parameter.kind, parameter.kind).value,
        parameter.default,
        parameter.required,
        **dict(zip(_LIMITS, bounds, strict=False)),
        one_more_than_multiple_of=parameter.every or UNSET,
        video=parameter.kind is ParameterKind.IMAGE_LIST or UNSET,
        many=parameter.many or UNSET,
        choices=parameter.choices or UNSET,
        nullable=parameter.nullable or UNSET,
        options={each.name: {o.name: describe_option(o) for o in each.options} for each in parameter.alternatives}
        or UNSET,
        alias_of=parameter.alias_of or UNSET,
        description=parameter.description or UNSET,
    )


def describe_option(option: Option) -> str | list[str]:
    """Say what an option is: the texts that it may be, or its kinds in one text."""
    if option.choices:
        return list(option.choices)
    return " or ".join([*(kind.value for kind in option.kinds), *(["null"] if option.nullable else [])])


@operation({200: ModelList}, (503,))
async def list_models(request: ApiRequest) -> JSONResponse:
    """List the models that are served."""
    models = await request.state["services"].head.models()
    return JSONResponse(ModelList([model_object(description) for description in models]))


@operation({200: ModelObject}, (404, 503))
async def get_model(request: ApiRequest) -> JSONResponse:
    """Describe one model: what it takes, and its defaults."""
    name = request.path_params["name"]
    if not name:
        raise not_found("there is no model without a name", code="model_not_found", param="model")
    return JSONResponse(model_object(await request.state["services"].head.describe(name)))
