"""ranged_removal.py - any process outside: removes what kernels of an ordinary user have left that
belongs to other ids of the user's range, which this user cannot remove as who it is.

A process of its own does it, in a user namespace with the whole range; it runs `main`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sandbox_provisioner import removal
from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.facilities.ids.facts import IDS, IdRange, find_id_range, id_map

_PACKAGES = str(Path(__file__).parents[1])
_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from sandbox_provisioner.ranged_removal import main; main(sys.argv[2:])"
)


def empty(aside: Path, seconds: float = float("inf")) -> bool:
    """As `removal.empty`."""
    try:
        return removal.empty(aside, seconds)
    except PermissionError:
        if os.geteuid() == 0:
            raise
        try:
            ids = find_id_range(os.geteuid())
        except SandboxError:
            raise PermissionError(f"{aside} has files of ids that are not ours") from None
        _empty_with(ids, aside, seconds)
        return not aside.exists()


def _empty_with(ids: IdRange, aside: Path, seconds: float) -> None:
    # All of the range, and the user besides: whoever was who inside.
    maps = id_map(IDS, os.geteuid(), ids.first_uid), id_map(IDS, os.getegid(), ids.first_gid)
    words = (ids.newuidmap, ids.newgidmap, *maps, str(aside), str(seconds))
    command = [sys.executable, "-SIB", "-c", _BOOT, _PACKAGES, *words]
    subprocess.run(
        command, env={}, stdin=subprocess.DEVNULL, capture_output=True, check=False, close_fds=True
    )


def main(words: list[str]) -> None:
    """In that process."""
    # What takes ctypes is of no use to a server.
    from sandbox_provisioner.facilities.ids.inside import map_user_namespace  # noqa: PLC0415
    from sandbox_provisioner.inside.box import Box  # noqa: PLC0415

    *how, aside, seconds = words
    map_user_namespace(Box(-1, -1), *how)
    removal.empty(Path(aside), float(seconds))
