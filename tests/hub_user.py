"""hub_user.py - in the test process, as root: a hub's user, whose server is set up by root alone.

::

    /opt/sbx-…/   root's
        code/     our package and tests, for the user to import
        etc/      the configuration of every server (JUPYTER_CONFIG_PATH)
        share/    kernelspecs
        home/     the user's: the notebooks and everything of one's own
        run/      the user's: records and sockets
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import users
import websocket
from facilities import packages, public_python
from jupyter_programs import PATIENCE_SECONDS, REPOSITORY, TOKEN, Home, Server

CONFIG = """
c.ServerApp.kernel_spec_manager_class = (
    "sandbox_provisioner.hub.kernelspecs.SandboxKernelSpecManager"
)
c.KernelProvisionerFactory.default_provisioner_name = "sandbox-provisioner"
c.TerminalsExtensionApp.terminal_manager_class = (
    "sandbox_provisioner.hub.terminals.SandboxTerminalManager"
)
"""


class HubHome(Home):
    """The folder of such a user, with the *config* of root's."""

    def __init__(self, config: str = CONFIG) -> None:
        super().__init__("/opt")
        self.path.chmod(0o755)
        self.python = (*users.IDENTITY, public_python())
        self.home = self.path / "home"
        self.notebooks.rmdir()
        self.notebooks = self.home
        self.etc, self.share = self._folder("etc"), self._folder("share")
        ours = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(
            REPOSITORY / "sandbox_provisioner", self.path / "code/sandbox_provisioner", ignore=ours
        )
        self.runtime.mkdir()
        for folder in (self.home, self.runtime, self.config, self.path / "runtime"):
            os.chown(folder, users.USER, users.USER)
        config += f"c.SandboxProvisioner.runtime_dir = {str(self.runtime)!r}\n"
        config += "c.SandboxProvisioner.warm = False\n"
        (self.etc / "jupyter_server_config.py").write_text(config)
        self.places |= {
            "HOME": str(self.home),
            "JUPYTER_CONFIG_DIR": str(self.config),
            "JUPYTER_DATA_DIR": str(self.home / ".local/share/jupyter"),
            "JUPYTER_CONFIG_PATH": f"{self.etc}:{sys.prefix}/etc/jupyter",
            "JUPYTER_PATH": str(self.share),
            "IPYTHONDIR": str(self.home / ".ipython"),
            "PYTHONPATH": os.pathsep.join((str(self.path / "code"), *packages())),
            "PYTHONDONTWRITEBYTECODE": "1",
            "SHELL": "/bin/bash",
        }

    def add_spec(self, share: Path, name: str, *, owner: int = 0, **spec: Any) -> Path:
        """A kernelspec *name* in the data folder *share*; all that is made for it is *owner*'s."""
        folder = share / "kernels" / name
        made = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True)
        (folder / "kernel.json").write_text(json.dumps({"language": "python"} | spec))
        for path in (*made, folder / "kernel.json"):
            os.chown(path, owner, owner)
        return folder

    def own(self, path: str, text: str) -> Path:
        """A file of the user's, at *path* below the home directory."""
        file = self.home / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        for made in (file, *file.parents):
            if made == self.home:
                return file
            os.chown(made, users.USER, users.USER)
        return file


def ipykernel(**metadata: Any) -> dict[str, Any]:
    """A kernelspec of Python's, started by whom *metadata* says."""
    argv = [public_python(), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    return {"argv": argv, "display_name": "Python", "metadata": metadata}


def stanza(name: str, **options: Any) -> Mapping[str, Any]:
    """What a kernelspec says of its provisioner."""
    return {"kernel_provisioner": {"provisioner_name": name, "config": options}}


class TerminalSocket:
    """A browser's end of a server's terminal."""

    def __init__(self, server: Server, name: str) -> None:
        address = server.url.replace("http", "ws", 1)
        self.shown = ""
        self._socket = websocket.create_connection(
            f"{address}/terminals/websocket/{name}",
            header=[f"Authorization: token {TOKEN}"], timeout=PATIENCE_SECONDS,
        )  # fmt: skip

    def type(self, text: str) -> None:
        """As a person types."""
        self._socket.send(json.dumps(["stdin", text]))

    def resize(self, rows: int, columns: int) -> None:
        """As when the window changes."""
        self._socket.send(json.dumps(["set_size", rows, columns, 400, 800]))

    def until(self, text: str) -> str:
        """Read until *text* has been shown; all that was shown since the last call."""
        while text not in self.shown:
            self._take()
        before, found, self.shown = self.shown.partition(text)
        return before + found

    def _take(self) -> None:
        kind, *words = json.loads(self._socket.recv())
        assert kind in {"stdout", "setup", "disconnect"}, kind
        self.shown += words[0] if kind == "stdout" else f"<{kind}>"

    def run(self, command: str) -> str:
        """What *command* shows, in a shell with a prompt."""
        # The echo of the typed line does not have the mark whole.
        self.type(f"{command}; echo 'the e''nd'\n")
        self.until("\r\n")
        return self.until("the end\r\n").removesuffix("the end\r\n")

    def close(self) -> None:
        """Close the browser's tab."""
        self._socket.close()
