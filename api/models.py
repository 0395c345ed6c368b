"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request

from api.encoding import JSONResponse, plain
from api.errors import not_found
from api.head import Head
from roles.messages.requests import DescribeModel, Kind, ModelDescription, Parameter

_LIMITS: Final = ("minimum", "maximum", "multiple_of")
_WORDS: Final = {Kind.IMAGE_LIST: Kind.IMAGES}
"""Whether one picture makes a list does not matter to who sends it."""


def model_object(description: ModelDescription) -> dict[str, object]:
    """Make OpenAI's model object, with what the model makes and what it takes."""
    return {
        "id": description.name,
        "object": "model",
        "created": int(description.created_at),
        "owned_by": "triptych",
        "family": description.family,
        "task": description.task,
        "dtype": description.dtype,
        "medium": description.medium,
        **({"fps": description.fps} if description.fps else {}),
        "parameters": [
            parameter_object(parameter, description.ranges.get(parameter.name, ()))
            for parameter in description.parameters
        ],
    }


def parameter_object(parameter: Parameter, limits: tuple[float, ...]) -> dict[str, object]:
    """Say of a parameter what it is, whether it must be given, and between which limits."""
    whole = parameter.kind in (Kind.INTEGER, Kind.PAIR)
    bounds = [int(limit) if whole else limit for limit in limits]
    words = {"alias_of": parameter.alias_of, "description": parameter.description}
    return {
        "name": parameter.name,
        "kind": _WORDS.get(parameter.kind, parameter.kind),
        "default": plain(parameter.default),
        "required": parameter.required,
        **dict(zip(_LIMITS, bounds, strict=False)),
        **({"one_more_than_multiple_of": parameter.every} if parameter.every else {}),
        **{name: text for name, text in words.items() if text},
    }


async def list_models(request: Request) -> JSONResponse:
    """List the one model that is served."""
    head: Head = request.app.state.head
    description = await head.ask(DescribeModel(), ModelDescription)
    return JSONResponse({"object": "list", "data": [model_object(description)]})


async def get_model(request: Request) -> JSONResponse:
    """Answer with that model, by its name."""
    head: Head = request.app.state.head
    name = request.path_params["name"]
    description = await head.ask(DescribeModel(), ModelDescription)
    if name != description.name:
        message = f"the model {name!r} is not served here, {description.name!r} is"
        raise not_found(message, code="model_not_found", param="model")
    return JSONResponse(model_object(description))
