"""``python -m tests.lifecycle --rounds 300 --seed 1``: the long form of test_rounds.py."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from leaks import Watch  # noqa: E402
from rounds import play_all  # noqa: E402


def main() -> None:
    """Play, and tell who was hit and what was left."""
    parser = argparse.ArgumentParser(prog="python -m tests.lifecycle", description=__doc__)
    parser.add_argument("--rounds", type=int, default=300, help="default: 300")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    parser.add_argument("--stop", action="store_true", help="SIGSTOP in place of SIGKILL")
    options = parser.parse_args()
    number = signal.SIGSTOP if options.stop else signal.SIGKILL
    watch = Watch()
    try:
        hits = play_all(options.rounds, options.seed, number, watch, say=print)
        print(f"\nhit: {dict(hits)}")
        sys.exit("\n".join(watch.leaks()))
    finally:
        watch.clean()


if __name__ == "__main__":
    main()
