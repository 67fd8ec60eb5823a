"""grade/course.py - whoever grades: nbgrader's course, assignment and gradebook.

nbgrader does what it does well, as a library: it puts the tests back, compares checksums, computes
marks, and keeps them. Of its ``autograde`` we do by ourselves what reads a submission's files
(no link is followed, nothing is read without a limit), and what runs them.

All of it is called in one thread, since SQLite is written by one at a time.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any

import nbformat
from nbconvert.exporters import Exporter
from nbformat import NotebookNode
from nbgrader import api, utils
from nbgrader.api import Gradebook
from nbgrader.apps import AutogradeApp
from nbgrader.converters import Autograde

from sandbox_provisioner.errors import SpecError, did_you_mean
from sandbox_provisioner.grade.copies import copy, digest_of
from sandbox_provisioner.grade.reading import read_notebook, read_short

# nbgrader opens the gradebook anew at each step of each notebook. An engine keeps the statements
# that it has compiled ("SQL Compilation Caching" of SQLAlchemy's documentation). Closing a
# gradebook closes its connections; the engine can be used again.
api.create_engine = cache(api.create_engine)

_TIMESTAMP = "timestamp.txt"
_NOTEBOOKS = ["*.ipynb"]
_EXECUTES = re.compile(r"\bExecute\b|\bSandboxExecute\b")
_DEFAULT_KERNEL = "python3"


@dataclass(frozen=True, slots=True)
class Submission:
    """What *student* has handed in, which lies in *folder*."""

    student: str
    folder: Path


@dataclass(slots=True)
class Sheet:
    """One notebook of a submission, under way: what nbgrader knows of it stands in *resources*."""

    name: str
    kernel: str
    book: NotebookNode
    resources: Any


class Course:
    """The assignment *name* of the course around the current directory, by its configuration."""

    def __init__(self, name: str, students: str, log: logging.Logger) -> None:
        app = AutogradeApp(log=log)
        app.log_level = logging.ERROR
        app.initialize([])
        self.name = name
        self.directory = app.coursedir
        self.directory.assignment_id = name
        self.directory.student_id = students
        self.root = Path(self.directory.root)
        self.config = app.config
        self._converter = Autograde(coursedir=self.directory, parent=app)
        self._kernels: dict[str, str] = {}
        self._most = 0.0

    def option(self, name: str, otherwise: Any) -> Any:
        """What the course's configuration says of the preprocessor Execute, or of ours."""
        said = {**self.config.get("Execute", {}), **self.config.get("SandboxExecute", {})}
        return said.get(name, otherwise)

    # -- what there is

    def check(self) -> None:
        """SpecError where there is no such assignment, no gradebook, or no source of it."""
        self._check_gradebook()
        with self._gradebook() as gradebook:
            known = [assignment.name for assignment in gradebook.assignments]
            if self.name in known:
                self._most = gradebook.find_assignment(self.name).max_score
                self._kernels = {
                    notebook.name: _kernel_of(notebook.kernelspec)
                    for notebook in gradebook.find_assignment(self.name).notebooks
                }
        if self.name not in known or not self._kernels:
            listed = f"Known are: {', '.join(sorted(known))}." if known else _GENERATE
            raise SpecError(
                attempt=f"grade {self.name}",
                answer="the gradebook has no such assignment, or no notebook of it",
                remedy=did_you_mean(self.name, set(known) - {self.name}, listed),
            )
        if not self.source.is_dir():
            raise SpecError(
                attempt=f"grade {self.name}",
                answer=f"{self.source} is not there, whose files go over those of submissions",
                remedy="Grade in the course's directory, with the assignment as it was generated.",
            )

    def _check_gradebook(self) -> None:
        url = str(self.directory.db_url)
        path = url.removeprefix("sqlite:///")
        if path != url and not os.path.exists(path):
            raise SpecError(
                attempt=f"open the gradebook {path}", answer="it is not there", remedy=_GENERATE
            )

    @property
    def source(self) -> Path:
        """Where the assignment is as its teacher wrote it."""
        return self._folder(self.directory.source_directory, ".")

    def submissions(self) -> list[Submission]:
        """All that was handed in, by the names of the students; SpecError where there is none."""
        step, student = self.directory.submitted_directory, self.directory.student_id
        pattern = str(self._folder(step, student))
        named = re.compile(
            self.directory.format_path(step, "(?P<student>.*)", re.escape(self.name), escape=True)
        )
        found = [
            Submission(match["student"], Path(path))
            for path in sorted(glob(pattern))
            if (match := named.fullmatch(path))
        ]
        if not found:
            raise SpecError(
                attempt=f"grade {self.name}",
                answer=f"nothing was handed in: there is no {pattern}",
                remedy="Collect first: nbgrader collect, or nbgrader zip_collect.",
            )
        return found

    def kernels(self, chosen: str = "") -> set[str]:
        """The kernels that its notebooks need: never what a submission says."""
        return {chosen} if chosen else set(self._kernels.values())

    def masters(self) -> list[NotebookNode]:
        """The teacher's notebooks."""
        return [read_notebook(path) for path in sorted(self.source.glob("*.ipynb"))]

    def digest(self) -> str:
        """What stands for the assignment: its files, and what the gradebook has of it."""
        with self._gradebook() as gradebook:
            cells = sorted(
                (notebook.name, cell.name, cell.checksum or "")
                for notebook in gradebook.find_assignment(self.name).notebooks
                for cell in notebook.source_cells
            )
        return f"{digest_of(self.source, self.directory.ignore)} {cells}"

    def ignored(self) -> list[str]:
        """Patterns of names that nbgrader leaves out."""
        return list(self.directory.ignore)

    def is_graded(self, submission: Submission) -> bool:
        """Whether its graded notebooks are still there."""
        return self._graded(submission).is_dir()

    # -- one submission

    def prepare(self, submission: Submission, build: Path, kernel: str = "") -> list[Sheet]:
        """Make its entry in the gradebook, its files in *build*, and its notebooks with the tests
        put back. SpecError where something of it cannot be read; nbgrader's errors."""
        books = {name: read_notebook(path) for name, path in self._handed_in(submission)}
        self._enter(submission, books)
        copy(submission.folder, build, [*self.ignored(), *_NOTEBOOKS])
        kept = self._converter.exclude_overwriting.get(self.name, [])
        copy(self.source, build, [*self.ignored(), *_NOTEBOOKS], kept)
        return [
            self._sheet(submission, name, book, kernel or self._kernels[name])
            for name, book in books.items()
        ]

    def finish(self, submission: Submission, sheets: Iterable[Sheet], build: Path) -> float:
        """Compute and keep the marks, and put *build*, with the notebooks, into its place; their
        sum."""
        for sheet in sheets:
            last = [one for one in self._converter.autograde_preprocessors if not _runs(one)]
            sheet.book, _ = self._through(last, sheet.book, sheet.resources)
            nbformat.write(sheet.book, build / f"{sheet.name}.ipynb")
        self._move(build, self._graded(submission))
        with self._gradebook() as gradebook:
            return float(gradebook.find_submission(self.name, submission.student).score)

    @property
    def most(self) -> float:
        """The most that a submission can have."""
        return float(self._most)

    # -- parts of these

    def _gradebook(self) -> Gradebook:
        return Gradebook(self.directory.db_url, self.directory.course_id)

    def _folder(self, step: str, student: str) -> Path:
        return Path(os.path.normpath(self.directory.format_path(step, student, self.name)))

    def _graded(self, submission: Submission) -> Path:
        return self._folder(self.directory.autograded_directory, submission.student)

    def _handed_in(self, submission: Submission) -> list[tuple[str, Path]]:
        """The notebooks of the assignment that are there; others are nobody's to grade."""
        paths = [(name, submission.folder / f"{name}.ipynb") for name in sorted(self._kernels)]
        return [(name, path) for name, path in paths if os.path.lexists(path)]

    def _enter(self, submission: Submission, books: Collection[str]) -> None:
        student = submission.student
        when = _timestamp(submission.folder / _TIMESTAMP)
        with self._gradebook() as gradebook:
            gradebook.update_or_create_student(student)
            more = {"timestamp": when} if when else {}
            gradebook.update_or_create_submission(self.name, student, **more)
            for name in self._kernels:
                if name not in books:
                    found = gradebook.find_submission_notebook(name, self.name, student)
                    for grade in found.grades:
                        grade.auto_score = 0
                        grade.needs_manual_grade = False
            gradebook.db.commit()

    def _sheet(self, submission: Submission, name: str, book: NotebookNode, kernel: str) -> Sheet:
        known = {
            "student": submission.student,
            "assignment": self.name,
            "notebook": name,
            "db_url": self.directory.db_url,
        }
        resources = {"unique_key": name, "output_files_dir": f"{name}_files", "nbgrader": known}
        sanitized, _ = self._through(self._converter.sanitize_preprocessors, book, resources)
        return Sheet(name, kernel, sanitized, resources)

    def _through(self, preprocessors: Iterable[Any], book: NotebookNode, resources: Any) -> Any:
        exporter = Exporter(parent=self._converter, config=self._converter.config)
        exporter._preprocessors = []
        for one in preprocessors:
            exporter.register_preprocessor(one)
        return exporter.from_notebook_node(book, resources)

    def _move(self, build: Path, place: Path) -> None:
        """In one go, so that what is there is whole."""
        mode = int(str(self._converter.permissions), 8)
        for folder, _, names in os.walk(build):
            for name in names:
                os.chmod(os.path.join(folder, name), mode)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            shutil.rmtree(place)  # what nbgrader, or we, have put there before
        build.rename(place)


_GENERATE = "Generate it first, in the course's directory: nbgrader generate_assignment NAME."


def _kernel_of(kernelspec: str | None) -> str:
    """The kernel that the gradebook has of a notebook. "python" is what jupyter_client calls its
    own one, and what nbgrader's quickstart writes."""
    found = json.loads(kernelspec or "{}")
    name = str((found or {}).get("name") or _DEFAULT_KERNEL)
    return _DEFAULT_KERNEL if name == "python" else name


def _runs(preprocessor: Any) -> bool:
    """Whether it is the one of nbgrader's list in whose place we are."""
    name = preprocessor if isinstance(preprocessor, str) else preprocessor.__name__
    return bool(_EXECUTES.search(name))


def _timestamp(path: Path) -> Any:
    """When it was handed in, as nbgrader collects it; None where nothing says so."""
    text = read_short(path)
    try:
        return utils.parse_utc(text) if text else None
    except (ValueError, OverflowError):
        raise SpecError(
            attempt=f"read {path}",
            answer=f"{text!r} is not a time",
            remedy="Correct or remove it: it tells how late the submission is.",
        ) from None
