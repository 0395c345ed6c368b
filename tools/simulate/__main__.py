"""The command: `python -m triptych.tools.simulate policies`, `python -m triptych.tools.simulate head`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from triptych.tools.command import make_parser
from triptych.tools.simulate import head, policies


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, and print the figures."""
    parser = make_parser("simulate", "Simulate scheduling policies on a trace, or the head with many instances.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for each in (policies, head):
        each.add_command(commands)
    options = parser.parse_args(arguments)
    if "max_batch" in options and options.max_batch > options.slots:
        parser.error("--max-batch must be at most --slots")
    options.run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
