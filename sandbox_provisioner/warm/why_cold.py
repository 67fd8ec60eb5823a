"""warm/why_cold.py - pure: which starts a nursery, or a spare, cannot serve."""

from __future__ import annotations

import re

from sandbox_provisioner.plan import HOME, LaunchRequest, Site
from sandbox_provisioner.spec import Confinement, Layer, UserIds, relative
from sandbox_provisioner.warm.keys import Command, is_usual

INSTALLED = "what it has installed is to be found before anything is imported"
_OLDEST_PYTHON = 11  # our own code runs in it


def why_no_nursery(request: LaunchRequest, site: Site) -> str:
    """Why *request* cannot come from a nursery, "" if it can."""
    if why := why_no_nursery_anywhere(request):
        return why
    if request.spec.user_ids is UserIds.RANGE and not site.facts.privileged:
        return "it wants a range of user ids"
    if site.facts.privileged and site.workdir.source and not site.workdir.idmappable:
        return f"the ids of {site.workdir.place.filesystem} cannot be mapped"
    return _why_not_in(site) if site.root.is_own else ""


def _why_not_in(site: Site) -> str:
    """Why the Python of another root cannot run our nursery, "" if it can."""
    found = re.fullmatch(
        r"python3\.(\d+)", site.files.own_site.library if site.files.own_site else ""
    )
    if found is None or int(found[1]) < _OLDEST_PYTHON:
        which = found[0] if found else "no Python that is known"
        return f"{site.root.wish} has {which}, and a nursery needs Python 3.{_OLDEST_PYTHON}"
    return ""


def why_no_nursery_anywhere(request: LaunchRequest) -> str:
    """The same for what no look at the host would change."""
    if Command.of(request.argv) is None:
        return "its command is not that of a usual IPython kernel"
    if request.survive_server and request.watched < 0:
        return "it shall outlive its server"
    if request.spec.keeps_layer and not (
        request.spec.has_own_root and request.spec.layer is Layer.KERNEL
    ):
        return INSTALLED
    if request.spec.is_root:
        return "it is root in a user namespace of its own, and a nursery's kernels share theirs"
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
