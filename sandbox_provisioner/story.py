"""story.py - pure: how a kernel ended, as data, and the sentence for the person at the notebook.

The one source of every word about an end: the log, the text under the cell, the status of
`jupyter sandbox run` and what programs read all come from an `ExitStory`.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from enum import StrEnum

from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.units import format_bytes


class EndKind(StrEnum):
    """What ended a kernel. Whoever counts ends by their causes, counts these.

    The first ones are caps. INTERRUPTED ended by itself, just after the interrupt near its memory
    cap. COVER_LOST: a program outside had replaced a file that it must not reach; GROUP_LOST: its
    control group was removed; SOCKETS_MISUSED: it put something else beside its sockets;
    INTERNAL_ERROR: PID 1 came upon a mistake of ours. ASKED: its server ended it. OUTSIDE: its
    PID 1 was ended, which nobody inside can do. SIGNAL and EXIT: none of these, and nothing that
    the sandbox did.
    """

    MEMORY_CAP = "memory-cap"
    SURROUNDINGS_MEMORY = "surroundings-memory"
    SHM_FULL = "shm-full"
    TMP_FULL = "tmp-full"
    PROCESSES_CAP = "processes-cap"
    INTERRUPTED = "interrupted"
    COVER_LOST = "cover-lost"
    GROUP_LOST = "group-lost"
    SOCKETS_MISUSED = "sockets-misused"
    INTERNAL_ERROR = "internal-error"
    ASKED = "asked"
    OUTSIDE = "outside"
    SIGNAL = "signal"
    EXIT = "exit"


# What PID 1 writes where it knows why.
_WHYS = {
    wire.COVER_LOST: EndKind.COVER_LOST,
    wire.GROUP_LOST: EndKind.GROUP_LOST,
    wire.INTERNAL_ERROR: EndKind.INTERNAL_ERROR,
    wire.INTERRUPTED: EndKind.INTERRUPTED,
    wire.MEMORY_CAP: EndKind.MEMORY_CAP,
    wire.SOCKETS_MISUSED: EndKind.SOCKETS_MISUSED,
    wire.SHM_FULL: EndKind.SHM_FULL,
    wire.TMP_FULL: EndKind.TMP_FULL,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitFile:
    """What PID 1 has left (`wire.exit_file`); *more* goes with its kind.

    *code* is None where it could write nothing. Under the confinement "landlock" anybody of its
    user may have written to the file.
    """

    code: int | None
    signal: int = 0
    kind: EndKind
    more: str = ""
    tail: bytes = b""

    @classmethod
    def of(cls, content: bytes, status: int | None = None) -> ExitFile:
        """Read it; anything else is as if there were none. On a full disk there is none: then the
        exit *status* of PID 1 tells the kernel's."""
        code, signal, why, more, tail = wire.read_exit_file(content)
        code = _code_of(status) if code is None else code
        kind = EndKind.OUTSIDE if code is None else EndKind.SIGNAL if signal else EndKind.EXIT
        return cls(code=code, signal=signal, kind=_WHYS.get(why, kind), more=more, tail=tail)

    @property
    def number(self) -> int:
        """*more* as a number of bytes; 0 if it is none."""
        is_number = self.more.isascii() and self.more.isdigit() and len(self.more) < 20
        return int(self.more) if is_number else 0

    @property
    def text(self) -> str:
        """*more* as a path or a text; "" if it is none."""
        return one_line(wire.from_hexadecimal(self.more))


def _code_of(status: int | None) -> int | None:
    """The kernel's exit status as PID 1 hands it on; from 125 on it is something else."""
    return status if status is not None and 0 <= status < wire.FAILED_STATUS else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitStory:
    """How a kernel ended, as data.

    *code* is its exit status, or the negative number of the signal that ended it, or None if
    nobody could learn it. *memory_limit_bytes* is its cap, *memory_peak_bytes* the most that it
    used; *full_above* names the group, or the machine, whose memory was full in place of its own;
    of a SIGNAL, or from OUTSIDE, it was full at that time, and may be why.
    *full_bytes* is the size of a folder in memory that was full. *lost_path* is the file in its
    work directory that was replaced. *mistake* is what PID 1 came upon that is our fault.
    *reason* is a sentence for the person at the notebook, "" where it ended by itself or somebody
    asked for it.
    *stderr_tail* is the last that it wrote to stderr, made printable.
    """

    kind: EndKind
    code: int | None
    signal: int = 0
    memory_limit_bytes: int | None = None
    memory_peak_bytes: int | None = None
    cpu_seconds: float | None = None
    pids_limit_hits: int = 0
    full_bytes: int = 0
    full_above: str = ""
    lost_path: str = ""
    mistake: str = ""
    reason: str = ""
    stderr_tail: str = ""

    @property
    def oom_killed(self) -> bool:
        """Whether Linux ended it for want of memory, its own or its surroundings'."""
        return self.kind in {EndKind.MEMORY_CAP, EndKind.SURROUNDINGS_MEMORY}


