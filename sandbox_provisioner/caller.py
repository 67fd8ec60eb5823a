"""caller.py - at the edge of whoever launches: on whose behalf a kernel is started.

What this machine is, is the same for everybody who asks; whose home it is, whose variables a kernel
may get, and from where relative paths are meant, is told by who asks. Here that is the server's own
process. Nothing else on the way of a start asks a process about itself, so that one which starts
kernels for others can hand in what it knows of them.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sandbox_provisioner.facilities.workdir.facts.run_by_host import Server
from sandbox_provisioner.places import Place
from sandbox_provisioner.spec import Volume

_FOLDERS = (
    "JUPYTER_CONFIG_DIR", "JUPYTER_CONFIG_PATH", "JUPYTER_DATA_DIR", "JUPYTER_PATH",
    "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME",
    "XDG_RUNTIME_DIR",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks for a kernel. *environment* is that of the server, of which a kernel gets some.

    Of one who asks another process, which launches with rights of its own, *groups* are all that
    the user is in, *server* is what that one's server runs and imports, and *opened* has what it
    has opened itself, by path: nothing else is given to the kernel to write. None: it is ourselves.
    *root* is the same for another root: its real path, by which a policy judges it, and it.
    *shown* is all that one sees of the host, as real paths, besides the system: to read, nothing
    else is given either. None: whatever its files let it see. *granted* is, by volumes, what
    whoever launches gives the kernel by itself: this the user need not own.
    """

    uid: int
    gid: int
    home: str
    cwd: str
    umask: int
    environment: Mapping[str, str]
    groups: frozenset[int] | None = None
    server: Server | None = None
    opened: Mapping[str, int] | None = None
    root: tuple[str, int] | None = None
    shown: tuple[str, ...] | None = None
    granted: Mapping[Volume, Place] = field(default_factory=dict)

    @property
    def own_folders(self) -> frozenset[str]:
        """Those that variables name as the settings, data and sockets of the server."""
        paths = (path for name in _FOLDERS for path in self.environment.get(name, "").split(":"))
        return frozenset(path.rstrip("/") for path in paths if path.startswith("/"))

    @classmethod
    def this_process(cls) -> Caller:
        """The process that we are."""
        return cls(
            uid=os.geteuid(),
            gid=os.getegid(),
            home=_home(),
            cwd=_cwd(),
            umask=_umask(),
            environment=dict(os.environ),
        )


def _home() -> str:
    try:
        return os.environ.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return "/"


def _cwd() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"


def _umask() -> int:
    """umask(2) cannot be asked without being set, for all threads."""
    match = re.search(r"Umask:\s*([0-7]+)", Path("/proc/self/status").read_text())
    return int(match[1], 8) if match else 0o022
