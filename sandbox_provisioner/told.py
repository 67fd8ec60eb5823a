"""told.py - pure: how a facility tells of what ended a kernel, happened to it, or was forbidden.

Its `tell` has the causes of an end that are its own (``ENDS``), and what its part of PID 1 may tell
at any time (``NOTICES``); `story.py` collects them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from sandbox_provisioner.errors import COMMAND


class EndKind(StrEnum):
    """What ended a kernel. Whoever counts ends by their causes, counts these.

    The first ones are caps. INTERRUPTED ended by itself, just after the interrupt near its memory
    cap. COVER_LOST: a program outside had replaced a file that it must not reach; GROUP_LOST: its
    control group was removed; SOCKETS_MISUSED: it put something else beside its sockets;
    INTERNAL_ERROR: PID 1 came upon a mistake of ours. STOPPED: somebody has run `jupyter sandbox
    stop`. ASKED: its server ended it, or has ended itself. OUTSIDE: its PID 1 was ended, which
    nobody inside can do. SIGNAL and EXIT: none of these, and nothing that the sandbox did.
    """

    MEMORY_CAP = "memory-cap"
    SURROUNDINGS_MEMORY = "surroundings-memory"
    SHM_FULL = "shm-full"
    TMP_FULL = "tmp-full"
    DISK_FULL = "disk-full"
    WORKDIR_FULL = "workdir-full"
    PROCESSES_CAP = "processes-cap"
    INTERRUPTED = "interrupted"
    COVER_LOST = "cover-lost"
    GROUP_LOST = "group-lost"
    SOCKETS_MISUSED = "sockets-misused"
    INTERNAL_ERROR = "internal-error"
    STOPPED = "stopped"
    ASKED = "asked"
    OUTSIDE = "outside"
    SIGNAL = "signal"
    EXIT = "exit"


@dataclass(frozen=True, slots=True)
class EndCause:
    """One *kind* of end, its sentence for the person at the notebook, whose fields are those of
    `story._reason`, and the *word* of the exit file that tells of it, if PID 1 can know it."""

    kind: EndKind
    sentence: str
    word: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The kernel that is spoken of: *what* it is and its *name* as people see it, and its cap, 0
    for none; *full_above* is what around it was full, in place of that cap, a clause."""

    name: str
    memory_limit_bytes: int
    full_above: str = ""
    what: str = "Kernel"  # or whose server it is

    @property
    def who(self) -> str:
        """Such as "Kernel 7f3a0123", where a sentence begins."""
        return f"{self.what} {self.name}"

    @property
    def whom(self) -> str:
        """The same within one."""
        return self.who[:1].lower() + self.who[1:]


# From what stands behind a word of PID 1's to a sentence for a log; "" if it cannot be meant.
Notice = Callable[[str, Subject], str]


@dataclass(frozen=True, slots=True)
class Cause:
    """Why namespaces are refused, and what lifts it; *is_command*: a line for a shell."""

    found: str
    remedy: str
    is_command: bool = False

    @property
    def steps(self) -> tuple[str, ...]:
        """The remedy for an error."""
        return ("As administrator:", COMMAND + self.remedy) if self.is_command else (self.remedy,)


def setting(name: str, value: int) -> str:
    """The command that changes a sysctl now and for good."""
    file = "/etc/sysctl.d/60-jupyter-sandbox.conf"
    return f"echo {name}={value} | sudo tee -a {file} && sudo sysctl --system"
