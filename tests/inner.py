"""inner.py - in the test process: a pytest within a test, whose tests the outer one reports.

Each test of the inner pytest counts, fails and is skipped as if the outer one had run it, under the
name of what is different there::

    outer pytest ──environment: REPORTS──▶ inner pytest    (other user, other start)
                 ◀──a line a report──────                  tests/inside/test_covers.py::test_x
    user-warm/test_covers.py::test_x: its text, its time, in the summary and in junit.xml
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

# Where an inner pytest writes what became of its tests.
REPORTS = "SANDBOX_TEST_REPORTS"


class Writer:
    """The plugin of an inner pytest."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self.config = config
        self.file = Path(path).open("a")  # noqa: SIM115 - until pytest ends

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One line each, as pytest-xdist sends them to its controller."""
        hook = self.config.hook
        data = hook.pytest_report_to_serializable(config=self.config, report=report)
        self.file.write(json.dumps(data) + "\n")

    def pytest_unconfigure(self) -> None:
        """The last of them is on the disk when the process has ended."""
        self.file.close()


def write_reports(config: pytest.Config) -> None:
    """Be an inner pytest, if we are one. What a test starts in turn is not."""
    if path := os.environ.pop(REPORTS, ""):
        config.pluginmanager.register(Writer(config, path))


class Test(NamedTuple):
    """What became of one test of an inner pytest, and its text if it failed."""

    module: str
    name: str
    failures: tuple[str, ...]


def tests_of(path: Path, config: pytest.Config) -> list[Test]:
    """What *path* tells, each test once."""
    found: dict[tuple[str, str], list[str]] = {}
    for report in _reports(path, config):
        module, _, name = report.nodeid.partition("::")
        failures = found.setdefault((Path(module).stem, name), [])
        if report.failed:
            failures.append(report.longreprtext)
    return [Test(*names, tuple(failures)) for names, failures in found.items()]


def report_as(variant: str, path: Path, config: pytest.Config) -> None:
    """Let the outer pytest report everything of *path*, as tests of *variant*."""
    for report in _reports(path, config):
        module, _, name = report.nodeid.partition("::")
        report.nodeid = f"{variant}/{Path(module).name}::{name}"
        config.hook.pytest_runtest_logreport(report=report)


def _reports(path: Path, config: pytest.Config) -> Iterator[pytest.TestReport]:
    for line in path.read_text().splitlines():
        data = json.loads(line)
        if data["outcome"] == "skipped":
            data["longrepr"] = tuple(data["longrepr"])  # where, and why
        yield config.hook.pytest_report_from_serializable(config=config, data=data)
