"""facilities/process/plan.py - pure: from the first step to the kernel's program, and its end."""

from __future__ import annotations

import os
from collections.abc import Iterator

from sandbox_provisioner.plan import Start, Step

_LEAST_AVAILABLE_PART = 20


def exit_file(start: Start) -> Iterator[Step]:
    """It lies in the record, which only the host has."""
    why = "where init will write how the kernel ended"
    yield Step("exit-file", (start.site.exit_file,), why)


def survive_server(start: Start) -> Iterator[Step]:
    """jupyter_client's "independent" kernels; and those whose server is not who launches them."""
    if start.request.survive_server:
        watching = start.request.watched >= 0
        words = ("watching",) if watching else ()
        why = "it ends with the server that asked for it" if watching else "asked for by the caller"
        yield Step("survive-server", words, why)


def outlive_kernel(_start: Start) -> Iterator[Step]:
    """A nursery's PID 1: PID namespaces lie in one another (pid_namespaces(7))."""
    yield Step("outlive-kernel", (), "the kernels that it forked live in its PID namespace")


def stdio(start: Start) -> Iterator[Step]:
    """What becomes of the kernel's output."""
    if not start.request.pump:
        yield Step("stdio", ("inherit",))
        return
    why = "what goes to the server's own log has a budget" if start.request.logged else ""
    yield Step("stdio", ("pump", *start.request.logged), why)


def fork_kernel(_start: Start) -> Iterator[Step]:
    """From here on PID 1 is init, for good."""
    yield Step("fork-kernel", (), "PID 1 stays behind as init; the rest is done by the kernel")


def terminal(start: Start) -> Iterator[Step]:
    """For a command that a person runs in one."""
    if start.request.terminal:
        yield Step("terminal", (), "a shell inside has job control, and Ctrl-C goes to its jobs")


def umask(start: Start) -> Iterator[Step]:
    """umask(2)."""
    mask = f"{start.site.facts.caller.umask:04o}"
    yield Step("umask", (mask,), "the server's: who may read new files")


def chdir(start: Start) -> Iterator[Step]:
    """Where the notebook lies."""
    remedy = "Start the notebook in a directory that its user may enter."
    yield Step("chdir", (start.request.cwd,), remedy=remedy)


def execute(start: Start) -> Iterator[Step]:
    """execve(2) of the kernel's program."""
    remedy = "Correct argv in its kernel.json, or install what is missing."
    yield Step("execute", _command(start), remedy=remedy)


def _command(start: Start) -> tuple[str, ...]:
    return start.site.files.program, *start.request.argv[1:]


# -- where the kernel comes from a nursery


def run_kernel(start: Start) -> Iterator[Step]:
    """The same in a process that has the kernel's program loaded already."""
    yield Step("run-kernel", _command(start))


def hand_over(_start: Start) -> Iterator[Step]:
    """The last act of a launcher that only opens."""
    yield Step("hand-over", (), "for a process that could open none of it")


def await_opened(_start: Start) -> Iterator[Step]:
    """Until then a nursery's child has done what needs nobody."""
    yield Step("await-opened", (), "from here on it needs what touches the host")


def stay_unclaimed(start: Start) -> Iterator[Step]:
    """A spare waits for a start that is bound to it, and ends if none comes for long."""
    words = (f"{start.site.idle_seconds:g}", str(least_available_bytes()))
    yield Step("stay-unclaimed", words, "nobody's code runs before a server has claimed it")


def least_available_bytes() -> int:
    """With less memory available on this machine, no spare is kept."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _LEAST_AVAILABLE_PART


def bind_kernel(start: Start) -> Iterator[Step]:
    """A spare is for this start from here on."""
    words = (start.request.cwd, *_command(start))
    yield Step("bind-kernel", words, "it goes on when init has no rights left")
