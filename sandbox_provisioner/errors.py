"""errors.py - any process: what can go wrong, and whose turn it is.

::

    SandboxError
    ├── SpecError     you: the options ask for something that cannot be meant
    ├── HostError     this machine: it lacks, or forbids, something the sandbox needs
    └── LaunchError   this start: a step failed, or the kernel did not come up

Every error tells the attempt, the answer, and the next act. How a kernel *ended* is data
(`handle.ExitStory`), not an exception.
"""

from __future__ import annotations


class SandboxError(Exception):
    """The common root: *attempt* failed, *answer* came back, *remedy* is what to do next."""

    def __init__(self, *, attempt: str, answer: str, remedy: str) -> None:
        self.attempt = attempt
        self.answer = answer
        self.remedy = remedy
        super().__init__(f"Could not {attempt}: {answer}. {remedy}")


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
        self.stderr_tail = stderr_tail
        if stderr_tail:
            remedy = f"{remedy}\nThe last lines that it wrote:\n{stderr_tail.rstrip()}"
        super().__init__(attempt=attempt, answer=f"[{step}] {answer}", remedy=remedy)
