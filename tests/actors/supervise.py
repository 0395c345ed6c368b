"""`triptych up`, but every component is a probe, forked from a zygote that has next to nothing to import.

`python -m tests.actors.supervise FILE [NAME,...]` writes each change of a child to stdout, one JSON array a line.
"""

from __future__ import annotations

import sys

import msgspec

from triptych.actors import logs
from triptych.actors.components import PARTS, Part
from triptych.actors.supervise import Supervision
from triptych.actors.system import ChildReport
from triptych.actors.topology import load_topology

PROBES = dict.fromkeys(PARTS, Part("tests.actors.component:build", forked=True))


def tell(report: ChildReport) -> None:
    print(msgspec.json.encode(report).decode(), flush=True)


if __name__ == "__main__":
    logs.configure("supervisor")
    only = sys.argv[2].split(",") if len(sys.argv) > 2 else ()
    supervision = Supervision(
        load_topology(sys.argv[1]), only=only, parts=PROBES, preload=("tests.actors.component",), on_change=tell
    )
    code = supervision.run()
    if supervision.problem:
        print(supervision.problem, file=sys.stderr)
    sys.exit(code)
