"""inside - runs in the launcher, PID 1 and the kernel: under the caps.

May import: os, resource, inside.files, kernel_calls, lookup, memory.
May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

import os
import resource

from sandbox_provisioner.facilities.caps.inside.memory import Level, Memory, open_files
from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside.files import write
from sandbox_provisioner.inside.lookup import look

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from sandbox_provisioner.inside.box import Box

_UNLIMITED = resource.RLIM_INFINITY
_LOCKS = 10  # RLIMIT_LOCKS, which Python does not name


class Caps:
    """What watches the group's memory."""

    def __init__(self) -> None:
        self.memory: Memory | None = None


def join_cgroup(box: Box, *files: str) -> None:
    """cgroups(7): writing 0 moves the writer, into the groups of *files* and of those that came
    with the plan (whoever opened them has the right to)."""
    for path in files:
        write(path, "0")
    for number, fd in enumerate(box.named.pop("group", [])):
        try:
            os.write(fd, b"0")
        except OSError as error:
            raise kernel.CallFailed("write", error.errno or 0, group=number, text="0") from None
        os.close(fd)


def open_memory(box: Box, version: str, group: str) -> None:
    """Open what tells of *group*'s memory, for `watch_memory`, while it can be reached."""
    box.named["memory"] = open_files(int(version), group)


def watch_memory(
    box: Box, version: str, share: str, cap: str, uid: str, gid: str, sentence: str, killed: str
) -> None:
    """Init interrupts the kernel of *uid* and *gid* at *share* bytes of *cap*, unless that is 0,
    and shows it *sentence*; *killed* when Linux has ended another process of the group."""
    level = Level(int(share), int(cap)) if int(share) else None
    files = box.named.pop("memory")
    box.part(Caps).memory = Memory(int(version), files, level, sentence, killed)
    box.files_as = int(uid), int(gid)


def oom_score(_box: Box, score: str) -> None:
    """proc(5), oom_score_adj: where the whole machine runs out, a kernel goes before its server."""
    write("/proc/self/oom_score_adj", score)


def resource_limits(_box: Box, *words: str) -> None:
    """setrlimit(2), each "NAME=SOFT:HARD". Where a hard limit is lower already, and we are nobody
    who could raise it, that one stands."""
    for word in words:
        name, _, values = word.partition("=")
        soft, hard = (_UNLIMITED if v == "unlimited" else int(v) for v in values.split(":"))
        number = _LOCKS if name == "locks" else getattr(resource, f"RLIMIT_{name.upper()}")
        try:
            resource.setrlimit(number, (soft, hard))
        except ValueError:  # EPERM
            most = resource.getrlimit(number)[1]
            inside = soft != _UNLIMITED and soft < most
            resource.setrlimit(number, (soft if inside else most, most))


def own_limits(box: Box, *words: str) -> None:
    """Each "PATH=VALUE" below /proc/sys: settings of namespaces that are ours. One that this Linux
    does not know limits nothing."""
    for word in words:
        path, _, value = word.partition("=")
        fd = look(box.mounts.root_fd, f"proc/sys/{path}")
        if fd >= 0:
            os.close(fd)
            write(f"proc/sys/{path}", value)


VERBS = (
    join_cgroup,
    open_memory,
    watch_memory,
    oom_score,
    resource_limits,
    own_limits,
)
