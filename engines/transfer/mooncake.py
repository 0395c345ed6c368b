"""Pulls between hosts over Mooncake's transfer engine, TCP or RDMA; over loopback the bytes travel too.

Written against version 0.3.13; its hazards are listed in `engines.transfer`. Two of them bind whoever runs it.
Hazard 9: the engine listens on all interfaces without authentication, and no setting binds it to one, so it belongs
behind a firewall or on a network of its own; a topology must say `trusted_network = true` to use it.
Hazard 10: a process that has opened a backend must never fork.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from triptych.engines.memory.arena import Arena
from triptych.engines.transfer import mooncake_setup as setup
from triptych.engines.transfer.backend import ByteRange
from triptych.engines.transfer.errors import TransferError, TransferSetupError

# After the deadline nothing more is submitted, so this much at most can land late.
PIECE = 64 << 20
SHORTEST_SLEEP_S = 50e-6
LONGEST_SLEEP_S = 1e-3

_COMPLETED = 1
_FAILED = -1


def open_mooncake(arena: Arena, *, hostname: str, protocol: str, ib_device: str) -> MooncakeBackend:
    """Import Mooncake, start an engine on `hostname` and serve `arena` with it.

    Call it in the pool's own process, a fresh interpreter, and off the event loop: registering memory for
    RDMA takes seconds and holds the GIL (hazard 6). Raises TransferSetupError with what to install or to
    set.
    """
    wheel = setup.check_wheels(setup.installed_wheels())
    setup.check_devices(protocol, ib_device, setup.infiniband_devices())
    module = setup.import_engine(setup.environment(protocol, os.environ))
    before = setup.listening_ports()
    engine = module.TransferEngine()
    if engine.initialize(hostname, "P2PHANDSHAKE", protocol, ib_device):
        raise TransferSetupError(f'Mooncake cannot start on "{hostname}" over {protocol}: see its lines in the log')
    # Hazard 8: one arena, registered once, since the descriptor that lists the registered memory is limited
    # to 1 MiB.
    if engine.register_memory(arena.base, arena.nbytes):
        raise TransferSetupError(f"Mooncake cannot register {arena.nbytes} bytes over {protocol}: see ulimit -l")
    ports = sorted({*setup.listening_ports()} - {*before})
    return MooncakeBackend(engine, arena, f"{hostname}:{engine.get_rpc_port()}", f"{wheel} over {protocol}", ports)


class MooncakeBackend:
    """A running engine that serves one arena.

    Hazard 1: calls before `initialize` crash the process, so there is no object before it; `open_mooncake`
    makes one.
    """

    def __init__(self, engine: Any, arena: Arena, session: str, transport: str, ports: list[int]) -> None:
        self._engine = engine
        # A view keeps the mapping for as long as any thread is inside the engine, whoever closes the arena.
        self._memory = arena.array(0, arena.nbytes)
        self._session = session
        self._transport = transport
        self._ports = ports
        self._rdma_requests_before = setup.rdma_requests()
        self._base = arena.base
        self._pid = os.getpid()
        self._met: set[str] = set()
        self._late: dict[int, ByteRange] = {}
        self._lock = threading.Lock()

    @property
    def session(self) -> str:
        """`hostname:port` of this engine."""
        return self._session

    @property
    def base(self) -> int:
        """The address of the arena in this process."""
        return self._base

    def describe(self) -> str:
        """Say what transport really runs, RDMA proved by the counters of the ports (hazard 2)."""
        rdma = setup.rdma_requests() - self._rdma_requests_before
        return f"{self._transport}, {rdma} RDMA requests served by this host since it started"

    def exposed(self) -> str:
        """Say which ports anybody reads and writes the arena through (hazard 9)."""
        ports = " and ".join(map(str, self._ports))
        return (
            f"whoever reaches TCP ports {ports} of this host, on any interface, reads and writes the pool's memory: "
            "keep them behind a firewall"
        )

    def pull(self, session: str, address: int, offset: int, nbytes: int, timeout_s: float) -> None:
        """Read from the engine at `session`; see TransferBackend.

        Hazard 5: a peer that accepts connections but does not answer holds the calling thread for 60 s,
        whatever the timeout. `PullExecutor` gives each peer a thread, and whether a peer lives is known from
        the bus.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > len(self._memory):
            raise ValueError(f"bytes {offset} to {offset + nbytes} are outside an arena of {len(self._memory)} bytes")
        engine = self._running_engine()
        deadline = time.monotonic() + timeout_s
        self._open_segment(engine, session)
        for start in range(0, nbytes, PIECE):
            size = min(PIECE, nbytes - start)
            if time.monotonic() >= deadline:
                raise TransferError(f"{session} took longer than {timeout_s:g} s", retryable=True)
            self._pull_piece(engine, session, address + start, (offset + start, size), deadline)

    def late(self) -> tuple[ByteRange, ...]:
        """List the local ranges that a pull given up at its deadline may still write to (hazard 3)."""
        with self._lock:
            if self._engine is not None:
                for batch in list(self._late):
                    # Hazard 1: an id is freed by the answer that ends it, and must not be asked about again.
                    if self._engine.transfer_check_status(batch) in (_COMPLETED, _FAILED):
                        del self._late[batch]
            return tuple(self._late.values())

    def close(self) -> None:
        """Stop serving and pulling. Takes a second and holds the GIL for it (hazard 6).

        Hazard 7: taking the memory off the engine is no fence against writes under way, only the end of the
        engine is.
        """
        with self._lock:
            self._engine = None

    def _running_engine(self) -> Any:
        if os.getpid() != self._pid:
            # Hazard 10: the engine's threads do not exist in a forked process.
            raise TransferError("the engine belongs to another process", retryable=False)
        with self._lock:
            if self._engine is None:
                raise TransferError("the backend is closed", retryable=False)
            return self._engine

    def _open_segment(self, engine: Any, session: str) -> None:
        # Hazard 5: the engine meets a peer under a lock that all its transfers take, so one that hangs there would
        # stop all of them. The probe takes no lock: one that hangs there holds this thread only.
        if session not in self._met:
            if engine.send_probe(session):
                raise TransferError(f"{session} cannot be reached", retryable=True)
            self._met.add(session)

    def _pull_piece(self, engine: Any, session: str, address: int, local: ByteRange, deadline: float) -> None:
        offset, nbytes = local
        # Hazard 8: the status of a batch is that of its first entry, so a batch has one entry.
        batch = engine.batch_transfer_async_read(session, [self._base + offset], [address], [nbytes])
        if not batch:
            raise TransferError(f"{session} cannot be reached", retryable=True)
        status = _wait(engine, batch, deadline)
        if status == _COMPLETED:
            return
        if status == _FAILED:
            raise TransferError(
                f"{session} refused {nbytes} bytes at {address:#x}, or broke off", retryable=True, quarantine=True
            )
        with self._lock:
            self._late[batch] = local
        raise TransferError(f"{session} did not send {nbytes} bytes in time", retryable=True, quarantine=True)


def _wait(engine: Any, batch: int, deadline: float) -> int:
    # Hazard 6: the engine's own wait spins on a core that its receiving thread could use; sleeping between
    # looks makes a pull of 64 MiB twice as fast on two cores.
    pause = SHORTEST_SLEEP_S
    while True:
        status = int(engine.transfer_check_status(batch))
        if status in (_COMPLETED, _FAILED) or time.monotonic() >= deadline:
            return status
        time.sleep(pause)
        pause = min(pause * 1.5, LONGEST_SLEEP_S)
