"""warm/why_cold.py - pure: which starts a nursery, or a spare, cannot serve."""

from __future__ import annotations

from sandbox_provisioner.plan import HOME, LaunchRequest, Site
from sandbox_provisioner.spec import Confinement, UserIds, relative
from sandbox_provisioner.warm.keys import Command, is_usual


def why_no_nursery(request: LaunchRequest, site: Site) -> str:
    """Why *request* cannot come from a nursery, "" if it can."""
    if why := why_no_nursery_anywhere(request):
        return why
    if request.spec.user_ids is UserIds.RANGE and not site.facts.privileged:
        return "it wants a range of user ids"
    if site.facts.privileged and site.workdir.source and not site.workdir.idmappable:
        return f"the ids of {site.workdir.place.filesystem} cannot be mapped"
    return ""


def why_no_nursery_anywhere(request: LaunchRequest) -> str:
    """The same for what no look at the host would change."""
    if Command.of(request.argv) is None:
        return "its command is not that of a usual IPython kernel"
    if request.survive_server:
        return "it shall outlive its server"
    if request.spec.confinement is not Confinement.NAMESPACES:
        return "a nursery's kernels are held by namespaces, and it asks for Landlock"
    return ""


def why_no_spare(request: LaunchRequest, site: Site) -> str:
    """Why *request* cannot be bound to a spare, "" if it can; where a nursery could serve it."""
    if not request.connection_file or not is_usual(request):
        return "its command line is not that of a usual IPython kernel"
    if "curve_secretkey" in request.connection_file[1]:
        return "its sockets are to be encrypted with keys of its own"
    if site.home != HOME or _overlap(site.workdir.source, HOME):
        return "its home directory is the work directory"
    if any(_overlap(path, site.workdir.path) for path in site.files.readonly):
        return "its environment and its work directory lie in one another"
    return ""


def _overlap(one: str, other: str) -> bool:
    return relative(one, other) is not None or relative(other, one) is not None
