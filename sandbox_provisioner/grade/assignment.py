"""grade/assignment.py - whoever grades: all submissions of an assignment, so many at a time.

::

    one thread      read, entered, tests put back      marks, gradebook, moved into place
                                        │                    ▲
    this loop                           └─▶ a box for each ──┘        N at a time

What goes wrong with one submission is its own: it is told, and the others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import sandbox_provisioner
from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.grade.book import Book, Graded
from sandbox_provisioner.grade.copies import copy, digest_of
from sandbox_provisioner.grade.course import Course, Sheet, Submission
from sandbox_provisioner.grade.imports import imports_of
from sandbox_provisioner.grade.kernels import Boxing
from sandbox_provisioner.grade.order import Order, Outcome
from sandbox_provisioner.grade.run import run_notebook
from sandbox_provisioner.inside.printable import one_line

_LONGEST_ERROR = 300


Tell = Callable[[Outcome], None]


class Assignment:
    """The submissions of one assignment, and what is needed for all of them."""

    def __init__(self, course: Course, book: Book, order: Order, tell: Tell) -> None:
        self._course = course
        self._book = book
        self._order = order
        self._tell = tell
        self._thread = ThreadPoolExecutor(1, "gradebook")
        self._boxings: dict[str, Boxing] = {}
        self._whole = ""
        #: What whoever grades should know besides.
        self.notes: list[str] = []

    async def grade(self, submissions: Sequence[Submission]) -> None:
        """Grade all *submissions*; each is told once."""
        try:
            self._book.work.mkdir(parents=True)
            waiting = [one for one in submissions if not await self._is_known(one)]
            if waiting:
                await self._warm_up()
            queue = iter(waiting)
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(self._order.at_once, len(waiting))):
                    workers.create_task(self._work(queue))
        finally:
            self._thread.shutdown()

    async def _work(self, queue: Iterator[Submission]) -> None:
        for submission in queue:
            self._tell(await self._outcome(submission))

    # -- for all of them

    async def _off(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, partial(call, *arguments)
        )

    async def _is_known(self, submission: Submission) -> bool:
        """Tell of one that has been graded already."""
        if not self._whole:
            self._whole = await self._off(self._course.digest)
        with contextlib.suppress(SandboxError, OSError):
            digest = await self._off(self._digest, submission)
            known = self._book.find(submission.student, digest)
            if known and not self._order.anew and self._course.is_graded(submission):
                self._tell(Outcome(submission.student, known, known=True))
                return True
        return False

    def _digest(self, submission: Submission) -> str:
        """Of all that its marks follow from."""
        order = self._order
        own = digest_of(submission.folder, self._course.ignored())
        parts = own, self._whole, asdict(order.terms), order.kernel, sorted(order.options.items())
        text = json.dumps([sandbox_provisioner.__version__, *parts], default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    async def _warm_up(self) -> None:
        """A nursery for each kernel, with what the assignment imports."""
        masters = await self._off(self._course.masters)
        modules = [name for name in imports_of(masters) if not self._is_own(name)]
        preload = dict.fromkeys((*self._order.options.get("preload", ()), *modules))
        options = {**self._order.options, "warm": "auto", "preload": list(preload)}
        files = self._book.work / "none"
        files.mkdir(mode=0o755)
        for name in self._course.kernels(self._order.kernel):
            boxing = Boxing(name=name, options=options, config=self._course.config)
            self._boxings[name] = boxing
            if why := await boxing.make_nursery(files):
                self.notes.append(f"{name}: each kernel starts by itself. {why}")

    def _is_own(self, module: str) -> bool:
        """Whether it lies beside the notebooks."""
        name = module.partition(".")[0]
        return any((self._course.source / place).exists() for place in (name, f"{name}.py"))

    # -- one of them

    async def _outcome(self, submission: Submission) -> Outcome:
        student = submission.student
        build = self._book.work / hashlib.sha256(student.encode()).hexdigest()[:16]
        try:
            return Outcome(student, await self._graded(submission, build))
        except SandboxError as error:
            problem = str(error)
        except Exception as error:  # nbgrader's, of what a submission says of itself
            problem = f"{type(error).__name__}: {error}"
        finally:
            for folder in (build, _files_of(build)):
                shutil.rmtree(folder, ignore_errors=True)
        return Outcome(student, None, one_line(problem)[:_LONGEST_ERROR])

    async def _graded(self, submission: Submission, build: Path) -> Graded:
        digest = await self._off(self._digest, submission)
        sheets = await self._off(self._course.prepare, submission, build, self._order.kernel)
        files = _files_of(build)
        await self._off(copy, build, files)
        verdicts = [await self._run(sheet, files) for sheet in sheets]
        score = await self._off(self._course.finish, submission, sheets, build)
        graded = Graded(
            student=submission.student,
            digest=digest,
            verdict="; ".join(filter(None, verdicts)),
            score=score,
            most=self._course.most,
        )
        self._book.add(graded)
        return graded

    async def _run(self, sheet: Sheet, files: Path) -> str:
        boxing = self._boxings[sheet.kernel]
        order = self._order
        told = await run_notebook(
            sheet.book, boxing, files, order.terms, seconds_of=order.seconds_of
        )
        return f"{sheet.name}: {told}" if told else ""


def _files_of(build: Path) -> Path:
    """Where what a submission's box shows lies, beside what will be in its place."""
    return build.with_name(f"{build.name}.files")
