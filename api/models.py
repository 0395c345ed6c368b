"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from starlette.requests import Request

from api.encoding import JSONResponse, plain
from api.errors import not_found
from api.head import Head
from roles.messages.requests import DescribeModel, ModelDescription


def model_object(description: ModelDescription) -> dict[str, object]:
    """Make OpenAI's model object, with what the model takes and what it uses when that is not given."""
    fields: dict[str, object] = plain(description)
    created = int(description.created_at)
    del fields["name"], fields["created_at"]
    return {"id": description.name, "object": "model", "created": created, "owned_by": "triptych", **fields}


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
        raise not_found(f"the model {name!r} is not served here", code="model_not_found")
    return JSONResponse(model_object(description))
