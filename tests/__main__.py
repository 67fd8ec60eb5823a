"""``python -m tests``: the linters, then all tests, quick ones first; this is what CI runs.

Arguments go to pytest: ``python -m tests tests/unit`` or ``python -m tests -k interrupt``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).parent
ROOMS = ("unit", "inside", "kernels", "lifecycle", "programs", "escape", "suites", "browser")
LINTERS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
)


def main() -> int:
    """Run all; the exit status is that of the first thing that fails."""
    os.chdir(TESTS.parent)
    for linter in LINTERS:
        status = subprocess.run([sys.executable, "-m", *linter], check=False).returncode
        if status:
            return status
    report = Path(os.environ.get("SANDBOX_ARTEFACTS", "artefacts")) / "junit.xml"
    chosen = sys.argv[1:] or [f"tests/{room}" for room in ROOMS]
    pytest = [sys.executable, "-m", "pytest", "-ra", f"--junit-xml={report}", *chosen]
    status = subprocess.run(pytest, check=False).returncode
    return status or refuse_unexplained_skips(report)


def refuse_unexplained_skips(report: Path) -> int:
    """1 if a test was skipped for a reason that allowed_skips.txt does not know."""
    lines = (TESTS / "allowed_skips.txt").read_text().splitlines()
    allowed = [line.partition(" - ")[0] for line in lines if line and not line.startswith("#")]
    status = 0
    for case in ElementTree.parse(report).iter("testcase"):
        for skip in case.iter("skipped"):
            reason = skip.get("message", "")
            if not any(part in reason for part in allowed):
                print(f"not allowed to skip: {case.get('classname')}.{case.get('name')}: {reason}")
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
