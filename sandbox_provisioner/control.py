"""control.py - in the launching process: control sockets, and what is said and heard on our end.

The words are drawn in `inside/wire.py`. Whoever runs out of descriptors keeps none of those that
came, and those that could not be sent stay whose they are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Sequence

from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.kernel_calls import MOST_DESCRIPTORS
from sandbox_provisioner.plan import Plan
from sandbox_provisioner.stages import fail_at

_CREDENTIALS = struct.Struct("3i")  # struct ucred of unix(7)
_DESCRIPTOR = struct.Struct("i")
_WORD_BYTES = 64


def control_pair() -> tuple[socket.socket, socket.socket]:
    """Our end and the other one of a control socket; what we hear comes with its sender's pid."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return ours, theirs


def say_go(
    control: socket.socket, plan: Plan, report: int, fds: Sequence[int], watched: int = -1
) -> None:
    """Send *plan* with *fds*, the first of which are standard streams, as
    `launcher.enter.obey` takes them; OSError if nobody is there. By the pidfd *watched*, or our
    own, PID 1 sees that its server has ended."""
    with contextlib.ExitStack() as stack:
        memfd = os.memfd_create("plan")
        stack.callback(os.close, memfd)
        server = os.pidfd_open(os.getpid()) if watched < 0 else os.dup(watched)
        stack.callback(os.close, server)
        os.pwrite(memfd, plan.encode(), 0)
        word = wire.message(wire.GO, fail_at())
        socket.send_fds(control, [word], [memfd, report, server, *fds])


def say_opened(control: socket.socket, fds: Sequence[int]) -> None:
    """Pass on *fds*, which a launcher has opened; nothing if nobody is there."""
    with contextlib.suppress(ConnectionError):
        socket.send_fds(control, [wire.message(wire.OPENED)], fds)


def hear(control: socket.socket, word: str) -> tuple[int, int]:
    """The sender's pid, as unix(7) translates it for us, once it says *word*, and the descriptor
    that comes with it, -1 without one; (0, -1) at its end, and of who says another word."""
    text, pid, fds = _received(control, 1)
    # The room that is left by rounding takes a second one.
    fd, *others = fds or [-1]
    if text != wire.message(word) and fd >= 0:
        others.append(fd)
    for other in others:
        os.close(other)
    return (pid, fd) if text == wire.message(word) else (0, -1)


def hear_descriptors(control: socket.socket) -> list[int]:
    """Those that come with the next word; none at its end."""
    return _received(control, MOST_DESCRIPTORS)[2]


def _received(control: socket.socket, most: int) -> tuple[bytes, int, list[int]]:
    """The next word, its sender's pid where that comes with it, and at least so many descriptors;
    b"" at the end."""
    room = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(most * _DESCRIPTOR.size)
    try:
        text, ancillary, flags, _ = control.recvmsg(_WORD_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:  # it has ended, and left unread what we had told it
        return b"", 0, []
    found = {kind: data for _, kind, data in ancillary}
    fds = [fd for (fd,) in _DESCRIPTOR.iter_unpack(found.get(socket.SCM_RIGHTS, b""))]
    if flags & socket.MSG_CTRUNC:  # unix(7): there was no descriptor left for all
        for fd in fds:
            os.close(fd)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    credentials = found.get(socket.SCM_CREDENTIALS)
    return text, _CREDENTIALS.unpack(credentials)[0] if credentials else 0, fds
