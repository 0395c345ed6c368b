"""`python -m triptych.tools.bench bus|transfer|overhead|memory|steps|hosts|http`: one JSON line for each case."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

_BENCHES = {
    "bus": "asks between two processes, against raw ZMQ and against xoscar",
    "transfer": "tensor bytes between two processes, for each backend",
    "overhead": "a whole request, against the pipeline in one process",
    "memory": "what each process holds in memory, against the pipeline in one process",
    "hosts": "three hosts, as namespaces: mooncake between them, and the loss of one under load, against the goals",
    "http": "requests accepted over HTTP against Ray Serve, clients with event streams, the page, against the goals",
    "steps": "denoising steps: batches, policies, cancellation, and what stepping costs",
}
_ROUNDS = 5
_EXAMPLES = """\
examples:
  python -m triptych.tools.bench bus                 five interleaved rounds
  python -m triptych.tools.bench bus --rounds 1      a quick look
  python -m triptych.tools.bench transfer | tee out/transfer.jsonl
  python -m triptych.tools.bench memory --markdown docs/memory.md

Each line is {"bench", "case", "unit", "ours", "peer", "peer_value", "ratio"}: medians over the rounds, which
take turns within one run; ratio > 1 where ours is better. Before those, memory has lines for its settings and for
each process.
"""


def main() -> None:
    """Run one benchmark and print its cases."""
    parser = argparse.ArgumentParser(
        prog="python -m triptych.tools.bench",
        description="Measure a part of Triptych against its peers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "bench",
        choices=sorted(_BENCHES),
        help="; ".join(f"{name}: {text}" for name, text in _BENCHES.items()),
    )
    parser.add_argument("--rounds", type=int, help="rounds for each side (default: 5; hosts, http: 3; memory: 1)")
    parser.add_argument("--seconds", type=float, help="length of the load with event streams (http; default: 60)")
    parser.add_argument("--markdown", type=Path, help="write the page here as well (memory)")
    arguments = parser.parse_args()
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    # Lazily: each benchmark needs libraries that the others do not.
    module = importlib.import_module(f"triptych.tools.bench.{arguments.bench}")
    if arguments.markdown and not hasattr(module, "markdown"):
        parser.error(f"{arguments.bench} has no page")
    options = {} if arguments.seconds is None else {"seconds": arguments.seconds}
    if options and not hasattr(module, "SECONDS"):
        parser.error(f"{arguments.bench} has no load of so many seconds")
    cases = []
    for case in module.run(arguments.rounds or getattr(module, "ROUNDS", _ROUNDS), **options):
        print(json.dumps(case), flush=True)
        cases.append(case)
    if arguments.markdown:
        arguments.markdown.write_text(module.markdown(cases))


if __name__ == "__main__":
    main()
