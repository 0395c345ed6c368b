"""Several hosts on one machine, made of namespaces, with faults of the network between them.

`Hosts` is for tests, chaos runs and benchmarks; it needs no root where the kernel lets users make namespaces.

| module | what |
| --- | --- |
| `namespaces` | the hosts, and commands on them |
| `network` | the switch between them, and its faults |
| `init` | the first process of a host |
| `wire` | a wire that takes its time |
| `cluster`, `forward` | a whole system on hosts, and how a client outside of them reaches its API |
"""

from triptych.tools.hosts.namespaces import DISK, HostProcess, Hosts, HostsError, enter_switch, resume, why_unsupported
from triptych.tools.hosts.network import NetworkFault

__all__ = ["DISK", "HostProcess", "Hosts", "HostsError", "NetworkFault", "enter_switch", "resume", "why_unsupported"]
