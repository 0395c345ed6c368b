from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from tests.actors.conftest import THREE_ROLES
from tests.actors.topology.topology_texts import HOST_A, HOST_B, MODEL, MOONCAKE, ON_HOSTS, TRUSTED, WHOLE
from triptych.actors import AddressBook, Component, Topology, TopologyError, load_topology
from triptych.actors.command.preflight import preflight
from triptych.actors.errors import UnknownNameError
from triptych.actors.runtime.address_book import supervisor_of
from triptych.actors.topology import HeadSection, largest_payload, parse_size, pool_zones
from triptych.actors.topology.paths import MAX_SOCKET_PATH, private_dir, private_run_dir

Write = Callable[..., Path]


def test_components_in_start_order_with_ports_by_rule(write: Write) -> None:
    topology = load_topology(
        write('[bus]\ntransport = "tcp"\n', THREE_ROLES.replace('"denoiser"', '"denoiser"\ncount = 2'))
    )
    assert [(c.name, c.kind, c.port, c.index, c.pool) for c in topology.components] == [
        ("pool", "pool", 5556, 0, ""),
        ("encoder-0", "encoder", 5557, 0, "pool"),
        ("denoiser-0", "denoiser", 5558, 0, "pool"),
        ("denoiser-1", "denoiser", 5559, 1, "pool"),
        ("decoder-0", "decoder", 5560, 0, "pool"),
        ("head", "head", 5555, 0, ""),
        ("api", "api", 5561, 0, ""),
    ]
    assert topology.component("denoiser-1").address == "tcp://127.0.0.1:5559"


def test_each_host_has_its_components_its_pool_and_its_supervisor(write: Write) -> None:
    hosts = f'{HOST_A}pool_size = "1GiB"\n{HOST_B}bind = "*"\n[[hosts]]\nname = "c"\naddress = "fd00::3"\n'
    text = f'{hosts}[head]\nhost = "c"\n{TRUSTED}'
    topology = load_topology(write(text, ON_HOSTS.replace("count = 2", "count = 2\nport = 7000")))
    assert [(c.name, c.host, c.pool, c.index, c.address, c.bind) for c in topology.components] == [
        ("pool-a", "a", "", 0, "tcp://10.0.0.1:5556", ""),
        ("pool-b", "b", "", 0, "tcp://10.0.0.2:5557", "tcp://*:5557"),
        ("encoder-0", "a", "pool-a", 0, "tcp://10.0.0.1:5558", ""),
        ("denoiser-0", "b", "pool-b", 0, "tcp://10.0.0.2:7000", "tcp://*:7000"),
        ("denoiser-1", "b", "pool-b", 1, "tcp://10.0.0.2:7001", "tcp://*:7001"),
        ("denoiser-2", "a", "pool-a", 0, "tcp://10.0.0.1:7000", ""),
        ("denoiser-3", "a", "pool-a", 1, "tcp://10.0.0.1:7001", ""),
        ("decoder-0", "b", "pool-b", 0, "tcp://10.0.0.2:5563", "tcp://*:5563"),
        ("head", "c", "", 0, "tcp://[fd00::3]:5555", ""),
        ("api", "c", "", 0, "tcp://[fd00::3]:5564", ""),
    ]
    assert (topology.engine, topology.bus.transport, topology.head_host) == ("mooncake", "tcp", "c")
    assert [c.name for c in topology.on_host("c")] == ["head", "api"]
    assert topology.host_of(topology.component("pool-b")) == topology.hosts[1]
    assert topology.pool_bytes(topology.component("pool-a")) == 1 << 30
    assert [topology.zones(topology.component(f"pool-{name}")) for name in "ab"] == [
        ("encoder", "denoiser"),
        ("denoiser", "incoming"),
    ]
    assert topology.largest_payload == 128 << 20, "half of the smallest pool"
    assert [topology.transfer_ports(name) for name in "ab"] == [(21000, 21015), (21016, 21031)]
    with pytest.raises(UnknownNameError, match=r"no host is called 'd' in .*; there are a, b, c"):
        topology.on_host("d")
    book = AddressBook(topology)
    assert book.address("supervisor-b") == "tcp://10.0.0.2:5566"
    assert book.bind_address("supervisor-b") == "tcp://*:5566"
    assert book.bind_address("head") == book.address("head") == "tcp://[fd00::3]:5555"
    assert book.address("supervisor-b.children") == f"ipc://{topology.run_dir}/supervisor-b"
    assert book.component_of("supervisor-b.children") == "supervisor-b"
    assert book.supervisors() == ("supervisor-a", "supervisor-b", "supervisor-c")


