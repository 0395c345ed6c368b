"""GET /openapi.json: the paths from the routes, the rest from what `operations.operation` says and from the structs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import inspect
from starlette.routing import BaseRoute
from starlette.schemas import BaseSchemaGenerator

from triptych.actors.runtime.system_messages import ActorStatus, DeadLetterReport
from triptych.api.access import OPEN_PATHS
from triptych.api.cluster_observer import PRIVATE
from triptych.api.event_stream import MEDIA_TYPE
from triptych.api.media_request import MediaRequest
from triptych.api.operations import EVENTS, FILE, OPERATIONS, TEXT, Answer, OneAnswer, Operation, RequestBody
from triptych.api.requests import IDEMPOTENCY_KEY, Deleted
from triptych.api.responses import JSONResponse
from triptych.api.services import ApiRequest
from triptych.engines.parameters.schema import TENSORS
from triptych.roles.media.formats import FORMATS
from triptych.roles.messages.pool import PoolDescription
from triptych.roles.messages.requests import ClusterView, RequestView

_REASONS: Final = {
    200: "OK",
    202: "Accepted, where the client said Prefer: respond-async: follow it at its Location",
    204: "It has ended, and the client has all of it",
    206: "The part that was asked for",
    304: "The client has it",
    400: "The body or a header is malformed",
    401: "No key, or none of the server's",
    403: "From a page of another site, or a priority that the key does not allow",
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
    429: "Too much at a time: retry after Retry-After",
    500: "Failed for good",
    503: "Cannot be done now: retry after Retry-After",
    504: "Not done in time",
}
_TEXT: Final[Mapping[str, Any]] = {"type": "string"}


def _parameter(name: str, place: str, schema: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "description": text}


HEADERS: Final = {
    "Prefer": "respond-async: answer 202 at once, with the place where the result will be.",
    "Idempotency-Key": (
        "1 to 255 visible ASCII characters: the same body under the same key is one request, until a day after its "
        "end ([state] keep_requests_s) or until max_requests others have ended since."
    ),
    "Last-Event-ID": "The id of the last event that the client has: only later ones are sent.",
    "If-None-Match": "ETags that the client has: 304.",
    "If-Modified-Since": "A date: 304.",
    "If-Match": "ETags, or * for any: else 412.",
    "If-Unmodified-Since": "A date: else 412.",
    "Range": "bytes=0-99: 206.",
    "If-Range": "The ETag that the Range is of.",
}
_DATE: Final = {"type": "string", "description": "A date as HTTP has it."}
_COUNT: Final = {"type": "integer", "minimum": 0}
ANSWER_HEADERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "X-Request-Id": {**_TEXT, "description": "Under which the server logs; of a request for media its id."},
    "traceparent": {**_TEXT, "description": "The W3C trace context."},
    "X-Should-Retry": {"type": "string", "enum": ["false"], "description": "The same again would fail again."},
    "Retry-After": {**_COUNT, "description": "Seconds after which to retry."},
    "WWW-Authenticate": {"type": "string", "enum": ["Bearer"]},
    "Location": {**_TEXT, "description": "The URL of the request."},
    "Preference-Applied": {"type": "string", "enum": ["respond-async"]},
    "ETag": _TEXT,
    "Last-Modified": _DATE,
    "Cache-Control": _TEXT,
    "Accept-Ranges": {"type": "string", "enum": ["bytes"]},
    "Content-Range": {**_TEXT, "description": "Which bytes of how many; of several ranges in each part."},
    "openai-poll-after-ms": {**_COUNT, "description": "When to ask again; left out once the video has ended."},
}
"""Headers of answers, each by its name with its schema."""
_ALWAYS: Final = ("X-Request-Id", "traceparent")
_STORED: Final = ("ETag", "Last-Modified", "Cache-Control")
_BY_STATUS: Final[Mapping[int, Sequence[str]]] = {
    202: ("Location", "Preference-Applied"),
    304: _STORED,
    401: ("WWW-Authenticate",),
    416: ("Content-Range",),
}
_RETRY: Final[Mapping[int, Sequence[str]]] = {408: (), 429: ("Retry-After",), 503: ("Retry-After",)}
"""What errors that may pass have in place of X-Should-Retry."""
_KEY: Final = {"type": "string", "pattern": f"^{IDEMPOTENCY_KEY.pattern}$"}


def _header(name: str) -> dict[str, Any]:
    return _parameter(name, "header", _KEY if name == "Idempotency-Key" else _TEXT, HEADERS[name])


def _query(kind: type[msgspec.Struct]) -> list[dict[str, Any]]:
    """Describe the parameters of a query, the fields of a struct."""
    _, schemas = msgspec.json.schema_components([kind], ref_template="{name}")
    properties = schemas[kind.__name__]["properties"]
    return [_parameter(name, "query", schema, schema.pop("description")) for name, schema in properties.items()]


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


def _body(body: RequestBody) -> dict[str, Any]:
    """Describe a body, in JSON (null is the same as left out) and as a form (there is no null)."""
    _, schemas = msgspec.json.schema_components([body.fields], ref_template="{name}")
    own = schemas[body.fields.__name__]
    no_effect = {
        name: {"enum": list(field.values), "description": field.advice}
        for name, field in (body.fields.no_effect.items() if issubclass(body.fields, MediaRequest) else ())
        if field.values
    }
    tensors = {} if body.closed else {TENSORS: {"type": "string", "description": _TENSORS}}
    others = {"additionalProperties": False} if body.closed else {"description": _EXTRA_FIELDS_TEXT}
    fields = {name: _without_null(schema) for name, schema in own["properties"].items()}
    needed = [*own.get("required", ()), *body.required]
    whole = {
        **fields,
        **{name: {**schema, "enum": _with_plain(schema["enum"])} for name, schema in no_effect.items()},
        **{name: {"anyOf": [_BASE64, _list(_BASE64)], "description": text} for name, text in body.images.items()},
        **{name: {**schema, "contentEncoding": "base64"} for name, schema in tensors.items()},
    }
    in_json = {
        name: schema if name in needed else {"anyOf": [schema, {"type": "null"}]} for name, schema in whole.items()
    }
    files = _list({"type": "string", "format": "binary"})
    in_form = {**fields, **no_effect, **{name: {**files, "description": text} for name, text in body.images.items()}}
    in_form |= {name: {**schema, "format": "binary"} for name, schema in tensors.items()}
    return {
        "required": True,
        "content": {
            media: {
                "schema": {
                    "type": "object",
                    **others,
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
        case inspect.EnumType(cls=enum):
            return {"enum": [member.value for member in enum]}
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
    unit = fields["units"]["items"]["properties"]
    artifact = next(one for one in unit["artifact"]["anyOf"] if "properties" in one)
    for made in (artifact, unit["previews"]["items"]["properties"]["artifact"]):
        made["properties"]["url"] = _TEXT
    return _object({"id": _TEXT, "object": {"const": "request"}, **fields})


def _request_list() -> dict[str, Any]:
    """`api.request_list.list_requests`."""
    id_ = {"type": ["string", "null"]}
    return _object(
        {
            "object": {"const": "list"},
            "data": _list({"$ref": "#/components/schemas/Request"}),
            "first_id": id_,
            "last_id": id_,
            "has_more": {"type": "boolean"},
        }
    )


def _cluster() -> dict[str, Any]:
    """`api.cluster_observer.ClusterObserver.snapshot`."""
    texts = _list(_TEXT)
    host = {
        "name": _TEXT, "address": _TEXT, "state": _TEXT, "components": texts, "restarts": _COUNT, "gave_up": texts,
    }  # fmt: skip
    of_component = {"component": _TEXT, "host": _TEXT}
    of_instance = {"credits": _COUNT, "slots": _COUNT, "running": texts, "start_s": {"type": "object"}}
    status = _properties(ActorStatus)
    pool = {name: schema for name, schema in _properties(PoolDescription).items() if name not in PRIVATE}
    pool |= {"transport": {"type": ["string", "null"]}, "state": _TEXT}  # of one that does not answer
    always = ("name", "kind", "pid", "generation", "state", "detail", "restarts", *of_component)
    fields = {
        "ready": {"type": "boolean"},
        "reasons": texts,
        "gave_up": texts,
        "hosts": _list(_object(host)),
        "actors": _list(_object({**status, **of_component, **of_instance}, always)),
        "pools": _list(_object(pool, ("name", "transport"))),
        "head": {"anyOf": [shape(inspect.type_info(ClusterView)), {"type": "null"}]},
        "dead_letters": {"type": "object", "additionalProperties": shape(inspect.type_info(DeadLetterReport))},
    }
    return _object(fields)


def _object(properties: Mapping[str, Any], required: Iterable[str] | None = None) -> dict[str, Any]:
    """Describe an object; by default each of its properties is always there."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties if required is None else required),
    }


