"""facilities/namespaces/inside.py - runs in the launcher and in PID 1: namespaces of our own.

May import: errno, os, inside.kernel_calls, say, wire.
May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

import errno
import os

from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.say import say_who

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from sandbox_provisioner.inside.box import Box

_NAMES = {
    "mount": kernel.CLONE_NEWNS,
    "pid": kernel.CLONE_NEWPID,
    "network": kernel.CLONE_NEWNET,
    "ipc": kernel.CLONE_NEWIPC,
    "uts": kernel.CLONE_NEWUTS,
    "cgroup": kernel.CLONE_NEWCGROUP,
}


def unshare(_box: Box, *names: str) -> None:
    """All other namespaces in one call."""
    flags = 0
    for name in names:
        flags |= _NAMES[name]
    kernel.unshare(flags)


def fork_init(box: Box) -> None:
    """Go on as PID 1 of the new PID namespace, a child of the server; the launcher ends here."""
    pid = kernel.fork_as_sibling()
    if pid:
        box.report(wire.PID, str(pid))
        os._exit(0)
    box.init_pid = os.getpid()
    say_who(box.control_fd, wire.INIT)


def new_session(_box: Box) -> None:
    """No controlling terminal, no process group and no keyring of the server; and a command line
    that names no folder of the host, since everybody inside may read that of PID 1."""
    kernel.show_arguments(("sandbox-init",))
    kernel.set_dumpable(dumpable=False)
    os.setsid()
    kernel.join_new_session_keyring()


def hostname(_box: Box, name: str) -> None:
    """The name in the UTS namespace of our own. We have the right to set it, so that EPERM is the
    word of a filter: Podman's lets a container make namespaces, and not do this. The name that the
    container has stays, then."""
    try:
        kernel.set_hostname(name)
    except kernel.CallFailed as error:
        if error.errno != errno.EPERM:
            raise


VERBS = (
    unshare,
    fork_init,
    new_session,
    hostname,
)
