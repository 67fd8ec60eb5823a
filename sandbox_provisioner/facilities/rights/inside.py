"""facilities/rights/inside.py - runs in the kernel: gives up what it could hold on to.

May import: os, inside.kernel_calls.
May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

import os

from sandbox_provisioner.inside import kernel_calls as kernel

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from sandbox_provisioner.inside.box import Box


def become(_box: Box, uid: str, gid: str) -> None:
    """Give up every right for good: no capability, no way to gain one, an ordinary user."""
    kernel.drop_bounding_set()
    os.setresgid(int(gid), int(gid), int(gid))
    os.setresuid(int(uid), int(uid), int(uid))
    kernel.set_capabilities()
    kernel.set_no_new_privileges()


def system_call_filter(_box: Box, program: bytes) -> None:
    """seccomp(2). The last but one step: from here on only what the filter lets through."""
    kernel.load_filter(program)


VERBS = (
    become,
    system_call_filter,
)
