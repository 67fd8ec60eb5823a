"""inside - runs in the kernel: gives up what it could hold on to; modes.py: in PID 1.

May import: os, modes, inside.kernel_calls, wire.
May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

import os

from sandbox_provisioner.facilities.rights.inside.modes import Modes
from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside import wire

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from sandbox_provisioner.inside.box import Box


def become(_box: Box, uid: str, gid: str, *capabilities: str) -> None:
    """Give up every right for good but *capabilities*: no way to gain one, an ordinary user, or
    root of a namespace in which there is nothing to rule."""
    kept = tuple(map(int, capabilities))
    kernel.drop_bounding_set(*kept)
    os.setresgid(int(gid), int(gid), int(gid))
    os.setresuid(int(uid), int(uid), int(uid))
    kernel.set_capabilities(*kept)
    kernel.set_no_new_privileges()


def answer_modes(box: Box) -> None:
    """PID 1 changes modes for the kernel, as it could itself, where its filter has us judge them:
    that takes a look at who asks, at the way to the file, and at files of all owners."""
    box.part(Modes).prepare(kernel.socket_pair())
    rights = kernel.CAP_SYS_PTRACE, kernel.CAP_DAC_READ_SEARCH, kernel.CAP_FOWNER
    box.lasting_rights = *box.lasting_rights, *rights


def system_call_filter(box: Box, program: bytes) -> None:
    """seccomp(2). The last but one step: from here on only what the filter lets through."""
    kernels_end = box.part(Modes).kernels_end
    if kernels_end < 0:
        kernel.load_filter(program)
        return
    listener = kernel.load_asking_filter(program)
    kernel.send_descriptors(kernels_end, wire.message(wire.FILTERS), [listener])
    os.close(listener)


VERBS = (
    become,
    answer_modes,
    system_call_filter,
)
