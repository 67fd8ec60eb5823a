"""killing.py - a process of root's that forks brokers: at a chosen point of what one is asked, that
broker is killed, or whoever has asked.

A *point* is just before something that the broker changes or sends: Python's audit events tell of
those, with the line of ours where it happens; or a stage or a step of a start begins (a step in a
launcher, which waits meanwhile), or a word of a launcher has come. So a new file, group or message
is a new point, and nobody has to name it.

Brokers are forks, which need no time to import anything. What a killed one leaves comes to us.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any, cast

from sandbox_provisioner import stages, stem
from sandbox_provisioner.broker import daemon
from sandbox_provisioner.broker.kept import Kept
from sandbox_provisioner.broker.peer import Connection, credentials
from sandbox_provisioner.descriptors import is_readable
from sandbox_provisioner.hub.for_hub import ServersOfHub
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.report import Report

PATIENCE_SECONDS = 60
_OURS = f"{os.sep}sandbox_provisioner{os.sep}"
_CHANGES = {
    "fcntl.flock", "fcntl.ioctl", "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove",
    "os.rename", "os.rmdir", "os.symlink", "os.truncate", "socket.bind", "socket.connect",
    "socket.sendmsg", "subprocess.Popen",
}  # fmt: skip
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# In the stem: before each step a launcher, or PID 1, asks us to go on.
_BOOT = """
import os, sys
sys.path.append(sys.argv[1])
from sandbox_provisioner.inside import wire
from sandbox_provisioner.launcher import enter
os.set_inheritable({fd}, False)
def begins(fail_at, step):
    try:
        os.write({fd}, step.encode())
        os.read({fd}, 1)
    except OSError:
        pass  # the broker is gone
