"""stem.py - in the launching process: the process that launchers are forked from.

The interpreter that launchers run in takes some 20 ms to start. So it is started once, as the
*stem* (launcher/enter.py), before anything else is known of the first start, and forks a launcher
for each. A stem that does not answer is ended, and another one asked.

No Python of ours runs between fork and exec in the server, which has threads: `subprocess` spawns a
fresh interpreter, and that one has a single thread.

The stem costs some 6 MB. It ends with the server, whose end of its socket closes then, and when no
start has come for a while.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import sandbox_provisioner
from sandbox_provisioner.control import control_pair
from sandbox_provisioner.descriptors import is_readable, keep_from_children, occupy_standard_streams
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.handle import LastWord, when_ended
from sandbox_provisioner.inside import wire
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.performer import Performer, signal_to
from sandbox_provisioner.streams import is_stream

BOOT = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from sandbox_provisioner.launcher.enter import main; main(sys.argv[2:])"
)
_INTERPRETER_SECONDS = 10.0
_ORDERLY_SECONDS = 1.0
_IDLE_SECONDS = 60.0
_MARGIN_SECONDS = 5.0


class Stem:
    """The process that launchers are forked from, as long as it is needed: one for each server. It
    is the source of performers that are launchers (`performer.py`)."""

    is_of_init = False
    patience_seconds = 60.0

    def __init__(self) -> None:
        self._wanted_seconds = _IDLE_SECONDS
        self._begin()
        # Two servers with one stem would both hear its answers.
        keep_from_children(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._requests: socket.socket | None = None
        self._idle_seconds = 0.0
        self._good_until = 0.0
        self.last_word = LastWord()

    def forget(self) -> None:
        """In a child that was forked: its first start makes another one."""
        if self._requests:
            self._requests.close()
        self._begin()

    def stay(self, seconds: float) -> None:
        """Let the next stem wait for another start for *seconds*, unless it does so for longer."""
        self._wanted_seconds = max(self._wanted_seconds, seconds)

    def ask(self, performer: Performer) -> None:
        """Let a launcher be forked now. Where there is no stem yet, one is started; LaunchError if
        the machine has no process left."""
        occupy_standard_streams()
        control, theirs = control_pair()
        performer.connect(control, self.last_word)
        with theirs, self._lock:
            try:
                self._ask(theirs)
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:  # unix(7): the next one could not be asked
                    raise
                # It has ended, or takes no request any more.
                self._end(0.0)
                self._ask(theirs)
            performer.asked = self._process

    async def here(self, performer: Performer) -> None:
        """Wait for the launcher; LaunchError if there is none to be had."""
        if await performer.is_heard():
            return
        await off_loop(self._ask_another, performer)
        if not await performer.is_heard():
            raise LaunchError(
                attempt="start the launcher",
                answer="it ended before it had begun, or did not begin",
                remedy="The machine may be out of processes or memory.",
                step="spawn-launcher",
            )

    def _ask_another(self, performer: Performer) -> None:
        """End the stem that does not answer, if it is still the one that was asked."""
        with self._lock:
            if self._process is performer.asked:
                self._end(0.0)
        self.ask(performer)

    def _ask(self, theirs: socket.socket) -> None:
        if time.monotonic() > self._good_until:
            self._end(_ORDERLY_SECONDS)
        requests = self._requests or self._spawn()
        socket.send_fds(requests, [wire.message(wire.FORK)], [theirs.fileno()], socket.MSG_DONTWAIT)
        # The stem counts from its fork, which is later: it is still there when we think that it is.
        self._good_until = time.monotonic() + self._idle_seconds - _MARGIN_SECONDS

    def _spawn(self) -> socket.socket:
        requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._idle_seconds = self._wanted_seconds
        self.last_word.time = time.monotonic() + _INTERPRETER_SECONDS
        try:
            self._process = subprocess.Popen(
                [*_command(), str(theirs.fileno()), f"{self._idle_seconds:g}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if is_stream(2) else subprocess.DEVNULL,
                env={},
                cwd="/",
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is for the server
            )
        except OSError as error:
            requests.close()
            raise LaunchError(
                attempt="start the launcher",
                answer=error.strerror or str(error),
                remedy="The machine may be out of processes or memory.",
                step="spawn-launcher",
            ) from None
        finally:
            theirs.close()
        with contextlib.suppress(ProcessLookupError):  # it has ended, and nobody waits here
            self._pidfd = os.pidfd_open(self._process.pid)
            process = self._process
            when_ended(self._pidfd, lambda _: process.wait())
        self._requests = requests
        return requests

    def end(self) -> None:
        """End it; the next launcher gets another one."""
        with self._lock:
            self._end(_ORDERLY_SECONDS)

    def _end(self, patience_seconds: float) -> None:
        """Let it do what it was asked for and end; kill it after *patience_seconds*."""
        if self._requests:
            self._requests.close()
        if self._pidfd >= 0:
            if not is_readable(self._pidfd, patience_seconds):
                signal_to(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
        if self._process:
            self._process.wait()
        self._process = self._requests = None
        self._pidfd = -1


stem = Stem()


def _command() -> list[str]:
    package = os.path.dirname(os.path.dirname(os.path.abspath(sandbox_provisioner.__file__)))
    return [interpreter(), "-SI", "-c", BOOT, package]


def interpreter() -> str:
    """The Python that runs the launcher. Not the virtual environment's: the launcher needs nothing
    of it, and finding it takes 4 ms."""
    return getattr(sys, "_base_executable", "") or sys.executable
