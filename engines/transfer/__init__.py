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

import importlib

from triptych.engines.backends import AUTO, BACKENDS, resolve_engine
from triptych.engines.memory.arena import Arena
from triptych.engines.transfer.backend import TransferBackend
from triptych.engines.transfer.errors import TransferError, TransferSetupError
from triptych.engines.transfer.fault_injection import FaultRates, FaultyBackend
from triptych.engines.transfer.pull_executor import PullExecutor

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
    """Open a transfer backend for an arena. Blocks; call it off the event loop.

    Args:
        engine: The name of the backend in `engines.backends.BACKENDS`, or "auto".
        arena: The memory that peers pull from and that pulls write to.
        hostname: The address by which peers reach this host.
        protocol: The transport, "tcp" or "rdma"; ignored by backends that share memory.
        ib_device: The RDMA devices, comma-separated; "" for all.
        faults: Faults to inject, as `FaultRates.parse` reads them; "" in production.
        seed: The seed of the injected faults.

    Raises:
        TransferSetupError: The backend cannot work here; the message says what to install or to set.
    """
    chosen = FaultRates.parse(faults)
    backend = _open(engine, arena, hostname, protocol, ib_device)
    return FaultyBackend(backend, arena, chosen, seed) if faults else backend


def _open(engine: str, arena: Arena, hostname: str, protocol: str, ib_device: str) -> TransferBackend:
    spec = BACKENDS.get(resolve_engine(engine))
    if spec is None:
        known = ", ".join(f'"{name}"' for name in (AUTO, *BACKENDS))
        raise TransferSetupError(f'[transfer] engine must be one of {known}, not "{engine}"')
    # Import the module only here: a process that imports this package may still fork.
    module, _, function = spec.opener.partition(":")
    opener = getattr(importlib.import_module(module), function)
    backend: TransferBackend = opener(arena, hostname=hostname, protocol=protocol, ib_device=ib_device)
    return backend
