"""gateway/main.py - runs as the gateway, from its start to its end: what the server tells it.

It has no rights of its own, needs no home and writes to no folder: what it has is the host's
network, and what comes by its control socket, which is its standard input::

    box JSON + a channel to PID 1, a file of counts    a new box; see `settings.py`
    resolver PATH + a file                             what that path is from now on
    ──▶ ok ID, ok PATH, failed TEXT

When the server ends, boxes may live on: the last of them takes the gateway with it.

May import: everything in this room; facilities.network.tell.counts, inside.kernel_calls,
inside.wire.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
from collections.abc import Sequence

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.network.tell.counts import MOST_BYTES
from sandbox_provisioner.gateway.box import Box, Shared
from sandbox_provisioner.gateway.lookups import Lookups
from sandbox_provisioner.gateway.loop import Loop
from sandbox_provisioner.gateway.seats import Seats
from sandbox_provisioner.gateway.settings import read_settings
from sandbox_provisioner.inside import kernel_calls, wire
from sandbox_provisioner.inside.printable import one_line

_CONTROL = 0
_MOST_OF_MESSAGE = 1 << 18
_MOST_OF_ANSWER = 1000
_DESCRIPTORS = 2


class Control:
    """The server's words; *shared* is what all of its boxes have together."""

    def __init__(self, shared: Shared, control: socket.socket) -> None:
        self._shared = shared
        self._control = control
        self.is_over = False
        control.setblocking(False)
        shared.loop.add(control.fileno(), self.on_word)

    def on_word(self) -> None:
        """There is one, or the server has ended."""
        try:
            text, fds, _, _ = socket.recv_fds(
                self._control, _MOST_OF_MESSAGE, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            text, fds = b"", []
        if not text:
            self.is_over = True
            self._shared.loop.remove(self._control.fileno())
            return
        answer = self._answer(text, fds)
        with contextlib.suppress(OSError):  # who does not read its answers gets none
            self._control.send(answer, socket.MSG_DONTWAIT)

    def _answer(self, text: bytes, fds: list[int]) -> bytes:
        word, rest = wire.parts(text)
        try:
            if word == wire.BOX:
                return wire.message(wire.OK, self._take_in(rest, fds))
            if word == wire.RESOLVER:
                return wire.message(wire.OK, _look_up_by(rest, fds))
            raise ValueError(f"nobody knows the word {word!r}")
        except (ValueError, SpecError, OSError) as error:
            return wire.message(wire.FAILED, one_line(str(error))[:_MOST_OF_ANSWER])
        finally:
            for fd in fds:  # those that nobody has taken
                os.close(fd)

    def _take_in(self, rest: str, fds: list[int]) -> str:
        settings = read_settings(rest)
        if len(fds) != _DESCRIPTORS:
            raise ValueError("with a box come a channel and a file of counts")
        settings.rules()
        if former := self._shared.boxes.get(settings.id):
            former.close()  # its kernel has ended, whoever keeps the channel open: it starts anew
        channel, counts = socket.socket(fileno=fds.pop(0)), fds.pop(0)
        self._shared.boxes[settings.id] = Box(self._shared, settings, channel, counts)
        return settings.id


def _look_up_by(path: str, fds: list[int]) -> str:
    """The path is a link to a descriptor: who reads it from now on reads this file."""
    if path not in wire.RESOLVER_FILES or len(fds) != 1:
        raise ValueError(f"no file of a resolver is {path!r}")
    os.dup2(fds[0], wire.RESOLVER_FILES[path], inheritable=False)
    return path


def _reserve_descriptors() -> None:
    """Those of the files that are yet to be told, before anything else has them."""
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for fd in wire.RESOLVER_FILES.values():
        os.dup2(nothing, fd, inheritable=False)
    if nothing not in wire.RESOLVER_FILES.values():
        os.close(nothing)


def main(_argv: Sequence[str] = ()) -> None:
    """Until the server has ended, and each box."""
    _reserve_descriptors()
    kernel_calls.set_no_new_privileges()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is meant for the server, and for kernels
    # A name is looked up as it stands: "data" is not "data.example.org" (resolv.conf(5), search).
    os.environ["LOCALDOMAIN"] = ""
    _bound_files()
    loop, lookups = Loop(), Lookups()
    shared = Shared(loop, lookups, Seats.of(_raise_descriptors()))
    loop.add(lookups.event, lookups.collect)
    with socket.socket(fileno=_CONTROL) as socket_of_server:
        control = Control(shared, socket_of_server)
        loop.run(lambda: control.is_over and not shared.boxes)


def _bound_files() -> None:
    """The files of counts lie where others write too, and stay as small as they are read."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    most = MOST_BYTES if hard == resource.RLIM_INFINITY else min(MOST_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def _raise_descriptors() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
