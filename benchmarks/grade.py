"""grade.py - an assignment graded by ``jupyter sandbox grade``, and by ``nbgrader autograde``.

The same small submissions lie in courses of their own, and are graded in chunks, in turns: a slow
minute of the machine hits all alike. nbgrader has to be installed: ``pip install '.[grade]'``.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat import v4

from benchmarks import common

ASSIGNMENT = "ps1"
_SOLUTION = "def mean(values):\n    return float(np.asarray(values).mean())"
_WRONG = "def mean(values):\n    return sum(values) / 7"
_DRAWN = "values = np.random.rand(1000)\nplt.hist(values)\nplt.show()\nprint(mean(values))"
_BOXED = """
from sandbox_provisioner.grade.preprocessor import AUTOGRADE
c.Autograde.autograde_preprocessors = AUTOGRADE
"""
_MARKS = """
import json, sys
from nbgrader.api import Gradebook
with Gradebook(f"sqlite:///{sys.argv[1]}/gradebook.db") as book:
    print(json.dumps({s.student.id: s.score for s in book.assignment_submissions("ps1")}))
"""


def _cell(source: str, name: str, **marks: Any) -> Any:
    cell = v4.new_code_cell(source)
    kind = {"grade": False, "solution": False, "locked": False, "task": False, **marks}
    cell.metadata["nbgrader"] = {"schema_version": 3, "grade_id": name, **kind}
    return cell


def _source() -> Any:
    begin, end = "### BEGIN SOLUTION", "### END SOLUTION"
    tested = {"grade": True, "locked": True}
    book = v4.new_notebook(
        cells=[
            v4.new_code_cell("import numpy as np\nimport matplotlib.pyplot as plt"),
            _cell(f"{begin}\n{_SOLUTION}\n{end}", "mean", solution=True),
            v4.new_code_cell(_DRAWN),
            _cell("assert mean([1, 2, 3]) == 2", "test-one", points=2, **tested),
            _cell("assert mean(range(7)) == 3", "test-two", points=3, **tested),
        ]
    )
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return book


def _make(course: Path, config: str, students: Sequence[str]) -> None:
    (course / "source" / ASSIGNMENT).mkdir(parents=True)
    nbformat.write(_source(), course / "source" / ASSIGNMENT / "problem.ipynb")
    (course / "nbgrader_config.py").write_text(f"c = get_config()\n{config}")
    _run(course, "nbgrader", "generate_assignment", ASSIGNMENT)
    for number, student in enumerate(students):
        folder = course / "submitted" / student / ASSIGNMENT
        folder.mkdir(parents=True)
        book = nbformat.read(course / "release" / ASSIGNMENT / "problem.ipynb", 4)
        book.cells[1].source = _WRONG if number % 3 == 0 else _SOLUTION
        nbformat.write(book, folder / "problem.ipynb")


def _run(course: Path, *words: str) -> float:
    """How many seconds ``python -m`` with *words* takes, in the *course*."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=course,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stdout)
    return time.perf_counter() - begin


def _marks(course: Path) -> dict[str, float]:
    words = [sys.executable, "-c", _MARKS, str(course)]
    return dict(json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout))


@contextlib.contextmanager
def _courses(students: Sequence[str], cold: int) -> Iterator[dict[str, Path]]:
    top = Path(tempfile.mkdtemp(prefix="grade-"))
    try:
        courses = {name: top / name for name in ("nbgrader", "boxed", "grade")}
        for name, course in courses.items():
            is_boxed = name == "boxed"
            _make(course, _BOXED if is_boxed else "", students[:cold] if is_boxed else students)
        yield courses
    finally:
        shutil.rmtree(top)


def main(submissions: int, chunks: int, cold: int, path: str | None) -> None:
    """Grade *submissions* by both, in *chunks*; *cold* of them by nbgrader in boxes as well."""
    facts = common.machine()
    students = [f"c{number % chunks}-{number:04}" for number in range(submissions)]
    took: dict[str, list[float]] = {"nbgrader": [], "grade": []}
    with _courses(students, cold) as courses:
        for chunk in range(chunks):
            whose = ("--student", f"c{chunk}-*")
            took["nbgrader"].append(
                _run(courses["nbgrader"], "nbgrader", "autograde", ASSIGNMENT, *whose)
            )
            took["grade"].append(_grade(courses["grade"], *whose))
        took["boxed"] = [_run(courses["boxed"], "nbgrader", "autograde", ASSIGNMENT)]
        whole = _grade(courses["grade"], "--force")
        first, again = _marks(courses["nbgrader"]), _marks(courses["grade"])
    print(common.format_machine(facts))
    print(f"in turns: {chunks} times {submissions // chunks} submissions\n")
    print(common.format_table(_table(submissions, cold, took, whole)))
    print(
        f"\nmarks: {'the same' if first == again else 'DIFFERENT'} by both, {len(again)} students"
    )
    if path:
        common.save_json(path, {"machine": facts, "took": took, "whole": whole})


def _grade(course: Path, *words: str) -> float:
    return _run(course, "sandbox_provisioner.app", "grade", ASSIGNMENT, *words)


def _table(
    submissions: int, cold: int, took: dict[str, list[float]], whole: float
) -> list[tuple[str, ...]]:
    plain = sum(took["nbgrader"]) / submissions
    rows = {
        "nbgrader autograde": plain,
        "jupyter sandbox grade": sum(took["grade"]) / submissions,
        "the same in one go": whole / submissions,
        f"nbgrader in boxes, {cold}": sum(took["boxed"]) / cold,
    }
    return [
        ("", "seconds each", "as fast as nbgrader"),
        *((name, f"{each:.2f}", f"x{plain / each:.2f}") for name, each in rows.items()),
    ]
