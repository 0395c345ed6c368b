"""Transfer of bytes between the arenas of two pools, through shared memory or over the network.

`open_backend` opens a backend of `engines.backends.BACKENDS`, `PullExecutor` runs its pulls off the event loop, and
`FaultRates` injects faults for tests.

Mooncake has hazards that its callers must know. The code that handles one names its number:

1. Calls before `initialize` has succeeded, and status queries for an old batch, crash the process.
2. The presence of an RDMA device decides the transport, not the argument `protocol`.
3. Writes of a transfer that was given up still arrive.
4. A peer that restarts on its port cannot be reached through a cached descriptor.
5. A peer that hangs blocks the calling thread for 60 s.
6. Registering memory and the destructor hold the GIL; the engine's own waits spin on a core.
7. Unregistering memory does not wait for writes under way.
8. The status of a batch is that of its first entry; the descriptor of registered memory is limited to 1 MiB.
9. It listens on all interfaces without authentication.
10. It does not survive a fork, and the transfer after a rejected one may fail.
"""

from __future__ import annotations

import importlib

from triptych.engines.backends import AUTO, BACKENDS, resolve_engine
from triptych.engines.memory.arena import Arena
from triptych.engines.transfer.backend import TransferBackend, TransferError, TransferSetupError
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

QUARANTINE_S = 10.0
"""Seconds for which a block is not leased after a failed pull, or longer if `PullExecutor.held` has it: twice the time
after which Mooncake closes a silent connection."""


def open_backend(
    engine: str,
    *,
    arena: Arena,
    hostname: str = "127.0.0.1",
    ports: tuple[int, int] | None = None,
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
        ports: The first and the last of those to listen on for peers; None for the engine's choice. A process that
            opens several backends gives all the same.
        protocol: The transport, "tcp" or "rdma"; ignored by backends that share memory.
        ib_device: The RDMA devices, comma-separated; "" for all.
        faults: Faults to inject, as `FaultRates.parse` reads them; "" in production.
        seed: The seed of the injected faults.

    Raises:
        TransferSetupError: The backend cannot work here; the message says what to install or to set.
    """
    chosen = FaultRates.parse(faults)
    backend = _open(engine, arena, hostname, ports, protocol, ib_device)
    return FaultyBackend(backend, arena, chosen, seed) if faults else backend


def _open(
    engine: str, arena: Arena, hostname: str, ports: tuple[int, int] | None, protocol: str, ib_device: str
) -> TransferBackend:
    spec = BACKENDS.get(resolve_engine(engine))
    if spec is None:
        known = ", ".join(f'"{name}"' for name in (AUTO, *BACKENDS))
        raise TransferSetupError(f'[transfer] engine must be one of {known}, not "{engine}"')
    # Import the module only here: a process that imports this package may still fork.
    module, _, function = spec.opener.partition(":")
    opener = getattr(importlib.import_module(module), function)
    backend: TransferBackend = opener(arena, hostname=hostname, ports=ports, protocol=protocol, ib_device=ib_device)
    return backend
