"""plan - pure: what the kernel's program needs, and its variables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sandbox_provisioner.facilities.environment.plan import installs
from sandbox_provisioner.plan import READ_ONLY, TAKE_REMEDY, Site, Start, Step
from sandbox_provisioner.spec import relative, volumes_for


def take(start: Start) -> Iterator[Step]:
    """The kernel's environment, read-only."""
    files = start.site.files
    for path in apart(start.site):
        words = (path, files.real.get(path, path), *READ_ONLY, "no-links")
        yield Step("take", words, "the kernel's environment", TAKE_REMEDY)


def apart(site: Site) -> tuple[str, ...]:
    """What of the environment has to be taken apart from the work directory.

    What lies in the work directory shows there; but where a cover hides it, it is needed again.
    """
    return tuple(path for path in site.files.readonly if not _shows_in_workdir(path, site))


def _shows_in_workdir(path: str, site: Site) -> bool:
    if not site.workdir.source:
        return False
    inside = relative(site.files.real.get(path, path), site.workdir.source)
    if inside is None or path != f"{site.workdir.path}/{inside}".rstrip("/"):
        return False
    covered = site.workdir.covered.directories
    return not any(relative(inside, place) is not None for place in covered)


def around_workdir(site: Site) -> tuple[str, ...]:
    """What of it the work directory lies in: a project that is installed from there. Attached after
    the work directory, it would hide it."""
    if not site.workdir.source:
        return ()
    paths = sorted(apart(site))
    return tuple(path for path in paths if relative(site.workdir.path, path) is not None)


def attach_around_workdir(start: Start) -> Iterator[Step]:
    """Before the work directory."""
    for path in around_workdir(start.site):
        yield Step("attach", (path,), "before the work directory, which lies in it")


def attach_with_volumes(start: Start) -> Iterator[Step]:
    """The rest of it, and volumes: any of them may lie in another one, or in the work directory."""
    site = start.site
    targets = {*apart(site), *(facts.volume.target for facts in site.volumes)}
    for target in sorted(targets - {*around_workdir(site)}):
        yield Step("attach", (target,))


def own_packages(start: Start) -> Iterator[Step]:
    """Folders for what the kernel installs, before its program looks where its modules are."""
    site = start.site
    spec = start.request.spec
    if not installs.are_possible(spec):
        return
    folders = installs.folders(site.files.own_site, installs.r_library(spec))
    why = "for what is installed inside; memory, gone with the kernel"
    if start.keeps_layer:
        why = f'for what is installed inside; kept: layer = "{spec.layer.value}"'
    yield Step("own-folders", folders, why)
    outside = site.files.own_site.outside if site.files.own_site else ""
    if any(relative(outside, path) is not None for path in site.files.readonly):
        why = "the user's own packages, which are shown, come after those"
        yield Step("own-note", (installs.note(site.files.own_site), installs.note_of(outside)), why)


def variables_step(start: Start, found: Mapping[str, str]) -> Step:
    """The kernel's whole environment, *found*, as a step."""
    pairs = tuple(f"{name}={value}" for name, value in sorted(found.items()))
    why = "this, and nothing of the server's; programs are told of the caps and the network by it"
    if hidden := start.site.files.off_path:
        why += f"; on its PATH and not in the box: {volumes_for(hidden)} would show it"
    return Step("environment", pairs, why, shown=tuple(sorted(found)))
