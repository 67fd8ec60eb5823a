"""app/warm.py - a command of its own: `jupyter sandbox warm` prepares a kernel's next starts."""

from __future__ import annotations

import asyncio
import os

from jupyter_client.manager import KernelManager
from traitlets import Unicode

from sandbox_provisioner.app.command import (
    COMMON_ALIASES,
    OPTION_ALIASES,
    SandboxCommand,
    find_kernel,
    provisioner_name_of,
    working_directory,
)
from sandbox_provisioner.errors import COMMAND, SpecError
from sandbox_provisioner.options import PROVISIONER
from sandbox_provisioner.provisioner import SandboxProvisioner
from sandbox_provisioner.warm import ahead

_ALIASES = {"cwd": "WarmApp.cwd", **OPTION_ALIASES, **COMMON_ALIASES}


class WarmApp(SandboxCommand):
    """Fills a nursery and its spares, and leaves them to whatever server of this user comes."""

    usage = "jupyter sandbox warm KERNEL [--spares N] [options]"
    description = (
        "Prepare the next starts of a sandboxed kernel, unless its option warm is false: make its "
        "nursery and its spares, if they are not there yet, for all servers of this user. A server "
        "does the same after each start, by default for itself alone; this "
        "is for the first one, in a start-up script. A server finds them if it runs as this user, "
        "in the same control group, and gives its kernels the same variables. They end by "
        "themselves when no start has come for warm_idle_timeout seconds."
    )
    examples = """
    jupyter sandbox install --kernel python3 --spares 2 --preload numpy --replace
    jupyter sandbox warm python3-sandbox
    jupyter sandbox list
    """
    cwd = Unicode("", help="A directory that notebooks are in. Default: this one.").tag(config=True)
    aliases = _ALIASES

    def start(self) -> None:
        """Called once by `main`."""
        if len(self.extra_args) != 1:
            raise self.wrong("write the name of one kernel")
        name = self.extra_args[0]
        kernel = find_kernel(self.kernels(), name)
        if provisioner_name_of(kernel.metadata) != PROVISIONER:
            raise SpecError(
                attempt=f"prepare starts of the kernel {name!r}",
                answer="it does not run in a sandbox",
                remedy=(
                    "Make a twin that does:",
                    f"{COMMAND}jupyter sandbox install --kernel {name}",
                ),
            )
        made = asyncio.run(self._fill(name))
        print(f"Made {made} of nursery and spares." if made else "All of it is there already.")

    async def _fill(self, name: str) -> int:
        manager = KernelManager(
            kernel_name=name, kernel_spec_manager=self.kernels(), config=self.config
        )
        cwd = os.path.abspath(self.cwd or working_directory())
        cmd, options = await manager._async_pre_start_kernel(cwd=cwd)
        provisioner = manager.provisioner
        assert isinstance(provisioner, SandboxProvisioner)
        try:
            if not provisioner.warm:
                folder = provisioner.kernel_spec.resource_dir
                raise SpecError(
                    attempt=f"prepare starts of the kernel {name!r}",
                    answer="its option warm is false, so that no start would use it",
                    remedy=f'Set "warm": "auto" in {folder}/kernel.json.',
                )
            return await provisioner.fill(cmd, **options)
        finally:
            manager.cleanup_connection_file()
            ahead.let_go()
