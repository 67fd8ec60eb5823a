"""orders/variables.py - pure: the kernel's environment, from the request and all facilities."""

from __future__ import annotations

from sandbox_provisioner.facilities.caps.plan import enforced
from sandbox_provisioner.facilities.environment.plan.variables import kernel_environment
from sandbox_provisioner.plan import LaunchRequest, Site
from sandbox_provisioner.spec import Limits


def variables_for(
    request: LaunchRequest, site: Site, *, home: str = "", limits: Limits | None = None
) -> dict[str, str]:
    """What the kernel gets. *home* is its home directory inside, where that is not `Site.home`, and
    *limits* are those that hold, where they are not those that groups can enforce."""
    return kernel_environment(
        request.environment,
        site.server_environment,
        kept=request.env_keep,
        limits=limits or enforced(request.spec.limits, site.facts),
        network=request.spec.network.mode,
        home=home or site.home,
        hostname=request.spec.hostname,
        found=site.files.variables,
    )