def with_reason(story: ExitStory, name: str) -> ExitStory:
    """*story* with its sentence, if the kernel called *name* did not end by itself."""
    return replace(story, reason=_reason(story, f"Kernel {name}"))


def signal_name(number: int) -> str:
    """As people look it up."""
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:  # a real-time one
        return f"signal {number}"


def _reason(story: ExitStory, name: str) -> str:
    sentence = _SENTENCES.get(story.kind, "")
    if story.kind is EndKind.MEMORY_CAP and story.memory_limit_bytes is None:
        return ""
    if story.kind is EndKind.SIGNAL and story.signal == signal.SIGKILL:
        sentence = _KILLED
    if story.kind in {EndKind.SIGNAL, EndKind.OUTSIDE} and story.full_above:
        sentence += _MAY_BE_MEMORY
    peak = format_bytes(story.memory_peak_bytes) if story.memory_peak_bytes else ""
    return sentence.format(
        name=name,
        limit=format_bytes(story.memory_limit_bytes or 0),
        peak=f" (peak {peak})" if peak else "",
        used=f", when it used {peak}" if peak else "",
        size=format_bytes(story.full_bytes),
        full_above=story.full_above,
        signal=signal_name(story.signal),
        lost_path=story.lost_path or "a file",
        mistake=story.mistake,
    )


_FULL_FOLDER = (
    "{{name}} ended, since {folder} was full, whose size is {{size}}, when it touched the memory "
    "of a file there. Raise {option}, or remove files from {folder}."
)
# A SIGKILL tells neither who sent it nor why.
_KILLED = (
    "{name} was killed by SIGKILL: by one of its own processes, by a person or a program outside "
    "of its sandbox, or by Linux where the machine was out of memory. If none of your cells did "
    "it, look into the machine's log (as administrator: journalctl --boot), then start the kernel "
    "again."
)
_MAY_BE_MEMORY = " It may have been for want of memory: {full_above} was full at that time."
_SENTENCES = {
    EndKind.MEMORY_CAP: "{name} was killed: it reached its memory limit of {limit}{peak}. Raise "
    "mem_limit, or work on less data at once.",
    EndKind.SURROUNDINGS_MEMORY: "{name} was killed{used}: {full_above} was full, which it shares "
    "with other programs. Ask who manages it for more, or end some of them.",
    EndKind.SHM_FULL: _FULL_FOLDER.format(folder="/dev/shm", option="shm_limit"),
    EndKind.TMP_FULL: _FULL_FOLDER.format(folder="/tmp", option="tmp_limit"),
    EndKind.PROCESSES_CAP: "{name} ended just after it was refused another process or thread: it "
    "has as many as pids_limit allows. Raise pids_limit, or start fewer at once.",
    EndKind.INTERRUPTED: "{name} ended when it was interrupted close to its memory limit of "
    "{limit}. Raise mem_limit, or set mem_interrupt to 0 for a kernel that ends at every "
    "interrupt.",
    EndKind.COVER_LOST: "{name} was ended: a program outside has replaced {lost_path} in its work "
    "directory. A kernel must not reach that file, and this one may have got hold of the new one "
    "before it could be stopped. Look at that file, then start the kernel again.",
    EndKind.GROUP_LOST: "{name} was ended: another program has removed its control group, and with "
    "it its limits. Look for who manages the groups of this machine, then start it again.",
    EndKind.INTERNAL_ERROR: "{name} was ended by a mistake in sandbox-provisioner: {mistake}. "
    "Please report it on the project's page, with this text and with what jupyter sandbox doctor "
    "--json prints.",
    EndKind.OUTSIDE: "{name} was killed from outside of its sandbox: by a person, by another "
    "program, or by Linux where the machine was out of memory. Look into the machine's log (as "
    "administrator: journalctl --boot), then start the kernel again.",
    EndKind.SIGNAL: "{name} was ended by {signal}: its program or a library has failed, or "
    "somebody has sent that signal. Run the cells one by one to find the one that ends it; what it "
    "wrote last stands in the log of the server.",
    EndKind.SOCKETS_MISUSED: "{name} was ended: its program, or start-up code of its environment, "
    "has put something into the directory of its sockets that is none of its five sockets. Let it "
    "write to the work directory or to /tmp.",
}
