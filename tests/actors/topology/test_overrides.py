"""Generations, locks, logs, overrides: what reads and writes files and streams."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.actors.conftest import THREE_ROLES
from tests.actors.supervision.supervised import ROOT
from triptych.actors import TopologyError, load_topology
from triptych.actors.errors import AlreadyRunningError
from triptych.actors.supervision._generation_counter import GenerationCounter, next_generation
from triptych.actors.supervision._ownership import hold_components
from triptych.actors.topology import write_with_overrides
from triptych.actors.topology.overrides import merge, to_toml


@given(st.integers(0, 1 << 53), st.integers(0, 1 << 53))
def test_a_generation_is_above_the_stored_one_and_not_below_the_clock(stored: int, now: int) -> None:
    assert next_generation(stored, now) > stored
    assert next_generation(stored, now) >= now


def test_generations_never_repeat(folder: Path) -> None:
    generations = GenerationCounter(folder / "g")
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda _: generations.next("head"), range(200)))
    assert len(set(taken)) == 200
    assert GenerationCounter(folder / "g").next("head") > max(taken)


def test_generations_survive_a_clock_that_goes_back_and_a_broken_file(folder: Path) -> None:
    generations = GenerationCounter(folder)
    future = 1 << 50
    (folder / "head").write_text(str(future))
    assert generations.next("head") == future + 1
    assert generations.next("api") < future
    (folder / "head").write_text("garbage")
    assert 0 < GenerationCounter(folder).next("head") < future


def test_a_full_disk_takes_no_generation_away(folder: Path) -> None:
    generations = GenerationCounter(folder)
    (folder / "head.new").symlink_to("/dev/full")
    first = generations.next("head")
    assert 0 < first < generations.next("head")
    assert not (folder / "head").exists()


def test_a_component_is_held_once_and_let_go(folder: Path) -> None:
    with hold_components(folder, ["head", "api"]):
        sentence = r"api is already running here, under process \d+: stop that first"
        with pytest.raises(AlreadyRunningError, match=sentence), hold_components(folder, ["pool", "api"]):
            pass
        with hold_components(folder, ["pool"]):
            pass
    with hold_components(folder, ["api"]):
        pass
    assert list(folder.iterdir()) == []


LOGGING = """
import logging, structlog
from triptych.actors.runtime import logs
logs.configure("head", 7)
log = structlog.stdlib.get_logger("actor").bind(actor="head")
with structlog.contextvars.bound_contextvars(request_id="r1"):
    log.info("taken in", steps=4)
logging.getLogger("a.library").warning("from %s", "elsewhere")
log.debug("not shown")
try:
    raise ValueError("boom")
except ValueError:
    log.exception("crashed")
"""


def test_logs_are_json_lines_with_process_generation_and_request() -> None:
    done = subprocess.run([sys.executable, "-c", LOGGING], cwd=ROOT, capture_output=True, text=True, check=True)
    taken, library, crashed = (json.loads(line) for line in done.stderr.splitlines())
    assert taken.pop("timestamp")
    assert taken == {
        "process": "head",
        "generation": 7,
        "actor": "head",
        "request_id": "r1",
        "event": "taken in",
        "steps": 4,
        "level": "info",
    }
    assert (library["event"], library["process"], library["level"]) == ("from elsewhere", "head", "warning")
    assert "ValueError: boom" in crashed["exception"]


scalars = st.one_of(
    st.integers(-(1 << 60), 1 << 60),
    st.booleans(),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
    st.floats(-9, 9),
)
keys = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
rows = st.dictionaries(keys, scalars, max_size=3)
tables = st.dictionaries(keys, st.one_of(scalars, st.lists(rows, min_size=1, max_size=2)), max_size=3)


@given(st.dictionaries(keys, st.one_of(tables, st.lists(tables, min_size=1, max_size=2)), max_size=3))
@settings(max_examples=50)
def test_written_toml_reads_back_as_it_was(document: dict[str, object]) -> None:
    assert tomllib.loads(to_toml(document)) == document


def test_adapters_of_a_topology_stay_where_they_are(folder: Path) -> None:
    file = folder / "t.toml"
    entry = '[[model.lora]]\nname = "{0}"\npath = "{0}.safetensors"\nscale = 0.5\n'
    file.write_text(f'[model]\npath = "m"\n{entry.format("a")}{entry.format("b")}path_2 = "/x"\n{THREE_ROLES}')
    (folder / "out").mkdir()
    topology = load_topology(write_with_overrides(file, {"api": {"port": 9000}}, folder / "out"))
    (model,) = topology.models
    assert [(lora.name, lora.scale) for lora in model.section.lora] == [("a", 0.5), ("b", 0.5)]
    assert [model.absolute(lora.path) for lora in model.section.lora] == [
        folder / "a.safetensors",
        folder / "b.safetensors",
    ]
    assert model.section.lora[1].path_2 == "/x"
    assert model.path == folder / "m"


def test_overrides_change_keys_and_roles_by_name(folder: Path) -> None:
    file = folder / "demo.toml"
    file.write_text(f'[model]\npath = "models/x"\n[api]\nport = 8001\n{THREE_ROLES}')
    changes = {"api": {"port": 0}, "head": {"max_pending": 2}, "roles": {"denoiser": {"count": 3}}}
    (folder / "out").mkdir()
    (folder / "models" / "x").mkdir(parents=True)  # what is not there could be the id of a repository
    topology = load_topology(write_with_overrides(file, changes, folder / "out"))
    assert topology.models[0].path == folder.resolve() / "models" / "x"
    assert topology.head.max_pending == 2
    assert topology.api.port not in (0, 8001)
    assert [role.count for role in topology.models[0].section.roles] == [1, 3, 1]
    assert topology.state_dir == (folder / "out" / "state").resolve()
    assert file.read_text().count("count") == 0


def test_overrides_change_models_by_name_and_their_roles(folder: Path) -> None:
    file = folder / "two.toml"
    roles = THREE_ROLES.replace("[[roles]]", "[[models.roles]]")
    file.write_text("".join(f'[[models]]\nname = "{name}"\npath = "{name}"\n{roles}' for name in "ab"))
    changes = {"models": {"b": {"dtype": "float32", "roles": {"denoiser": {"count": 2}}}}}
    (folder / "out").mkdir()
    topology = load_topology(write_with_overrides(file, changes, folder / "out"))
    first, second = topology.models
    assert (first.path, second.path) == (folder.resolve() / "a", folder.resolve() / "b")
    assert (first.section.dtype, second.section.dtype) == ("bfloat16", "float32")
    assert [role.count for role in first.section.roles] == [1, 1, 1]
    assert [role.count for role in second.section.roles] == [1, 2, 1]
    with pytest.raises(TopologyError, match=r"\[\[models\]\] of the overrides name c, which is not there"):
        merge("two.toml", tomllib.loads(file.read_text()), {"models": {"c": {}}})


def test_an_override_for_a_role_that_is_not_there(folder: Path) -> None:
    tables = tomllib.loads(THREE_ROLES)
    with pytest.raises(TopologyError, match="name denoisr, which is not there: did you mean denoiser"):
        merge("demo.toml", tables, {"roles": {"denoisr": {"count": 2}}})
    with pytest.raises(TopologyError, match="cannot be read"):
        write_with_overrides(folder / "none.toml", {"api": {}}, folder)
