"""hub/doors.py - in the hub, as root: the folder by which the proxy and the hub reach a box.

::

    /run/sandbox-provisioner-hub/ root's alone, so the proxy has to be root, as the hub is
      lock                        held while a folder is made or swept away
      <sandbox id>/
        making                    locked until there is a record of the box
        s.sock, s.sock:80         the proxy's way in: hub and proxy write its name in two ways
        hub/api.sock              shows in the box as /jupyterhub/api.sock: the way to the hub's API

A folder goes with its box. One that nobody makes any more, and whose box has no record, is swept.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from pathlib import Path

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.locks import is_free, lock, locked, unlock

INSIDE = "/jupyterhub"
API_SOCKET = f"{INSIDE}/api.sock"
_BACKLOG = 128


class Doors:
    """The folder of the box *sandbox_id*, whose record is in *runtime*."""

    def __init__(self, sandbox_id: str, runtime: Path) -> None:
        self.path = _folder_of(runtime) / sandbox_id
        self._making = -1

    @property
    def url(self) -> str:
        """Where the hub and its proxy reach the server. jupyterhub puts the host of it into lower
        case, so the path has no others."""
        return f"http+unix://{str(self.entrance).replace('/', '%2F')}"

    @property
    def entrance(self) -> Path:
        """The proxy's way in."""
        return self.path / "s.sock"

    @property
    def shown(self) -> Path:
        """What the box sees of it as `INSIDE`."""
        return self.path / "hub"

    def make(self) -> socket.socket:
        """Make it, and listen for the proxy; HostError. Whoever gets the socket accepts."""
        try:
            _own(self.path.parent)
            with locked(self.path.parent):
                self.path.mkdir(mode=0o755)
                self._making = lock(self.path / "making", fcntl.LOCK_EX)
            self.shown.mkdir(mode=0o755)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(str(self.entrance))
            listener.listen(_BACKLOG)
            # jupyterhub writes the port of every URL behind its host, and the proxy takes both.
            (self.path / "s.sock:80").symlink_to("s.sock")
        except OSError as error:
            self.remove()
            raise HostError(
                attempt=f"make a way for the proxy in {self.path}",
                answer=str(error.strerror or error),
                remedy=f"{self.path.parent} has to be a directory of root's, with free space.",
            ) from error
        return listener

    def made(self) -> None:
        """There is a record of the box now, and as long as there is this folder stays."""
        if self._making >= 0:
            unlock(self._making)
            self._making = -1

    def listen_for_server(self) -> socket.socket:
        """Listen at the way to the hub's API, in place of a hub that was there before."""
        path = self.shown / "api.sock"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(path))
            path.chmod(0o666)  # for whoever can see it, and that is this box
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener

    def remove(self) -> None:
        """More than once is fine."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.made()


def _folder_of(runtime: Path) -> Path:
    """Beside the records: what a box is shown must not lie in these."""
    return Path(f"{runtime}-hub")


def _own(folder: Path) -> None:
    if str(folder) != str(folder).lower():
        raise HostError(
            attempt=f"keep the sockets of servers in {folder}",
            answer="jupyterhub writes every path to a socket in lower case",
            remedy="Set runtime_dir to a path without capital letters.",
        )
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat(follow_symlinks=False)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise HostError(
            attempt=f"keep the sockets of servers in {folder}",
            answer="others than root can get into it",
            remedy=f"chown root {folder} && chmod 700 {folder}",
        )


def sweep(runtime: Path) -> list[str]:
    """Remove the folders of boxes that have no record in *runtime*; their ids."""
    gone: list[str] = []
    folder = _folder_of(runtime)
    if not folder.is_dir():
        return gone
    with locked(folder):
        for path in folder.iterdir():
            # In this order: who makes one holds the lock until there is a record.
            if path.is_dir() and is_free(path / "making") and not (runtime / path.name).exists():
                Doors(path.name, runtime).remove()
                gone.append(path.name)
    return gone
