"""facilities/root/tell.py - pure: that a folder in memory was full."""

from __future__ import annotations

from sandbox_provisioner.inside import wire
from sandbox_provisioner.told import EndCause, EndKind, Subject

_FULL_FOLDER = (
    "{{name}} ended, since {folder} was full, whose size is {{size}}, when it touched the memory "
    "of a file there. Raise {option}, or remove files from {folder}."
)
ENDS = (
    EndCause(
        EndKind.SHM_FULL,
        _FULL_FOLDER.format(folder="/dev/shm", option="shm_limit"),
        wire.SHM_FULL,
    ),
    EndCause(
        EndKind.TMP_FULL,
        _FULL_FOLDER.format(folder="/tmp", option="tmp_limit"),
        wire.TMP_FULL,
    ),
)


def _full(path: str, of: Subject) -> str:
    return f"{path} of kernel {of.name} is full." if path.startswith("/") else ""


NOTICES = {wire.FULL: _full}
