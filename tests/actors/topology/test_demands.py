"""What a host needs of whoever runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from triptych.actors.topology import gpu_count, load_topology, stop_bound_s

Write = Callable[..., Path]
HOSTS = """
[supervision]
shutdown_s = 7
[transfer]
trusted_network = true
[head]
host = "a"
[[hosts]]
name = "a"
address = "127.0.0.2"
[[hosts]]
name = "b"
address = "127.0.0.3"
"""
ROLES = """
[[roles]]
kind = "encoder"
host = "a"
[[roles]]
kind = "denoiser"
host = "b"
count = 3
device = "cuda"
[[roles]]
kind = "decoder"
host = "a"
device = "cuda:4"
"""
AGAIN = (
    '[[roles]]\nkind = "denoiser"\nname = "other"\nhost = "a"\n[[roles]]\nkind = "encoder"\nname = "more"\nhost = "a"\n'
)


def test_a_host_stops_its_kinds_of_components_one_after_the_other(write: Write) -> None:
    topology = load_topology(write(HOSTS, ROLES))
    assert stop_bound_s(topology) == stop_bound_s(topology, "a") == 5 * 7, "pool, encoder, decoder, head, API"
    assert stop_bound_s(topology, "b") == 2 * 7, "pool, and three denoisers at once"


def test_kinds_that_come_again_in_the_file_are_waited_for_again(write: Write) -> None:
    assert stop_bound_s(load_topology(write(HOSTS, ROLES + AGAIN))) == 7 * 7


def test_one_machine_needs_no_hosts(write: Write) -> None:
    topology = load_topology(write("[supervision]\nshutdown_s = 2\n"))
    assert stop_bound_s(topology) == stop_bound_s(topology, "") == 6 * 2


def test_gpus_are_those_that_the_components_name(write: Write) -> None:
    topology = load_topology(write(HOSTS, ROLES))
    assert [gpu_count(topology.on_host(host)) for host in "ab"] == [5, 3]
    assert gpu_count(component for component in topology.components if component.kind == "encoder") == 0
