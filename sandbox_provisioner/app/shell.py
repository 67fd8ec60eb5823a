"""app/shell.py - a command of its own: `jupyter sandbox shell`, a server's terminal in a box.

A Jupyter server opens its terminals by it: it runs outside, with the user's rights, for a person
whom the box is to hold. So it reads configuration of root's alone, and nothing that lies where it
is started.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec
from traitlets import Unicode

from sandbox_provisioner.app.command import SandboxCommand, working_directory
from sandbox_provisioner.app.run import Signals, request_for_command, run_and_tell
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.workdir.facts.run_by_host import IN_START_DIRECTORY
from sandbox_provisioner.links import real_path
from sandbox_provisioner.provisioner import SandboxProvisioner
from sandbox_provisioner.spec import HOST_ROOT, relative
from sandbox_provisioner.trust import Writer, changeable

_SHELLS = ("/bin/bash", "/bin/sh")


class ShellApp(SandboxCommand):
    """Opens one shell, on the terminal that it is started on, and ends with it."""

    usage = "jupyter sandbox shell"
    description = (
        "Open a shell in the box that a Jupyter server's kernels get, with the same files. It is "
        "what a server runs for its terminals (docs/jupyterhub.md). Configuration counts where "
        "root alone can have written it. With JUPYTER_SERVER_ROOT, which a server sets, the work "
        "directory is in there."
    )
    examples = """
    jupyter sandbox shell

    In jupyter_server_config.py, for each terminal of a server:
    c.TerminalsExtensionApp.terminal_manager_class = (
        "sandbox_provisioner.hub.terminals.SandboxTerminalManager"
    )
    """
    options = Unicode("", help="The options of the box, as JSON: no configuration is read.").tag(
        config=True
    )
    aliases = {"options": "ShellApp.options"}  # noqa: RUF012  # as traitlets has them
    flags = {}  # noqa: RUF012

    @property
    def config_file_paths(self) -> list[str]:
        """Asked by JupyterApp, which runs the files that it finds there."""
        return [path for path in super().config_file_paths if is_administrators(path)]

    def start(self) -> None:
        """Called once by `main`; leaves with the shell's exit status."""
        self.refuse_words()
        provisioner = self._provisioner()
        root = os.environ.get("JUPYTER_SERVER_ROOT", "")
        cwd = _directory(root)
        if provisioner.workdir == "root":
            provisioner.workdir = root or cwd
        request = replace(
            request_for_command(provisioner, [_shell()], cwd),
            server_places=tuple(f"{root}/{name}" for name in IN_START_DIRECTORY if root),
            extra_files=_of_server(provisioner),
        )
        raise SystemExit(asyncio.run(run_and_tell(provisioner, request, _OfATerminal)))

    def _provisioner(self) -> SandboxProvisioner:
        if not self.options:
            return self.provisioner()
        try:
            options: dict[str, Any] = json.loads(self.options)
        except ValueError as error:
            raise SpecError(
                attempt="read the option options", answer=str(error), remedy="Write it as JSON."
            ) from None
        return SandboxProvisioner(kernel_spec=KernelSpec(display_name="terminal"), **options)


def _of_server(provisioner: SandboxProvisioner) -> tuple[str, ...]:
    """What the server's own kernels run in, where it is not another root."""
    return (sys.prefix, sys.base_prefix) if provisioner.rootfs == HOST_ROOT else ()


class _OfATerminal(Signals):
    """Who hangs up is gone: what ignores SIGHUP inside ends all the same."""

    def _take(self, number: int) -> None:
        super()._take(signal.SIGKILL if number == signal.SIGHUP else number)


def is_administrators(folder: str) -> bool:
    """Whether our user can have written none of the configuration in *folder*."""
    there = Path(os.path.abspath(folder)).glob("jupyter*config.*")
    writer = Writer.this_process()
    return not changeable(os.path.abspath(folder), writer) and not any(
        changeable(str(path), writer) for path in there
    )


def _directory(root: str) -> str:
    """Where the shell starts: here, if that is in the server's *root*."""
    here = working_directory()
    if not root or relative(real_path(here), real_path(root)) is not None:
        return here
    return root


def _shell() -> str:
    """The user's own, where there is such a program; it runs in the box."""
    wished = os.environ.get("SHELL", "")
    return next(path for path in (wished, *_SHELLS) if path in _SHELLS or Path(path).is_file())
