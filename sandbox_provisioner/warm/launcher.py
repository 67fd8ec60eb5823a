"""warm/launcher.py - in the server: the launcher of this machine that also prepares starts."""

from __future__ import annotations

from functools import partial

from sandbox_provisioner.contract import Labels, Stdio, Warmth
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.plan import LaunchRequest
from sandbox_provisioner.warm import ahead
from sandbox_provisioner.warm.start_from import start_warm_as
from sandbox_provisioner.warm.why_cold import why_no_nursery


class WarmLauncher(LocalLauncher):
    """A `LocalLauncher` with nurseries and spares. `start` is cold all the same: who asks for a
    start that was prepared has to know that there was none."""

    def why_cold(self, request: LaunchRequest) -> str:
        """Why no start of *request* can be prepared, "" if one can."""
        request = self.settled(request)
        site, _ = self.survey(request)
        with site.opened:
            return why_no_nursery(request, site)

    async def start_prepared(
        self, request: LaunchRequest, labels: Labels, stdio: Stdio, warmth: Warmth
    ) -> LocalHandle:
        """Start *request* from a spare or a nursery; see the contract."""
        asked = partial(self._asked, request)
        return await start_warm_as(asked, labels, stdio, warmth)

    def _asked(self, request: LaunchRequest) -> tuple[LocalLauncher, LaunchRequest]:
        return self, self.settled(request)

    def prepare(self, request: LaunchRequest, labels: Labels, warmth: Warmth) -> None:
        """Prepare a start such as *request*, in the background."""
        ahead.prepare(self, request, labels, warmth)

    async def fill(self, request: LaunchRequest, labels: Labels, warmth: Warmth) -> int:
        """Prepare now, and return how many nurseries and spares were made for it."""
        request = await off_loop(self.settled, request)
        return await ahead.fill(self, request, labels, warmth)
