"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request

from api.encoding import JSONResponse
from api.errors import not_found
from api.head import Head
from roles.messages.requests import DescribeModel, Kind, ModelDescription, Parameter

_LIMITS: Final = ("minimum", "maximum", "multiple_of")
_WORDS: Final = {Kind.IMAGE_LIST: Kind.IMAGES}
"""Whether one picture makes a list does not matter to who sends it."""


class ParameterObject(msgspec.Struct):
    """A parameter: what it is, whether it must be given, and between which limits."""

    name: str
    kind: str
    default: bool | int | float | str | tuple[int | float, ...] | None
    required: bool
    minimum: int | float | UnsetType = UNSET
    maximum: int | float | UnsetType = UNSET
    multiple_of: int | float | UnsetType = UNSET
    one_more_than_multiple_of: int | UnsetType = UNSET
    alias_of: str | UnsetType = UNSET
    description: str | UnsetType = UNSET


class ModelObject(msgspec.Struct):
    """OpenAI's model object, with what the model makes and what it takes."""

    id: str
    created: int
    """Unix seconds."""
    family: str
    task: str
    dtype: str
    medium: str
    """image, video or audio."""
    parameters: list[ParameterObject]
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
        task=description.task,
        dtype=description.dtype,
        medium=description.medium,
        parameters=[
            parameter_object(parameter, description.ranges.get(parameter.name, ()))
            for parameter in description.parameters
        ],
        fps=description.fps or UNSET,
    )


def parameter_object(parameter: Parameter, limits: tuple[float, ...]) -> ParameterObject:
    """Describe a parameter."""
    whole = parameter.kind in (Kind.INTEGER, Kind.PAIR)
    bounds = [int(limit) if whole else limit for limit in limits]
    return ParameterObject(
        parameter.name,
        _WORDS.get(parameter.kind, parameter.kind).value,
        parameter.default,
        parameter.required,
        **dict(zip(_LIMITS, bounds, strict=False)),
        one_more_than_multiple_of=parameter.every or UNSET,
        alias_of=parameter.alias_of or UNSET,
        description=parameter.description or UNSET,
    )


async def list_models(request: Request) -> JSONResponse:
    """List the one model that is served."""
    head: Head = request.app.state.head
    description = await head.ask(DescribeModel(), ModelDescription)
    return JSONResponse(ModelList([model_object(description)]))


async def get_model(request: Request) -> JSONResponse:
    """Answer with that model, by its name."""
    head: Head = request.app.state.head
    name = request.path_params["name"]
    description = await head.ask(DescribeModel(), ModelDescription)
    if name != description.name:
        message = f"the model {name!r} is not served here, {description.name!r} is"
        raise not_found(message, code="model_not_found", param="model")
    return JSONResponse(model_object(description))
