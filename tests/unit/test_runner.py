"""``python -m tests``: what fails anywhere fails the whole, and no skip is overlooked."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sandbox_provisioner.launcher.verbs import VERBS
from sandbox_provisioner.stages import SERVER_STEPS
from tests.vm import __main__ as vm

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


def test_every_step_that_some_starts_may_lack_is_one():
    text = (TESTS / "allowed_skips.txt").read_text()
    listed = set(re.findall(r"has no step (\S+) - ", text))
    assert listed
    assert listed <= {*VERBS, *SERVER_STEPS}


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


@pytest.mark.parametrize("status", [0, 3])
def test_what_a_lane_says_is_told_with_its_exit_status(tmp_path, capsys, status):
    command = ["sh", "-c", f"echo it\\'s one; echo last >&2; exit {status}"]
    with runner.aside(command, tmp_path / "log") as lane:
        assert runner.follow(lane, tmp_path / "log") == status
    assert capsys.readouterr().out == "it's one\nlast\n"


def test_lanes_end_when_we_are_interrupted(tmp_path):
    for name in ("begun", "never"):
        os.mkfifo(tmp_path / name)
    text = f"cd {tmp_path}; trap 'echo cleaned up; exit 1' INT; exec 3<>never; echo > begun"
    command = ["sh", "-c", f"{text}; read _ <&3"]
    with pytest.raises(KeyboardInterrupt), runner.aside(command, tmp_path / "log") as lane:
        (tmp_path / "begun").read_text()
        raise KeyboardInterrupt
    assert lane.returncode == 1
    assert (tmp_path / "log").read_text() == "cleaned up\n"


def test_the_slowest_tests_are_told_with_the_time_of_all():
    cases = [
        ElementTree.fromstring(f'<testcase classname="c" name="{name}" time="{seconds}"/>')
        for name, seconds in (("quick", 0.5), ("slow", 6), ("slower", 7.25))
    ]
    assert runner.durations(cases).split() == [
        *("7.2", "c.slower"), *("6.0", "c.slow"), *("13.8", "all", "3", "tests"),
    ]  # fmt: skip


# -- what fails once, and passes alone

STEADY = "def test_steady(): pass\n"
BROKEN = "def test_broken(): assert 'always' == ''\n"
FLAKY = """
from pathlib import Path
def test_flaky():
    print("printed by the first run")
    seen = Path(__file__).with_suffix(".seen")
    there, _ = seen.exists(), seen.touch()
    assert there, "a hiccup"
"""
LEAVES = """
import pytest
from pathlib import Path
@pytest.fixture
def leaves():
    yield
    seen = Path(__file__).with_suffix(".seen")
    there, _ = seen.exists(), seen.touch()
    assert there, "it leaves something behind"
def test_leaves(leaves): pass
"""
NO_END = "pytest has not run to its end"
SKIPS = FLAKY.replace("assert there", "if there: __import__('pytest').skip('no')\n    assert there")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """``project(main={"test_x": TEXT}, aside=…, vm=0)`` runs two lanes there; the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(aside=None, vm=0, main="room", linters=(), **modules):
        for folder, texts in ((main, modules), ("beside", aside or {"test_beside": STEADY})):
            for name, text in texts.items():
                Path("tests", folder).mkdir(parents=True, exist_ok=True)
                Path("tests", folder, f"{name}.py").write_text(text)
        Path("artefacts").mkdir()
        monkeypatch.setattr(runner, "LANES", {"main": (main,), "aside": ("beside",)})
        monkeypatch.setattr(runner, "LINTERS", linters)
        monkeypatch.setattr(runner, "_VM", ("sh", "-c", f"exit {vm}"))
        return runner.run_lanes(Path("artefacts"), with_vm=True)

    return run


def test_a_test_that_passes_alone_is_told_loudly_and_the_run_goes_on(project, capfd):
    assert project(test_it=FLAKY, aside={"test_its": LEAVES}) == 0
    told, kept = capfd.readouterr().out, Path("artefacts/unsteady.txt").read_text()
    for name, why in (
        ("tests/room/test_it.py::test_flaky", "AssertionError: a hiccup"),
        ("tests/beside/test_its.py::test_leaves", "AssertionError: it leaves something behind"),
    ):
        for text in (told[told.index("UNSTEADY") :], kept):
            assert f"UNSTEADY: {name}\n" in text
            assert why in text
    assert "printed by the first run" in kept


def test_a_run_in_which_all_pass_at_once_tells_of_nothing_unsteady(project, tmp_path, capfd):
    assert project(test_it=STEADY) == 0
    assert "UNSTEADY" not in capfd.readouterr().out
    assert not Path("artefacts/unsteady.txt").exists()


def test_a_test_that_fails_again_fails_the_run_and_what_was_unsteady_is_told_too(project, capfd):
    assert project(test_it=FLAKY, test_other=BROKEN) == 1
    told = capfd.readouterr().out
    assert "It fails alone too: tests/room/test_other.py::test_broken\n" in told
    assert "UNSTEADY: tests/room/test_it.py::test_flaky\n" in told


def test_a_skip_is_refused_also_where_something_has_failed(project, capfd):
    skips = "import pytest\ndef test_skips(): pytest.skip('a whim')\n"
    assert project(test_it=BROKEN, test_other=skips) == 1
    told = capfd.readouterr().out
    assert "not allowed to skip: tests.room.test_other.test_skips: a whim\n" in told
    assert "It fails alone too: tests/room/test_it.py::test_broken\n" in told


