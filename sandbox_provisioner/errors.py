"""errors.py - any process: what can go wrong, and whose turn it is.

::

    SandboxError
    ├── SpecError     you: the options ask for something that cannot be meant
    ├── HostError     this machine: it lacks, or forbids, something the sandbox needs
    └── LaunchError   this start: a step failed, or the kernel did not come up

Every error tells the attempt, the answer, and the next act. How a kernel *ended* is data
(`story.ExitStory`), not an exception.

Errors end up in terminals, logs and dialogs, and name what a kernel may have named: they are made
printable here, once for all.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from sandbox_provisioner.inside.printable import one_line, printable


class SandboxError(Exception):
    """The common root: *attempt* failed, *answer* came back, *remedy* is what to do next."""

    def __init__(self, *, attempt: str, answer: str, remedy: str) -> None:
        self.attempt = one_line(attempt)
        self.answer = one_line(answer)
        self.remedy = one_line(remedy)
        super().__init__(f"Could not {self.attempt}: {self.answer}. {self.remedy}")


class SpecError(SandboxError):
    """An option has a value that cannot be meant; nothing has been started."""


class HostError(SandboxError):
    """This machine, for this user, lacks or forbids a facility that was asked for."""


class LaunchError(SandboxError):
    """A start failed on its way.

    *step* is the step of the plan that failed (a verb from `plan.py`, or ``wait-for-kernel``), and
    *stderr_tail* the last lines that the kernel wrote, empty if it wrote none.
    """

    def __init__(
        self, *, attempt: str, answer: str, remedy: str, step: str, stderr_tail: str = ""
    ) -> None:
        self.step = step
        self.stderr_tail = printable(stderr_tail)
        super().__init__(attempt=attempt, answer=f"[{step}] {answer}", remedy=remedy)

    def __str__(self) -> str:
        """What it wrote is set in: it cannot look like a line of a log."""
        if not self.stderr_tail:
            return super().__str__()
        lines = "\n".join(f"    {line}" for line in self.stderr_tail.rstrip().split("\n"))
        return f"{super().__str__()}\nThe last lines that it wrote:\n{lines}"


_REMEDIES = {
    errno.EMFILE: "This process is out of descriptors: raise its limit (ulimit -n, or LimitNOFILE= "
    "of its service).",
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
