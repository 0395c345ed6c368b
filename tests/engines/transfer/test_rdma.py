"""Mooncake over RDMA between real processes, on a host with an RDMA device: see `make test-rdma`."""

from __future__ import annotations

import re
import socket

import pytest

from tests.engines.transfer.peer_process import PeerProcess, peer
from triptych.engines.transfer.mooncake_setup import infiniband_devices

pytestmark = pytest.mark.rdma

NBYTES = 64 << 20
LARGEST_PACKET = 4096
"""Bytes of data; the largest MTU of InfiniBand (IBTA specification, volume 1, 9.3)."""


def address() -> str:
    """This host's address on the network that its default route, or its only route, leads to."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.0.2.2", 9))
        return str(probe.getsockname()[0])


def counted(process: PeerProcess) -> int:
    match = re.search("over rdma, ([0-9]+) RDMA requests or packets", process.ask("describe"))
    assert match
    return int(match[1])


@pytest.mark.timeout(600)
def test_64_mib_come_over_rdma_as_the_counters_of_the_device_prove() -> None:
    devices = infiniband_devices()
    settings = {"engine": "mooncake", "hostname": address(), "protocol": "rdma", "ib_device": ",".join(devices)}
    with peer(NBYTES, **settings) as source, peer(NBYTES, **settings) as target:
        expected = source.ask("fill", offset=0, nbytes=NBYTES, byte=7)
        before = counted(target)
        target.ask("pull", **source.source(0, NBYTES), offset=0, timeout_s=300)
        assert target.ask("checksum", offset=0, nbytes=NBYTES) == expected
        packets = counted(target) - before
        print(f"{NBYTES} bytes over {', '.join(devices)}: {packets} requests or packets")
        assert packets >= NBYTES // LARGEST_PACKET
