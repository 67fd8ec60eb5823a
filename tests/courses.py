"""courses.py - in the test process: a course of nbgrader's, with an assignment and submissions."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat import v4

# nbgrader would be an extension of every server of the tests: it is installed beside them.
VERSION = "0.9.6"
_ALL = (
    f"nbgrader=={VERSION}", "alembic==1.20.1", "Mako==1.4.3", "rapidfuzz==3.14.6",
    "sqlalchemy==2.1.9",
)  # fmt: skip
PLACE = Path(tempfile.gettempdir(), f"sandbox-provisioner-nbgrader-{VERSION}-{os.geteuid()}")
ASSIGNMENT = "ps1"
NOTEBOOK = "problem"
SOLVE = "def double(x):\n    return 2 * x"
WRONG = "def double(x):\n    return x if x > 1 else 2 * x"
_PATIENCE_SECONDS = 300
_GRADE = ("grade", ASSIGNMENT, "--jobs", "2")


def python_path() -> dict[str, str]:
    """The variables by which a program finds nbgrader; it is fetched from the index the first time,
    unless it is installed."""
    programs = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    if importlib.util.find_spec("nbgrader"):
        return {"PATH": programs}
    if not PLACE.is_dir():
        with tempfile.TemporaryDirectory(dir=PLACE.parent) as folder:
            command = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")
            # Its utils import what Python no longer brings along.
            older = () if importlib.util.find_spec("setuptools") else ("setuptools",)
            words = (*command, "--target", f"{folder}/all", *_ALL, *older)
            subprocess.run(words, check=True, timeout=_PATIENCE_SECONDS)
            Path(folder, "all").rename(PLACE)
    assert PLACE.stat().st_uid == os.geteuid()
    return {"PYTHONPATH": str(PLACE), "PATH": f"{PLACE}/bin:{programs}"}


def cell(source: str, name: str, **marks: Any) -> Any:
    """A cell of the assignment's, as nbgrader marks it."""
    kind = {"grade": False, "solution": False, "locked": False, "task": False, **marks}
    made = v4.new_code_cell(source)
    made.metadata["nbgrader"] = {"schema_version": 3, "grade_id": name, **kind}
    return made


def source() -> Any:
    """The teacher's notebook: an exercise, a test that students see, and a hidden one."""
    begin, end = "### BEGIN SOLUTION", "### END SOLUTION"
    hidden = "### BEGIN HIDDEN TESTS\nassert double(21) == 42\n### END HIDDEN TESTS"
    book = v4.new_notebook(
        cells=[
            v4.new_markdown_cell("# Doubling"),
            cell(f"{begin}\n{SOLVE}\n{end}", "double", solution=True),
            cell("assert double(1) == 2", "test-one", grade=True, locked=True, points=3),
            cell(hidden, "test-two", grade=True, locked=True, points=7),
        ]
    )
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return book


class Course:
    """A course in *root*, with its assignment released and no submissions yet."""

    def __init__(self, root: Path, environment: Mapping[str, str]) -> None:
        self.root = root
        self.environment = {**environment, **python_path()}
        self.configure("")

    def release(self) -> None:
        """Write the assignment, and let nbgrader make of it what students get."""
        (self.root / "source" / ASSIGNMENT).mkdir(parents=True)
        nbformat.write(source(), self.root / "source" / ASSIGNMENT / f"{NOTEBOOK}.ipynb")
        self.nbgrader("generate_assignment", ASSIGNMENT)

    def configure(self, config: str) -> None:
        """Write its nbgrader_config.py."""
        text = f"c = get_config()\nc.CourseDirectory.course_id = 'course'\n{config}\n"
        (self.root / "nbgrader_config.py").write_text(text)

    def submit(self, student: str, solution: str, *more: str, tags: Sequence[str] = ()) -> Path:
        """Hand in *solution* for *student*, with cells of *more* code before it, and *tags* on the
        last test."""
        folder = self.root / "submitted" / student / ASSIGNMENT
        folder.mkdir(parents=True, exist_ok=True)
        book = nbformat.read(self.root / "release" / ASSIGNMENT / f"{NOTEBOOK}.ipynb", 4)
        book.cells[1].source = solution
        book.cells[1:1] = [v4.new_code_cell(code) for code in more]
        book.cells[-1].metadata["tags"] = list(tags)
        nbformat.write(book, folder / f"{NOTEBOOK}.ipynb")
        return folder

    def nbgrader(self, *words: str, status: int = 0) -> str:
        """What `nbgrader` says; it must end with *status*."""
        return self._run("nbgrader", *words, status=status)

    def grade(self, *words: str, status: int = 0) -> str:
        """The same of `jupyter sandbox grade`."""
        return self._run("sandbox_provisioner.app", *_GRADE, *words, status=status)

    def grading(self) -> subprocess.Popen[str]:
        """`jupyter sandbox grade`, whose output its caller reads."""
        words = (sys.executable, "-m", "sandbox_provisioner.app", *_GRADE)
        return subprocess.Popen(
            words, cwd=self.root, env={**self.environment, "PYTHONUNBUFFERED": "1"}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def _run(self, *words: str, status: int) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=self.root, env=self.environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stdout
        return done.stdout

    def graded(self, student: str) -> Any:
        """The notebook of *student* as it was graded."""
        return nbformat.read(
            self.root / "autograded" / student / ASSIGNMENT / f"{NOTEBOOK}.ipynb", 4
        )

    def marks(self) -> dict[str, list[float | None]]:
        """Of each student, the marks of both tests, by name, as nbgrader exports them."""
        script = (
            "import json\nfrom nbgrader.api import Gradebook\n"
            f"with Gradebook('sqlite:///{self.root}/gradebook.db') as book:\n"
            "    print(json.dumps({s.student.id: [g.auto_score for g in sorted("
            "(g for n in s.notebooks for g in n.grades), key=lambda g: g.cell.name)]"
            f" for s in book.assignment_submissions('{ASSIGNMENT}')}}))"
        )
        answer = subprocess.run(
            [sys.executable, "-c", script], env=self.environment, check=True,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return dict(json.loads(answer.stdout))
