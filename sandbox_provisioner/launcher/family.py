"""launcher/family.py - runs in init without a PID namespace: finds and ends all descendants.

init is a child subreaper (prctl(2)): whoever inside loses its parent becomes its child, however it
daemonised, so that a walk from parent to children finds everybody.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal without its enums
import os

_SIGKILL = 9
_SIGSTOP = 19
_WALL = 0x40000000  # waitpid(2), __WALL: children that end with another signal than SIGCHLD too


def end_all() -> None:
    """Kill and reap every descendant of this process; returns when there is none left.

    First all are stopped, round by round, until a look finds nobody new: a stopped process forks no
    more, and keeps its place under the cap on processes, so that even a fork bomb comes to rest.
    """
    stopped: set[tuple[int, int]] = set()
    while new := _descendants() - stopped:
        for member in new:
            _send(member, _SIGSTOP)
        stopped |= new
    while members := _descendants():
        for member in members:
            _send(member, _SIGKILL)
        _reap()


def _reap() -> None:
    """Wait for one child, then take all that have ended, whatever signal they end with."""
    try:
        os.waitpid(-1, _WALL)
        while os.waitpid(-1, _WALL | os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return  # there is none left, or none yet: of the dead, the children come to us


def _descendants() -> set[tuple[int, int]]:
    """(pid, start time) of everybody below us who has not ended."""
    children: dict[int, list[tuple[int, int]]] = {}
    for name in os.listdir("/proc"):
        found = _look(int(name)) if name.isdecimal() else None
        if found:
            parent, start = found
            children.setdefault(parent, []).append((int(name), start))
    members: set[tuple[int, int]] = set()
    waiting = [os.getpid()]
    while waiting:
        for member in children.get(waiting.pop(), ()):
            members.add(member)
            waiting.append(member[0])
    return members


def _look(pid: int) -> tuple[int, int] | None:
    """Parent and start time of *pid* (proc_pid_stat(5)); None if there is no such process.

    A zombie counts too: it may be a leader that has ended while its threads go on.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            words = file.read(4096).rpartition(b")")[2].split()
    except OSError:
        return None
    return int(words[1]), int(words[19])


def _send(member: tuple[int, int], number: int) -> None:
    """Signal *member*, and nobody who has got its pid meanwhile."""
    pid, start = member
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        found = _look(pid)
        if found and found[1] == start:
            _signal.pidfd_send_signal(pidfd, number)
    except OSError:
        pass  # it has ended
    finally:
        os.close(pidfd)
