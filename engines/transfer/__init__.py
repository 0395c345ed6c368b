"""Moving bytes between the arenas of two pools: `shm` on one host, `mooncake` between hosts.

Mooncake's engine has hazards that its callers must know. Where the code answers one of them it names its
number.

1.  Calling anything before `initialize` has succeeded, or asking for the status of a stale batch, crashes
the process. 2.  The presence of an RDMA device chooses the transport, not the `protocol` argument. 3.
Writes of a transfer that was given up still land. 4.  A peer that restarts on its port is not reached again
through a cached descriptor. 5.  A peer that hangs holds the calling thread for 60 s. 6.  Registering memory
and the destructor hold the GIL; its own waits spin on a core. 7.  Unregistering memory is no fence. 8.  The
status of a batch is that of its first entry; the descriptor of the registered memory is limited to 1 MiB.
9.  It listens on all interfaces without authentication. 10. It does not survive a fork, and the transfer
after a rejected one may fail.
"""

from __future__ import annotations

from triptych.engines.memory.arena import Arena
from triptych.engines.transfer.backend import TransferBackend
from triptych.engines.transfer.errors import TransferError, TransferSetupError
from triptych.engines.transfer.fault_injection import FaultRates, FaultyBackend
from triptych.engines.transfer.pull_executor import PullExecutor
from triptych.engines.transfer.shm import ShmBackend

__all__ = [
    "QUARANTINE_S",
    "FaultRates",
    "PullExecutor",
    "TransferBackend",
    "TransferError",
    "TransferSetupError",
    "open_backend",
]

# How long a block stays out of use after a failed pull, `held` ranges apart: twice the time after which
# Mooncake gives a silent connection up.
QUARANTINE_S = 10.0


def open_backend(
    engine: str,
    *,
    arena: Arena,
    hostname: str = "127.0.0.1",
    protocol: str = "tcp",
    ib_device: str = "",
    faults: str = "",
    seed: int = 0,
) -> TransferBackend:
    """Open the backend named by `engine`: "shm" (also "auto") or "mooncake".

    Blocks: call it off the event loop. `hostname` is what peers reach this host by; `faults` is a setting as
    `FaultRates.parse` reads it, "" in production. Raises TransferSetupError with what to install or to set.
    """
    chosen = FaultRates.parse(faults)
    backend = _open(engine, arena, hostname, protocol, ib_device)
    return FaultyBackend(backend, arena, chosen, seed) if faults else backend


def _open(engine: str, arena: Arena, hostname: str, protocol: str, ib_device: str) -> TransferBackend:
    if engine in ("auto", "shm"):
        return ShmBackend(arena)
    if engine == "mooncake":
        # Only here, so that importing this package never imports Mooncake into a process that may fork.
        from triptych.engines.transfer.mooncake import open_mooncake

        return open_mooncake(arena, hostname=hostname, protocol=protocol, ib_device=ib_device)
    raise TransferSetupError(f'transfer.engine must be "auto", "shm" or "mooncake", not "{engine}"')
