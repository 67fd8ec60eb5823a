"""grade/book.py - whoever grades: what has been graded already, so that a killed run goes on.

A line of JSON for each submission that is graded, added when its marks are in the gradebook and its
notebook is in its place::

    COURSE/.sandbox-grade/ASSIGNMENT.jsonl    locked as long as somebody grades that assignment
    COURSE/.sandbox-grade/ASSIGNMENT.work/    what is under way: nobody's, when nobody has the lock
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from sandbox_provisioner.errors import HostError, SpecError

FOLDER = ".sandbox-grade"


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """One submission's marks, *score* of *most*, and its *verdict*, "" where all of it ran.

    *digest* stands for all that they follow from."""

    student: str
    digest: str
    verdict: str
    score: float
    most: float


class Book:
    """The book of one assignment, open and ours; *work* is a folder for what is under way."""

    def __init__(self, file: BinaryIO, work: Path) -> None:
        self.work = work
        self._file = file
        content = file.read()
        self._known = {graded.student: graded for graded in _lines(content)}
        if content and not content.endswith(b"\n"):
            file.write(b"\n")

    def find(self, student: str, digest: str) -> Graded | None:
        """What is known of *student*, where it still holds."""
        known = self._known.get(student)
        return known if known and known.digest == digest else None

    def add(self, graded: Graded) -> None:
        """Called when there is nothing left to do for it."""
        self._file.write(json.dumps(asdict(graded)).encode() + b"\n")
        self._file.flush()


def _lines(content: bytes) -> Iterator[Graded]:
    """The last line of a killed run may be a part of one."""
    for line in content.splitlines():
        with contextlib.suppress(ValueError, TypeError):
            yield Graded(**json.loads(line))


@contextlib.contextmanager
def opened(course: Path, assignment: str) -> Iterator[Book]:
    """The book of *assignment*, ours until we leave; SpecError where somebody else has it."""
    folder = course / FOLDER
    work = folder / f"{assignment}.work"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        file = open(folder / f"{assignment}.jsonl", "a+b")  # noqa: SIM115
    except OSError as error:
        raise HostError(
            attempt=f"write to {folder}",
            answer=error.strerror or str(error),
            remedy="Grade as somebody who may write to the course, where there is room.",
        ) from None
    with file:
        _lock(file, assignment)
        file.seek(0)
        try:
            shutil.rmtree(work, ignore_errors=True)
            yield Book(file, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _lock(file: BinaryIO, assignment: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SpecError(
            attempt=f"grade {assignment}",
            answer="somebody is grading it now",
            remedy="Wait for that run; it tells when it is done.",
        ) from None
