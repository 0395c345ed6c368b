"""`python -m tools.bench bus|transfer|overhead`: one JSON line for each case."""

from __future__ import annotations

import argparse
import importlib
import json

_BENCHES = {
    "bus": "asks between two processes, against raw ZMQ and against xoscar",
    "transfer": "tensor bytes between two processes, for each backend",
    "overhead": "a whole request, against the pipeline in one process",
}
_EXAMPLES = """\
examples:
  python -m tools.bench bus                 five interleaved rounds
  python -m tools.bench bus --rounds 1      a quick look
  python -m tools.bench transfer | tee out/transfer.jsonl

Each line is {"bench", "case", "unit", "ours", "peer", "peer_value", "ratio"}: medians over the rounds, which
take turns within one run; ratio > 1 where ours is better.
"""


def main() -> None:
    """Run one benchmark and print its cases."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description="Measure a part of Triptych against its peers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "bench",
        choices=sorted(_BENCHES),
        help="; ".join(f"{name}: {text}" for name, text in _BENCHES.items()),
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds for each side (default: 5)")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    # Lazily: each benchmark needs libraries that the others do not.
    module = importlib.import_module(f"tools.bench.{arguments.bench}")
    for case in module.run(arguments.rounds):
        print(json.dumps(case), flush=True)


if __name__ == "__main__":
    main()
