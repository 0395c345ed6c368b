"""The key of the bus in the state folder."""

from __future__ import annotations

import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from triptych.actors import AddressBook, StartError, Topology, load_topology
from triptych.actors.runtime.bus_keys import make_bus_keys, read_bus_keys

Write = Callable[..., Path]


@pytest.fixture
def topology(write: Write) -> Topology:
    return load_topology(write('[bus]\ntransport = "tcp"\n'))


def test_all_who_start_at_once_have_the_same_key_for_themselves_alone(topology: Topology) -> None:
    def start(_: int) -> object:
        make_bus_keys(topology)
        return read_bus_keys(topology)

    with ThreadPoolExecutor(8) as starters:
        found = list(starters.map(start, range(8)))
    assert found[0] is not None
    assert set(found) == {AddressBook(topology).socket_options.curve}
    (file,) = topology.state_dir.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(topology.state_dir.stat().st_mode) == 0o700


def test_a_bus_in_a_private_folder_needs_no_key(write: Write) -> None:
    topology = load_topology(write())
    make_bus_keys(topology)
    assert not topology.state_dir.exists()
    assert AddressBook(topology).socket_options.curve is None


def test_a_key_that_cannot_be_used_is_refused_with_what_to_do(topology: Topology) -> None:
    with pytest.raises(StartError, match=r"bus\.key cannot be read .*`triptych up` makes it"):
        read_bus_keys(topology)
    make_bus_keys(topology)
    file = topology.state_dir / "bus.key"
    file.chmod(0o640)
    for use in (make_bus_keys, read_bus_keys):
        with pytest.raises(StartError, match="open to other users"):
            use(topology)
    file.chmod(0o600)
    for text in ("", "x" * 39, '"' * 40, "ä"):
        file.write_text(text)
        with pytest.raises(StartError, match="holds no key"):
            make_bus_keys(topology)


def test_a_state_folder_may_be_elsewhere_by_a_link(topology: Topology, tmp_path: Path) -> None:
    topology.state_dir.parent.mkdir(parents=True)
    topology.state_dir.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    make_bus_keys(topology)
    assert read_bus_keys(topology)
    assert (tmp_path / "elsewhere" / "bus.key").exists()