def test_a_single_host_is_as_none_but_for_the_name_of_its_pool(write: Write) -> None:
    topology = load_topology(write(HOST_A))
    assert topology.component("head").address == f"ipc://{topology.run_dir}/head"
    assert {component.host for component in topology.components} == {"a"}
    assert topology.component("encoder-0").pool == "pool-a"
    assert topology.engine == "shm"
    assert AddressBook(topology).supervisors() == ()


def test_roles_on_one_of_several_hosts_share_memory(write: Write) -> None:
    roles = ON_HOSTS.replace('hosts = ["b", "a"]', 'host = "b"').replace('host = "a"', 'host = "b"')
    topology = load_topology(write(f'{HOST_A}{HOST_B}[head]\nhost = "a"\n', roles))
    assert (topology.engine, topology.bus.transport) == ("shm", "tcp")
    assert [c.name for c in topology.components if c.kind == "pool"] == ["pool-b"]


def test_an_explicit_port_counts_up_over_the_instances(write: Write) -> None:
    topology = load_topology(write(roles=THREE_ROLES.replace('"denoiser"', '"denoiser"\ncount = 3\nport = 7000')))
    assert [c.port for c in topology.components if c.kind == "denoiser"] == [7000, 7001, 7002]
    assert topology.component("decoder-0").port == 5561


def test_mooncake_has_a_pool_for_each_kind_and_monolithic_none(write: Write) -> None:
    mooncake = load_topology(write(MOONCAKE))
    assert [c.name for c in mooncake.components if c.kind == "pool"] == [
        "pool-encoder",
        "pool-denoiser",
        "pool-decoder",
    ]
    assert mooncake.component("decoder-0").pool == "pool-decoder"
    alone = load_topology(write(roles='[[roles]]\nkind = "monolithic"\nname = "whole"\n'))
    assert [c.name for c in alone.components] == ["whole-0", "head", "api"]
    assert alone.component("whole-0").pool == ""


def test_several_models_have_roles_of_their_own(write: Write, folder: Path) -> None:
    named = '[[models]]\nname = "b"\npath = "b"\ndtype = "float32"\n[[models.roles]]\nkind = "monolithic"\nname = "b"\n'
    roles = THREE_ROLES.replace("[[roles]]", "[[models.roles]]")
    topology = load_topology(write(model=f'[[models]]\nname = "SD.1"\npath = "a"\n{roles}{named}', roles=""))
    assert [(c.name, c.model, c.pool, c.dtype) for c in topology.components] == [
        ("pool", "", "", ""),
        *((f"sd-1-{kind}-0", "SD.1", "pool", "bfloat16") for kind in ("encoder", "denoiser", "decoder")),
        ("b-0", "b", "", "float32"),
        ("head", "", "", ""),
        ("api", "", "", ""),
    ]
    first, second = topology.models
    assert (first.path, second.path) == (folder.resolve() / "a", folder.resolve() / "b")
    assert topology.model_of(topology.component("b-0")) == second
    assert first.prompt_cache_bytes == topology.transfer.pool_bytes // 8, "half of the quarter"
    assert second.prompt_cache_bytes == 0, "nothing is encoded apart"
    with pytest.raises(TopologyError, match=r'\[\[models\]\] "SD.1" path = "a" does not exist'):
        preflight(topology, topology.components)
    alone = load_topology(write(model=WHOLE.format("a"), roles=""))
    assert [c.name for c in alone.components] == ["monolithic-0", "head", "api"], "as with [model]"


def test_paths_are_relative_to_the_file_and_ipc_paths_fit(write: Write, folder: Path) -> None:
    topology = load_topology(write('[state]\npath = "kept"\n', model='[model]\npath = "models/x"\n'))
    assert topology.models[0].path == folder.resolve() / "models" / "x"
    assert topology.state_dir == folder.resolve() / "kept"
    assert topology.component("head").address == f"ipc://{topology.run_dir}/head"