wire.fail_as_wished = begins
enter.main(sys.argv[2:])
"""


class Points:
    """In a broker: what is reached, the first time, from a question that makes something until its
    answer; at the point *chosen* the *victim* is killed."""

    def __init__(self) -> None:
        self.reached: dict[str, None] = {}
        self.chosen = self.victim = ""
        self._asker = 0
        self._open = False
        self._lock = threading.RLock()

    def begin(self, asker: int) -> None:
        self._asker, self._open = asker, True
        self.reach("question read")

    def end(self) -> None:
        self.reach("answered")
        self._open = False

    def choose(self, point: str, victim: str) -> None:
        self._open = False
        self.reached, self.chosen, self.victim = {}, point, victim

    def reach(self, point: str) -> None:
        with self._lock:
            if not self._open or point in self.reached:
                return
            self.reached[point] = None
            if point == self.chosen:
                self._kill()

    def _kill(self) -> None:
        if self.victim == "broker":
            os.kill(os.getpid(), signal.SIGKILL)
        self._open = False
        pidfd = os.pidfd_open(self._asker)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert is_readable(pidfd, PATIENCE_SECONDS)
        os.close(pidfd)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """sys.addaudithook: just before it happens."""
        if not self._open:
            return
        writes = event == "open" and arguments[2] & _TO_WRITE
        if writes or event in _CHANGES:
            self.reach_here(event)

    def reach_here(self, event: str) -> None:
        """By the line of ours that does it."""
        frame: FrameType | None = sys._getframe(1)
        while frame and _OURS not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame:
            place = frame.f_code.co_filename.rpartition(_OURS)[2]
            self.reach(f"{event} {place}:{frame.f_lineno}")

    def hear_steps(self, there: socket.socket) -> None:
        """In a thread: launchers wait for us."""
        while step := there.recv(256):
            self.reach(f"step {step.decode()}")
            there.send(b".")


def _be_broker(told: socket.socket, where: list[str]) -> None:
    """Does not return."""
    points = Points()
    steps, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stem.BOOT = _BOOT.format(fd=theirs.fileno())
    _wrap(points, theirs.fileno())
    threading.Thread(target=points.hear_steps, args=(steps,), daemon=True).start()
    threading.Thread(target=_obey, args=(told, points), daemon=True).start()

    def log(event: str, **_: object) -> None:
        if event == "listen":
            told.send(b'"listens"')

    daemon.log = log
    sys.addaudithook(points.hear)
    path, runtime, layers, policy, state = where
    servers = ServersOfHub(runtime, policy, log, state)
    asyncio.run(daemon.run(path, runtime, policy, kept=Kept(layers, 1.0), servers=servers))


def _obey(told: socket.socket, points: Points) -> None:
    while text := told.recv(1 << 16):
        match json.loads(text):
            case ["choose", point, victim]:
                points.choose(point, victim)
                told.send(b'"chosen"')
            case ["reached"]:
                told.send(json.dumps(list(points.reached)).encode())


def _wrap(points: Points, fd: int) -> None:
    popen, add, message = subprocess.Popen, Report.add, daemon._message
    answer, patched = Connection.answer, cast("Any", Connection)

    def opened(words: list[str], **more: Any) -> Any:
        if stem.BOOT in words:
            more["pass_fds"] = (*more["pass_fds"], fd)
        return popen(words, **more)

    def added(report: Report, words: list[str]) -> None:
        points.reach(f"word {words[0]}")
        add(report, words)

    async def read(connection: Connection) -> dict[str, Any]:
        found = await message(connection)
        if found.keys() & {"start", "server-start"}:
            points.begin(credentials(connection.socket)[0])
        return found

    @functools.wraps(answer)
    async def answered(connection: Connection, *given: Any) -> None:
        await answer(connection, *given)
        points.end()

    for name, call in list(vars(kernel_calls).items()):
        if isinstance(call, FunctionType) and not name.startswith("_"):
            setattr(kernel_calls, name, _told(points, name, call))
    stages.fail_here = lambda name: points.reach(f"stage {name}")
    subprocess.Popen = opened  # type: ignore[assignment, misc]
    Report.add = added  # type: ignore[method-assign]
    daemon._message = read
    patched.answer = answered


def _told(points: Points, name: str, call: Any) -> Any:
    """*call*, of kernel_calls.py, of which there are no audit events."""

    @functools.wraps(call)
    def called(*given: Any, **more: Any) -> Any:
        points.reach_here(name)
        return call(*given, **more)

    return called


# -- who forks them


class Parent:
    """One broker at a time."""

    def __init__(self, where: list[str]) -> None:
        self._where = where
        self._broker = 0
        self._told: socket.socket | None = None
        self._mounts = Path("/proc/self/mountinfo").read_text()

    def obey(self, words: list[str]) -> Any:
        match words:
            case ["broker"]:
                self._fork()
                return self._hear()
            case ["died"]:
                return self._died()
            case ["kill"]:
                os.kill(self._broker, signal.SIGKILL)
                return self._died()
            case ["alone", *others]:
                return self._alone({int(pid) for pid in others})
            case ["children"]:
                return self._children(self._broker)
            case _:
                assert self._told
                self._told.send(json.dumps(words).encode())
                return self._hear()

    def _fork(self) -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if self._told:
            self._told.close()
        self._broker = os.fork()
        if not self._broker:
            here.close()
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(2, 1)
            try:
                _be_broker(there, self._where)
            finally:
                os._exit(1)
        there.close()
        self._told = here

    def _hear(self) -> Any:
        assert self._told
        text = self._told.recv(1 << 16)
        return json.loads(text) if text else "died"

    def _died(self) -> int:
        """By which signal the broker has ended, which is waited for."""
        with _in_time():
            return os.WTERMSIG(os.waitpid(self._broker, 0)[1])

    def _alone(self, others: set[int]) -> list[str]:
        """Wait until all that came to us from killed brokers has ended, but for *others*; what
        mounts there are more."""
        with _in_time():
            while set(self._children(os.getpid())) - {self._broker} - others:
                assert os.wait()[0] != self._broker
        found = set(Path("/proc/self/mountinfo").read_text().splitlines())
        return sorted(found - set(self._mounts.splitlines()))

    def _children(self, pid: int) -> list[int]:
        threads = Path(f"/proc/{pid}/task").glob("*/children")
        return [int(child) for file in threads for child in file.read_text().split()]


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    signal.alarm(PATIENCE_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def _give_up(*_: object) -> None:
    raise TimeoutError("they live on")


def main() -> None:
    """Obey lines of standard input, until it ends: then the broker is killed."""
    kernel_calls.adopt_orphans()
    signal.signal(signal.SIGALRM, _give_up)
    parent = Parent(sys.argv[1:])
    for line in sys.stdin:
        try:
            told = parent.obey(json.loads(line))
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
    os.kill(parent._broker, signal.SIGKILL)
    os.waitpid(parent._broker, 0)


if __name__ == "__main__":
    main()
