"""app/grade.py - a command of its own: `jupyter sandbox grade` grades all that was handed in.

What names a student is somebody else's text: nothing of it reaches a terminal but as letters, and
nothing of it is markup. nbgrader need not be installed: it is imported when it is needed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from traitlets import Bool, Float, Integer, Unicode

from sandbox_provisioner.app.command import (
    COMMON_ALIASES,
    COMMON_FLAGS,
    OPTION_ALIASES,
    SandboxCommand,
    find_kernel,
    silent_log,
    spoken,
)
from sandbox_provisioner.errors import COMMAND, HostError
from sandbox_provisioner.grade import book
from sandbox_provisioner.grade.order import Order, Outcome
from sandbox_provisioner.grade.terms import Terms
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.units import parse_bytes

if TYPE_CHECKING:
    from sandbox_provisioner.grade.assignment import Assignment
    from sandbox_provisioner.grade.course import Course, Submission

_PIPE_COLUMNS = 1 << 14
_DEFAULTS = Terms()

_ALIASES = {
    "jobs": "GradeApp.jobs",
    "student": "GradeApp.student",
    "kernel": "GradeApp.kernel",
    "cell-timeout": "GradeApp.cell_timeout",
    "total-timeout": "GradeApp.total_timeout",
    "output-limit": "GradeApp.output_limit",
    **OPTION_ALIASES,
    **COMMON_ALIASES,
}
_FLAGS = {
    **COMMON_FLAGS,
    "force": ({"GradeApp": {"force": True}}, "Grade also what has been graded already."),
}


class GradeApp(SandboxCommand):
    """Grades an assignment, and ends with 0 if all of it is graded."""

    usage = "jupyter sandbox grade ASSIGNMENT [options]"
    description = (
        "Grade all that was handed in for an assignment of nbgrader's, each submission in a box of "
        "its own, several at a time, and keep the marks in nbgrader's gradebook. Called in the "
        "course's directory, in place of nbgrader autograde; what it needs of nbgrader_config.py "
        "it reads. A run that was ended goes on where it was, and what has been handed in anew, or "
        "whose assignment has changed, is graded again.\n\n"
        "A submission that reaches a limit is graded up to there, with a verdict in words. One "
        "that cannot be read is told, and the others are graded; the command ends with 1 then."
    )
    examples = """
    jupyter sandbox grade ps1
    jupyter sandbox grade ps1 --jobs 4 --mem-limit 512M --cell-timeout 10
    jupyter sandbox grade ps1 --student 'a*' --force
    """
    jobs = Integer(0, min=0, help="How many at a time. Default: one a CPU.").tag(config=True)
    student = Unicode("*", help="Whose submissions, as a pattern of names.").tag(config=True)
    kernel = Unicode("", help="The kernel to run them with. Default: the assignment's.").tag(
        config=True
    )
    cell_timeout = Float(
        -1.0, help="Seconds that a cell may take, 0 for no limit. Default: c.Execute.timeout, 30."
    ).tag(config=True)
    total_timeout = Float(
        600.0, help="Seconds that all cells of a notebook may take together, 0 for no limit."
    ).tag(config=True)
    output_limit = Unicode(
        "64M", help="A notebook that shows more than that is stopped; 256K of a cell are kept."
    ).tag(config=True)
    force = Bool(False, help="Grade all of them anew.").tag(config=True)
    aliases = _ALIASES
    flags = _FLAGS

    def _log_level_default(self) -> int:
        # What nbgrader and nbformat say of each notebook is for who looks for a mistake.
        return logging.CRITICAL

    def start(self) -> None:
        """Called once by `main`."""
        if int(str(self.log_level)) > logging.WARNING:
            warnings.simplefilter("ignore")
        if len(self.extra_args) != 1:
            raise self.wrong("write the name of one assignment")
        course = _course(self.extra_args[0], self.student)
        order = self._order(course)
        course.check()
        for name in course.kernels(order.kernel):
            find_kernel(self.kernels(), name)
        submissions = course.submissions()
        with book.opened(course.root, course.name) as ours, _Shown(len(submissions)) as shown:
            assignment = _assignment(course, ours, order, shown.tell)
            _run(assignment.grade, submissions)
            shown.note(assignment.notes)
        raise SystemExit(1 if shown.problems else 0)

    def _order(self, course: Course) -> Order:
        seconds = self.cell_timeout
        if seconds < 0:
            seconds = float(course.option("timeout", _DEFAULTS.cell_seconds) or 0)
        return Order(
            at_once=self.jobs or len(os.sched_getaffinity(0)),
            terms=Terms(
                cell_seconds=seconds or None,
                total_seconds=self.total_timeout or None,
                said_bytes=parse_bytes("output_limit", self.output_limit),
            ),
            kernel=self.kernel or str(course.option("kernel_name", "")),
            options=self.given_options(),
            seconds_of=course.option("timeout_func", None),
            anew=self.force,
        )


def _course(name: str, students: str) -> Course:
    try:
        from sandbox_provisioner.grade.course import Course  # noqa: PLC0415
    except ImportError as error:
        raise HostError(
            attempt="grade with nbgrader",
            answer=one_line(str(error)),
            remedy=("Install it:", f'{COMMAND}pip install "sandbox-provisioner[grade]"'),
        ) from None
    return Course(name, students, silent_log())


def _assignment(
    course: Course, ours: book.Book, order: Order, tell: Callable[[Outcome], None]
) -> Assignment:
    from sandbox_provisioner.grade.assignment import Assignment  # noqa: PLC0415

    return Assignment(course, ours, order, tell)


def _run(
    grade: Callable[[Sequence[Submission]], Awaitable[None]], submissions: Sequence[Submission]
) -> None:
    """Until it is done, or somebody ends us: then nothing that is under way is left."""

    async def until_ended() -> None:
        task = asyncio.current_task()
        assert task
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await grade(submissions)

    try:
        asyncio.run(until_ended())
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(
            spoken("ended before all was graded. The same command goes on from here."),
            file=sys.stderr,
        )
        raise KeyboardInterrupt from None


class _Shown:
    """What the person sees: on a terminal a bar, and above it whatever is not as it should be."""

    def __init__(self, whole: int) -> None:
        self.problems = 0
        self._marks: list[float] = []
        self._verdicts = self._known = 0
        self._began = time.monotonic()
        tty = sys.stdout.isatty()
        self._console = Console(highlight=False, width=None if tty else _PIPE_COLUMNS)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        self._bar = Progress(
            *columns, TimeRemainingColumn(), console=self._console, disable=not tty, transient=True
        )
        self._task = self._bar.add_task("graded", total=whole)

    def __enter__(self) -> _Shown:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._print(self._summary())

    def tell(self, outcome: Outcome) -> None:
        """Called once for each submission."""
        self._bar.advance(self._task)
        self._known += outcome.known
        graded, student = outcome.graded, one_line(outcome.student)
        if graded is None:
            self.problems += 1
            self._print(f"{student}: not graded: {outcome.problem}")
            return
        self._marks.append(graded.score)
        self._verdicts += bool(graded.verdict)
        if graded.verdict or not self._console.is_terminal:
            verdict = f": {graded.verdict}" if graded.verdict else ""
            before = " (graded before)" if outcome.known else ""
            self._print(f"{student}: {graded.score:g} of {graded.most:g}{before}{verdict}")

    def note(self, notes: Sequence[str]) -> None:
        """Called at the end, with what is nobody's own."""
        for text in notes:
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(Text(one_line(text)))

    def _summary(self) -> str:
        return (
            ", ".join(
                _counted(
                    (len(self._marks), "graded"),
                    (self._known, "of them before"),
                    (self._verdicts, "with a verdict"),
                    (self.problems, "not graded"),
                )
            )
            + f", in {time.monotonic() - self._began:.1f} s"
        )


def _counted(*found: tuple[int, str]) -> Iterator[str]:
    first, *rest = found
    yield f"{first[0]} {first[1]}"
    yield from (f"{count} {what}" for count, what in rest if count)
