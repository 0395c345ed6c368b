"""`triptych up`, but every component is a probe, forked from a zygote that has next to nothing to import.

`python -m tests.actors.supervision.run_supervisor FILE [NAME,...]` writes each change of a child to stdout, one JSON
array a line.
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
    only = sys.argv[2].split(",") if len(sys.argv) > 2 else ()
    supervision = SupervisorProcess(
        load_topology(sys.argv[1]), only=only, specs=PROBES, preload=("tests.actors.supervision.probe",), on_change=tell
    )
    code = supervision.run()
    if supervision.problem:
        print(supervision.problem, file=sys.stderr)
    sys.exit(code)