@pytest.mark.parametrize("more", [{}, {"vm": 1}], ids=["it fails alone too", "nothing runs again"])
def test_the_last_thing_that_a_failed_run_says_is_why_in_few_lines(project, capfd, more):
    long = "def test_long():\n    print('x' * 10000)\n    assert 6 * 9 == 42, 'y' * 10000\n"
    assert project(test_it=long, **more) == 1
    told = capfd.readouterr().out[-2000:]
    last = told[told.index("FAILED tests/room/test_it.py::test_long\n>") :]
    assert "assert 6 * 9 == 42" in last
    assert len(last) < 1500


def test_a_test_that_is_skipped_when_it_runs_again_has_not_passed(project, capfd):
    assert project(test_it=SKIPS) == 1
    assert "It fails alone too: tests/room/test_it.py::test_flaky\n" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("told", "options"),
    [
        ("the virtual machine", {"test_it": FLAKY, "vm": 1}),
        ("a wall that holds at the second attempt", {"main": "escape", "test_it": FLAKY}),
        (
            NO_END,
            {"test_it": "def test_x(): __import__('os')._exit(1)", "aside": {"test_f": FLAKY}},
        ),
        (NO_END, {"test_it": FLAKY, "aside": {"test_none": ""}}),
    ],
)
def test_what_may_not_be_unsteady_fails_the_run_at_once(project, capfd, told, options):
    assert project(**options) == 1
    out = capfd.readouterr().out
    assert f"Nothing is run again: {told}" in out
    assert "UNSTEADY" not in out


@pytest.mark.parametrize(
    "text",
    [
        FLAKY.replace("test_flaky", "test_it_works_without_the_box"),
        FLAKY.replace('assert there, "a hiccup"', "if not there: raise TimeoutError"),
    ],
    ids=["a control", "an attempt without an answer"],
)
def test_what_tells_nothing_of_a_wall_may_be_unsteady(project, capfd, text):
    assert project(main="escape", test_it=text) == 0
    assert "UNSTEADY: tests/escape/test_it.py::test_" in capfd.readouterr().out


FAILS = '<testcase classname="tests.{}.test_it" name="{}"><failure message="assert 0"/></testcase>'
PASSES = '<testcase classname="tests.{}.test_it" name="{}"/>'


@pytest.mark.parametrize(
    ("room", "stays", "status"),
    [("room", "", 0), ("room", "user", 1), ("escape", "", 1)],
    ids=["it passes alone", "it fails again in one set-up", "a wall"],
)
def test_what_fails_in_the_guest_runs_again_where_it_failed(
    tmp_path, monkeypatch, room, stays, status
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SANDBOX_ARTEFACTS", "artefacts")
    Path("tests", room).mkdir(parents=True)
    Path("tests", room, "test_it.py").touch()
    runs = []

    def run(setup, chosen, results):
        fails = setup.name == stays if chosen != ["all"] else setup.name != "units"
        runs.append((setup.name, *chosen))
        results.write_text(
            f"<testsuite>{(FAILS if fails else PASSES).format(room, 'test_x')}</testsuite>"
        )
        return int(fails)

    monkeypatch.setattr(vm, "run", run)
    setups = [setup for setup in vm.SETUPS if setup.name in {"root", "user", "units"}]
    assert vm.run_all(setups, ["all"]) == status
    again = [(name, "tests/room/test_it.py::test_x") for name in ("root", "user")]
    assert runs[3:] == (again if room == "room" else [])


def test_a_linter_that_finds_fault_ends_the_other_lanes_and_begins_no_test(project, capfd):
    waits = "import os\ndef test_waits(): os.read(os.pipe()[0], 1)"
    linters = [("pytest", "--version"), ("nowhere-to-be-found",)]
    assert project(linters=linters, test_it=BROKEN, aside={"test_waits": waits}) == 1
    told = capfd.readouterr()
    assert "No module named nowhere-to-be-found" in told.err
    assert "test_broken" not in told.out


def test_four_tests_that_have_failed_are_too_many_to_be_unsteady():
    failures = {runner.unsteady.Case("tests.room.test_it", f"test_{n}"): "" for n in range(4)}
    assert "at most 3" in runner.unsteady.why_not_again(failures, [], [], [0])
    failures.popitem()
    assert runner.unsteady.why_not_again(failures, [], [], [0]) == ""


def test_a_test_of_an_inner_pytest_is_run_again_by_the_test_that_runs_it(project, capfd):
    inner = Path("test_inner.py").absolute()
    inner.write_text(FLAKY)
    shutil.copy(TESTS / "inner.py", ".")
    Path("conftest.py").write_text(CONFTEST)
    outer = OUTER.replace("test_inner.py", str(inner)).replace("returncode == 1", "returncode == 0")
    assert project(test_outer=outer) == 0
    told = capfd.readouterr().out
    assert "UNSTEADY: other.test_inner.test_flaky\n" in told
    assert "UNSTEADY: tests/room/test_outer.py::test_outer\n" in told


def test_every_room_of_tests_is_in_one_lane():
    there = {path.parent.name for path in TESTS.glob("*/test_*.py")}
    assert sorted(room for rooms in runner.LANES.values() for room in rooms) == sorted(there)
