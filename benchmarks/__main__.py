"""``python -m benchmarks NAME``: see README.md beside this file."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

from benchmarks import (
    broker,
    crowd,
    density,
    files,
    gpu,
    grade,
    loop,
    network,
    overhead,
    soak,
    start,
    steps,
)


class Benchmark(NamedTuple):
    """What a benchmark is about, what runs it, and its options: name, default, what it is."""

    about: str
    main: Callable[..., None]
    options: tuple[tuple[str, int | float | str, str], ...]


_ROUNDS = ("rounds", 20, "rounds of all of them")
BENCHMARKS = {
    "start": Benchmark(
        "time and memory of sandboxed kernels beside plain ones", start.main, (_ROUNDS,)
    ),
    "steps": Benchmark(
        "where the milliseconds of a sandboxed start go",
        steps.main,
        (_ROUNDS, ("kind", "cold", "of start: cold, nursery or spare")),
    ),
    "loop": Benchmark(
        "how long the event loop stands still while kernels start, run and end",
        loop.main,
        (
            ("rounds", 10, "of one kernel"),
            ("at-once", 60, "kernels then"),
            ("crowds", 3, "of those"),
        ),
    ),
    "density": Benchmark(
        "memory of each of many kernels, and starts while many are alive",
        density.main,
        (
            ("few", "1,2,5,20", "kernels together, to weigh with and without their nursery"),
            ("each", 50, "kernels to weigh, 0 to leave out this and all that follows"),
            ("alive", 300, "kernels at once"),
            ("seconds", 10.0, "of starts"),
        ),
    ),
    "grade": Benchmark(
        "grading an assignment, beside nbgrader autograde",
        grade.main,
        (
            ("submissions", 100, "that are graded"),
            ("chunks", 4, "in which both take turns"),
            ("cold", 8, "of them graded by nbgrader in boxes, one by one"),
        ),
    ),
    "overhead": Benchmark(
        "what work costs in a sandboxed kernel, beside a plain one", overhead.main, (_ROUNDS,)
    ),
    "gpu": Benchmark(
        "what a GPU costs in a box, beside plain kernels: starts up to the first result, and work",
        gpu.main,
        (
            _ROUNDS,
            ("work-rounds", 20, "rounds of work"),
            ("device", "nvidia.com/gpu=0", "as a specification names it"),
        ),
    ),
    "files": Benchmark(
        "what another root and its layer cost: starts, memory, small and large files, an install",
        files.main,
        (
            ("rounds", 20, "of starts"),
            ("work", 20, "rounds of work; 0 for none"),
        ),
    ),
    "network": Benchmark(
        "what a network costs: the gateway, a card, and others where they are installed",
        network.main,
        (
            ("rounds", 20, "of kernels"),
            ("pairs", 100, "rounds of boxes without a kernel"),
            ("alive", 200, "kernels at once, with the gateway and with a card; 0 for none"),
            ("seconds", 3.0, "of a flow in each direction; 0 for none"),
        ),
    ),
    "broker": Benchmark(
        "what a start through the broker costs beside one by a server of root's, as root",
        broker.main,
        (_ROUNDS,),
    ),
    "crowd": Benchmark(
        "many users with some kernels each, through one broker or one hub, as root",
        crowd.main,
        (
            ("users", 50, "who are there at once"),
            ("kernels", 4, "of each"),
            ("through", "broker", "or hub: a server in a box for each of them"),
        ),
    ),
    "soak": Benchmark(
        "what a server keeps of kernels that have come and gone",
        soak.main,
        (("cycles", 1000, "kernels, one after the other"), ("plot", "", "SVG file to write")),
    ),
}
_COMPARISONS = ("start", "density", "overhead")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.about, description=benchmark.about)
        for option, default, about in benchmark.options:
            told = f"{about}; default: {default}" if default else about
            command.add_argument(f"--{option}", type=type(default), default=default, help=told)
        command.add_argument("--json", metavar="FILE", help="save every sample to FILE")
    about = f"{', '.join(_COMPARISONS)}, as they are by default"
    commands.add_parser("run", help=about, description=about)
    return parser


def main(words: list[str] | None = None) -> None:
    """Read the command line and run one benchmark, or those that compare."""
    options = vars(_parser().parse_args(words))
    name = options.pop("command")
    if name == "run":
        for one in _COMPARISONS:
            print(f"\n-- {one}\n")
            main([one])
        return
    benchmark = BENCHMARKS[name]
    chosen = [options[option.replace("-", "_")] for option, _, _ in benchmark.options]
    benchmark.main(*chosen, options["json"])


if __name__ == "__main__":
    main()
