"""nbgrader's own ``nbgrader autograde``: hostile submissions beside honest ones, in boxes.

Each attempt has to succeed with a plain kernel, by the same text, or it proves nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from courses import ASSIGNMENT, NOTEBOOK, SOLVE, WRONG, Course
from jupyter_programs import EAT_MEMORY, Home

pytestmark = [
    pytest.mark.requires("userns", "cgroup-memory", "cgroup-pids", "nbclient"),
    pytest.mark.slow("nbgrader, twice"),
    # Processes of others' compute, one after the other: on a busy machine that takes its time.
    pytest.mark.timeout(900),
]

BOXED = """
from sandbox_provisioner.grade.preprocessor import AUTOGRADE
c.Autograde.autograde_preprocessors = AUTOGRADE
c.SandboxExecute.kernel_name = "boxed"
c.Execute.timeout_func = lambda cell: 1 if "FOR EVER" in cell.source else 60
"""
# No more time is given to who never ends, so that nothing hangs on how busy the machine is.
ALL_AT_ONCE = """
c.Execute.timeout_func = lambda cell: 1 if "FOR EVER" in cell.source else 60
c.SandboxExecute.kernel_name = "boxed"
"""
HELD = ("key", "another's", "link", "gradebook", "tests")
# Runs in the submission; tells in JSON what it could do.
ATTEMPTS = """
import json, os, socket, subprocess
found = {{}}
def attempt(name, call):
    try:
        found[name] = call() or "done"
    except BaseException as error:
        found[name] = type(error).__name__
def connect():
    socket.create_connection(("127.0.0.1", {port}), 2).close()
def children():
    made = []
    try:
        for _ in range(100):
            made.append(subprocess.Popen(["sleep", "60"]))
    finally:
        for child in made:
            child.kill()
            child.wait()
def plant(name):
    def call():
        with open(name, "w") as file:
            file.write("raise SystemExit('planted')")
    return call
