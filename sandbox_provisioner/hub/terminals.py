"""hub/terminals.py - in a hub user's Jupyter server: its terminals open in a box.

Named in a configuration of root's::

    c.TerminalsExtensionApp.terminal_manager_class = (
        "sandbox_provisioner.hub.terminals.SandboxTerminalManager"
    )

A `shell_command` among `terminado_settings` is not enough: a request for a terminal may bring one
of its own, and variables for the program outside (terminado's `new_terminal` takes them all).
"""

from __future__ import annotations

import json
import sys
from typing import Any

from jupyter_server_terminals.terminalmanager import TerminalManager
from terminado.management import PtyWithClients
from tornado.ioloop import IOLoop
from traitlets import Float

from sandbox_provisioner.provisioner import SandboxProvisioner

# Of a request; the rest of it says what would be run outside.
_HEEDED = ("name", "cwd")


class SandboxTerminalManager(TerminalManager):
    """Opens `jupyter sandbox shell` with the options of the server's kernels, and nothing else."""

    end_unwatched_after = Float(
        0.0,
        help="How many seconds after the last browser that showed it has gone a terminal ends, "
        "with all that runs in it. 0: it waits for one, as in any Jupyter server.",
    ).tag(config=True)

    def create(self, **kwargs: Any) -> dict[str, Any]:
        """Called for a request, with all that it says."""
        return super().create(**{name: kwargs[name] for name in _HEEDED if name in kwargs})

    def new_terminal(self, **kwargs: Any) -> PtyWithClients:
        """Called for each terminal, also for one that a websocket asks for by a new name."""
        cwd = kwargs.get("cwd")
        here = {"cwd": cwd} if isinstance(cwd, str) else {}
        return super().new_terminal(shell_command=self._command(), **here)

    def _command(self) -> list[str]:
        """With no module from the current directory, which a kernel may write to, or the user's
        site; and with the options as this server has read them."""
        section = self.config.get(SandboxProvisioner.__name__, {})
        read = SandboxProvisioner(config=self.config)
        options = json.dumps({name: getattr(read, name) for name in section})
        module = ["-m", "sandbox_provisioner.app", "shell"]
        return [sys.executable, "-P", "-s", *module, f"--options={options}"]

    def client_disconnected(self, websocket: Any) -> None:
        """Called when a browser has gone."""
        super().client_disconnected(websocket)
        terminal = websocket.terminal
        if self.end_unwatched_after and terminal is not None and not terminal.clients:
            IOLoop.current().call_later(self.end_unwatched_after, self._end_unwatched, terminal)

    async def _end_unwatched(self, terminal: PtyWithClients) -> None:
        name = str(terminal.term_name)
        if self.terminals.get(name) is terminal and not terminal.clients:
            self.log.info("Terminal %s ends: nobody watches it", name)
            await self.terminate(name, force=True)