def _properties(kind: type[msgspec.Struct]) -> dict[str, Any]:
    properties: dict[str, Any] = shape(inspect.type_info(kind))["properties"]
    return properties


_SCHEMAS: Final = BaseSchemaGenerator()
_EVENT: Final = {
    "type": "object",
    "description": "Each server-sent event.",
    "properties": {"event": _TEXT, "id": _TEXT, "data": {"type": "string", "contentMediaType": "application/json"}},
    "required": ["event", "data"],
}
_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {**_TEXT, "description": "Names the field as it was sent, and says what to send."},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"], "description": "The field at fault."},
                "code": _TEXT,
            },
        }
    },
}


def _answer(status: int, answer: Answer, headers: Sequence[str]) -> dict[str, Any]:
    kinds = answer if isinstance(answer, tuple) else (answer,)
    content: dict[str, Any] = {}
    for kind in kinds:
        content |= _content(status, kind)
    names = [*_ALWAYS, *_headers_by_status(status, kinds)]
    sent = {name: {"schema": ANSWER_HEADERS[name], "required": name not in headers} for name in (*names, *headers)}
    return {"description": _REASONS[status], "headers": sent, **({"content": content} if content else {})}


def _headers_by_status(status: int, kinds: Sequence[OneAnswer]) -> Sequence[str]:
    if "Error" in kinds:
        return [*_BY_STATUS.get(status, ()), *_RETRY.get(status, ("X-Should-Retry",))]
    if FILE in kinds:
        return [*_STORED, "Accept-Ranges"]
    return _BY_STATUS.get(status, ())


