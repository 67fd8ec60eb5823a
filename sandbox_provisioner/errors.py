"""errors.py - any process: what can go wrong, and whose turn it is.

::

    SandboxError
    ├── SpecError     you: the options ask for something that cannot be meant
    ├── HostError     this machine: it lacks, or forbids, something the sandbox needs
    ├── LaunchError   this start: a step failed, or the kernel did not come up
    └── InternalError   us: this program has a mistake in it

Every error tells the attempt, the answer, and the next act. How a kernel *ended* is data
(`story.ExitStory`), not an exception.

Errors end up in logs, terminals and dialogs. A log and a program get ``str(error)``, which is one
line; a person gets `SandboxError.for_people`, in lines that fit into JupyterLab's dialog, which
breaks none by itself. They name what a kernel may have named: they are made printable here, once
for all.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from sandbox_provisioner.inside.printable import one_line, printable, with_place

# What a terminal has, and a dialog of JupyterLab shows without a scroll bar.
COLUMNS = 80
# A step of a remedy that begins so is a line for a shell.
COMMAND = "  "
_SHOWN_LINES = 12

# A sentence, or several steps: sentences, and commands behind `COMMAND`.
Remedy = str | tuple[str, ...]


def in_lines(text: str, columns: int = COLUMNS) -> str:
    """*text* in lines of at most *columns* characters; each of its sentences begins one. A command
    is broken where a shell goes on reading."""
    lines: list[str] = []
    for part in text.split("\n"):
        if part.startswith(COMMAND) and part.strip():
            lines += _command_lines(part, columns)
            continue
        joined = re.sub(r"(?<=\d) (?=[KMGT]iB)", "\N{NO-BREAK SPACE}", part)
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", joined):
            lines += textwrap.wrap(sentence, columns, break_on_hyphens=False) or [""]
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def _command_lines(command: str, columns: int) -> list[str]:
    """At blanks outside of quotes, with a backslash at the end of all lines but the last."""
    words = re.findall(r"(?:'[^']*'|\"[^\"]*\"|[^\s'\"]|['\"])+", command)
    indent = command[: len(command) - len(command.lstrip())]
    lines = [indent + words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 <= columns:
            lines[-1] += f" {word}"
        else:
            lines[-1] += " \\"
            lines.append(f"{indent}{COMMAND}{word}")
    return lines


def joined(words: Sequence[str]) -> str:
    """*words* as a sentence has them: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def nearest(word: str, known: Iterable[str]) -> str:
    """The one of *known* that *word* may be a slip of; "" where none is near."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), "")


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """The remedy for a name that does not exist: the nearest that does, or *otherwise*."""
    found = nearest(word, known)
    return f"Did you mean {found!r}?" if found else otherwise


class SandboxError(Exception):
    """The common root: *attempt* failed, *answer* came back, *remedy* is what to do next, and
    *steps* is the same as lines."""

    def __init__(self, *, attempt: str, answer: str, remedy: Remedy) -> None:
        self.attempt = one_line(attempt)
        self.answer = one_line(answer)
        self.steps = tuple(map(one_line, (remedy,) if isinstance(remedy, str) else remedy))
        super().__init__(f"Could not {self.attempt}: {self.answer}. {self.remedy}")

    @property
    def remedy(self) -> str:
        """What to do next, in one line."""
        return " ".join(step.strip() for step in self.steps if step)

    def for_people(self) -> str:
        """The same for a terminal or a dialog: attempt, answer and remedy begin a line each."""
        told = (f"Could not {self.attempt}:", f"{self._shown_answer()}.", "", *self.steps)
        return in_lines("\n".join(told))

    def _shown_answer(self) -> str:
        return self.answer


class SpecError(SandboxError):
    """An option has a value that cannot be meant; nothing has been started."""


class HostError(SandboxError):
    """This machine, for this user, lacks or forbids a facility that was asked for."""


class InternalError(SandboxError):
    """This program has a mistake in it: something came up that it never expects. Nothing that the
    person could set mends it; who develops it needs to know."""

    def __init__(self, *, attempt: str, answer: str) -> None:
        super().__init__(attempt=attempt, answer=answer, remedy=_REPORT)


_REPORT = (
    "This is a mistake in sandbox-provisioner, not in what you have set.",
    "Please report it on the project's page, with this text, what the log says before it, and what "
    "this prints:",
    f"{COMMAND}jupyter sandbox doctor --json",
)


class LaunchError(SandboxError):
    """A start failed on its way.

    *step* is the step of the plan that failed (a verb of `launcher/verbs.py`, or
    ``wait-for-kernel``), *places* what it was about to touch, and *stderr_tail* the last lines that
    the kernel wrote, empty if it wrote none.
    """

    def __init__(
        self,
        *,
        attempt: str,
        answer: str,
        remedy: Remedy,
        step: str,
        places: str = "",
        stderr_tail: str = "",
    ) -> None:
        self.step = step
        self.places = one_line(places)
        self.stderr_tail = printable(stderr_tail)
        where = f"{step} {self.places}" if places else step
        super().__init__(attempt=attempt, answer=f"[{where}] {answer}", remedy=remedy)

    def __str__(self) -> str:
        """What it wrote is set in: it cannot look like a line of a log."""
        if not self.stderr_tail:
            return super().__str__()
        lines = "\n".join(f"    {line}" for line in self.stderr_tail.rstrip().split("\n"))
        return f"{super().__str__()}\nThe last lines that it wrote:\n{lines}"

    def _shown_answer(self) -> str:
        """Without the step, which is a word of ours, where it names no places."""
        if self.places:
            where = f"{self.step} {self.places}"
            return f"{where}: {self.answer.removeprefix(f'[{where}] ')}"
        return self.answer.removeprefix(f"[{self.step}] ")

    def for_people(self) -> str:
        """With the last of what it wrote: all of it is in the log."""
        told = super().for_people()
        lines = [
            line
            for written in self.stderr_tail.expandtabs().rstrip().split("\n")
            for line in textwrap.wrap(written, COLUMNS - 4, drop_whitespace=False)
        ]
        if not lines:
            return told
        tail = "\n".join(f"    {line}" for line in lines[-_SHOWN_LINES:])
        return f"{told}\n\nThe last lines that it wrote:\n{tail}"


_REMEDIES = {
    errno.EMFILE: "This process is out of descriptors: raise its limit (ulimit -n, or LimitNOFILE= "
    "of its service).",
    errno.ETOOMANYREFS: "This user has more descriptors under way between processes than its limit "
    "allows: raise it (ulimit -n, or LimitNOFILE= of the service).",
    errno.ENFILE: "The machine is out of descriptors: raise fs.file-max with sysctl.",
    errno.ENOSPC: "Free some space there, or set runtime_dir to a place that has some.",
    errno.EDQUOT: "Free some space there, or set runtime_dir to a place that has some.",
    errno.EROFS: "Set runtime_dir to a place that can be written to.",
    errno.EAGAIN: "The machine, or this user's limit, is out of processes: see ulimit -u.",
    errno.ENOMEM: "The machine is out of memory.",
}


@contextlib.contextmanager
def told_as_host_error(attempt: str) -> Iterator[None]:
    """Let what the machine refuses meanwhile be told as any error: a full disk, a directory that
    has gone or is read-only, no descriptors left. The edge of what starts and removes sandboxes."""
    try:
        yield
    except OSError as error:
        name = f" ({error.filename})" if error.filename else ""
        raise HostError(
            attempt=attempt,
            answer=f"{error.strerror or error}{name}",
            remedy=_REMEDIES.get(error.errno or 0, "See: jupyter sandbox doctor"),
        ) from error


@contextlib.contextmanager
def told_as_internal_error(
    attempt: str, *, but: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Let what nobody expects meanwhile be told as a mistake of ours, *but* for what the caller
    does expect. The edge of what people start."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (SandboxError, OSError, *but)):
            raise
        number = _of_this_machine(error)
        if number:
            raise HostError(
                attempt=attempt, answer=os.strerror(number), remedy=_REMEDIES[number]
            ) from error
        raise InternalError(attempt=attempt, answer=with_place(error)) from error


def _of_this_machine(error: Exception) -> int:
    """What of errno(3) Python means by an *error* that is no OSError; 0 for anything else."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    # threading.Thread.start() of a machine that has no thread left.
    is_thread = isinstance(error, RuntimeError) and str(error) == "can't start new thread"
    return errno.EAGAIN if is_thread else 0
