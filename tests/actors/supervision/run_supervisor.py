"""`triptych up`, but every component is a probe, forked from a zygote that has next to nothing to import.

`python -m tests.actors.supervision.run_supervisor FILE [NAME,...|host=NAME]` writes each change of a child to stdout,
one JSON array a line.
"""

from __future__ import annotations

import sys

import msgspec

from triptych.actors.runtime import logs
from triptych.actors.runtime.system_messages import ChildReport
from triptych.actors.supervision import COMPONENT_SPECS, ComponentSpec, SupervisorProcess
from triptych.actors.topology import load_topology

PROBES = dict.fromkeys(COMPONENT_SPECS, ComponentSpec("tests.actors.supervision.probe:build", forked=True))


def tell(report: ChildReport) -> None:
    print(msgspec.json.encode(report).decode(), flush=True)


if __name__ == "__main__":
    logs.configure("supervisor")
    part = sys.argv[2] if len(sys.argv) > 2 else ""
    host = part.removeprefix("host=") if part.startswith("host=") else ""
    supervision = SupervisorProcess(
        load_topology(sys.argv[1]),
        only=part.split(",") if part and not host else (),
        host=host,
        until_eof=bool(host),
        specs=PROBES,
        preload=("tests.actors.supervision.probe",),
        on_change=tell,
    )
    code = supervision.run()
    if supervision.problem:
        print(supervision.problem, file=sys.stderr)
    sys.exit(code)
