"""The backend over Mooncake's transfer engine, TCP or RDMA, also between pools of one host.

Written for version 0.3.13; its hazards are listed in `engines.transfer`. Two of them concern operators. Hazard 9: the
engine listens on all interfaces without authentication, and no setting restricts it, so its ports must be behind a
firewall or on a network of their own; a topology must have `trusted_network = true` to use it. Hazard 10: a process
that has opened a backend must never fork.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from triptych.engines.memory.arena import Arena
from triptych.engines.memory.leases import ByteRange
from triptych.engines.transfer import mooncake_setup as setup
from triptych.engines.transfer.backend import TransferError, TransferSetupError

PIECE = 64 << 20
"""Bytes of one read. None is begun after the deadline, so at most this many bytes arrive late."""
SHORTEST_SLEEP_S = 50e-6
LONGEST_SLEEP_S = 1e-3

_COMPLETED = 1
_FAILED = -1


def open_mooncake(
    arena: Arena, *, hostname: str, protocol: str, ib_device: str, ports: tuple[int, int] | None = None
) -> MooncakeBackend:
    """Import Mooncake, start an engine on `hostname` and serve `arena` with it.

    Call it in the pool's own process, which must be a fresh interpreter, and off the event loop: registering memory for
    RDMA takes seconds and holds the GIL (hazard 6).

    Raises:
        TransferSetupError: Mooncake cannot be started; the message says what to install or to set.
    """
    wheel = setup.check_wheels(setup.installed_wheels())
    setup.check_devices(protocol, ib_device, setup.infiniband_devices())
    module = setup.import_engine(setup.environment(protocol, os.environ, ports))
    before = setup.listening_ports()
    engine = module.TransferEngine()
    if engine.initialize(hostname, "P2PHANDSHAKE", protocol, ib_device):
        raise TransferSetupError(f'Mooncake cannot start on "{hostname}" over {protocol}: see its messages in the log')
    # Register the arena once and as a whole: the descriptor of registered memory is limited to 1 MiB (hazard 8).
    if engine.register_memory(arena.base, arena.nbytes):
        raise TransferSetupError(f"Mooncake cannot register {arena.nbytes} bytes over {protocol}: see ulimit -l")
    opened = sorted({*setup.listening_ports()} - {*before})
    return MooncakeBackend(engine, arena, f"{hostname}:{engine.get_rpc_port()}", f"{wheel} over {protocol}", opened)


class MooncakeBackend:
    """A running engine that serves one arena.

    Only `open_mooncake` makes one, after `initialize`: earlier calls crash the process (hazard 1).
    """

    def __init__(self, engine: Any, arena: Arena, session: str, transport: str, ports: list[int]) -> None:
        self._engine = engine
        # Hold a view, so that the arena stays mapped while a thread is inside the engine.
        self._memory = arena.array(0, arena.nbytes)
        self._session = session
        self._transport = transport
        self._ports = ports
        self._rdma_activity_before = setup.rdma_activity()
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
        """Describe the transport, with the counters that prove RDMA (hazard 2)."""
        rdma = setup.rdma_activity() - self._rdma_activity_before
        return f"{self._transport}, {rdma} RDMA requests or packets counted by this host since it started"

    def exposed(self) -> str:
        """Describe the ports through which anybody can read and write the arena (hazard 9)."""
        ports = " and ".join(map(str, self._ports))
        return (
            f"whoever reaches TCP ports {ports} of this host, on any interface, can read and write the pool's memory: "
            "keep them behind a firewall"
        )

    def pull(self, session: str, address: int, offset: int, nbytes: int, timeout_s: float) -> None:
        """Read from the engine at `session`; see `TransferBackend.pull`.

        A peer that accepts connections but does not answer blocks the calling thread for 60 s, whatever the timeout
        (hazard 5): `PullExecutor` uses a thread for each peer, and the bus tells whether a peer is alive.
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
        """Return the local ranges that pulls given up at their deadline may still write to (hazard 3)."""
        with self._lock:
            if self._engine is not None:
                for batch in list(self._late):
                    # The answer that ends a batch frees its id, which must not be asked about again (hazard 1).
                    if self._engine.transfer_check_status(batch) in (_COMPLETED, _FAILED):
                        del self._late[batch]
            return tuple(self._late.values())

    def close(self) -> None:
        """Stop serving and pulling; blocks for a second and holds the GIL (hazard 6).

        Ends the engine, since unregistering its memory would not wait for writes under way (hazard 7).
        """
        with self._lock:
            self._engine = None

    def _running_engine(self) -> Any:
        if os.getpid() != self._pid:
            # The engine's threads do not exist in a forked process (hazard 10).
            raise TransferError("the engine belongs to another process", retryable=False)
        with self._lock:
            if self._engine is None:
                raise TransferError("the backend is closed", retryable=False)
            return self._engine

    def _open_segment(self, engine: Any, session: str) -> None:
        # The engine connects to a new peer under a lock that all transfers take: a peer that hangs would block all of
        # them. Probe it first, which takes no lock and so blocks this thread only (hazard 5).
        if session not in self._met:
            if engine.send_probe(session):
                raise TransferError(f"{session} cannot be reached", retryable=True)
            self._met.add(session)

    def _pull_piece(self, engine: Any, session: str, address: int, local: ByteRange, deadline: float) -> None:
        offset, nbytes = local
        # One entry for each batch, since the status of a batch is that of its first entry (hazard 8).
        batch = engine.batch_transfer_async_read(session, [self._base + offset], [address], [nbytes])
        if not batch:
            raise TransferError(f"{session} cannot be reached", retryable=True)
        status = _wait(engine, batch, deadline)
        if status == _COMPLETED:
            return
        if status == _FAILED:
            raise TransferError(
                f"{session} refused {nbytes} bytes at {address:#x}, or the connection broke",
                retryable=True,
                quarantine=True,
            )
        with self._lock:
            self._late[batch] = local
        raise TransferError(f"{session} did not send {nbytes} bytes in time", retryable=True, quarantine=True)


def _wait(engine: Any, batch: int, deadline: float) -> int:
    # Sleep between status queries: the engine's own wait spins on a core that its receiving thread could use, which
    # makes a pull of 64 MiB take twice as long on two cores (hazard 6).
    pause = SHORTEST_SLEEP_S
    while True:
        status = int(engine.transfer_check_status(batch))
        if status in (_COMPLETED, _FAILED) or time.monotonic() >= deadline:
            return status
        time.sleep(pause)
        pause = min(pause * 1.5, LONGEST_SLEEP_S)