attempt("key", lambda: open("{root}/source/{assignment}/{notebook}.ipynb").close())
attempt("another's", lambda: open("{root}/submitted/honest/{assignment}/{notebook}.ipynb").close())
attempt("link", lambda: open("link.txt").close())
attempt("gradebook", lambda: open("{root}/gradebook.db", "r+b").close())
attempt("tests", lambda: open("{notebook}.ipynb").read().index("double(21)") and "done")
attempt("own notebook", plant("{notebook}.ipynb"))
attempt("configuration", plant("nbgrader_config.py"))
attempt("configuration of Jupyter", plant("jupyter_config.py"))
attempt("connect", connect)
attempt("processes", children)
attempt("disk", lambda: os.posix_fallocate(os.open("big", os.O_CREAT | os.O_RDWR), 0, 40 << 20))
print("FOUND" + json.dumps(found))
"""
MEGABYTES = "print('x' * (3 << 20), flush=True)"
# Every cell that comes later is another one.
PASSES = "get_ipython().input_transformers_cleanup.append(lambda lines: ['pass\\n'])"
FOR_EVER = """  # FOR EVER
import time
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
"""


@pytest.fixture(scope="module")
def released() -> Iterator[tuple[Home, Path]]:
    """A course whose assignment is released; each test has a copy."""
    with Home() as home:
        home.add_kernel("boxed", mem_limit="200M", pids_limit=50, tmp_limit="32M")
        root = home.notebooks / "released"
        root.mkdir()
        Course(root, home.environment()).release()
        yield home, root


@pytest.fixture
def course(released: tuple[Home, Path], request: pytest.FixtureRequest) -> Iterator[Course]:
    home, root = released
    own = home.notebooks / request.node.name[:20]
    shutil.copytree(root, own)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = Course(own, home.environment())
        names = {"root": own, "assignment": ASSIGNMENT, "notebook": NOTEBOOK}
        attempts = ATTEMPTS.format(port=listener.getsockname()[1], **names)
        made.submit("honest", SOLVE)
        folder = made.submit("curious", SOLVE, attempts, MEGABYTES)
        (folder / "link.txt").symlink_to(own / "source" / ASSIGNMENT / f"{NOTEBOOK}.ipynb")
        made.submit("passes", WRONG, PASSES)
        made.submit("skips", WRONG, tags=["skip-execution"])
        yield made
    assert home.records() == []
    shutil.rmtree(own)


def found_by(book: Any) -> dict[str, str]:
    """What the attempts in *book* could do."""
    text = "".join(
        output.get("text", "") for cell in book.cells for output in cell.get("outputs", ())
    )
    line = next(line for line in text.splitlines() if line.startswith("FOUND"))
    return dict(json.loads(line.removeprefix("FOUND")))


def planted(course: Course) -> set[str]:
    return {path.name for path in (course.root / "autograded/curious" / ASSIGNMENT).iterdir()}


def size_of(course: Course, student: str) -> int:
    return Path(course.root, "autograded", student, ASSIGNMENT, f"{NOTEBOOK}.ipynb").stat().st_size


def add_greedy(course: Course) -> None:
    """What would hurt the machine, or never end, has no control."""
    course.submit("hungry", SOLVE, EAT_MEMORY)
    course.submit("waits", SOLVE, FOR_EVER)


DESERVED = {
    "honest": [3, 7],
    "curious": [3, 7],
    "passes": [0, 0],
    "skips": [3, 0],
    "hungry": [0, 0],
    "waits": [0, 0],
}


def test_hostile_submissions_are_graded_and_get_nothing_by_it(course: Course) -> None:
    # With plain kernels, as nbgrader is installed: all of it succeeds.
    course.nbgrader("autograde", ASSIGNMENT)
    assert set(found_by(course.graded("curious")).values()) == {"done"}
    assert {"nbgrader_config.py", "jupyter_config.py", "big"} <= planted(course)
    assert size_of(course, "curious") > 3 << 20
    assert course.marks() == {name: [3, 7] for name in ("honest", "curious", "passes", "skips")}

    add_greedy(course)
    course.configure(BOXED)
    key = course.root / "source" / ASSIGNMENT / f"{NOTEBOOK}.ipynb"
    handed_in = course.submit("linked", SOLVE) / key.name
    handed_in.unlink()
    handed_in.symlink_to(key)
    log = course.nbgrader("autograde", ASSIGNMENT, "--force", status=1)
    assert "Could not grade problem of linked: it is a symbolic link" in log
    assert found_by(course.graded("curious")) == {
        "key": "FileNotFoundError",
        "another's": "FileNotFoundError",
        "link": "FileNotFoundError",
        "gradebook": "FileNotFoundError",
        "tests": "FileNotFoundError",
        "own notebook": "done",  # in memory, and gone with it
        "configuration": "done",
        "configuration of Jupyter": "done",
        "connect": "ConnectionRefusedError",
        "processes": "BlockingIOError",
        "disk": "OSError",
    }
    # nbgrader itself follows links when it copies: after the box, and for who grades alone.
    assert planted(course) == {f"{NOTEBOOK}.ipynb", "link.txt"}
    assert size_of(course, "curious") < 1 << 20
    assert course.marks() == {**DESERVED, "linked": [None, None]}
    assert "problem of hungry: stopped: memory limit of 200 MiB, at cell 2" in log
    assert "problem of waits: stopped: time limit of 1 s a cell, and the interrupt was not" in log
    assert "problem of passes: does not count: before the tests at cell 4 (test-one)" in log


def add_unreadable(course: Course) -> None:
    """What is no notebook, each by a student of its name."""
    deep = "[" * 5000 + "]" * 5000
    for name, text in {"words": "print(1)", "deep": f'{{"cells": [], "metadata": {deep}}}'}.items():
        course.submit(name, SOLVE).joinpath(f"{NOTEBOOK}.ipynb").write_text(text)
    huge = course.submit("huge", SOLVE) / f"{NOTEBOOK}.ipynb"
    huge.write_bytes(b"")
    os.truncate(huge, 50 << 20)
    linked = course.submit("linked", SOLVE) / f"{NOTEBOOK}.ipynb"
    linked.unlink()
    linked.symlink_to(course.root / "source" / ASSIGNMENT / f"{NOTEBOOK}.ipynb")


def ended_early(course: Course, number: int) -> str:
    """What `grade` says that gets the signal *number* when it has graded somebody more."""
    with course.grading() as program:
        assert program.stdout
        first = next(line for line in program.stdout if "graded" not in line)
        program.send_signal(number)
        rest, _ = program.communicate()
    return str(first + rest)


def test_an_assignment_is_graded_whole_whoever_ends_it_and_whatever_was_handed_in(
    course: Course,
) -> None:
    add_greedy(course)
    add_unreadable(course)
    course.configure(ALL_AT_ONCE)
    assert " of 10" in ended_early(course, signal.SIGKILL)
    told = ended_early(course, signal.SIGINT)
    assert "The same command goes on from here" in told
    assert not (course.root / ".sandbox-grade" / f"{ASSIGNMENT}.work").exists()
    # Who has been graded, and hands in anew, is graded again.
    book = (course.root / ".sandbox-grade" / f"{ASSIGNMENT}.jsonl").read_text().splitlines()
    anew = json.loads(book[0])["student"]
    course.submit(anew, WRONG)

    log = course.grade(status=1)
    assert course.marks() == {**DESERVED, anew: [3, 0]}
    assert "hungry: 0 of 10: problem: stopped: memory limit of 200 MiB, at cell 2" in log
    assert "waits: 0 of 10: problem: stopped: time limit of 1 s a cell, and the interrupt" in log
    assert "passes: 0 of 10: problem: does not count" in log
    assert "deep: not graded: Could not read" in log and "it is nested too deeply" in log
    assert "words: not graded: Could not read" in log
    assert "huge: not graded: Could not read" in log and "it is larger than 16 MiB" in log
    assert "linked: not graded: Could not read" in log
    before = re.search(r"6 graded, (\d) of them before, 3 with a verdict, 4 not graded", log)
    assert before and int(before[1]) == len(book) - 1
    if anew != "curious":
        found = found_by(course.graded("curious"))
        assert {found[name] for name in HELD} == {"FileNotFoundError"}
    assert planted(course) == {f"{NOTEBOOK}.ipynb"}
