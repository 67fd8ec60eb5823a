"""facilities/sockets/tell.py - pure: that the folder of sockets was misused."""

from __future__ import annotations

from sandbox_provisioner.inside import wire
from sandbox_provisioner.told import EndCause, EndKind

ENDS = (
    EndCause(
        EndKind.SOCKETS_MISUSED,
        "{name} was ended: its program, or start-up code of its environment, "
        "has put something into the directory of its sockets that is none of its five sockets. "
        "Let it write to the work directory or to /tmp.",
        wire.SOCKETS_MISUSED,
    ),
)
