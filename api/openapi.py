"""GET /openapi.json: which paths there are by hand, what goes in and out from the structs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import inspect
from starlette.requests import Request

from triptych.api.health import Health, Live, Ready
from triptych.api.images import ImageRequest, ImagesResponse
from triptych.api.media_request import NO_EFFECT_FIELDS, MediaRequest
from triptych.api.models import ModelList, ModelObject
from triptych.api.requests import Deleted
from triptych.api.responses import JSONResponse
from triptych.api.submission import IDEMPOTENCY_KEY
from triptych.api.videos import ListQuery, Video, VideoList, VideoRequest
from triptych.roles.media.formats import CONTENT_TYPES
from triptych.roles.messages.requests import TENSORS, ClusterView, RequestView

_FILE: Final = "file"
_POST_ERRORS: Final = (400, 403, 404, 408, 413, 415, 421, 422, 429, 503)
_GET_ERRORS: Final = (403, 421, 503)


class Operation(NamedTuple):
    """One method of one path."""

    id: str
    summary: str
    answers: Mapping[int, str]
    """Name of the schema of each answer that is no error; "file" for media, "" for no body."""
    errors: tuple[int, ...] = _GET_ERRORS
    parameters: tuple[str, ...] = ()
    """Names in `_PARAMETERS`; those of the path need not be named."""
    body: str = ""
    """Name in `_BODIES`."""
    is_public: bool = False
    """Needs no key."""


_IMAGE_ERRORS: Final = (*_POST_ERRORS, 409, 410, 500, 504)
_ASYNC_HEADERS: Final = ("Prefer", "Idempotency-Key")
_CONDITIONS: Final = ("If-None-Match", "If-Modified-Since", "If-Match", "If-Unmodified-Since", "Range", "If-Range")
_FILE_ANSWERS: Final = {200: _FILE, 206: _FILE, 304: ""}
_OPERATIONS: Final[Mapping[str, Mapping[str, Operation]]] = {
    "/v1/images/generations": {
        "post": Operation(
            "createImage",
            "Make images of a prompt, and of images, and wait for them",
            {200: "ImagesResponse", 202: "Request"}, _IMAGE_ERRORS, _ASYNC_HEADERS, "generations",
        )
    },
    "/v1/images/edits": {
        "post": Operation(
            "createImageEdit",
            "Make images of an image, within a mask or all over, and wait for them",
            {200: "ImagesResponse", 202: "Request"}, _IMAGE_ERRORS, _ASYNC_HEADERS, "edits",
        )
    },
    "/v1/images/{name}": {
        "get": Operation("getFile", "A finished file", _FILE_ANSWERS, (*_GET_ERRORS, 404, 410, 412, 416), _CONDITIONS)
    },
    "/v1/videos": {
        "get": Operation(
            "listVideos", "Videos page by page",
            {200: "VideoList"}, (*_GET_ERRORS, 404, 422), ("after", "limit", "order"),
        ),
        "post": Operation(
            "createVideo", "Begin a video",
            {200: "Video"}, (*_POST_ERRORS, 409), _ASYNC_HEADERS[1:], "videos",
        ),
    },
    "/v1/videos/{video_id}": {
        "get": Operation("getVideo", "How far a video is", {200: "Video"}, (*_GET_ERRORS, 404)),
        "delete": Operation(
            "deleteVideo", "Cancel a video and remove it, its prompt and its file",
            {200: "Deleted"}, (*_GET_ERRORS, 404),
        ),
    },
    "/v1/videos/{video_id}/content": {
        "get": Operation(
            "getVideoContent",
            "The finished file; 409 while there is none",
            _FILE_ANSWERS, (*_GET_ERRORS, 404, 409, 410, 412, 416, 422), ("variant", *_CONDITIONS),
        )
    },
    "/v1/models": {"get": Operation("listModels", "The models that are served", {200: "ModelList"})},
    "/v1/models/{name}": {
        "get": Operation(
            "getModel", "One model: what it takes, and its defaults", {200: "ModelObject"}, (*_GET_ERRORS, 404)
        )
    },
    "/v1/requests/{request_id}": {
        "get": Operation(
            "getRequest", "A request: state, history, attempts, causes, artifacts",
            {200: "Request"}, (*_GET_ERRORS, 404),
        ),
        "delete": Operation(
            "deleteRequest",
            "Cancel a request; remove one that has ended, its prompt and its files",
            {200: "RequestOrDeleted"}, (*_GET_ERRORS, 404),
        ),
    },
    "/v1/cluster": {
        "get": Operation("getCluster", "Every actor, pool and dead letter", {200: "Cluster"}, _GET_ERRORS[:2])
    },
    "/live": {"get": Operation("isLive", "The API process answers", {200: "Live"}, _GET_ERRORS[:2], is_public=True)},
    "/ready": {
        "get": Operation(
            "isReady", "Pictures can be made now", {200: "Ready", 503: "Ready"}, _GET_ERRORS[:2], is_public=True
        )
    },
    "/health": {
        "get": Operation(
            "getHealth", "Summary of the system", {200: "Health", 503: "Health"}, _GET_ERRORS[:2], is_public=True
        )
    },
}  # fmt: skip

_REASONS: Final = {
    200: "OK",
    202: "Accepted, where the client said Prefer: respond-async: follow it at its Location",
    206: "The part that was asked for",
    304: "The client has it",
    400: "The body or a header is malformed",
    401: "No key, or none of the server's",
    403: "From a page of another site",
    404: "Not there, or somebody else's",
    408: "The body came too slowly",
    409: "Cancelled, not finished yet, or an Idempotency-Key that came with another body",
    410: "The file was made and is not kept any more",
    412: "The file is another one",
    413: "Too long",
    415: "Neither JSON nor a form, or no image",
    416: "The file has no such bytes",
    421: "For a host that this is not",
    422: "A field is not as it must be; param names it",
    429: "Too much at a time: try again after Retry-After",
    500: "Failed for good",
    503: "Cannot be done now: try again after Retry-After",
    504: "Not done in time",
}
_TEXT: Final[Mapping[str, Any]] = {"type": "string"}


def _parameter(name: str, place: str, schema: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "description": text}


_QUERY: Final = {"after": "The id that the list goes on after.", "limit": "Most of them.", "order": "By age."}
_HEADERS: Final = {
    "Prefer": "respond-async: answer 202 at once, with the place where the result will be.",
    "Idempotency-Key": (
        "1 to 255 visible ASCII characters: the same body under the same key is one request, until a day after its "
        "end ([state] keep_requests_s) or until max_requests others have ended since."
    ),
    "If-None-Match": "ETags that the client has: 304.",
    "If-Modified-Since": "A date: 304.",
    "If-Match": "ETags, or * for any: else 412.",
    "If-Unmodified-Since": "A date: else 412.",
    "Range": "bytes=0-99: 206.",
    "If-Range": "The ETag that the Range is of.",
}
_KEY: Final = {"type": "string", "pattern": f"^{IDEMPOTENCY_KEY.pattern}$"}
_VARIANT: Final = {"enum": ["video"], "default": "video"}


@functools.cache
def _parameters() -> dict[str, dict[str, Any]]:
    """Everything but the parts of paths, by name."""
    (query,), schemas = msgspec.json.schema_components([ListQuery], ref_template="{name}")
    properties = schemas[query["$ref"]]["properties"]
    return {
        **{name: _parameter(name, "query", properties[name], text) for name, text in _QUERY.items()},
        **{name: _parameter(name, "header", _TEXT, text) for name, text in _HEADERS.items()},
        "Idempotency-Key": _parameter("Idempotency-Key", "header", _KEY, _HEADERS["Idempotency-Key"]),
        "variant": _parameter("variant", "query", _VARIANT, "Which file of the video."),
    }


_IMAGE: Final = "An image, PNG, JPEG or WebP; or several of them."
_MASK_TEXT: Final = "What of the image to paint anew: what is transparent, else what is white. As large as the image."
_BODIES: Final[Mapping[str, tuple[type[MediaRequest], Mapping[str, str], tuple[str, ...]]]] = {
    "generations": (ImageRequest, {"image": _IMAGE, "mask": _MASK_TEXT}, ()),
    "edits": (ImageRequest, {"image": _IMAGE, "mask": _MASK_TEXT}, ("image",)),
    "videos": (VideoRequest, {"input_reference": "The first frame.", "last_image": "The last frame."}, ()),
}
_TENSORS: Final = (
    "Tensors for inputs of the pipeline, by their names, where GET /v1/models lists some: a safetensors file."
)
_EXTRA_FIELDS_TEXT: Final = "Any other field is a parameter of the model, as GET /v1/models lists them."
_BASE64: Final = {
    "oneOf": [
        {"type": "string", "contentEncoding": "base64", "description": "Base64, plain or a data URL."},
        {"type": "object", "required": ["image_url"], "properties": {"image_url": _TEXT}},
    ]
}


def _body(kind: type[MediaRequest], images: Mapping[str, str], required: tuple[str, ...]) -> dict[str, Any]:
    """Describe a body, in JSON (null is the same as left out) and as a form (there is no null)."""
    _, schemas = msgspec.json.schema_components([kind], ref_template="{name}")
    own = schemas[kind.__name__]
    no_effect = {
        name: {"enum": list(field.values), "description": field.advice} for name, field in NO_EFFECT_FIELDS.items()
    }
    fields = {name: _without_null(schema) for name, schema in own["properties"].items()}
    needed = [*own.get("required", ()), *required]
    whole = {
        **fields,
        **{name: {**schema, "enum": _with_plain(schema["enum"])} for name, schema in no_effect.items()},
        **{name: {"anyOf": [_BASE64, _list(_BASE64)], "description": text} for name, text in images.items()},
        TENSORS: {"type": "string", "contentEncoding": "base64", "description": _TENSORS},
    }
    in_json = {
        name: schema if name in needed else {"anyOf": [schema, {"type": "null"}]} for name, schema in whole.items()
    }
    files = _list({"type": "string", "format": "binary"})
    in_form = {**fields, **no_effect, **{name: {**files, "description": text} for name, text in images.items()}}
    in_form[TENSORS] = {"type": "string", "format": "binary", "description": _TENSORS}
    return {
        "required": True,
        "content": {
            media: {
                "schema": {
                    "type": "object",
                    "description": _EXTRA_FIELDS_TEXT,
                    "properties": properties,
                    "required": needed,
                }
            }
            for media, properties in (("application/json", in_json), ("multipart/form-data", in_form))
        },
    }


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    options = [option for option in schema.get("anyOf", ()) if option != {"type": "null"}]
    if options:
        rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
        return {**rest, **(options[0] if len(options) == 1 else {"anyOf": options})}
    if "enum" in schema:
        return {**schema, "enum": [value for value in schema["enum"] if value is not None]}
    return schema


def _with_plain(values: Iterable[str]) -> list[object]:
    """Add what stands for texts in JSON."""
    plain: dict[str, object] = {"false": False, "0": 0}
    return [*values, *(plain[value] for value in values if value in plain)]


def _list(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def shape(kind: inspect.Type) -> dict[str, Any]:
    """Describe a value as `api.responses.to_builtins` shows it: messages by field name, not as arrays."""
    match kind:
        case inspect.StructType(fields=fields):
            properties = {field.name: shape(field.type) for field in fields}
            return {"type": "object", "properties": properties, "required": list(properties)}
        case inspect.UnionType(types):
            return {"anyOf": [shape(one) for one in types]}
        case inspect.VarTupleType(item_type=item):
            return {"type": "array", "items": shape(item)}
        case inspect.DictType(value_type=value):
            return {"type": "object", "additionalProperties": shape(value)}
    return msgspec.json.schema(_SIMPLE[type(kind)])


_SIMPLE: Final[Mapping[type[inspect.Type], Any]] = {
    inspect.StrType: str,
    inspect.IntType: int,
    inspect.FloatType: float,
    inspect.BoolType: bool,
    inspect.NoneType: None,
}


def _request() -> dict[str, Any]:
    """`api.requests.request_object`."""
    made = shape(inspect.type_info(RequestView))
    fields = made["properties"]
    del fields["request_id"]
    fields["inputs"] = {"type": "object", "description": "As they are run; files by name and size."}
    artifact = next(one for one in fields["units"]["items"]["properties"]["artifact"]["anyOf"] if "properties" in one)
    artifact["properties"]["url"] = _TEXT
    fields = {"id": _TEXT, "object": {"const": "request"}, **fields}
    return {"type": "object", "properties": fields, "required": list(fields)}


def _cluster() -> dict[str, Any]:
    """`api.cluster.ClusterObserver.snapshot`."""
    rows = {"type": "array", "items": {"type": "object"}}
    texts = {"type": "array", "items": _TEXT}
    head = {"anyOf": [shape(inspect.type_info(ClusterView)), {"type": "null"}]}
    fields = {
        "ready": {"type": "boolean"}, "reasons": texts, "gave_up": texts, "actors": rows, "pools": rows, "head": head,
        "dead_letters": {"type": "object"},
    }  # fmt: skip
    return {"type": "object", "properties": fields, "required": list(fields)}


_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {**_TEXT, "description": "Names the field as it was sent, and says what to send."},
                "type": _TEXT,
                "param": {"type": ["string", "null"], "description": "The field at fault."},
                "code": _TEXT,
            },
        }
    },
}


def _answer(status: int, schema: str) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": _REASONS[status], "headers": {"X-Request-Id": {"schema": _TEXT}}}
    if status in (429, 503):
        answer["headers"]["Retry-After"] = {"schema": {"type": "integer"}}
    if schema == _FILE:
        files = {"schema": {"type": "string", "format": "binary"}}
        several = {"multipart/byteranges": files} if status == 206 else {}
        answer["content"] = {**dict.fromkeys(CONTENT_TYPES.values(), files), **several}
    elif schema:
        answer["content"] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return answer


def _operation(path: str, operation: Operation, *, keyed: bool) -> dict[str, Any]:
    needs_key = keyed and not operation.is_public
    errors = {*operation.errors, *((401, 429) if needs_key else ())} - operation.answers.keys()
    answers = {**operation.answers, **dict.fromkeys(errors, "Error")}
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    parameters = [_parameter(name, "path", _TEXT, "") for name in names]
    parameters += [_parameters()[name] for name in operation.parameters]
    return {
        "operationId": operation.id,
        "summary": operation.summary,
        **({"parameters": parameters} if parameters else {}),
        **({"requestBody": _body(*_BODIES[operation.body])} if operation.body else {}),
        "responses": {str(status): _answer(status, answers[status]) for status in sorted(answers)},
        "security": [{"key": []}] if needs_key else [],
    }


def document(*, keyed: bool = False) -> dict[str, Any]:
    """Write the OpenAPI 3.1 document; `keyed` says whether requests need a key."""
    _, schemas = msgspec.json.schema_components(
        [ImagesResponse, Video, VideoList, Deleted, ModelObject, ModelList, Live, Ready, Health],
        ref_template="#/components/schemas/{name}",
    )
    either = [{"$ref": f"#/components/schemas/{name}"} for name in ("Request", "Deleted")]
    own = {"Request": _request(), "Cluster": _cluster(), "RequestOrDeleted": {"anyOf": either}, "Error": _ERROR}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Triptych", "version": "1"},
        "paths": {
            path: {method: _operation(path, operation, keyed=keyed) for method, operation in methods.items()}
            for path, methods in _OPERATIONS.items()
        },
        "components": {
            "schemas": {**schemas, **own},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


async def openapi(request: Request) -> JSONResponse:
    """Answer with the document."""
    return JSONResponse(document(keyed=request.app.state.topology.keys_path is not None))
