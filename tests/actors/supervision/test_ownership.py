"""Whose a state folder is."""

from __future__ import annotations

import stat
from pathlib import Path

import msgspec
import pytest

from triptych.actors.errors import AlreadyRunningError, ForeignStateError
from triptych.actors.supervision._ownership import (
    Owner,
    lock_components,
    lock_folder,
    sharing_problem,
    takeover_problem,
)
from triptych.actors.topology import ModelIdentity
from triptych.actors.topology._model_identity import identify_model
from triptych.actors.topology.paths import private_state_dir

MODEL = ModelIdentity("/m", "index", "content")
COPY = ModelIdentity("/copy", "index", "content")
LATER = ModelIdentity("/m", "index", "trained on")
REPLACED = ModelIdentity("/m", "another index", "another")
TUNED = ModelIdentity("/tuned", "index", "tuned")
ONE = Owner(topology="/a/one.toml", state_dir="/s", run_dir="/r", models=(MODEL,), pid=7)

EARLIER = msgspec.structs.replace(ONE, models=(), model=MODEL)


def other(**changes: object) -> Owner:
    return msgspec.structs.replace(ONE, pid=8, **changes)


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        (None, ONE, ""),
        (ONE, other(), ""),
        (ONE, other(models=(TUNED,)), ""),
        (ONE, other(topology="/b/two.toml"), ""),
        (ONE, other(topology="/b/two.toml", models=()), ""),
        (ONE, other(topology="/b/two.toml", models=(COPY,)), ""),
        (ONE, other(topology="/b/two.toml", models=(LATER,)), ""),
        (ONE, other(topology="/b/two.toml", models=(TUNED, COPY)), ""),
        (EARLIER, other(topology="/b/two.toml", models=(COPY,)), ""),
        (EARLIER, other(topology="/b/two.toml", models=(TUNED,)), "of the model /m: give /b/two.toml"),
        (ONE, other(topology="/b/two.toml", models=(TUNED,)), "give /b/two.toml a folder of its own with [state] path"),
        (ONE, other(topology="/b/two.toml", models=(REPLACED,)), "of the model /m: give /b/two.toml"),
    ],
)
def test_state_is_taken_over_by_the_same_topology_or_the_same_model(
    before: Owner | None, now: Owner, says: str
) -> None:
    reason = takeover_problem(before, now)
    assert says in reason
    assert bool(says) == bool(reason)


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (other(), ""),
        (other(models=(LATER,)), ""),
        (other(topology="/b/two.toml"), "in use by /a/one.toml (process 7): give /b/two.toml a folder of its own"),
        (other(run_dir="/x"), "with its sockets in /r (process 7) and not in /x: set the same XDG_RUNTIME_DIR"),
        (other(state_dir="/x"), "with its state in /s (process 7) and not in /x: set the same TRIPTYCH_STATE_DIR"),
    ],
)
def test_components_that_run_at_the_same_time_are_one_system(now: Owner, says: str) -> None:
    reason = sharing_problem(ONE, now)
    assert says in reason
    assert bool(says) == bool(reason)


def test_a_folder_is_held_together_by_one_system_alone(tmp_path: Path) -> None:
    two = other(topology="/b/two.toml", models=(TUNED,))
    with lock_folder(tmp_path, ONE, keep=True):
        with (
            lock_folder(tmp_path, other(), keep=True),
            pytest.raises(AlreadyRunningError),
            lock_folder(tmp_path, two, keep=True),
        ):
            pass
        with pytest.raises(AlreadyRunningError), lock_folder(tmp_path, two, keep=True):
            pass
    with pytest.raises(ForeignStateError), lock_folder(tmp_path, two, keep=True):
        pass
    (tmp_path / "owner.json").write_text('{"cut sho')
    with lock_folder(tmp_path, two, keep=True):
        pass
    with pytest.raises(ForeignStateError), lock_folder(tmp_path, ONE, keep=True):
        pass


def test_the_last_of_a_folder_that_does_not_keep_takes_its_record_away(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with lock_folder(folder, ONE, keep=False):
        with lock_folder(folder, other(), keep=False):
            pass
        assert (folder / "owner.json").exists()
    assert list(folder.iterdir()) == []


def test_an_identity_tells_copies_versions_and_other_models_apart(tmp_path: Path) -> None:
    def model(name: str, weights: bytes, more: str = "") -> ModelIdentity:
        folder = tmp_path / name
        (folder / "unet").mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
        (folder / "triptych.json").write_text(more)
        (folder / "unet" / "weights.safetensors").write_bytes(weights)
        found = identify_model(folder)
        assert found is not None
        return found

    large = bytes(3 << 20)
    first, copy = model("first", large), model("copy", large, more="its own serving config")
    assert first.is_same(copy)
    assert first.path != copy.path
    trained = bytearray(large)
    trained[-5] = 1
    others = (
        model("trained", bytes(trained)),
        model("longer", large + b"0"),
        model("small", b"1"),
        model("less", b"2"),
    )
    assert len({first.content, *(found.content for found in others)}) == 5
    assert not any(first.is_same(found) for found in others)
    assert {found.index for found in others} == {first.index}
    assert identify_model(tmp_path / "nowhere") is None


def test_a_state_folder_of_an_earlier_version_is_closed_to_others_and_a_shared_one_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    (folder / "generations").mkdir(parents=True)
    folder.chmod(0o755)
    files = [folder / "journal.sqlite", folder / "journal.sqlite-wal", folder / "generations" / "head"]
    for file in files:
        file.touch()
        file.chmod(0o644)
    private_state_dir(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    folder.chmod(0o1777)
    with pytest.raises(PermissionError, match="a folder for all users: give the state a folder of its own"):
        private_state_dir(folder)


def test_a_component_is_held_once_and_let_go(folder: Path) -> None:
    with lock_components(folder, ["head", "api"]):
        sentence = r"api is already running here, under process \d+: stop that first"
        with pytest.raises(AlreadyRunningError, match=sentence), lock_components(folder, ["pool", "api"]):
            pass
        with lock_components(folder, ["pool"]):
            pass
    with lock_components(folder, ["api"]):
        pass
    assert list(folder.iterdir()) == []
