"""The same tests of the box, run once more in sandboxes that a nursery has forked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from boxes import WARM

HERE = Path(__file__).parent
# Tests that take a start apart, or what a test's own runtime directory has in it, are not among
# them: test_warm_starts has theirs.
ROOMS = [
    ("test_file_system", 30),
    ("test_bounds", 5),
    ("test_covers", 30),
    ("test_identity", 15),
    ("test_limits", 8),
    ("test_namespaces", 25),
    ("test_system_calls", 20),
]


@pytest.mark.timeout(300)  # each is a pytest of many tests
@pytest.mark.requires("userns", "root", "cgroup-memory")
@pytest.mark.parametrize(("room", "fewest"), ROOMS)
def test_a_box_from_a_nursery_passes_the_tests_of_the_box(room: str, fewest: int) -> None:
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / f"{room}.py"))
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {WARM: "1"},
        cwd=HERE.parents[1],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    match = re.search(r"(\d+) passed", done.stdout)
    assert match, done.stdout
    assert int(match[1]) >= fewest
