"""The benchmark of starts through the broker leaves nothing of what it has had made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from facilities import roots_python

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.slow("a benchmark, whose first rounds do not count"),
    pytest.mark.requires("userns", "root", "cgroup-memory", "ordinary-user"),
]

# Whoever loses its parent in this becomes a child of its own, and is told and ended.
RUN = """
import contextlib, os, signal, subprocess, sys
from sandbox_provisioner.inside import kernel_calls

kernel_calls.adopt_orphans()
words = [sys.executable, "-m", "benchmarks", "broker", "--rounds", "1"]
subprocess.run(words, check=True, stdout=sys.stderr)
with contextlib.suppress(ChildProcessError):
    while os.waitpid(-1, os.WNOHANG)[0]:
        pass
for pid in open(f"/proc/self/task/{os.getpid()}/children").read().split():
    print(open(f"/proc/{pid}/cmdline").read())
    os.kill(int(pid), signal.SIGKILL)
    os.waitpid(int(pid), 0)
"""


def test_the_benchmark_of_the_broker_ends_all_that_it_has_had_made() -> None:
    if found := roots_python():
        pytest.skip(f"not root's alone: {found}")
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=Path(__file__).parents[2],
        env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "spare" in done.stderr
    assert done.stdout == ""
