"""orders/variables.py - pure: the kernel's environment, from the request and all facilities."""

from __future__ import annotations

from collections.abc import Mapping

from sandbox_provisioner.facilities.caps.plan import enforced
from sandbox_provisioner.facilities.environment.plan import installs
from sandbox_provisioner.facilities.environment.plan.variables import kernel_environment
from sandbox_provisioner.plan import LaunchRequest, Site
from sandbox_provisioner.spec import Limits


def variables_for(
    request: LaunchRequest, site: Site, *, home: str = "", limits: Limits | None = None
) -> dict[str, str]:
    """What the kernel gets. *home* is its home directory inside, where that is not `Site.home`, and
    *limits* are those that hold, where they are not those that groups can enforce."""
    found = before_installs(request, site, home=home, limits=limits)
    if installs.are_possible(request.spec):
        found |= _of_installs(request, site, found)
    return found


def before_installs(
    request: LaunchRequest, site: Site, *, home: str = "", limits: Limits | None = None
) -> dict[str, str]:
    """The same without what leads to folders for what is installed inside: so the files that the
    kernel needs can be found by it again."""
    return kernel_environment(
        request.environment,
        site.server_environment,
        kept=request.env_keep,
        limits=limits or enforced(request.spec.limits, site.facts),
        network=request.spec.network.mode,
        home=home or site.home,
        hostname=request.spec.hostname,
        own_root=request.spec.has_own_root,
        is_root=request.spec.is_root,
        found={**site.devices.variables, **site.files.variables},
    )


def _of_installs(request: LaunchRequest, site: Site, found: Mapping[str, str]) -> dict[str, str]:
    told = site.packages.variables
    machine = site.facts.machine
    system = (*machine.system_directories, *machine.system_files)
    # Another root has files of its own by these names, or none.
    shown = site.files.readonly if request.spec.has_own_root else (*system, *site.files.readonly)
    certificates = installs.of_certificates(request.environment, told, shown)
    plain = {name: value for name, value in told.items() if name not in installs.OF_FILES}
    library = installs.r_library(request.spec)
    program, own = site.files.program, site.files.own_site
    return installs.variables(found, program, own, plain | certificates, library)
