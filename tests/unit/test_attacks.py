"""docs/attacks.md is made from the table of tests/escape, and is not stale."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_page_of_attacks_is_that_of_the_table():
    page = subprocess.run(
        [sys.executable, "-m", "tests.escape"],
        cwd=REPOSITORY, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    written = (REPOSITORY / "docs/attacks.md").read_text()
    assert page == written, "Run: python -m tests.escape > docs/attacks.md"
    assert len(re.findall(r"^\| \d", page, re.MULTILINE)) >= 150
