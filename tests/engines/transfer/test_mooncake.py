"""Mooncake over loopback TCP between real processes, beside what test_every_backend.py asks of all backends.

The numbers are those of the hazards in `engines.transfer`.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.engines.transfer.peer_process import ROOT, arrives, peer, until
from tests.ports import free_ports, mooncake_environment

NBYTES = 8 << 20
MOONCAKE = {"engine": "mooncake", "hostname": "127.0.0.1", "protocol": "tcp"}


@pytest.fixture(scope="module")
def puller():
    with peer(NBYTES, **MOONCAKE) as process:
        yield process


@pytest.fixture(scope="module")
def server():
    with peer(NBYTES, **MOONCAKE) as process:
        yield process


def test_pulls_that_are_longer_than_a_piece_arrive_whole():
    nbytes = (64 << 20) + 4097
    with peer(nbytes, **MOONCAKE) as here, peer(nbytes, **MOONCAKE) as there:
        assert arrives(here, there, 0, nbytes, 5)


def test_it_says_what_runs_and_that_it_is_open(puller):
    # 2: "tcp" is what runs, whatever devices the host has.
    line = puller.ask("describe")
    assert "over tcp" in line
    assert "0 RDMA requests or packets" in line
    assert puller.session.startswith("127.0.0.1:")
    # 9: that no setting binds it to one interface is why a topology must say that the network is trusted.
    warning = puller.ask("exposed")
    ports = [int(port) for port in re.findall(r"[0-9]{4,5}", warning)]
    assert "can read and write" in warning
    assert len(ports) == 2
    assert int(puller.session.rpartition(":")[2]) in ports
    for port in ports:
        assert listens_everywhere(port)


def listens_everywhere(port: int) -> bool:
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return any(set(row[1].rpartition(":")[0]) == {"0"} for row in rows if row[1].endswith(f":{port:04X}"))


def test_an_address_that_no_lease_has_is_rejected_and_the_next_pull_succeeds(puller, server):
    # 10: what follows a rejected transfer may fail for that, and is tried again.
    error = puller.refused("pull_once", session=server.session, address=4096, nbytes=4096, offset=0, timeout_s=10)
    assert (error.get("retryable"), error.get("quarantine")) == (True, True), error
    assert "refused" in error["error"]
    beyond = server.source(NBYTES - 10, 11)
    assert "refused" in puller.refused("pull", **beyond, offset=0, timeout_s=10)["error"]
    assert arrives(puller, server, 0, 4096, 1)
    assert puller.ask("held") == []


@pytest.mark.parametrize("session", ["127.0.0.1:1", "nobody.invalid:12345", "nonsense"])
def test_a_session_of_nobody_cannot_be_reached(puller, session):
    error = puller.refused("pull", session=session, address=4096, nbytes=1, offset=0, timeout_s=5)
    assert (error["retryable"], error["quarantine"]) == (True, False)
    assert puller.ask("held") == []


def test_a_pull_that_was_given_up_still_lands_and_is_held_until_it_has():
    # 3: so the block is not free before the engine says that the transfer has ended.
    nbytes = 64 << 20
    with peer(nbytes, **MOONCAKE) as here, peer(nbytes, **MOONCAKE) as there:
        expected = there.ask("fill", offset=0, nbytes=nbytes, byte=5)
        # The first pull from a peer also connects, which may take longer than the next one may last.
        here.ask("pull_once", **there.source(0, 4096), offset=0, timeout_s=20)
        error = here.refused("pull_once", **there.source(0, nbytes), offset=0, timeout_s=0.001)
        assert (error.get("retryable"), error.get("quarantine")) == (True, True), error
        assert "in time" in error["error"]
        until(lambda: here.ask("held") == [])
        assert here.ask("checksum", offset=0, nbytes=nbytes) == expected


def test_a_peer_that_restarts_on_its_port_is_reached_again(puller):
    # 4: with the engine's cached descriptor it would not be.
    for _ in range(10):
        port = free_ports(4)
        # The engine takes two ports of this range by chance; the first of them is in its session.
        environ = {"MC_MIN_RPC_PORT": str(port), "MC_MAX_RPC_PORT": str(port + 3)}
        with peer(NBYTES, environ, **MOONCAKE) as first:
            assert arrives(puller, first, 0, 4096, 1)
            its_port = int(first.session.rpartition(":")[2])
            make_the_kernel_forget(its_port)
            kept = clients_in_time_wait(its_port)
        for _ in range(0 if kept else 15):
            with peer(NBYTES, environ, **MOONCAKE) as second:
                if second.session == first.session:
                    assert arrives(puller, second, 0, 4096, 2)
                    return
    pytest.fail("in ten tries the kernel did not let go of the port")


def clients_in_time_wait(port: int) -> list[int]:
    """The client ports of the connections to `port` that would keep it from being taken again for a minute."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    waiting = [row for row in rows if row[3] == "06" and int(row[1].rpartition(":")[2], 16) == port]
    return [int(row[2].rpartition(":")[2], 16) for row in waiting]


