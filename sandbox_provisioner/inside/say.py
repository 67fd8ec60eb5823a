"""inside/say.py - runs in whoever the server has to know: the launcher, PID 1, a nursery's child.

May import: os, kernel_calls, wire.
"""

from __future__ import annotations

import os

from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside import wire


def say_who(control_fd: int, word: str) -> None:
    """Tell the server *word*. It learns our pid from the message's credentials; with it comes a
    pidfd, since we may have ended when it looks, and have been waited for by whatever handler of
    SIGCHLD it has."""
    pidfd = os.pidfd_open(os.getpid())
    kernel.send_descriptors(control_fd, wire.message(word), [pidfd])
    os.close(pidfd)
