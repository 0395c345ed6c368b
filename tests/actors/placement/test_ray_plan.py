"""What Ray is asked for; nothing here needs Ray."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from triptych.actors.errors import TopologyError
from triptych.actors.placement import ray_plan
from triptych.actors.topology import Topology, load_topology
from triptych.actors.topology.placed_hosts import (
    VARIABLE,
    PlacedHost,
    PlacedHosts,
    current_address,
    write_placed_hosts,
)

FILE = """
[model]
path = "model"
[transfer]
trusted_network = true
[head]
host = "a"
[[hosts]]
name = "a"
address = "10.0.0.1"
[[hosts]]
name = "b"
[[hosts]]
name = "c"
[[roles]]
kind = "encoder"
host = "a"
[[roles]]
kind = "denoiser"
hosts = ["b", "c"]
device = "cuda"
count = 2
[[roles]]
kind = "decoder"
host = "c"
device = "cuda:2"
[[roles]]
kind = "decoder"
name = "slow-decoder"
host = "c"
"""
NODES = [
    {"NodeID": "n1", "NodeManagerAddress": "10.0.0.1", "Alive": True, "Resources": {"CPU": 4.0}},
    {"NodeID": "n2", "NodeManagerAddress": "10.0.0.2", "Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}},
    {"NodeID": "n3", "NodeManagerAddress": "10.0.0.3", "Alive": False, "Resources": {"CPU": 4.0, "GPU": 8.0}},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "three.toml"
    path.write_text(FILE)
    return path


@pytest.fixture
def topology(file: Path) -> Topology:
    return load_topology(file, PlacedHosts(hosts={}))


def test_a_host_asks_for_the_gpus_that_its_roles_count_and_a_cpu_for_each_other_instance(topology: Topology) -> None:
    assert ray_plan.bundle(topology, "a", "10.0.0.1") == {"CPU": 1.0, "node:10.0.0.1": 0.001}
    assert ray_plan.bundle(topology, "b") == {"GPU": 2.0}
    assert ray_plan.bundle(topology, "c") == {"GPU": 3.0, "CPU": 1.0}


def test_the_heads_host_and_hosts_with_an_address_stay_where_they_are(topology: Topology) -> None:
    assert ray_plan.pins(topology, {"a": "10.0.0.1"}, "10.0.0.9") == {"a": "10.0.0.1"}
    assert ray_plan.pins(topology, {"b": "10.0.0.2"}, "10.0.0.9") == {"a": "10.0.0.9", "b": "10.0.0.2"}
    ray_plan.check_pins("f.toml", {"a": "10.0.0.1", "b": "10.0.0.2"}, NODES)
    with pytest.raises(TopologyError, match=r'\[\[hosts\]\] "b" address = "10.0.0.3" is not a node of the Ray cluster'):
        ray_plan.check_pins("f.toml", {"b": "10.0.0.3"}, NODES)


def test_only_hosts_on_live_nodes_have_an_address() -> None:
    where = {0: "n1", 1: "n3", 2: ""}
    assert ray_plan.placed_addresses(("a", "b", "c"), where, NODES) == {"a": "10.0.0.1"}


def test_a_cluster_without_room_is_told_what_is_missing() -> None:
    said = ray_plan.why_not_placed({"a": {"CPU": 1.0, "node:10.0.0.1": 0.001}, "b": {"GPU": 2.0}}, NODES)
    assert said == (
        "Ray has no room: a needs 1 CPU and the node 10.0.0.1, b needs 2 GPU; "
        "10.0.0.1 has 4 CPU in all, 10.0.0.2 has 1 GPU and 4 CPU in all"
    )


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "gpu-1:6379"])
def test_addresses_of_a_cluster(address: str) -> None:
    ray_plan.check_address(address)


@pytest.mark.parametrize("address", ["", "10.0.0.1", "ray://10.0.0.1:10001"])
def test_what_is_no_address_of_a_cluster_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        ray_plan.check_address(address)


def test_a_cluster_that_sees_losses_late_is_warned_of() -> None:
    assert not ray_plan.slow_settings({**ray_plan.SYSTEM_CONFIG, "other": True})
    assert "health_check_period_ms low" in ray_plan.slow_settings(
        {**ray_plan.SYSTEM_CONFIG, "health_check_period_ms": 3000}
    )
    assert '--system-config=\'{"health_check_initial_delay_ms":0' in ray_plan.slow_settings({})


def test_the_bound_on_threads_is_the_users_never_that_of_a_ray_worker() -> None:
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "3"}
    assert ray_plan.environment(own, {}, "/p") == {"CUDA_VISIBLE_DEVICES": "3", VARIABLE: "/p"}
    assert ray_plan.environment(own, {"OMP_NUM_THREADS": "4"}, "/p")["OMP_NUM_THREADS"] == "4"


def test_hosts_are_where_they_have_been_placed(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process of b sees it, whose entry has no address, and after c has moved."""
    entries = {
        "a": PlacedHost(public_key="A" * 40),
        "b": PlacedHost(address="10.0.0.2", public_key="B" * 40),
        "c": PlacedHost(address="10.0.0.3", public_key="C" * 40),
    }
    placed_file = tmp_path / "placed.json"
    write_placed_hosts(placed_file, PlacedHosts(hosts=entries))
    monkeypatch.setenv(VARIABLE, str(placed_file))
    topology = load_topology(file)
    denoiser = topology.component("denoiser-0")
    assert (denoiser.address, denoiser.bind) == (f"tcp://b:{denoiser.port}", f"tcp://10.0.0.2:{denoiser.port}")
    assert topology.component("head").address.startswith("tcp://10.0.0.1:")
    assert topology.host("b").transfer_address == "10.0.0.2"
    assert topology.host("c").public_key == "C" * 40
    assert [current_address(name) for name in ("10.0.0.1", "b", "c")] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    write_placed_hosts(placed_file, PlacedHosts(hosts={**entries, "c": PlacedHost(address="10.0.0.4")}))
    assert current_address("c") == "10.0.0.4"
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(TopologyError, match=r'\[\[hosts\]\] "b" has no address.*--ray'):
        load_topology(file)
    assert os.environ.get(VARIABLE) is None
