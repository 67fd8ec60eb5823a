"""nbgrader's own ``nbgrader autograde``: hostile submissions beside honest ones, in boxes.

Each attempt has to succeed with a plain kernel, by the same text, or it proves nothing.
"""

from __future__ import annotations

import json
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
]

BOXED = """
from sandbox_provisioner.grade.preprocessor import AUTOGRADE
c.Autograde.autograde_preprocessors = AUTOGRADE
c.SandboxExecute.kernel_name = "boxed"
c.Execute.timeout_func = lambda cell: 1 if "FOR EVER" in cell.source else 60
"""
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


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@pytest.fixture
def course(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Course]:
    with Home() as home:
        home.add_kernel("boxed", mem_limit="200M", mem_interrupt=0, pids_limit=50, tmp_limit="32M")
        root = home.notebooks / "course"
        root.mkdir()
        made = Course(root, home.environment(JUPYTER_PREFER_ENV_PATH="1"))
        port = listener.getsockname()[1]
        attempts = ATTEMPTS.format(port=port, root=root, assignment=ASSIGNMENT, notebook=NOTEBOOK)
        made.submit("honest", SOLVE)
        made.submit("curious", SOLVE, attempts, MEGABYTES)
        made.submit("passes", WRONG, PASSES)
        made.submit("skips", WRONG, tags=["skip-execution"])
        yield made


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


def test_hostile_submissions_are_graded_and_get_nothing_by_it(course: Course) -> None:
    # With plain kernels, as nbgrader is installed: all of it succeeds.
    course.nbgrader("autograde", ASSIGNMENT)
    assert set(found_by(course.graded("curious")).values()) == {"done"}
    assert {"nbgrader_config.py", "jupyter_config.py", "big"} <= planted(course)
    assert size_of(course, "curious") > 3 << 20
    before = {"honest": [3, 7], "curious": [3, 7], "passes": [3, 7], "skips": [3, 7]}
    assert course.marks() == before

    # What would hurt the machine, or never end, has no such control.
    course.submit("hungry", SOLVE, EAT_MEMORY)
    course.submit("waits", SOLVE, FOR_EVER)
    course.configure(BOXED)
    log = course.nbgrader("autograde", ASSIGNMENT, "--force")
    assert found_by(course.graded("curious")) == {
        "key": "FileNotFoundError",
        "another's": "FileNotFoundError",
        "gradebook": "FileNotFoundError",
        "tests": "FileNotFoundError",
        "own notebook": "done",  # in memory, and gone with it
        "configuration": "done",
        "configuration of Jupyter": "done",
        "connect": "ConnectionRefusedError",
        "processes": "BlockingIOError",
        "disk": "OSError",
    }
    assert planted(course) == {f"{NOTEBOOK}.ipynb"}
    assert size_of(course, "curious") < 1 << 20
    stopped = {"hungry": [0, 0], "waits": [0, 0]}
    assert course.marks() == {**before, "passes": [0, 0], "skips": [3, 0], **stopped}
    assert "problem of hungry: stopped: memory limit of 200 MiB, at cell 2" in log
    assert "problem of waits: stopped: time limit of 1 s a cell, and the interrupt was not" in log
    assert "problem of passes: does not count: before the tests at cell 4 (test-one)" in log
