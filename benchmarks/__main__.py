"""``python -m benchmarks start | steps | loop | density``: see README.md beside this file."""

from __future__ import annotations

import argparse

from benchmarks import density, loop, start, steps


def main() -> None:
    """Read the command line and run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("start", "time and memory of sandboxed kernels beside plain ones"),
        ("steps", "where the milliseconds of a sandboxed start go"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--rounds", type=int, default=20, help="default: 20")
        command.add_argument("--json", metavar="FILE", help="save every sample to FILE")
    kinds = ("cold", "nursery", "spare")
    command.add_argument("--kind", choices=kinds, default="cold", help="of start; default: cold")
    about = "how long the event loop stands still while kernels start, run and end"
    command = commands.add_parser("loop", help=about, description=about)
    command.add_argument("--rounds", type=int, default=10, help="of one kernel; default: 10")
    command.add_argument("--at-once", type=int, default=60, help="kernels then; default: 60")
    command.add_argument("--json", metavar="FILE", help="save every sample to FILE")
    about = "memory of each of many kernels, and starts while many are alive"
    command = commands.add_parser("density", help=about, description=about)
    command.add_argument("--each", type=int, default=50, help="kernels to weigh; default: 50")
    command.add_argument("--alive", type=int, default=300, help="kernels at once; default: 300")
    command.add_argument("--seconds", type=float, default=10, help="of starts; default: 10")
    command.add_argument("--json", metavar="FILE", help="save every sample to FILE")
    options = parser.parse_args()
    if options.command == "density":
        density.main(options.each, options.alive, options.seconds, options.json)
        return
    if options.command == "loop":
        loop.main(options.rounds, options.at_once, options.json)
        return
    if options.command == "steps":
        steps.main(options.rounds, options.kind, options.json)
        return
    start.main(options.rounds, options.json)


if __name__ == "__main__":
    main()
