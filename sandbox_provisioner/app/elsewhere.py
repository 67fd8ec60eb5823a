"""app/elsewhere.py - a command of its own, root's: `doctor --pid`, from another process's place.

What a server may do depends on its user, its control groups, its limits, its environment and its
directory. So a child of ours takes all of that over, and looks; it runs nothing of that user's. It
has no terminal; what it prints goes to files in memory, which we show.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from sandbox_provisioner.errors import COMMAND, HostError, InternalError, SandboxError, SpecError
from sandbox_provisioner.facilities.caps.cgroup import own_directories
from sandbox_provisioner.inside.printable import printable, with_place

_NAMESPACES = ("mnt", "user", "pid")
_HERE = "/proc/self"
# By their names in proc_pid_limits(5); prlimit(2) of another user's asks for more rights.
_LIMITS = {"Max open files": resource.RLIMIT_NOFILE, "Max processes": resource.RLIMIT_NPROC}
# Of its environment; what else a user has set there could make our Python run something.
_VARIABLES = ("HOME", "USER", "LOGNAME", "LANG", "XDG_RUNTIME_DIR", "JUPYTERHUB_USER")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where process *pid* is, and as whom."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...]
    cwd: str
    environment: dict[str, str]
    cgroups: tuple[str, ...]
    limits: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, pid: int) -> Place:
        """Look at *pid*; SpecError if there is none, HostError if we may not or it is elsewhere."""
        with _told(pid):
            _refuse_other_namespaces(pid)
            fields = dict(_status(pid))
            return cls(
                pid=pid,
                uid=int(fields["Uid"].split()[1]),
                gid=int(fields["Gid"].split()[1]),
                groups=tuple(map(int, fields["Groups"].split())),
                cwd=os.readlink(f"/proc/{pid}/cwd"),
                environment=dict(_environment(pid)),
                cgroups=own_directories(str(pid)),
                limits=tuple(_limits(pid)),
            )

    def enter(self) -> None:
        """Become like it; for a process that does nothing else afterwards."""
        for directory in self.cgroups:
            with open(f"{directory}/cgroup.procs", "w") as file:
                file.write("0")  # cgroups(7): whoever writes
        for kind, soft, hard in self.limits:
            resource.setrlimit(kind, (soft, hard))
        if os.geteuid() == 0:
            os.setgroups(self.groups)
            os.setresgid(self.gid, self.gid, self.gid)
            os.setresuid(self.uid, self.uid, self.uid)
        os.chdir(self.cwd)
        kept = {"PATH": os.defpath, "PYTHONDONTWRITEBYTECODE": "1"}
        os.environ.clear()
        os.environ.update(kept | self.environment)


@contextlib.contextmanager
def _told(pid: int) -> Iterator[None]:
    attempt = f"look from the place of process {pid}"
    try:
        yield
    except (FileNotFoundError, ProcessLookupError):
        raise SpecError(
            attempt=attempt,
            answer="there is no such process",
            remedy=("Take the number of the Jupyter server:", f"{COMMAND}pgrep -af jupyter"),
        ) from None
    except OSError as error:
        raise HostError(
            attempt=attempt,
            answer=error.strerror or str(error),
            remedy=("As administrator:", f"{COMMAND}sudo jupyter sandbox doctor --pid {pid}"),
        ) from None


def _refuse_other_namespaces(pid: int) -> None:
    for kind in _NAMESPACES:
        if os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"{_HERE}/ns/{kind}"):
            raise HostError(
                attempt=f"look from the place of process {pid}",
                answer=f"it is in a container (another {kind} namespace)",
                remedy="Run doctor in there, such as with docker exec or kubectl exec.",
            )


def _status(pid: int) -> Iterator[tuple[str, str]]:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        yield name, value


def _environment(pid: int) -> Iterator[tuple[str, str]]:
    for entry in os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes()).split("\0"):
        name, equals, value = entry.partition("=")
        if equals and (name in _VARIABLES or name.startswith(("JUPYTER_", "XDG_"))):
            yield name, value


def _limits(pid: int) -> Iterator[tuple[int, int, int]]:
    """Not above what we may have ourselves."""
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        for name, kind in _LIMITS.items():
            if line.startswith(f"{name} "):
                most = resource.getrlimit(kind)[1]
                told = [_limit(word) for word in line.removeprefix(name).split()[:2]]
                soft, hard = (most if value < 0 or 0 <= most < value else value for value in told)
                yield kind, soft, hard


def _limit(word: str) -> int:
    return resource.RLIM_INFINITY if word == "unlimited" else int(word)


def look_from(place: Place, look: Callable[[], None]) -> int:
    """Call *look* in a child that is at *place*, and show what it prints; its exit status."""
    sys.stdout.flush()
    outputs = {stream: os.memfd_create("doctor") for stream in (sys.stdout, sys.stderr)}
    child = os.fork()
    if child == 0:
        _be_the_child(place, look, *outputs.values())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for stream, fd in outputs.items():
        with open(fd, errors="backslashreplace") as told:
            told.seek(0)
            stream.write(printable(told.read()))
    return status


def _be_the_child(place: Place, look: Callable[[], None], output: int, errors: int) -> NoReturn:
    status = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, ours in ((0, null), (1, output), (2, errors)):
            os.dup2(ours, fd)
        with _told(place.pid):
            place.enter()
        look()
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except SandboxError as error:
        print(error.for_people(), file=sys.stderr)
    except Exception as error:
        traceback.print_exception(error)
        mistake = InternalError(attempt="look from there", answer=with_place(error))
        print(mistake.for_people(), file=sys.stderr)
    finally:
        sys.stdout.flush()
        os._exit(status)
