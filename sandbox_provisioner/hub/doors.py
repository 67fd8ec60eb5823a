"""hub/doors.py - in the hub, or in the daemon, as root: the folders by which the proxy and the hub
reach a box.

::

    /run/sandbox-provisioner-hub/ root's alone
      lock                        held while a folder is made or swept away
      <sandbox id>/
        making                    locked until there is a record of the box
        s.sock, s.sock:80         the proxy's way in: hub and proxy write its name in two ways
        desk.json                 what the box's kernels may have: `broker/desk.py`
        server                    which hub has asked for it, until that one has written it down
        hub/                      shows in the box as /jupyterhub: `broker/box.py`
          api.sock                the way to the hub's API
          broker.sock, kernels/   the way to the box's kernels
    /run/sandbox-provisioner-ways/ root's; everybody walks through it
      <sandbox id>/
        s.sock, s.sock:80         the same of a hub that is not root: its account's alone

A folder goes with its box. One that nobody makes any more, and whose box has no record, is swept.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
from pathlib import Path

from sandbox_provisioner.broker.box import INSIDE, KERNELS, SOCKET
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.locks import is_free, lock, locked, unlock
from sandbox_provisioner.records import RecordFolder

API_SOCKET = f"{INSIDE}/api.sock"
_BACKLOG = 128


def url_of(entrance: Path) -> str:
    """Where the hub and its proxy reach the server behind *entrance*. jupyterhub puts the host of
    it into lower case, so the path has no others."""
    return f"http+unix://{str(entrance).replace('/', '%2F')}"


class Doors:
    """The folder of the box *sandbox_id*, whose record is in *runtime*; its hub, and its proxy, are
    the user *account*, root or another one."""

    def __init__(self, sandbox_id: str, runtime: Path, account: int = 0) -> None:
        self.runtime = runtime
        self.path = _folder_of(runtime) / sandbox_id
        self._account = account
        self._making = -1

    @property
    def entrance(self) -> Path:
        """The proxy's way in."""
        return (self._way if self._account else self.path) / "s.sock"

    @property
    def _way(self) -> Path:
        return _ways_of(self.runtime) / self.path.name

    @property
    def shown(self) -> Path:
        """What the box sees of it as `INSIDE`."""
        return self.path / "hub"

    @property
    def kernels(self) -> Path:
        """What the box sees of it as `KERNELS`."""
        return self.shown / os.path.relpath(KERNELS, INSIDE)

    @property
    def desk_file(self) -> Path:
        """What the next hub has to know of the box's kernels."""
        return self.path / "desk.json"

    def make(self) -> socket.socket:
        """Make it, and listen for the proxy; HostError. Whoever gets the socket accepts."""
        try:
            _own(self.path.parent)
            with locked(self.path.parent):
                self.path.mkdir(mode=0o755)
                self._making = lock(self.path / "making", fcntl.LOCK_EX)
            for folder in (self.shown, self.kernels):
                folder.mkdir()
                folder.chmod(0o755)  # whatever our umask
            return self._listen_for_proxy()
        except OSError as error:
            self.remove()
            raise HostError(
                attempt=f"make a way for the proxy in {self.path}",
                answer=str(error.strerror or error),
                remedy=f"{self.path.parent} has to be a directory of root's, with free space.",
            ) from error

    def _listen_for_proxy(self) -> socket.socket:
        if self._account:
            _own(self._way.parent, 0o711)
            self._way.mkdir()
            self._way.chmod(0o711)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self.entrance))
            if self._account:
                os.chown(self.entrance, self._account, -1)
                self.entrance.chmod(0o600)  # who may write to it connects (unix(7))
            listener.listen(_BACKLOG)
            # jupyterhub writes the port of every URL behind its host, and the proxy takes both.
            self.entrance.with_name("s.sock:80").symlink_to("s.sock")
        except BaseException:
            listener.close()
            raise
        return listener

    def made(self) -> None:
        """There is a record of the box now, and as long as there is this folder stays."""
        if self._making >= 0:
            unlock(self._making)
            self._making = -1

    def note_hub(self, pid: int) -> None:
        """The process *pid* is the hub that asks for the box, and is to hear of it: until then the
        box ends with that one."""
        self._of_hub.note_asker(pid)

    def waiting_hub(self) -> int | None:
        """A pidfd of that process; -1 if it has ended, None where it has heard."""
        return self._of_hub.open_asker()

    def hub_has_heard(self) -> None:
        """It has written down where it finds the box; the next one will."""
        self._of_hub.forget_asker()

    @property
    def _of_hub(self) -> RecordFolder:
        return RecordFolder(self.path)

    def listen_for_server(self) -> socket.socket:
        """Listen at the way to the hub's API, in place of a hub that was there before."""
        return self._listen(API_SOCKET)

    def listen_for_kernels(self) -> socket.socket:
        """The same for who asks for kernels."""
        return self._listen(SOCKET)

    def _listen(self, inside: str) -> socket.socket:
        path = self.shown / os.path.relpath(inside, INSIDE)
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
        for folder in (self._way, self.path):
            shutil.rmtree(folder, ignore_errors=True)
        self.made()


def _folder_of(runtime: Path) -> Path:
    """Beside the records: what a box is shown must not lie in these."""
    return Path(f"{runtime}-hub")


def _ways_of(runtime: Path) -> Path:
    return Path(f"{runtime}-ways")


def _own(folder: Path, mode: int = 0o700) -> None:
    if str(folder) != str(folder).lower():
        raise HostError(
            attempt=f"keep the sockets of servers in {folder}",
            answer="jupyterhub writes every path to a socket in lower case",
            remedy="Set runtime_dir to a path without capital letters.",
        )
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        folder.chmod(mode)  # whatever our umask
    status = folder.stat(follow_symlinks=False)
    if status.st_uid != os.geteuid() or status.st_mode & 0o777 & ~mode:
        raise HostError(
            attempt=f"keep the sockets of servers in {folder}",
            answer="others than root can get into it",
            remedy=f"chown root {folder} && chmod {mode:o} {folder}",
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
