"""What became of the tests of another project's suite."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Results:
    """What became of each test of the suite, by the names of a JUnit report, and where it ran."""

    failures: dict[str, str] = field(default_factory=dict)
    passed: set[str] = field(default_factory=set)
    folder: Path = Path()
    output: str = ""

    def note(self, report: Path) -> None:
        """Take in pytest's *report*: one that passes when it runs again has passed."""
        for case in ET.parse(report).iter("testcase"):
            name = f"{case.attrib['classname']}::{case.attrib['name']}"
            bad = [part for part in case if part.tag in {"failure", "error"}]
            if bad:
                self.failures[name] = bad[0].attrib.get("message", "")
            elif case.find("skipped") is None:
                self.passed.add(name)
                self.failures.pop(name, None)


def node_id(name: str) -> str:
    """ "tests.test_x.Class::test" -> "tests/test_x.py::Class::test"."""
    path, _, test = name.partition("::")
    package, module, *classes = path.split(".")
    return "::".join([f"{package}/{module}.py", *classes, test])
