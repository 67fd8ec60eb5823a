"""inside/say.py - runs in whoever has to be known or heard: the launcher, PID 1, a nursery's child.

May import: os, stat, kernel_calls, wire.
"""

from __future__ import annotations

import os
import stat

from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside import wire


def say_who(control_fd: int, word: str) -> None:
    """Tell the server *word*. It learns our pid from the message's credentials; with it comes a
    pidfd, since we may have ended when it looks, and have been waited for by whatever handler of
    SIGCHLD it has."""
    pidfd = os.pidfd_open(os.getpid())
    kernel.send_descriptors(control_fd, wire.message(word), [pidfd])
    os.close(pidfd)


def say_to_person(pid: int, text: str) -> None:
    """Write *text* to what process *pid* has as its standard error now, if that is a pipe.

    Language kernels put a pipe of their own there, and show what comes out of it at the cell that
    runs. It is opened with the rights of the kernel's user, which are ours (`init.run`), and never
    waits: a descriptor 2 that is something else is the kernel's own choice.
    """
    flags = os.O_NONBLOCK | os.O_CLOEXEC
    try:
        found = os.open(f"/proc/{pid}/fd/2", os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if stat.S_ISFIFO(os.fstat(found).st_mode):
            pipe = os.open(f"/proc/self/fd/{found}", os.O_WRONLY | flags)
            try:
                # What the server says may name a path, and be cut within one of its letters.
                os.write(pipe, text.encode("utf-8", "replace"))
            finally:
                os.close(pipe)
    except OSError:
        pass
    finally:
        os.close(found)
