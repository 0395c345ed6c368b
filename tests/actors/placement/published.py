"""The published schemas that the manifests are tested against, and how their copies in `schemas/` are made.

    pip install kubernetes-validate    # 108 MB, for the schemas of Kubernetes
    python tests/actors/placement/published.py config/crd/bases/disaggregatedset.x-k8s.io_disaggregatedsets.yaml

The argument is a file of https://github.com/kubernetes-sigs/lws; both sources are Apache-2.0. The copies have what the
manifests' kinds refer to, without descriptions.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

Schema = dict[str, Any]
VERSION = "1.37.0"
FOLDER = Path(__file__).parent / "schemas"
KUBERNETES = FOLDER / "kubernetes.json"
DISAGGREGATED_SET = FOLDER / "disaggregatedset.json"
_POD_TEMPLATE = "io.k8s.api.core.v1.PodTemplateSpec"
KINDS = {
    ("v1", "ConfigMap"): "io.k8s.api.core.v1.ConfigMap",
    ("v1", "Secret"): "io.k8s.api.core.v1.Secret",
    ("v1", "Service"): "io.k8s.api.core.v1.Service",
    ("v1", "PersistentVolumeClaim"): "io.k8s.api.core.v1.PersistentVolumeClaim",
    ("apps/v1", "StatefulSet"): "io.k8s.api.apps.v1.StatefulSet",
    ("policy/v1", "PodDisruptionBudget"): "io.k8s.api.policy.v1.PodDisruptionBudget",
    ("networking.k8s.io/v1", "NetworkPolicy"): "io.k8s.api.networking.v1.NetworkPolicy",
}


def check_object(manifest: Schema) -> None:
    """Raise `jsonschema.ValidationError` unless an object is as its published schema says, with no other keys."""
    kind = manifest.get("apiVersion"), manifest.get("kind")
    if kind in KINDS:
        _validator(KINDS[kind]).validate(manifest)
        return
    schema = json.loads(DISAGGREGATED_SET.read_text())
    if kind != (schema["apiVersion"], schema["kind"]):
        raise jsonschema.ValidationError(f"no object is of the kind {kind}")
    jsonschema.Draft202012Validator(schema["schema"]).validate(manifest)
    for role in manifest["spec"]["roles"]:
        _validator(_POD_TEMPLATE).validate(role["spec"]["leaderWorkerTemplate"]["workerTemplate"])


@cache
def _validator(name: str) -> jsonschema.Draft202012Validator:
    definitions = json.loads(KUBERNETES.read_text())["$defs"]
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": definitions})


def kubernetes_schema(definitions: Schema) -> Schema:
    """Return what `KINDS` refer to among the definitions of a version."""
    wanted, found = list(KINDS.values()), {}
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name] = _bare(definitions[name])
            wanted += _references(found[name])
    return {"version": VERSION, "$defs": dict(sorted(found.items()))}


def disaggregated_set_schema(definition: Schema) -> Schema:
    """Return the schema in a CustomResourceDefinition, closed to other keys and with any pod template."""
    spec = definition["spec"]
    version = next(each for each in spec["versions"] if each["storage"])
    schema = _closed(_bare(version["schema"]["openAPIV3Schema"]))
    schema["properties"].pop("status")
    schema["properties"]["metadata"] = {"type": "object"}
    return {
        "apiVersion": f"{spec['group']}/{version['name']}",
        "kind": spec["names"]["kind"],
        "schema": schema,
    }


def published_definitions() -> Schema:
    """Return the definitions in the package kubernetes-validate; raises `ModuleNotFoundError`."""
    found = importlib.util.find_spec("kubernetes_validate")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("kubernetes_validate")
    file = Path(found.origin).with_name("kubernetes-json-schema") / f"v{VERSION}-local-strict" / "_definitions.json"
    definitions: Schema = json.loads(file.read_text())["$defs"]
    return definitions


def _references(schema: Any) -> list[str]:
    if isinstance(schema, dict):
        own = [schema["$ref"].rpartition("/")[2]] if isinstance(schema.get("$ref"), str) else []
        return own + [name for value in schema.values() for name in _references(value)]
    return [name for value in schema for name in _references(value)] if isinstance(schema, list) else []


def _bare(schema: Any) -> Any:
    """Return a schema without descriptions, and with references within one file."""
    if isinstance(schema, dict):
        kept = {key: _bare(value) for key, value in schema.items() if key != "description" or isinstance(value, dict)}
        if isinstance(kept.get("$ref"), str):
            kept["$ref"] = f"#/$defs/{kept['$ref'].rpartition('/')[2]}"
        return kept
    return [_bare(value) for value in schema] if isinstance(schema, list) else schema


def _closed(schema: Any) -> Any:
    """Return the schema of a CustomResourceDefinition as JSON Schema that refuses what a server would drop."""
    if not isinstance(schema, dict):
        return schema
    closed: Schema = {}
    for key, value in schema.items():
        if key == "properties":
            closed[key] = {
                name: {"type": "object"} if name in ("workerTemplate", "leaderTemplate") else _closed(each)
                for name, each in value.items()
            }
        else:
            closed[key] = _closed(value)
    if closed.pop("x-kubernetes-int-or-string", False):
        closed.pop("anyOf", None)
        closed["type"] = ["integer", "string"]
    if "properties" in closed:
        closed["additionalProperties"] = False
    return {key: value for key, value in closed.items() if not key.startswith("x-kubernetes-")}


if __name__ == "__main__":
    made = {
        KUBERNETES: kubernetes_schema(published_definitions()),
        DISAGGREGATED_SET: disaggregated_set_schema(yaml.safe_load(Path(sys.argv[1]).read_text())),
    }
    for path, content in made.items():
        path.write_text(json.dumps(content, separators=(",", ":")) + "\n")