def test_paths_follow_the_environment(write: Write, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write()
    by_default = load_topology(file)
    assert by_default.state_dir.parent == folder / "home" / "triptych"
    assert by_default.run_dir.parent == folder / "triptych"
    monkeypatch.setenv("TRIPTYCH_STATE_DIR", str(folder / "elsewhere"))
    assert load_topology(file).state_dir == folder / "elsewhere"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder / ("long" * 20)))
    long_name = "x" * 32
    moved = load_topology(write(roles=THREE_ROLES.replace('"encoder"', f'"encoder"\nname = "{long_name}"\ncount = 99')))
    supervisor = AddressBook(moved).address(supervisor_of(f"{long_name}-98"))
    assert len(f"{supervisor.removeprefix('ipc://')}.1234567.") <= MAX_SOCKET_PATH


def test_two_topologies_share_neither_sockets_nor_state(write: Write, folder: Path) -> None:
    first = load_topology(write())
    copy = folder / "copy.toml"
    copy.write_text(first.path.read_text())
    second = load_topology(copy)
    assert first.run_dir != second.run_dir
    assert first.state_dir != second.state_dir


@pytest.mark.parametrize(
    ("text", "size"), [("256MiB", 256 << 20), ("1.5 GiB", 3 << 29), ("4096", 4096), ("7B", 7), ("2TiB", 2 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(("cache", "expected"), [("", 64 << 20), ("0", 0), ("128MiB", 128 << 20), ("64KiB", 64 << 10)])
def test_the_prompt_cache_is_a_quarter_of_the_pool_or_what_is_said(write: Write, cache: str, expected: int) -> None:
    model = f'[model]\npath = "."\nprompt_cache = "{cache}"\n'
    assert load_topology(write(model=model)).models[0].prompt_cache_bytes == expected
    whole = '[[roles]]\nkind = "monolithic"\n'
    assert load_topology(write(model=model, roles=whole)).models[0].prompt_cache_bytes == 0, "nothing is encoded apart"


@pytest.fixture
def topology(write: Write) -> Topology:
    return load_topology(write())


def test_the_address_book_knows_components_their_actors_and_supervisors(topology: Topology) -> None:
    address_book = AddressBook(topology, {"extra": "inproc://extra"})
    assert address_book.address("head") == topology.component("head").address
    assert address_book.address("encoder-0.transfer") == "inproc://encoder-0.transfer"
    assert address_book.address("supervisor") == f"ipc://{topology.run_dir}/supervisor"
    assert address_book.address("supervisor-head") == f"ipc://{topology.run_dir}/supervisor-head"
    assert address_book.address("extra") == "inproc://extra"
    for sender in ("head", "encoder-0.transfer", "supervisor", "supervisor-head", "extra"):
        assert address_book.component_of(sender) == sender.partition(".")[0]
    for sender in ("", "heads", "encoder-1", "supervisor-x", "head-supervisor", ".head", "test"):
        assert address_book.component_of(sender) == ""
    with pytest.raises(UnknownNameError, match="no actor is called 'heads'; known are api"):
        address_book.address("heads")
    with pytest.raises(UnknownNameError, match="no component is called 'x'"):
        topology.component("x")


def test_the_scheduler_of_a_model_is_a_table_of_options(write: Write) -> None:
    table = '[model.scheduler]\nclass = "euler"\nuse_karras_sigmas = true\nsigmas = [1, 0.5]\n'
    topology = load_topology(write(model=MODEL + "vae_tiling = true\n" + table))
    assert topology.models[0].section.scheduler == {"class": "euler", "use_karras_sigmas": True, "sigmas": (1, 0.5)}
    assert (topology.models[0].section.vae_tiling, topology.models[0].section.guider) == (True, {})


def test_weights_are_held_as_the_role_says_or_the_model(write: Write) -> None:
    roles = THREE_ROLES + 'dtype = "float32"\nquantization = "int8"\noffload = "group"\n'
    topology = load_topology(write(model=MODEL + 'dtype = "float16"\n', roles=roles))
    held = {c.name: (c.dtype, c.quantization, c.offload) for c in topology.components if c.slots}
    last = held.pop("decoder-0")
    assert last == ("float32", "int8", "group")
    assert set(held.values()) == {("float16", "none", "none")}


def test_steps_are_scheduled_and_batched_as_the_role_says(write: Write) -> None:
    denoiser = '"denoiser"\nslots = 8\nmax_batch = 8\npolicy = "fair"'
    topology = load_topology(write(roles=THREE_ROLES.replace('"denoiser"', denoiser)))
    stepping = {c.name: (c.policy, c.max_batch) for c in topology.components if c.slots}
    assert stepping == {"encoder-0": ("fifo", 1), "denoiser-0": ("fair", 8), "decoder-0": ("fifo", 1)}


def test_a_step_cache_is_part_of_what_a_model_is_known_by(write: Write, folder: Path) -> None:
    (folder / "model").mkdir(exist_ok=True)
    plain = load_topology(write()).models[0]
    cached = load_topology(write(roles=THREE_ROLES.replace('"denoiser"', '"denoiser"\ncache = "first_block:0.1"')))
    model = cached.models[0]
    assert (plain.step_cache, model.step_cache) == ("", "first_block:0.1")
    assert plain.identity is not None
    assert model.identity is not None
    assert (plain.identity.cache, model.identity.cache) == ("", "first_block:0.1")
    assert model.identity.is_same(plain.identity)


def test_run_folders_are_private_all_the_way(folder: Path) -> None:
    (folder / "shared").mkdir(mode=0o777)
    run_dir = private_run_dir(folder / "shared" / "run")
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(run_dir.parent.stat().st_mode) == 0o700


def test_a_link_in_place_of_a_run_folder_is_refused(folder: Path) -> None:
    (folder / "theirs").mkdir()
    (folder / "run").symlink_to(folder / "theirs")
    with pytest.raises(PermissionError, match="does not belong to user"):
        private_dir(folder / "run")


@pytest.mark.parametrize(
    ("pool_size", "largest"),
    [("8KiB", 4 << 10), ("12287B", 4 << 10), ("16KiB", 8 << 10), ("256MiB", 128 << 20), ("1000MiB", 256 << 20)],
)
def test_a_payload_is_at_most_a_block_of_half_a_pool(pool_size: str, largest: int) -> None:
    assert largest_payload(parse_size(pool_size)) == largest


@pytest.mark.parametrize(
    ("hosts", "zones"),
    [
        ({"e": "a", "d": "a", "c": "a"}, {"a": ("encoder", "denoiser")}),
        ({"e": "a", "d": "b", "c": "c"}, {"a": ("encoder",), "b": ("denoiser", "incoming"), "c": ("incoming",)}),
        ({"e": "a", "d": "b", "c": "a"}, {"a": ("encoder", "incoming"), "b": ("denoiser", "incoming")}),
        ({"e": "ab", "d": "ab", "c": "a"}, dict.fromkeys("ab", ("encoder", "denoiser", "incoming"))),
        ({"e": "a", "d": "ab", "c": "b"}, {"a": ("encoder", "denoiser"), "b": ("denoiser", "incoming")}),
    ],
)
def test_what_may_wait_for_another_in_a_pool_has_a_zone_of_its_own(
    hosts: dict[str, str], zones: dict[str, tuple[str, ...]]
) -> None:
    kinds = {"e": "encoder", "d": "denoiser", "c": "decoder"}
    components = [
        Component(name=f"{kind}-{host}", kind=kinds[kind], address="", port=0, pool=f"pool-{host}")  # type: ignore[arg-type]
        for kind, names in hosts.items()
        for host in names
    ]
    assert {host: pool_zones(components, f"pool-{host}") for host in zones} == zones


def test_a_payload_fits_into_a_third_where_a_pool_has_three_zones() -> None:
    assert largest_payload(256 << 20, 3) == 64 << 20
    assert largest_payload(256 << 20, 1) == 128 << 20, "it may go on into a pool with two"


def test_an_earlier_name_of_a_key_is_read_with_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "t.toml"
    file.write_text(f'[model]\npath = "m"\n[head]\nqueue = 7\n{THREE_ROLES}')
    with pytest.raises(TopologyError, match="has no key called queue"):
        load_topology(file)
    monkeypatch.setattr(HeadSection, "earlier_names", {"queue": "max_pending"})
    with structlog.testing.capture_logs() as logs:
        assert load_topology(file).head.max_pending == 7
    assert [(line["key"], line["write"], line["log_level"]) for line in logs] == [("queue", "max_pending", "warning")]
    file.write_text(f'[model]\npath = "m"\n[head]\nqueue = 7\nmax_pending = 8\n{THREE_ROLES}')
    with pytest.raises(TopologyError, match="has both max_pending and queue, its earlier name: remove queue"):
        load_topology(file)
