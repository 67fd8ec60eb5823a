"""launcher/watchers.py - runs in PID 1: the list of all that it waits for, and its own watchers.

May import: the facilities' `inside`, and `inside/`.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal without its enums
import os
import select

from sandbox_provisioner.facilities.caps.inside import Caps
from sandbox_provisioner.facilities.figures.inside import Told
from sandbox_provisioner.facilities.figures.inside.watch import SIGIO
from sandbox_provisioner.facilities.network.inside import Network
from sandbox_provisioner.facilities.process.inside import Output
from sandbox_provisioner.facilities.rights.inside.modes import Modes
from sandbox_provisioner.facilities.root.inside.folders import Folders
from sandbox_provisioner.facilities.root.inside.served import ServersOfImages
from sandbox_provisioner.facilities.sockets.inside import Seal, Sockets
from sandbox_provisioner.facilities.workdir.inside import Workdir
from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.box import Box
from sandbox_provisioner.inside.watcher import Watcher

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandbox_provisioner.inside.watcher import Init

_SIGCHLD = 17
# What an administrator's kill(1) sends is for the kernel as well.
_RELAYED = wire.RELAYED | {1: 1, 2: 2, 15: 15}
_LISTENED = (_SIGCHLD, *_RELAYED)
_CHUNK = 4096


def watchers_of(box: Box) -> list[Watcher]:
    """In the order in which they are served, after each wait."""
    found = (
        # Before the covers: whoever sweeps after a server that has ended would remove what is made
        # for them now.
        ServersEnd(box),
        # Until everybody is stopped, something may be bare.
        box.part(Workdir).watch,
        # Before the death of the kernel: what it wrote until then belongs to its tail.
        *box.part(Output).begin(),
        Control(box),
        box.part(Network).watch,
        Seal(box) if box.part(Sockets).names else None,
        box.part(Modes).watch(),
        ServersOfImages(box) if wire.IMAGE_SERVER in box.named else None,
        # Before the memory: it knows the reason of a SIGBUS.
        box.part(Folders).own() if box.namespaces else None,
        # After the seal: v1 takes some 10 ms for each event that is asked for then.
        box.part(Caps).memory,
        # Whoever reads waits no longer than for what came before.
        box.part(Told).watch(),
        Children(),
    )
    return [watcher for watcher in found if watcher]


def block_signals() -> None:
    """Before the fork, so that no signal is lost between it and `Children`."""
    _signal.pthread_sigmask(_signal.SIG_BLOCK, (*_LISTENED, SIGIO))


def unblock_signals() -> None:
    """In the kernel's process."""
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, (*_LISTENED, SIGIO))


class ServersEnd(Watcher):
    """A pidfd of the server: a child of it may hold the control socket too, and that socket may be
    of somebody else, who launches for it."""

    def __init__(self, box: Box) -> None:
        self._box = box

    def waits(self) -> Iterable[tuple[int, int]]:
        """Nothing where we outlive it."""
        outlives = self._box.survives_server and not self._box.ends_with_watched
        return () if outlives else ((self._box.server_fd, select.POLLIN),)

    def serve(self, init: Init, ready: dict[int, int]) -> None:
        """The sandbox ends with it."""
        if self._box.server_fd in ready:
            init.end_with_server()


class Control(Watcher):
    """The socket to the server, as long as it is there."""

    def __init__(self, box: Box) -> None:
        self._box = box

    def waits(self) -> Iterable[tuple[int, int]]:
        """Nothing when the server has ended, and we have not."""
        return ((self._box.control_fd, select.POLLIN),) if self._box.control_fd >= 0 else ()

    def serve(self, init: Init, ready: dict[int, int]) -> None:
        """Pass on what the server says, and heed its end."""
        if self._box.control_fd not in ready:
            return
        if told := os.read(self._box.control_fd, _CHUNK):
            word, sentence = wire.parts(told)
            if word == wire.SAY:
                init.say(sentence)
            elif word == wire.CAP and (memory := self._box.part(Caps).memory):
                cap, said, killed = sentence.split(" ")
                memory.cap_is(int(cap), *map(wire.from_hexadecimal, (said, killed)))
            return
        if not self._box.survives_server:
            init.end_with_server()
        os.close(self._box.control_fd)
        self._box.control_fd = -1


class Children(Watcher):
    """Signals: those for the kernel, and those that tell of the end of a process."""

    def __init__(self) -> None:
        self._signals = kernel.signal_fd(_LISTENED)
        self._last_code = 0

    def waits(self) -> Iterable[tuple[int, int]]:
        """signalfd(2)."""
        return ((self._signals, select.POLLIN),)

    def serve(self, init: Init, ready: dict[int, int]) -> None:
        """One signal at a time."""
        if self._signals not in ready:
            return
        number = int.from_bytes(os.read(self._signals, 128)[:4], "little")
        if number == _SIGCHLD:
            self._reap(init)
        else:
            init.relay(_RELAYED[number])

    def _reap(self, init: Init) -> None:
        outlives_kernel = init.box.part(Output).outlives_kernel
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                if outlives_kernel and not init.kernel_pid:
                    init.end(self._last_code)
                return
            if pid == 0:
                return
            if pid == init.kernel_pid and outlives_kernel:
                init.kernel_pid, self._last_code = 0, os.waitstatus_to_exitcode(status)
            elif pid == init.kernel_pid:
                code = os.waitstatus_to_exitcode(status)
                init.end(code, init.why(code))
