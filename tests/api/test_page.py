"""The files of the page: how they are sent, and that they hang together."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path, PurePosixPath

import msgspec
import pytest

from triptych.api.images import ImageRequest
from triptych.api.page import FILES, FOLDER, POLICY
from triptych.roles.head.job import RUNNING
from triptych.roles.media.formats import formats_for
from triptych.roles.messages.common import MAX_PARTIAL_IMAGES, MAX_PRIORITY

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parents[2]
MAX_BYTES = 100_000
"""Of all files together, as browsers get them."""


async def test_the_page_is_sent_once_and_then_only_asked_for(client):
    answer = await client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["cache-control"] == "no-cache"
    again = await client.get("/", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", answer.headers["etag"])
    no_date = await client.get("/", headers={"If-Modified-Since": f"Mon, 01 Jan {'9' * 20} 00:00:00 GMT"})
    assert no_date.status_code == 200
    assert (await client.head("/")).headers["content-length"] == str(len(FILES["/"].gzip.content))


async def test_who_takes_no_compressed_files_gets_plain_ones(client):
    packed, plain = await client.get("/"), await client.get("/", headers={"Accept-Encoding": "identity"})
    assert (packed.headers["content-encoding"], packed.headers["vary"]) == ("gzip", "Accept-Encoding")
    assert "content-encoding" not in plain.headers
    assert packed.content == plain.content == FILES["/"].plain.content
    assert packed.headers["etag"] != plain.headers["etag"]


async def test_what_is_no_file_of_the_page_is_not_there(client):
    for path in ("/page", "/page/", "/page/index.html", "/page/..%2fapp.py", "/page/../app.py"):
        assert (await client.get(path)).status_code == 404


async def test_every_file_that_the_page_asks_for_is_sent(client):
    for path, file in FILES.items():
        text = file.plain.content.decode()
        linked = re.findall(r'(?:href|src)="(page/[^"#]+)"', text) if path == "/" else []
        imported = re.findall(r'from "\./([\w.-]+\.js)"', text) if path.endswith(".js") else []
        for name in (*linked, *(f"page/{name}" for name in imported)):
            answer = await client.get(f"/{name}")
            assert answer.status_code == 200, f"{path} asks for {name}"
            assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_needs_no_other_host_and_nothing_inline():
    for path, file in FILES.items():
        text = file.plain.content.decode()
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), path
        assert not re.search(r"<style|\sstyle=|\son\w+=\"|<script(?! type=\"module\" src=)", text), path


def test_the_page_is_small():
    assert sum(len(file.gzip.content) for file in FILES.values()) < MAX_BYTES


def test_the_wheel_has_the_files_of_the_page():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["triptych.api"]
    names = [path.relative_to(FOLDER.parent) for path in FOLDER.iterdir()]
    assert len(names) == len(FILES)
    assert all(any(PurePosixPath(name).match(pattern) for pattern in patterns) for name in names)


def test_what_the_page_repeats_of_the_api_is_as_the_api_has_it():
    text = FILES["/page/constants.js"].plain.content.decode()
    numbers = {name: int(value) for name, value in re.findall(r"const (\w+) = (\d+);", text)}
    fields = msgspec.json.schema(ImageRequest)["$defs"]["ImageRequest"]["properties"]
    assert numbers == {
        "MAX_IMAGES": fields["n"]["maximum"],
        "MAX_PARTIAL_IMAGES": MAX_PARTIAL_IMAGES,
        "MAX_PRIORITY": MAX_PRIORITY,
    }
    states = dict(re.findall(r'(\w+): "(\w+)"', text))
    assert {stage: f"{state}_RUNNING" for stage, state in states.items()} == RUNNING
    formats = {medium: json.loads(names) for medium, names in re.findall(r"(\w+): (\[.*\]),", text)}
    assert set(formats) == {"image", "video", "audio"}
    for medium, names in formats.items():
        assert set(names) <= set(formats_for(medium)), medium
