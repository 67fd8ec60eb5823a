"""facilities/ids/plan.py - pure: who the kernel is inside and outside, and who may do what first.

Two things force most of a start's order. A mount's ids can only be mapped by somebody who is
privileged *outside*, so a root server takes all mounts before it enters the user namespace. An
ordinary user may take mounts only *inside* one, so it is the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.ids.facts import ATTEMPT as RANGE_ATTEMPT
from sandbox_provisioner.facilities.ids.facts import (
    FIRST_ID,
    FOREIGN_ID,
    IDS,
    INIT_ID,
    LAST_ID,
    id_map,
)
from sandbox_provisioner.host import VolumeFacts, WorkdirFacts
from sandbox_provisioner.plan import DISK, Kind, Site, Start, Step
from sandbox_provisioner.spec import UserIds

# The namespace of a kernel that is root, in that of its box.
_KERNELS = "kernel"


def check(start: Start) -> None:
    """HostError for what no kernel could look into, for a directory whose owner none can be, and
    for a root that would have no id but its own."""
    _check_places(start.site)
    spec = start.request.spec
    if spec.is_root and not start.site.facts.privileged and spec.user_ids is UserIds.SINGLE:
        raise HostError(
            attempt='let a kernel be root in its own root file system (kernel_user = "root")',
            answer="its box has the id of this user and no other, and what packages install "
            "belongs to many",
            remedy='Set user_ids to "range", for which /etc/subuid has to give this user ids (see: '
            'jupyter sandbox doctor), or kernel_user to "user".',
        )
    if spec.is_root and start.site.facts.privileged:
        _check_owners(start.site)


def _check_owners(site: Site) -> None:
    """Where the ids of a mount are not mapped, root inside could give files to ids of its range,
    which another box has tomorrow."""
    given = [(site.workdir.path, site.workdir.idmappable)] if site.workdir.source else []
    given += [(v.source, v.idmappable) for v in site.volumes if not v.volume.readonly]
    for path in (path for path, is_mapped in given if not is_mapped):
        raise HostError(
            attempt=f'let a kernel that is root in its box (kernel_user = "root") write to {path}',
            answer="Linux cannot map the ids of that file system's mounts here, and root inside "
            "could give files there to ids that are nobody's",
            remedy="Work on a file system such as ext4, xfs or btrfs, let a volume be read-only, "
            'or set kernel_user to "user".',
        )


def _check_places(site: Site) -> None:
    workdir = site.workdir
    for _, place in site.places:
        if site.facts.privileged and place.mount.private:
            raise HostError(
                attempt=f"show {place.path} to a kernel that is not root",
                answer=f"it lies on a mount of {place.filesystem} which lets in nobody but the "
                "user who mounted it",
                remedy="Mount it with -o allow_other (mount.fuse3(8); for users other than root "
                "/etc/fuse.conf has to say user_allow_other), or work on another file system.",
            )
    if site.facts.privileged and not workdir.idmappable and workdir.place.owner_uid == 0:
        linux = ".".join(map(str, site.facts.machine.kernel))
        raise HostError(
            attempt=f"show {workdir.path} to a kernel that is not root",
            answer=f"it belongs to root, and Linux {linux} cannot "
            f"map the ids of a mount of {workdir.place.filesystem}",
            remedy=f"Give it to an ordinary user (chown), or work on a file system such as ext4, "
            f"xfs or btrfs, so that the files in {workdir.path} can keep their owner.",
        )


def make(start: Start) -> Iterator[Step]:
    """The kernel's user namespace. An ordinary user is in it from here on."""
    yield _make(start, "")


def make_for_nursery(start: Start) -> Iterator[Step]:
    """The same, with all ids that its kernels may have: each makes its own namespace in it."""
    above = start.site.first_id + IDS
    parts = (FIRST_ID, start.site.first_id - FIRST_ID), (above, LAST_ID + 1 - above)
    yield _make(start, "".join(f"\n{first} {first} {n}" for first, n in parts if n > 0))


def _make(start: Start, more_ids: str) -> Step:
    site = start.site
    if not site.facts.privileged:
        return _own(start)
    why = "uid 0 inside is nobody outside: the server's root maps to an id range of its own"
    maps = tuple(ids + more_ids for ids in _maps(site))
    # Its owner is what the machine's own limits count it for (namespaces(7)).
    return Step("make-user-namespace", ("sandbox", *maps, str(site.first_id)), why)


