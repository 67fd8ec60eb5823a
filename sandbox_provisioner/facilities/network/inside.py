"""facilities/network/inside.py - runs in PID 1: the network that a sandbox has.

May import: inside.kernel_calls.
May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

from sandbox_provisioner.inside import kernel_calls as kernel

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from sandbox_provisioner.inside.box import Box


def loopback_up(_box: Box) -> None:
    """Without it, a debugger inside hangs the kernel for good: debugpy connects to 127.0.0.1."""
    kernel.loopback_up()


VERBS = (loopback_up,)
