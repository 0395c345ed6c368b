"""The key of a host: in the state folder of a system of one machine, listed by its public half between several."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from triptych.actors import Actor, AddressBook, Incarnation, StartError, Topology, TopologyError, load_topology
from triptych.actors.command import app
from triptych.actors.command.preflight import preflight
from triptych.actors.runtime.bus_keys import bus_options, make_bus_keys, read_bus_keys
from triptych.actors.runtime.runtime import Runtime
from triptych.actors.topology import free_port
from triptych.api.cluster_observer import ClusterObserver
from triptych.bus import CurveKeys, HandshakeRefusedError, Message, Outbox

Write = Callable[..., Path]
BOUND_S = 30.0


@pytest.fixture
def topology(write: Write) -> Topology:
    return load_topology(write('[bus]\ntransport = "tcp"\n'))


def test_all_who_start_at_once_have_the_same_key_for_themselves_alone(topology: Topology) -> None:
    def start(_: int) -> object:
        make_bus_keys(topology)
        return read_bus_keys(topology, "")

    with ThreadPoolExecutor(8) as starters:
        found = list(starters.map(start, range(8)))
    options = AddressBook(topology).socket_options
    assert set(found) == {options.curve}
    assert options.curve is not None
    assert options.accepted_keys == {options.curve.public}
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
        read_bus_keys(topology, "")
    make_bus_keys(topology)
    file = topology.state_dir / "bus.key"
    file.chmod(0o640)
    for use in (lambda: make_bus_keys(topology), lambda: read_bus_keys(topology, "")):
        with pytest.raises(StartError, match="open to other users"):
            use()
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
    assert read_bus_keys(topology, "")
    assert (tmp_path / "elsewhere" / "bus.key").exists()


# -- several hosts: addresses of the loopback network stand for them

PORT = free_port()
ADDRESSES = {"a": "127.0.0.1", "b": "127.0.0.2", "c": "127.0.0.3"}


def with_hosts(write: Write, lines: dict[str, str], keys: str = "keys/{host}.key") -> Topology:
    """Write a topology of three hosts, each with its line of `triptych keys`."""
    hosts = "".join(
        f'[[hosts]]\nname = "{name}"\naddress = "{address}"\n{lines.get(name, "")}\n'
        for name, address in ADDRESSES.items()
    )
    roles = "".join(
        f'[[roles]]\nkind = "{kind}"\nhost = "{host}"\n'
        for kind, host in (("encoder", "b"), ("denoiser", "c"), ("decoder", "b"))
    )
    sections = f'[bus]\nkeys = "{keys}"\n[head]\nhost = "a"\nport = {PORT}\n[transfer]\ntrusted_network = true\n'
    return load_topology(write(sections + hosts, roles=roles))


def line_of(topology: Topology, host: str, *options: str) -> str:
    said = CliRunner().invoke(app, ["keys", str(topology.path), "--host", host, *options])
    assert said.exit_code == 0, said.stderr
    return said.stdout.strip()


def test_the_command_makes_a_key_once_and_prints_the_line_for_the_list(write: Write, folder: Path) -> None:
    topology = with_hosts(write, {})
    line = line_of(topology, "b")
    (file,) = (folder / "keys").iterdir()
    assert (file.name, stat.S_IMODE(file.stat().st_mode)) == ("b.key", 0o600)
    assert line == f'public_key = "{CurveKeys.of(file.read_text()).public.decode()}"'
    assert line_of(topology, "b") == line
    assert line_of(topology, "b", "--force") != line
    file.chmod(0o644)
    for host, said in (("b", "b.key is open to other users"), ("d", "no host is called 'd'")):
        refused = CliRunner().invoke(app, ["keys", str(topology.path), "--host", host])
        assert refused.exit_code != 0
        assert said in refused.stderr


def test_each_host_has_its_own_key_and_knows_those_of_all(write: Write) -> None:
    blank = with_hosts(write, {})
    topology = with_hosts(write, {host: line_of(blank, host) for host in ADDRESSES})
    options = {host: bus_options(topology, host) for host in ADDRESSES}
    assert len({each.curve for each in options.values()}) == len({each.accepted_keys for each in options.values()}) * 3
    for host, each in options.items():
        assert each.curve is not None
        assert {(key.name, key.address, key.public == each.curve.public) for key in each.hosts} == {
            (name, address, name == host) for name, address in ADDRESSES.items()
        }
        assert each.heartbeat_s == 0.5


def test_hosts_on_one_machine_may_share_the_key_of_a_system_of_one(write: Write) -> None:
    topology = with_hosts(write, {}, keys="")
    make_bus_keys(topology, "b")
    assert len({bus_options(topology, host) for host in ADDRESSES}) == 1


def test_a_list_that_cannot_be_right_is_refused_with_what_to_do(write: Write) -> None:
    blank = with_hosts(write, {})
    lines = {host: line_of(blank, host) for host in ADDRESSES}
    for missing in (lambda t: preflight(t, ()), lambda t: make_bus_keys(t, "a")):
        with pytest.raises((TopologyError, StartError), match=r"public_key.* `triptych keys .* --host c` on it"):
            missing(with_hosts(write, {**lines, "c": ""}))
    swapped = with_hosts(write, {"a": lines["b"], "b": lines["a"], "c": lines["c"]})
    with pytest.raises(StartError, match=r"a\.key is the key of host b, and this is a"):
        make_bus_keys(swapped, "a")
    former = with_hosts(write, lines)
    line_of(former, "a", "--force")
    with pytest.raises(StartError, match=r"a\.key is a key that no host lists, and this is a"):
        make_bus_keys(former, "a")
    with pytest.raises(TopologyError, match=r'"b" public_key = "x" is not a public key: run `triptych keys'):
        with_hosts(write, {**lines, "b": 'public_key = "x"'})


class Ping(Message):
    pass


class Pong(Message):
    pass


class Head(Actor):
    async def ping(self, _: Ping) -> Pong:
        return Pong()


def test_a_host_that_is_taken_out_of_the_list_is_refused_by_name_from_the_next_start_on(write: Write) -> None:
    blank = with_hosts(write, {})
    lines = {host: line_of(blank, host) for host in ADDRESSES}
    with_all = with_hosts(write, lines)
    options = {host: bus_options(with_all, host) for host in ADDRESSES}
    line_of(blank, "c", "--force")
    without_c = with_hosts(write, {**lines, "c": line_of(blank, "c")})

    async def ask(host: str) -> None:
        outbox = Outbox(host, options=options[host])
        try:
            await outbox.reference("head", with_all.component("head").address).ask(Ping(), Pong, timeout_s=BOUND_S)
        finally:
            outbox.close()

    async def scenario() -> None:
        async with Runtime([Head("head")], Incarnation(AddressBook(without_c, host="a"))):
            await ask("b")
            with pytest.raises(HandshakeRefusedError, match="host a refuses the key of host c"):
                await ask("c")

    asyncio.run(asyncio.wait_for(scenario(), BOUND_S))


async def _readiness(topology: Topology, host: str) -> list[str]:
    address_book = AddressBook(topology, host=host)
    outbox = Outbox("api", options=address_book.socket_options)
    try:
        observer = ClusterObserver(
            topology, address_book, lambda name: outbox.reference(name, address_book.address(name))
        )
        return (await observer.readiness()).reasons
    finally:
        outbox.close()


def test_a_host_that_refuses_the_heads_is_said_to_be_silent_for_that(write: Write) -> None:
    blank = with_hosts(write, {})
    lines = {host: line_of(blank, host) for host in ADDRESSES}
    formerly = with_hosts(write, lines)
    line_of(blank, "a", "--force")
    topology = with_hosts(write, {**lines, "a": line_of(blank, "a")})

    async def scenario() -> None:
        async with Runtime([Head("supervisor-c")], Incarnation(AddressBook(formerly, host="c"))):
            reasons = await _readiness(topology, "a")
            assert "host b does not answer" in reasons
            (said,) = [reason for reason in reasons if reason.startswith("host c does not answer: supervisor-c at ")]
            assert "host c refuses the key of host a: list public_key" in said

    asyncio.run(asyncio.wait_for(scenario(), BOUND_S))
