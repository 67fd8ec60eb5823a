"""grade/verdict.py - pure: in words, why a submission was not run to its end, or does not count."""

from __future__ import annotations

from dataclasses import dataclass

from sandbox_provisioner.ends import End
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.story import signal_name
from sandbox_provisioner.told import EndKind
from sandbox_provisioner.units import format_bytes

_LONGEST_NAME = 60


@dataclass(frozen=True, slots=True)
class Place:
    """A cell, by its number in the notebook, counted from 1 as a reader does, and by the name that
    nbgrader gives it, "" if it has none."""

    number: int
    name: str = ""

    def __str__(self) -> str:
        name = one_line(self.name)[:_LONGEST_NAME]
        return f"at cell {self.number}" + (f" ({name})" if name else "")


def stopped(why: str, place: Place) -> str:
    """The verdict on a submission that was not run further than *place*."""
    return f"stopped: {why}, {place}"


def cell_time(seconds: float) -> str:
    """Why: a cell took too long, and went on when it was interrupted."""
    return f"time limit of {seconds:g} s a cell, and the interrupt was not heeded"


def total_time(seconds: float) -> str:
    """Why: all cells together took too long."""
    return f"time limit of {seconds:g} s in all"


def said_too_much(most_bytes: int) -> str:
    """Why: its output was too much."""
    return f"output limit of {format_bytes(most_bytes)}"


_CAPS = {
    EndKind.MEMORY_CAP: "memory limit of {limit}",
    EndKind.INTERRUPTED: "memory limit of {limit}",
    EndKind.PROCESSES_CAP: "limit of processes",
    EndKind.SHM_FULL: "/dev/shm was full ({full})",
    EndKind.TMP_FULL: "/tmp and the home directory were full ({full})",
    EndKind.DISK_FULL: "/tmp and the home directory were full ({full})",
    EndKind.WORKDIR_FULL: "the work directory was full ({full})",
    EndKind.EXIT: "its kernel ended by itself, with status {status}",
    EndKind.SIGNAL: "its kernel was ended by {signal}",
}


def cap_that_bit(end: End | None) -> str:
    """Why: what the *end* of its kernel tells; None is one that nobody knows."""
    if end is None:
        return "its kernel has ended"
    text = _CAPS.get(EndKind(end.kind))
    if text is None:
        return one_line(end.sentence).rstrip(".") or "its kernel has ended"
    return text.format(
        limit=format_bytes(end.memory_limit_bytes or 0),
        full=format_bytes(end.full_bytes or 0),
        status=end.exit_code,
        signal=signal_name(end.signal or 0),
    )


def tampered(place: Place) -> str:
    """The verdict on a submission whose kernel did not report a failure that it had to report."""
    return (
        f"does not count: before the tests {place}, a check that has to fail did not; the "
        "submission changes how code is run, so look at it by hand"
    )