def _maps(site: Site) -> tuple[str, str]:
    """What a root server gives a kernel, as lines of uid_map and gid_map."""
    return (
        id_map(site.uid, site.outside_uid, site.first_id),
        id_map(site.gid, site.outside_gid, site.first_id),
    )


def _own(start: Start) -> Step:
    """An ordinary user's: the kernel's id outside is theirs, whatever its number inside."""
    site, facts, ids = start.site, start.site.facts, start.site.id_range
    if start.request.spec.user_ids is UserIds.SINGLE:
        why = "an ordinary user has rights over mounts only in a user namespace"
        return Step("unshare-user-namespace", _single(site), why)
    if ids is None:
        raise HostError(
            attempt=RANGE_ATTEMPT,
            answer="nobody has looked for one",
            remedy='Set user_ids to "single".',
        )
    why = "the user's own id, and for every other one of /etc/subuid's; mapped by set-uid helpers"
    maps = ids.maps(facts.caller.uid, facts.caller.gid, site.uid, site.gid)
    return Step("map-user-namespace", (ids.newuidmap, ids.newgidmap, *maps), why)


def _single(site: Site) -> tuple[str, str]:
    return f"{site.uid} {site.facts.caller.uid} 1", f"{site.gid} {site.facts.caller.gid} 1"


def map_owners(start: Start) -> Iterator[Step]:
    """A user namespace for each mount whose ids a root server maps."""
    site = start.site
    if not site.facts.privileged:
        return
    why = "for an id-mapped mount: who owns it outside appears as the kernel's user"
    owned: list[tuple[str, WorkdirFacts | VolumeFacts]]
    owned = [("workdir", site.workdir)] if site.workdir.source and site.workdir.idmappable else []
    if start.request.spec.is_reviewed and site.workdir.source:
        yield _of_review(site, why)
    if site.layer:
        why_layer = "for what is kept: on the disk it belongs to ids that nobody has"
        yield Step("make-user-namespace", ("layer", *map(_on_disk, _maps(site))), why_layer)
    if site.storage and site.storage.is_folder and start.kind is not Kind.CLAIM:
        why_disk = "for what it writes to a folder of the host's: there it is of ids nobody has"
        yield Step("make-user-namespace", (DISK, *map(_on_disk, _maps(site))), why_disk)
    is_like_box = site.has_image or (site.root.is_own and not site.root.is_callers)
    if is_like_box and start.kind not in (Kind.COLD, Kind.CLAIM):
        why_box = "for mounts of file systems whose ids are the box's"
        yield Step("make-user-namespace", (start.map_of_box, *_maps(site)), why_box)
    if site.root.is_callers and start.kind is not Kind.CLAIM:
        yield _of_caller(site)
    mapped = [(f"volume-{n}", facts) for n, facts in enumerate(site.volumes) if facts.idmappable]
    for name, facts in (*owned, *mapped):
        owner = (
            f"{facts.place.owner_uid} {site.outside_uid} 1",
            f"{facts.place.owner_gid} {site.outside_gid} 1",
        )
        yield Step("make-user-namespace", (name, *owner), why)


def _of_caller(site: Site) -> Step:
    """As for that user's own launcher, for whom no other id means anything. What is anybody else's
    is read as any stranger reads it, and never the kernel's, whatever number it has."""
    caller = site.facts.caller
    maps = f"{caller.uid} {site.outside_uid} 1", f"{caller.gid} {site.outside_gid} 1"
    why = "for the mount of another root: of its ids the user's own alone are the box's"
    return Step("make-user-namespace", ("image", *maps), why)


def _on_disk(ids: str) -> str:
    """The map *ids*, lines of uid_map, where what is N inside is `FOREIGN_ID` + N on a disk."""
    lines = (line.split(" ", 1) for line in ids.split("\n"))
    return "\n".join(f"{FOREIGN_ID + int(inside)} {outside}" for inside, outside in lines)


def _of_review(site: Site, why: str) -> Step:
    """On the disk what is laid aside belongs to the owner of the work directory, and what the
    overlay keeps for itself to nobody else."""
    place = site.workdir.place
    maps = (
        f"{FOREIGN_ID} {site.first_id} 1\n{place.owner_uid} {site.outside_uid} 1",
        f"{FOREIGN_ID} {site.first_id} 1\n{place.owner_gid} {site.outside_gid} 1",
    )
    return Step("make-user-namespace", ("review", *maps), why)


def enter(start: Start) -> Iterator[Step]:
    """A root server's: all that needs its rights outside has been done."""
    if start.site.facts.privileged:
        yield Step("enter-user-namespace", ("sandbox",), "from here on nobody on the host")


