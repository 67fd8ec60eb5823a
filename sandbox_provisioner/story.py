"""story.py - pure: how a kernel ended, as data, and the sentence for the person at the notebook.

The log, the text under the cell, the status of `jupyter sandbox run` and what programs read all
come from an `ExitStory`. The causes of an end are the facilities' own (`facilities/*/tell.py`).
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace

from sandbox_provisioner.facilities.caps import tell as caps
from sandbox_provisioner.facilities.network.tell import notices as network
from sandbox_provisioner.facilities.network.tell.counts import Traffic
from sandbox_provisioner.facilities.root import tell as root
from sandbox_provisioner.facilities.sockets import tell as sockets
from sandbox_provisioner.facilities.workdir import tell as workdir
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.told import EndCause, EndKind, Notice
from sandbox_provisioner.units import format_bytes

# Killed by SIGKILL: that tells neither who sent it nor why.
_KILLED = (
    "{name} was killed by SIGKILL: by one of its own processes, by a person or a program outside "
    "of its sandbox, or by Linux where the machine was out of memory. If none of your cells did "
    "it, look into the machine's log (as administrator: journalctl --boot), then start the kernel "
    "again."
)
_MAY_BE_MEMORY = " It may have been for want of memory: {full_above} was full at that time."
ROOT = "root"
_ADMINISTRATOR = "the administrator of this machine"
_FULL_TOO = " In that time {full_above} was full, too: it may have been for that."
# What no facility has to do with.
_ENDS = (
    EndCause(
        EndKind.INTERNAL_ERROR,
        "{name} was ended by a mistake in sandbox-provisioner: {mistake}. "
        "Please report it on the project's page, with this text and with what jupyter sandbox "
        "doctor --json prints.",
        wire.INTERNAL_ERROR,
    ),
    EndCause(
        EndKind.STOPPED,
        "{name} was stopped by {by} with the command jupyter sandbox stop, and what its memory "
        "held is lost. It does not start again by itself: start it when you want to go on.",
    ),
    EndCause(EndKind.ASKED, "", wire.SERVER_ENDED),
    EndCause(
        EndKind.OUTSIDE,
        "{name} was killed from outside of its sandbox: by a person, by another "
        "program, or by Linux where the machine was out of memory. Look into the machine's log (as "
        "administrator: journalctl --boot), then start the kernel again.",
    ),
    EndCause(
        EndKind.SIGNAL,
        "{name} was ended by {signal}: its program or a library has failed, or "
        "somebody has sent that signal. Run the cells one by one to find the one that ends it; "
        "what it wrote last stands in the log of the server.",
    ),
)
_CAUSES = (*caps.ENDS, *root.ENDS, *sockets.ENDS, *workdir.ENDS, *_ENDS)
_SENTENCES = {cause.kind: cause.sentence for cause in _CAUSES}
_WHYS = {cause.word: cause.kind for cause in _CAUSES if cause.word}
# By the word of PID 1's.
NOTICES: dict[str, Notice] = {**caps.NOTICES, **network.NOTICES, **root.NOTICES, **workdir.NOTICES}


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
    of a SIGNAL, from OUTSIDE, or at its own cap, it was full in that time, and may be why.
    *full_bytes* is the size of a folder in memory that was full. *lost_path* is the file in its
    work directory that was replaced. *stopped_by* is the user who has stopped it. *mistake* is what
    PID 1 came upon that is our fault.
    *network* is what went over its network, None where it had none that is counted.
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
    stopped_by: str = ""
    mistake: str = ""
    network: Traffic | None = None
    reason: str = ""
    stderr_tail: str = ""

    @property
    def oom_killed(self) -> bool:
        """Whether Linux ended it for want of memory, its own or its surroundings'."""
        return self.kind in {EndKind.MEMORY_CAP, EndKind.SURROUNDINGS_MEMORY}


def with_reason(story: ExitStory, name: str, what: str = "Kernel") -> ExitStory:
    """*story* with its sentence, if the kernel called *name* did not end by itself."""
    return replace(story, reason=_reason(story, f"{what} {name}"))


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
    if story.kind is EndKind.MEMORY_CAP and story.full_above:
        sentence += _FULL_TOO
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
        by=_ADMINISTRATOR if story.stopped_by == ROOT else story.stopped_by or "somebody",
        mistake=story.mistake,
    )
