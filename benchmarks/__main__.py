"""``python -m benchmarks start | steps``: see README.md beside this file."""

from __future__ import annotations

import argparse

from benchmarks import start, steps


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
    options = parser.parse_args()
    run = {"start": start.main, "steps": steps.main}[options.command]
    run(options.rounds, options.json)


if __name__ == "__main__":
    main()
