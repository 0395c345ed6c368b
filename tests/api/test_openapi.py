"""The OpenAPI document: it has every route, and what it says of each is whole.

That answers are as it says is held for every test that uses `client`: tests/contract.py.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from starlette.routing import Route
from starlette.schemas import BaseSchemaGenerator

from triptych.api.app import ROUTES
from triptych.api.openapi import document
from triptych.api.operations import OPERATIONS


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    return json.loads(json.dumps(document(ROUTES, keyed=True)))


def operations_of(described: dict[str, Any]) -> list[dict[str, Any]]:
    return [operation for methods in described["paths"].values() for operation in methods.values()]


def test_every_endpoint_is_declared_with_its_answers() -> None:
    routes = [route for route in ROUTES if isinstance(route, Route)]
    documented = {route.endpoint for route in routes if route.include_in_schema}
    hidden = {route.path for route in routes if route.path.startswith("/v1/") and route.endpoint not in documented}
    assert not hidden, "all that clients may call is in the document, under one of its paths"
    endpoints = BaseSchemaGenerator().get_endpoints(list(ROUTES))
    undeclared = [f"{method} {path}" for path, method, endpoint in endpoints if endpoint not in OPERATIONS]
    assert not undeclared, "declare them with api.operations.operation"


def test_no_path_takes_methods_that_the_document_does_not_have(described: dict[str, Any]) -> None:
    for path, methods in described["paths"].items():
        routes = [route for route in ROUTES if isinstance(route, Route) and route.path.replace(":path", "") == path]
        for route in routes:
            assert {method.lower() for method in route.methods or ()} - {"head"} <= methods.keys(), path


def test_every_operation_is_whole(described: dict[str, Any]) -> None:
    operations = operations_of(described)
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for operation in operations:
        name = operation["operationId"]
        assert operation["summary"], name
        answers = operation["responses"]
        assert any(status < "300" for status in answers), name
        for status, answer in answers.items():
            assert answer["description"], (name, status)
            assert {"X-Request-Id", "traceparent"} <= answer["headers"].keys(), (name, status)
            has_body = status not in ("204", "304")
            assert ("content" in answer) is has_body, (name, status)
            if status >= "400" and name not in ("isReady", "getHealth"):
                assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/Error"), (name, status)


def test_every_schema_is_there_and_valid(described: dict[str, Any]) -> None:
    schemas = described["components"]["schemas"]
    for reference in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(described)):
        assert reference in schemas
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)


def test_bodies_are_json_or_forms_and_forms_have_no_null(described: dict[str, Any]) -> None:
    bodies = {o["operationId"]: o["requestBody"]["content"] for o in operations_of(described) if "requestBody" in o}
    assert bodies.keys() >= {"createImage", "createImageEdit", "createVideo"}
    for name in ("createImage", "createImageEdit", "createVideo"):
        assert bodies[name].keys() == {"application/json", "multipart/form-data"}
    for name, content in bodies.items():
        form = content.get("multipart/form-data", {}).get("schema", {})
        assert "null" not in json.dumps(form), name
    edit = bodies["createImageEdit"]
    assert all("image" in media["schema"]["required"] for media in edit.values())
    image = edit["multipart/form-data"]["schema"]["properties"]["image"]
    assert image["items"] == {"type": "string", "format": "binary"}


def test_what_a_client_chooses_is_documented(described: dict[str, Any]) -> None:
    generate = described["paths"]["/v1/images/generations"]["post"]
    assert {parameter["name"] for parameter in generate["parameters"]} == {"Prefer", "Idempotency-Key"}
    assert generate["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
    assert {"Location", "Preference-Applied"} <= generate["responses"]["202"]["headers"].keys()
    assert "401" in generate["responses"]
    file = described["paths"]["/v1/images/{name}"]["get"]["responses"]
    assert {"206", "304", "412", "416"} <= file.keys()
    assert "401" not in described["paths"]["/live"]["get"]["responses"]
    assert "401" not in document(ROUTES)["paths"]["/v1/images/generations"]["post"]["responses"]
