"""facilities/workdir/plan.py - pure: the work directory, and what of it the kernel must not have.

It arrives as a descriptor, opened and judged before; no path of it is looked up again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.plan import REVIEW, Site, Start, Step, mapping_words, unmapped_steps
from sandbox_provisioner.spec import WRITTEN_THROUGH, relative

_WRITABLE = "Make the work directory writable for its owner, or choose another one with workdir."
_UPPER = (
    "Set layer_dir to a directory on ext4, xfs or btrfs, or on tmpfs from Linux 6.6 on; or set "
    'workdir_mode to "direct".'
)
_WATCHERS = (
    "If it tells of EMFILE, raise the sysctl fs.inotify.max_user_instances: a kernel whose work "
    "directory has a home or a repository in it needs one."
)


def check(start: Start) -> None:
    """SpecError for a volume that would have to be made in it; HostError for what an overlay would
    not show of it."""
    site = start.site
    if start.request.spec.is_reviewed and site.workdir.place.below:
        below = site.workdir.place.below[0]
        raise HostError(
            attempt=f"lay aside what the kernel writes in {site.workdir.path}",
            answer=f"an overlay does not show what is mounted in it: {below.path}",
            remedy='Show that as a volume and work elsewhere, or set workdir_mode to "direct".',
        )
    for facts in site.volumes:
        if relative(facts.volume.target, site.workdir.path) is not None:
            raise SpecError(
                attempt=f"show the volume {facts.volume.source} at {facts.volume.target}",
                answer="the target lies in the work directory, where it would have to be made",
                remedy="Choose a target such as /data, and make a link to it.",
            )


def take(start: Start) -> Iterator[Step]:
    """Its mounts, with the owner's ids mapped to the kernel's."""
    workdir = start.site.workdir
    if workdir.source:
        words = (*mapping_words("workdir", workdir, start.site), "nosuid", "nodev")
        why = "the work directory, writable; its files keep their owner"
        yield Step("take-place", (workdir.path, *words), why)
    if workdir.source and start.request.spec.is_reviewed:
        mapped = ("idmap=review",) if start.site.facts.privileged else ()
        why = "where what is written there is laid aside, on the disk"
        yield Step("take-place", (REVIEW, *mapped, "nosuid", "nodev"), why, _UPPER)


def attach(start: Start) -> Iterator[Step]:
    """At the same path as outside."""
    workdir = start.site.workdir
    if workdir.source and start.request.spec.is_reviewed:
        why = "at the same path as outside; what is written there is laid aside"
        yield Step("attach-review", (workdir.path, REVIEW), why, _UPPER)
    elif workdir.source:
        yield Step("attach", (workdir.path,), "at the same path as outside")
        yield from unmapped_steps(workdir.path, workdir)


def cover(start: Start) -> Iterator[Step]:
    """Take out of it what the host would run or trust."""
    site = start.site
    covered, inside = site.workdir.covered, _environment_within(site)
    if not site.workdir.source or not (covered.count or inside):
        return
    why = "what of it the host would run or trust, or must be kept from the kernel"
    owner = str(site.uid), str(site.gid)
    yield Step("covers-of", (site.workdir.path, *owner, WRITTEN_THROUGH), why, _WATCHERS)
    if covered.links:
        homes = sorted({os.path.dirname(link) for link in covered.links})
        why = "where files go that a program outside writes meanwhile"
        folders = tuple(os.path.join(home, WRITTEN_THROUGH) for home in homes)
        yield Step("make-folders", folders, why, _WRITABLE)
        why = "not there, and to programs outside not there meanwhile: links to nothing"
        yield Step("cover", ("link", *covered.links), why, _WRITABLE)
    if covered.sockets:
        why = "the same for names that would be seen: no file browser shows a socket"
        yield Step("cover", ("socket", *covered.sockets), why, _WRITABLE)
    if covered.directories:
        why = "private and empty: secrets, and what the host would run or trust later"
        yield Step("cover", ("directory", *covered.directories), why, _WRITABLE)
    if covered.files:
        yield Step("cover", ("file", *covered.files), "the same for files", _WRITABLE)
    if covered.placed:
        words = tuple(word for pair in covered.placed for word in pair)
        yield Step("place", words, "git would believe what a kernel writes there")
    if covered.frozen or inside:
        why = "the host runs these too: they may be read, not changed"
        yield Step("protect", (*covered.frozen, *inside), why)


def _environment_within(site: Site) -> tuple[str, ...]:
    """What of the kernel's environment shows in the work directory, relative to it."""
    workdir = site.workdir
    covered = (*workdir.covered.directories, *workdir.covered.frozen)
    kept = (relative(path, workdir.source) for path in site.files.environment)
    return tuple(path for path in kept if path and not _within_any(path, covered))


def _within_any(path: str, folders: Iterable[str]) -> bool:
    return any(relative(path, folder) is not None for folder in folders)
