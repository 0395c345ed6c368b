"""The copies of schemas are as published, and the whole of them finds nothing either."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.actors.placement import published
from tests.actors.placement.test_kubernetes import THREE, made

pytestmark = pytest.mark.placement


def test_the_copy_of_the_schemas_of_kubernetes_is_what_its_package_has() -> None:
    copy = json.loads(published.KUBERNETES.read_text())
    assert copy == published.kubernetes_schema(published.published_definitions())


def test_the_package_that_publishes_them_takes_the_manifests(tmp_path: Path) -> None:
    import kubernetes_validate

    (tmp_path / "flux").mkdir()
    file = tmp_path / "three.toml"
    file.write_text(THREE)
    for manifest in (*made(file), *made(file, "--secrets")):
        kubernetes_validate.validate(manifest, "1.37", strict=True)
    manifest["kinds"] = "Secret"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, "1.37", strict=True)
