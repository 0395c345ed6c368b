"""Where the files of a model are: folders, checkpoints in one file, and the local cache of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.actors.command.test_command import Write
from triptych.actors import TopologyError, load_topology
from triptych.actors.command.preflight import preflight
from triptych.actors.topology import ModelSection, find_source, write_with_overrides

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def found(base: Path, **keys: Any) -> Any:
    return find_source(ModelSection(**keys), base)


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.fixture
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub, as `hf download` leaves it, with one repository: files are links to what has no name."""
    hub = folder / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    repository = hub / "models--people--tiny"
    snapshot = model(repository / "snapshots" / COMMIT)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "5ca1ab1e").write_bytes(b"weights")
    (snapshot / "tiny.safetensors").symlink_to("../../blobs/5ca1ab1e")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_a_folder_is_what_it_is(folder: Path) -> None:
    model(folder / "m")
    assert found(folder, path="m").files == (folder.resolve() / "m",)


def test_a_checkpoint_needs_a_folder_of_configurations(folder: Path) -> None:
    model(folder / "base")
    (folder / "x.safetensors").write_bytes(b"")
    source = found(folder, path="x.safetensors", config="base")
    assert (source.folder, source.checkpoint) == (folder.resolve() / "base", folder / "x.safetensors")
    source = found(folder, path="x.safetensors")
    assert source.key == "config"
    assert "has weights, but no configurations" in source.problem
    assert "triptych init x.safetensors" in source.fix
    (folder / "empty").mkdir()
    assert "is not a model in the layout of diffusers" in found(folder, path="x.safetensors", config="empty").problem
    assert "which base is not" in found(folder, path="base", config="base").problem


@pytest.mark.parametrize("name", ["x.ckpt", "x.bin", "x.zip"])
def test_a_file_that_may_run_code_is_refused(name: str, folder: Path) -> None:
    model(folder / "base")
    (folder / name).write_bytes(b"")
    for keys in ({"path": name, "config": "base"}, {"path": "base", "components": {"vae": name}}):
        source = found(folder, **keys)
        assert "is a file of another kind" in source.problem
        assert "those can run code" in source.fix


def test_components_are_files_and_folders_that_are_there(folder: Path) -> None:
    model(folder / "base")
    (folder / "vae").mkdir()
    (folder / "t.gguf").write_bytes(b"")
    source = found(folder, path="base", components={"vae": "vae", "transformer": "t.gguf"})
    assert source.components == {"vae": folder.resolve() / "vae", "transformer": folder / "t.gguf"}
    source = found(folder, path="base", components={"unet": "no.gguf"})
    assert (source.key, source.problem.partition(" (")[0]) == (
        "components",
        'has unet = "no.gguf", which does not exist',
    )


def test_a_repository_is_found_in_the_cache_and_never_fetched(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in ("socket.socket.connect", "socket.getaddrinfo"):  # a machine without a network fails at the latter
        monkeypatch.setattr(call, lambda *_, **__: pytest.fail("nothing may be fetched"))
    assert found(folder, path="people/tiny").folder == cache
    assert found(folder, path="people/tiny", revision=COMMIT).folder == cache
    source = found(folder, path="people/tiny", revision="v2")
    assert "run: hf download people/tiny --revision v2" in source.fix
    source = found(folder, path="people/other")
    assert "nor a repository in the local cache of the hub" in source.problem
    assert "run: hf download people/other" in source.fix
    file = str(cache / "tiny.safetensors")
    source = found(folder, path=file, config="people/tiny")
    assert (str(source.checkpoint), source.folder) == (file, cache), "a link keeps its name, which says what it is"


def test_a_path_that_is_no_id_is_not_looked_for_in_the_cache(folder: Path) -> None:
    for path in ("nowhere", "a/b/c", "../no-such", "/no-such/x", "~/no-such"):
        assert "does not exist" in found(folder, path=path).problem, path


def test_preflight_says_what_is_wrong_with_which_key(write: Write, folder: Path) -> None:
    (folder / "x.gguf").write_bytes(b"")
    topology = load_topology(write(model='[model]\npath = "x.gguf"\nconfig = "people/none"\n'))
    with pytest.raises(TopologyError, match=r'\[model\] config = "people/none" is neither .*hf download people/none'):
        preflight(topology, topology.components)
    topology = load_topology(write(model='[model]\npath = "."\n[model.components]\nvae = "none"\n'))
    with pytest.raises(TopologyError, match=r'\[model\] components has vae = "none", which does not exist'):
        preflight(topology, topology.components)
    with pytest.raises(TopologyError, match=r"\[model\] components = 3 does not fit: give it a table of files"):
        load_topology(write(model='[model]\npath = "."\ncomponents = 3\n'))


def test_the_version_and_the_identity_are_those_of_all_files(write: Write, folder: Path) -> None:
    from triptych.engines.weights.model_version import model_version

    model(folder / "base")
    for name in ("x.safetensors", "y.safetensors", "z.gguf"):
        (folder / name).write_bytes(b"12345678")

    def seen(path: str, component: str) -> tuple[str, Any]:
        text = f'[model]\npath = "{path}"\nconfig = "base"\n[model.components]\nvae = "{component}"\n'
        (loaded,) = load_topology(write(model=text)).models
        return model_version(loaded.files), loaded.identity

    version, identity = seen("x.safetensors", "z.gguf")
    assert (version, identity) == seen("x.safetensors", "z.gguf")
    assert identity.path == str(folder / "x.safetensors")
    (folder / "y.safetensors").write_bytes(b"abcdefgh")
    assert not identity.is_same(seen("y.safetensors", "z.gguf")[1]), "another file with the same configuration"
    assert not identity.is_same(seen("x.safetensors", "y.safetensors")[1]), "another component"
    for name in ("x.safetensors", "z.gguf"):
        (folder / name).write_bytes(b"123456789")
        changed, other = seen("x.safetensors", "z.gguf")
        assert changed != version
        assert other.content != identity.content
        version = changed


def test_a_newer_snapshot_of_a_repository_is_the_same_model(cache: Path, write: Write) -> None:
    (old,) = load_topology(write(model='[model]\npath = "people/tiny"\n')).models
    before = old.identity
    assert (before and before.path, old.title) == ("people/tiny", "people/tiny")
    newer = model(cache.with_name(COMMIT[::-1]))
    (newer / "config.json").write_text("{}")
    (cache.parents[1] / "refs" / "main").write_text(COMMIT[::-1])
    after = old.identity
    assert after
    assert before
    assert after.content != before.content
    assert after.is_same(before)


def test_overrides_leave_ids_and_move_paths(write: Write, folder: Path) -> None:
    model(folder / "base")
    text = '[model]\npath = "people/tiny"\nconfig = "base"\n[model.components]\nvae = "v.gguf"\n'
    (section,) = (m.section for m in load_topology(write_with_overrides(write(model=text), {}, _other(folder))).models)
    assert section.path == "people/tiny"
    assert (section.config, section.components) == (
        str(folder.resolve() / "base"),
        {"vae": str(folder.resolve() / "v.gguf")},
    )


def _other(folder: Path) -> Path:
    made = folder / "other"
    made.mkdir()
    return made
