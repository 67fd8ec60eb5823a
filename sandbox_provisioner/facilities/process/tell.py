"""facilities/process/tell.py - pure: why a program could not be run."""

from __future__ import annotations

import errno
import os

from sandbox_provisioner.errors import LaunchError

# What execve(2) answers where the program, or something that it needs, is not there for us.
MISSING = {errno.EACCES, errno.ENOENT}


def not_executed(program: str, text: str) -> LaunchError:
    """The error for a step `execute` that was answered so."""
    installation = os.path.dirname(os.path.dirname(program))
    return LaunchError(
        attempt=f"run {program} in the sandbox",
        answer=text,
        remedy="It, its interpreter or its libraries are missing inside or are not readable "
        f"for others: try chmod -R o+rX on {installation}.",
        step="execute",
    )
