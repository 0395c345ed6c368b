from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.actors.conftest import THREE_ROLES
from triptych.actors import TopologyError, load_topology
from triptych.actors.command import app
from triptych.actors.command.generate import api_key
from triptych.actors.command.preflight import preflight
from triptych.actors.topology import write_with_overrides
from triptych.api.client import authorization
from triptych.api.keys import ApiClient, ApiKeysError, load_api_keys, read_client_key

ALICE, BOB, NEXT = "a" * 16, "b" * 43, "c" * 16


def written(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "keys"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_keys_have_names_and_a_name_may_have_two_for_a_while(tmp_path: Path) -> None:
    keys = load_api_keys(written(tmp_path, f"# who\nalice:{ALICE}\n\n bob.1-x : {BOB} \nalice:{NEXT}"))
    assert [keys.find(key).name for key in (ALICE, BOB, NEXT)] == ["alice", "bob.1-x", "alice"]
    assert [keys.find(key) for key in ("", "alice", ALICE[:-1], ALICE + "a", "\u00e9" * 16)] == [None] * 5


def test_a_key_may_raise_a_priority_as_far_as_its_line_says(tmp_path: Path) -> None:
    file = written(tmp_path, f"alice:{ALICE} max_priority=10\nbob:{BOB}")
    keys = load_api_keys(file)
    assert [keys.find(key) for key in (ALICE, BOB)] == [ApiClient("alice", 10), ApiClient("bob", 0)]
    assert read_client_key(file) == ALICE


@pytest.mark.parametrize(
    ("text", "mode", "problem"),
    [
        ("", 0o600, "holds no key"),
        ("# nobody\n", 0o600, "holds no key"),
        (f"alice:{ALICE}", 0o640, "can be read by others"),
        (f"alice:{ALICE}", 0o604, "can be read by others"),
        ("alice\n", 0o600, "no name:key in line 1"),
        (f"a/b:{ALICE}", 0o600, "no name:key in line 1"),
        (f"alice:{ALICE}\nbob:short", 0o600, "16 to 256 visible ASCII characters in line 2"),
        (f"alice:{ALICE}\nbob:{ALICE}", 0o600, "key of alice again in line 2"),
        (f"alice:{ALICE} max_priority=101", 0o600, "no limit after the key in line 1"),
        (f"alice:{ALICE} priority=1", 0o600, "no limit after the key in line 1"),
    ],
)
def test_a_file_that_keeps_nobody_out_is_refused(tmp_path: Path, text: str, mode: int, problem: str) -> None:
    with pytest.raises(ApiKeysError, match=problem) as refused:
        load_api_keys(written(tmp_path, text, mode))
    assert ALICE not in str(refused.value), "no key is ever shown"


def test_with_keys_a_network_may_be_listened_on(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    text = '[model]\npath = "."\n[api]\nhost = "0.0.0.0"\nkeys_file = "keys"\nallowed_hosts = ["a.example", "b"]\n'
    file.write_text(text + THREE_ROLES)
    with pytest.raises(TopologyError, match=r'keys_file = "keys" cannot be read \(No such file or directory\)'):
        preflight(load_topology(file), load_topology(file).components)
    written(tmp_path, f"alice:{ALICE}")
    preflight(load_topology(file), load_topology(file).components)
    (tmp_path / "elsewhere").mkdir()
    moved = load_topology(write_with_overrides(file, {"api": {"port": 0}}, tmp_path / "elsewhere"))
    assert (moved.keys_path, moved.api.allowed_hosts) == ((tmp_path / "keys").resolve(), ("a.example", "b"))


def test_the_command_takes_its_key_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRIPTYCH_API_KEY", raising=False)
    assert authorization(api_key(None)) == {}
    monkeypatch.setenv("TRIPTYCH_API_KEY", BOB)
    assert authorization(api_key(None)) == {"Authorization": f"Bearer {BOB}"}
    assert api_key(written(tmp_path, f"{ALICE}\n")) == ALICE
    assert api_key(written(tmp_path, f"# who\n\nbob.1-x : {BOB} \nalice:{ALICE}\n")) == BOB
    for command in (["status"], ["generate", "x", "-o", str(tmp_path / "x.png")]):
        shown = CliRunner().invoke(app, [*command, "--key-file", str(written(tmp_path, f"a {ALICE}"))])
        assert shown.exit_code == 1
        assert "has no key: write the key alone into it, or a line name:key" in shown.stderr