def make_the_kernel_forget(port: int) -> None:
    """Put a new connection in the place of each, and reset it."""
    for client in clients_in_time_wait(port):
        with socket.socket() as again, suppress(OSError):
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            again.bind(("127.0.0.1", client))
            again.connect(("127.0.0.1", port))


def test_a_peer_that_died_cannot_be_reached(puller):
    with peer(NBYTES, **MOONCAKE) as gone:
        assert arrives(puller, gone, 0, 4096, 1)
    error = puller.refused("pull", **gone.source(0, 4096), offset=0, timeout_s=5)
    assert error["retryable"]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("met", [True, False])
def test_a_peer_that_hangs_holds_up_nobody_else(puller, server, met):
    # 5: the thread that asked it stays stuck, its caller does not, and its block stays held.
    with peer(NBYTES, **MOONCAKE) as hung:
        expected = hung.ask("fill", offset=0, nbytes=4096, byte=8)
        if met:
            puller.ask("pull", **hung.source(0, 4096), offset=8192, timeout_s=20)
        hung.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, hung.process.pid, os.WSTOPPED)  # each of its threads has stopped
        try:
            stuck = puller.send("pull", **hung.source(0, 4096), offset=4096, timeout_s=0.5)
            assert arrives(puller, server, 0, 4096, 3)
            error = puller.answer(stuck)
            assert (error.get("retryable"), error.get("quarantine")) == (True, True), error
            assert [4096, 4096] in puller.ask("held")
            assert arrives(puller, server, 0, 4096, 4)
            # Another pull from the peer that hangs does not add a thread to it.
            waiting = puller.refused("pull", **hung.source(0, 4096), offset=8192, timeout_s=0.2)
            assert (waiting["retryable"], waiting["quarantine"]) == (True, False)
            assert "earlier pull" in waiting["error"]
        finally:
            hung.process.send_signal(signal.SIGCONT)
        # A probe that was stopped half-way may only end when the engine gives it up, after a minute.
        again = puller.send("pull", **hung.source(0, 4096), offset=4096, timeout_s=90)
        assert "error" not in puller.answer(again, timeout_s=100)
        assert puller.ask("checksum", offset=4096, nbytes=4096) == expected
        until(lambda: puller.ask("held") == [])


def python(code: str, **environ: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environ},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return result.stdout.strip()


def test_an_engine_that_cannot_start_is_never_called():
    # 1: there is no backend object before `initialize` has succeeded. A range of one port is too few for it.
    code = """
from triptych.engines.memory.arena import Arena
from triptych.engines.transfer import TransferSetupError, open_backend
try:
    open_backend("mooncake", arena=Arena.create(4096))
except TransferSetupError as error:
    print(error)
"""
    port = str(free_ports(1))
    assert "cannot start" in python(code, MC_MIN_RPC_PORT=port, MC_MAX_RPC_PORT=port)


def test_a_forked_process_does_not_touch_the_engine():
    # 10: its threads exist in the parent only.
    code = """
import os
from triptych.engines.memory.arena import Arena
from triptych.engines.transfer import TransferError, open_backend
backend = open_backend("mooncake", arena=Arena.create(4096))
if os.fork() == 0:
    try:
        backend.pull(backend.session, backend.base, 0, 1, 1.0)
    except TransferError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""
    assert python(code, **mooncake_environment()) == "the engine belongs to another process"


def test_rdma_without_a_device_is_refused_before_anything_is_imported():
    # 2: "rdma" without a device would run TCP without a word.
    code = """
import sys
import threading
from triptych.engines.memory.arena import Arena
from triptych.engines.transfer import TransferSetupError, open_backend
from triptych.engines.transfer.mooncake_setup import infiniband_devices
assert not infiniband_devices()
try:
    open_backend("mooncake", arena=Arena.create(4096), protocol="rdma")
except TransferSetupError as error:
    print(error, "mooncake" in sys.modules)
"""
    from triptych.engines.transfer.mooncake_setup import infiniband_devices

    if infiniband_devices():
        pytest.skip("this host has RDMA devices")
    line = python(code)
    assert "no device" in line
    assert line.endswith("False")