def _content(status: int, kind: OneAnswer) -> dict[str, Any]:
    if kind == FILE:
        files = {"schema": {"type": "string", "format": "binary"}}
        several = {"multipart/byteranges": files} if status == 206 else {}
        return {**{row.content_type: files for row in FORMATS.values()}, **several}
    if kind == EVENTS:
        return {MEDIA_TYPE: {"schema": _EVENT}}
    if kind == TEXT:
        return {"text/plain": {"schema": _TEXT}}
    if kind is None:
        return {}
    name = kind if isinstance(kind, str) else kind.__name__
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _operation(path: str, method: str, operation: Operation, *, keyed: bool) -> dict[str, Any]:
    needs_key = keyed and path not in OPEN_PATHS
    errors = {*operation.errors, *((401,) if needs_key else ()), *((429,) if method == "post" else ())}
    answers: dict[int, tuple[Answer, Sequence[str]]] = dict.fromkeys(errors, ("Error", ()))
    answers |= {status: (answer, operation.answer_headers) for status, answer in operation.answers.items()}
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    parameters = [_parameter(name, "path", _TEXT, "") for name in names]
    parameters += _query(operation.query) if operation.query else []
    parameters += [_header(name) for name in operation.headers]
    return {
        "operationId": operation.id,
        "summary": operation.summary,
        **({"parameters": parameters} if parameters else {}),
        **({"requestBody": _body(operation.body)} if operation.body else {}),
        "responses": {str(status): _answer(status, *answers[status]) for status in sorted(answers)},
        "security": [{"key": []}] if needs_key else [],
    }


def document(routes: Sequence[BaseRoute], *, keyed: bool = False) -> dict[str, Any]:
    """Write the OpenAPI 3.1 document.

    Args:
        routes: Of the application; each endpoint in the schema is declared with `operations.operation`.
        keyed: Whether requests need a key.
    """
    endpoints = [(path, method, OPERATIONS[func]) for path, method, func in _SCHEMAS.get_endpoints(list(routes))]
    paths: dict[str, dict[str, Any]] = {}
    for path, method, operation in endpoints:
        paths.setdefault(path, {})[method] = _operation(path, method, operation, keyed=keyed)
    answers = [answer for *_, operation in endpoints for answer in operation.answers.values()]
    kinds = [kind for answer in answers for kind in (answer if isinstance(answer, tuple) else (answer,))]
    structs = dict.fromkeys(kind for kind in kinds if isinstance(kind, type))
    _, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    either = [{"$ref": f"#/components/schemas/{name}"} for name in ("Request", Deleted.__name__)]
    own = {
        "RequestList": _request_list(),
        "TaskList": {"type": "object", "additionalProperties": {"$ref": "#/components/schemas/TaskStatus"}},
        "Request": _request(),
        "Cluster": _cluster(),
        "RequestOrDeleted": {"anyOf": either},
        "Error": _ERROR,
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Triptych", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": {**schemas, **own},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


async def get_openapi(request: ApiRequest) -> JSONResponse:
    """Return the OpenAPI document."""
    return JSONResponse(document(request.app.routes, keyed=request.state["services"].topology.keys_path is not None))