# -- where the kernel is root in its box


def make_for_root_as_user(start: Start) -> Iterator[Step]:
    """An ordinary user's, who is in the box's namespace already."""
    if not start.site.facts.privileged:
        yield from _make_for_root(start)


def make_for_root_as_root(start: Start) -> Iterator[Step]:
    """A root server's, who has just entered it."""
    if start.site.facts.privileged:
        yield from _make_for_root(start)


def _make_for_root(start: Start) -> Iterator[Step]:
    """user_namespaces(7): a capability counts in its own namespace and in those below it. All other
    namespaces of the box, and PID 1, belong to the one above."""
    if start.request.spec.is_root:
        # In parts that lie within those of the namespace above, whose first one may be of one id.
        ids = f"0 0 1\n1 1 {INIT_ID - 1}"
        why = "the kernel is root in a namespace of its own, that owns nothing: no mount, network"
        yield Step("make-user-namespace", (_KERNELS, ids, ids), f"{why} or process")


def stand_aside(start: Start) -> Iterator[Step]:
    """PID 1's last act before there is a kernel."""
    if start.request.spec.is_root:
        words = str(INIT_ID), str(start.site.uid), str(start.site.gid)
        yield Step("stand-aside", words, "PID 1 has an id that the kernel's namespace lacks")


def join_for_root(start: Start) -> Iterator[Step]:
    """The kernel's first act."""
    if start.request.spec.is_root:
        yield Step("join-user-namespace", (_KERNELS,), "from here on it has no right over its box")


# -- where the kernel comes from a nursery


def have_rights_over_mounts(start: Start) -> Iterator[Step]:
    """Who only takes mounts for somebody else needs a user namespace for as long."""
    if not start.site.facts.privileged:
        yield Step("unshare-user-namespace", _single(start.site))


def map_child(start: Start) -> Iterator[Step]:
    """Each kernel of a root server has ids that nobody else has, warm or cold.

    user_namespaces(7): a map is written in the namespace or in its parent, which is the nursery's;
    there the whole of the range that kernels have their ids from appears as it is outside.
    """
    family = start.site.family
    if start.site.facts.privileged and family:
        words = (str(family.init), str(family.child), *_maps(start.site))
        why = "an id range of its own: the nursery has no right to give one"
        yield Step("map-child", words, why)


def become_inside(start: Start) -> Iterator[Step]:
    """The child has made its user namespace before it said that it is there."""
    site = start.site
    if site.facts.privileged:
        yield Step("become-root-inside", (), "uid 0 of its own namespace, nobody outside")
        return
    maps = f"{site.uid} {site.uid} 1", f"{site.gid} {site.gid} 1"
    yield Step("map-own-ids", maps, "the user's own ids, as the nursery has them")


# -- what tells programs inside


def files(start: Start) -> Iterator[Step]:
    """passwd(5), group(5)."""
    uid, gid, home = start.site.uid, start.site.gid, start.site.home
    nobody = "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n"
    if start.request.spec.is_root:
        yield from _files_of_root(start, nobody)
        return
    text = (
        "root:x:0:0:root:/root:/usr/sbin/nologin\n"
        f"jovyan:x:{uid}:{gid}:Notebook user:{home}:/bin/bash\n"
        f"{nobody}"
    )
    yield Step("file", ("/etc/passwd", text + _more(text, start.site.root.users)))
    text = f"root:x:0:\njovyan:x:{gid}:\ntty:x:5:\nnogroup:x:65534:\n"
    yield Step("file", ("/etc/group", text + _more(text, start.site.root.groups)))


def _files_of_root(start: Start, nobody: str) -> Iterator[Step]:
    """Where the kernel is root. What it has added to a layer that is kept stays."""
    verb = "file-if-none" if start.keeps_layer else "file"
    text = f"root:x:0:0:root:{start.site.home}:/bin/bash\n{nobody}"
    yield Step(verb, ("/etc/passwd", text + _more(text, start.site.root.users)))
    text = "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"
    yield Step(verb, ("/etc/group", text + _more(text, start.site.root.groups)))


def _more(ours: str, theirs: str) -> str:
    """The lines of another root's file whose name and number *ours* does not have: what is
    installed there belongs to them."""
    known = {key for line in ours.splitlines() for key in line.split(":")[0:3:2]}
    lines = []
    for line in theirs.splitlines():
        name, _, number, *rest = (*line.split(":"), "", "", "")
        if name and number.isdecimal() and rest and not {name, number} & known:
            lines.append(f"{line}\n")
    return "".join(lines)
