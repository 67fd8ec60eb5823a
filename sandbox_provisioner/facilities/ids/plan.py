"""facilities/ids/plan.py - pure: who the kernel is inside and outside, and who may do what first.

Two things force most of a start's order. A mount's ids can only be mapped by somebody who is
privileged *outside*, so a root server takes all mounts before it enters the user namespace. An
ordinary user may take mounts only *inside* one, so it is the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.ids.facts import ATTEMPT as RANGE_ATTEMPT
from sandbox_provisioner.facilities.ids.facts import FIRST_ID, IDS, LAST_ID, id_map
from sandbox_provisioner.host import VolumeFacts, WorkdirFacts
from sandbox_provisioner.plan import KERNEL_ID, Site, Start, Step
from sandbox_provisioner.spec import UserIds


def check(site: Site) -> None:
    """HostError for what no kernel could look into, and for a directory whose owner none can be."""
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
        id_map(KERNEL_ID, site.outside_uid, site.first_id),
        id_map(KERNEL_ID, site.outside_gid, site.first_id),
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
    mapped = [(f"volume-{n}", facts) for n, facts in enumerate(site.volumes) if facts.idmappable]
    for name, facts in (*owned, *mapped):
        owner = (
            f"{facts.place.owner_uid} {site.outside_uid} 1",
            f"{facts.place.owner_gid} {site.outside_gid} 1",
        )
        yield Step("make-user-namespace", (name, *owner), why)


def enter(start: Start) -> Iterator[Step]:
    """A root server's: all that needs its rights outside has been done."""
    if start.site.facts.privileged:
        yield Step("enter-user-namespace", ("sandbox",), "from here on nobody on the host")


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
    text = (
        "root:x:0:0:root:/root:/usr/sbin/nologin\n"
        f"jovyan:x:{uid}:{gid}:Notebook user:{home}:/bin/bash\n"
        "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n"
    )
    yield Step("file", ("/etc/passwd", text))
    text = f"root:x:0:\njovyan:x:{gid}:\ntty:x:5:\nnogroup:x:65534:\n"
    yield Step("file", ("/etc/group", text))
