"""What a topology needs of this machine, looked at before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.actors.conftest import THREE_ROLES
from tests.actors.topology.topology_texts import LORA, MODEL, MOONCAKE
from triptych.actors import TopologyError, load_topology
from triptych.actors.command.preflight import has_accelerator, preflight

Write = Callable[..., Path]


def test_preflight_wants_the_model_folder(write: Write, folder: Path) -> None:
    topology = load_topology(write(model='[model]\npath = "nowhere"\n'))
    with pytest.raises(TopologyError, match=r'\[model\] path = "nowhere" does not exist'):
        preflight(topology, topology.components)
    preflight(topology, [topology.component("api")])
    (folder / "nowhere").write_text("")
    with pytest.raises(TopologyError, match="is a file"):
        preflight(topology, topology.components)


def test_preflight_wants_the_mooncake_wheel(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    topology = load_topology(write(MOONCAKE))
    with pytest.raises(TopologyError, match=r"needs the mooncake engine.*pip install"):
        preflight(topology, topology.components)
    preflight(load_topology(write()), topology.components[3:4])


def test_preflight_wants_what_the_store_needs_where_it_is_used(
    write: Write, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = load_topology(write(f'[store]\nurl = "{folder / "shared"}"\n'))
    api = [topology.component("api")]
    with pytest.raises(TopologyError, match="is not a folder that this user can write to: mount the file system"):
        preflight(topology, api)
    (folder / "shared").mkdir()
    preflight(topology, api)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    topology = load_topology(write('[store]\nurl = "s3://bucket/x"\n'))
    with pytest.raises(
        TopologyError, match=r"needs s3fs, which is missing: install it with pip install .triptych\[s3\]"
    ):
        preflight(topology, api)


def test_preflight_wants_the_files_of_adapters(write: Write, folder: Path) -> None:
    topology = load_topology(write(model=MODEL + LORA + 'path_2 = "low"\n'))
    assert topology.models[0].section.lora[0].scale == 1.0
    with pytest.raises(TopologyError, match=r'\[\[model.lora\]\] path = "ink.safetensors" does not exist'):
        preflight(topology, topology.components)
    (folder / "ink.safetensors").touch()
    with pytest.raises(TopologyError, match=r'path_2 = "low" does not exist'):
        preflight(topology, topology.components)
    (folder / "low").mkdir()
    preflight(topology, topology.components)
    (folder / "ink.bin").touch()
    pickled = load_topology(write(model=MODEL + LORA.replace("ink.safetensors", "ink.bin")))
    with pytest.raises(TopologyError, match=r"is not a \.safetensors file.*since those can run code"):
        preflight(pickled, pickled.components)


def test_preflight_wants_torchao(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = load_topology(write(roles=THREE_ROLES + 'quantization = "float8"\n'))
    preflight(topology, topology.components)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=r'needs torchao.*pip install "triptych\[quantization\]"'):
        preflight(topology, topology.components)
    preflight(topology, [topology.component("encoder-0")])


def test_preflight_wants_opentelemetry_where_traces_go_somewhere(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = load_topology(write('[otel]\nendpoint = "http://127.0.0.1:4318"\n'))
    preflight(topology, topology.components)

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)  # as find_spec does for what a missing package would have in it

    monkeypatch.setattr("importlib.util.find_spec", missing)
    with pytest.raises(TopologyError, match=r'needs OpenTelemetry.*pip install "triptych\[otel\]"'):
        preflight(topology, topology.components)
    preflight(load_topology(write()), topology.components)


@pytest.mark.skipif(has_accelerator(), reason="this machine has one")
def test_preflight_wants_the_device(write: Write) -> None:
    topology = load_topology(write(roles=THREE_ROLES.replace('"denoiser"', '"denoiser"\ndevice = "cuda:1"')))
    with pytest.raises(TopologyError, match=r'device = "cuda:1" for denoiser-0.*use device = "cpu"'):
        preflight(topology, topology.components)


def test_an_accelerator_is_seen_by_its_device_file(folder: Path) -> None:
    assert not has_accelerator(folder)
    (folder / "nvidia0").touch()
    assert has_accelerator(folder)
