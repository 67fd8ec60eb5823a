"""``python -m tests``: what fails anywhere fails the whole, and no skip is overlooked."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

TESTS = Path(__file__).parents[1]
# Our own name is "tests.__main__" only for `python -m tests`.
_spec = importlib.util.spec_from_file_location("runner", TESTS / "__main__.py")
runner = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runner)

LINES = [
    "# a comment - says nothing",
    "no Rscript - R is large",
    "[user*] requires root: - the outer run has it",
]
INNER = """
import pytest
def test_passes(): pass
def test_fails(): assert "its own text" == ""
@pytest.mark.skip(reason="it may not")
def test_is_skipped(): pass
"""
OUTER = """
import inner, os, pathlib, subprocess, sys
def test_outer(request, tmp_path):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_inner.py"]
    reports = tmp_path / "reports"
    done = subprocess.run(command, env={**os.environ, inner.REPORTS: str(reports)})
    inner.report_as("other", reports, request.config)
    assert done.returncode == 1
"""
ALONE = {"PYTHONPATH": str(TESTS), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
CONFTEST = """
import inner
def pytest_configure(config): inner.write_reports(config)
"""


def case_of(reason, classname="tests.inside.test_x"):
    text = (
        f'<testcase classname="{classname}" name="test_y"><skipped message="{reason}"/></testcase>'
    )
    return ElementTree.fromstring(text)


def refused(*case):
    return list(runner.unexplained_skips(case_of(*case), LINES))


def test_a_skip_is_refused_whose_reason_is_not_listed():
    assert refused("no Rscript on this machine") == []
    assert refused("a whim") == ["tests.inside.test_x.test_y: a whim"]
    assert refused("# a comment") != []


def test_a_skip_that_is_listed_for_a_variant_is_refused_elsewhere():
    assert refused("requires root: uid 4321", "user-range.test_x") == []
    assert refused("requires root: uid 4321", "root-warm.test_x") != []
    assert refused("requires root: uid 4321") != []


def test_a_test_of_an_inner_pytest_fails_the_outer_one_with_its_own_text(tmp_path):
    for name, text in {"test_inner": INNER, "test_outer": OUTER, "conftest": CONFTEST}.items():
        (tmp_path / f"{name}.py").write_text(text)
    report = tmp_path / "junit.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", f"--rootdir={tmp_path}",
         f"--junit-xml={report}", "test_outer.py"],
        cwd=tmp_path, env={**os.environ, **ALONE}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "assert 'its own text' == ''" in done.stdout
    assert "FAILED other/test_inner.py::test_fails" in done.stdout
    assert "1 failed, 2 passed, 1 skipped" in done.stdout
    cases = {
        (c.get("classname"), c.get("name")): c for c in ElementTree.parse(report).iter("testcase")
    }
    assert "its own text" in cases["other.test_inner", "test_fails"].find("failure").text
    assert (
        cases["other.test_inner", "test_is_skipped"].find("skipped").get("message") == "it may not"
    )
    assert len(cases["other.test_inner", "test_passes"]) == 0


@pytest.mark.parametrize(("middle", "status"), [("true", 0), ("false", 1)])
def test_what_fails_aside_fails_the_lane_and_does_not_stop_it(tmp_path, capsys, middle, status):
    with runner.aside(
        [["echo", "it's", "one"], [middle], ["echo", "last"]], tmp_path / "log"
    ) as lane:
        assert runner.follow(lane, tmp_path / "log") == status
    assert capsys.readouterr().out == "it's one\nlast\n"


def test_what_runs_aside_ends_when_we_are_interrupted(tmp_path):
    for name in ("begun", "never"):
        os.mkfifo(tmp_path / name)
    first = "trap 'echo cleaned up; exit 1' INT; exec 3<>never; echo > begun; read _ <&3"
    commands = [["sh", "-c", f"cd {tmp_path}; {first}"], ["echo", "not begun"]]
    with pytest.raises(KeyboardInterrupt), runner.aside(commands, tmp_path / "log") as lane:
        (tmp_path / "begun").read_text()
        raise KeyboardInterrupt
    assert lane.returncode == 130
    assert (tmp_path / "log").read_text() == "cleaned up\n"


def test_the_slowest_tests_are_told_with_the_time_of_all():
    cases = [
        ElementTree.fromstring(f'<testcase classname="c" name="{name}" time="{seconds}"/>')
        for name, seconds in (("quick", 0.5), ("slow", 6), ("slower", 7.25))
    ]
    assert runner.durations(cases).split() == [
        *("7.2", "c.slower"), *("6.0", "c.slow"), *("13.8", "all", "3", "tests"),
    ]  # fmt: skip


def test_every_room_of_tests_is_in_one_lane():
    there = {path.parent.name for path in TESTS.glob("*/test_*.py")}
    assert sorted([*runner.MAIN, *runner.ASIDE]) == sorted(there)
