"""host.py - reads only: what this Linux and who asks may do, and what the host's tree looks like.

`HostFacts.probe()` is called once a start by the launcher, and by `doctor`. Whatever decides on
what is found here stands in `orders/`, and in what facilities plan.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from sandbox_provisioner.caller import Caller
from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.facilities.caps.cgroup import CgroupFacts, memory_bounds, survey
from sandbox_provisioner.facilities.namespaces.facts import current_obstacle
from sandbox_provisioner.facilities.network.facts.ipv6 import has_ipv6
from sandbox_provisioner.facilities.storage.facts import WorkdirQuota
from sandbox_provisioner.facilities.workdir.facts.covers import Covered, bad_workdir, find_covered
from sandbox_provisioner.facilities.workdir.facts.run_by_host import (
    Server,
    find_run_by_host,
    this_server,
)
from sandbox_provisioner.inside.kernel_calls import landlock_version
from sandbox_provisioner.mounts import Mount
from sandbox_provisioner.places import Asker, Place, TooManyFolders, is_of_system
from sandbox_provisioner.spec import Covers, Volume
from sandbox_provisioner.system_files import system_files, system_tree

# The new mount API with mount_setattr(2) came with this release.
OLDEST_KERNEL = (5, 12)
MACHINES = ("x86_64", "aarch64")

# File systems whose mounts can be id-mapped, and since which Linux (mount_setattr(2)).
_IDMAPPED_SINCE = {
    "ext2": (5, 12), "ext3": (5, 12), "ext4": (5, 12), "vfat": (5, 12), "xfs": (5, 12),
    "btrfs": (5, 15), "ntfs3": (5, 15), "f2fs": (5, 18), "erofs": (5, 19), "squashfs": (6, 2),
    "tmpfs": (6, 3), "ceph": (6, 7), "zfs": (5, 15), "bcachefs": (6, 10),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is so here whoever asks. *landlock* is the version of Landlock's ABI, 0 without it;
    *ipv6* whether boxes have IPv6."""

    kernel: tuple[int, int]
    architecture: str
    root_links: Mapping[str, str]
    system_directories: tuple[str, ...]
    system_files: tuple[str, ...]
    landlock: int = 0
    ipv6: bool = False

    @classmethod
    def probe(cls) -> Machine:
        """Look at it."""
        links, directories = system_tree()
        return cls(
            kernel=kernel_release(),
            architecture=os.uname().machine,
            root_links=links,
            system_directories=directories,
            system_files=system_files(),
            landlock=landlock_version(),
            ipv6=has_ipv6(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What whoever launches can find out before it is known who asks: the words are those of
    `HostFacts`; *homes* are those that this machine knows of."""

    machine: Machine
    privileged: bool
    obstacle: HostError | None
    cgroups: CgroupFacts
    homes: frozenset[str]

    @classmethod
    def probe(cls) -> Ground:
        """Look at this machine. Costs a few ms, starts nothing."""
        machine, privileged = Machine.probe(), is_privileged()
        return cls(
            machine=machine,
            privileged=privileged,
            obstacle=_obstacle(machine, privileged=privileged),
            cgroups=survey(),
            homes=_homes(entry.pw_dir for entry in pwd.getpwall()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What this *machine* lets the *caller* do. *obstacle* is why there are no namespaces here, as
    a HostError, or None.

    *privileged*: who launches is the machine's own root; a root that a container limits is not.
    *homes* are the home directories that this machine knows of, with the caller's; *server* is what
    that one runs and imports.
    """

    machine: Machine
    caller: Caller
    privileged: bool
    obstacle: HostError | None
    cgroups: CgroupFacts
    homes: frozenset[str]
    server: Server = field(default_factory=Server)

    @property
    def asker(self) -> Asker:
        """Who opens what a kernel is given. Anybody can set HOME: that one counts for nothing."""
        homes = self.homes - {self.caller.home}
        return Asker.of(self.caller.uid, homes, self.caller.groups)

    @classmethod
    def probe(
        cls,
        server_places: Iterable[str] = (),
        caller: Caller | None = None,
        ground: Ground | None = None,
    ) -> HostFacts:
        """Look at this machine for *caller*, who is this process unless somebody else is named;
        *server_places* are more that the server runs. *ground* was looked at a moment before, or
        is looked at now."""
        caller, ground = caller or Caller.this_process(), ground or Ground.probe()
        return cls(
            machine=ground.machine,
            caller=caller,
            privileged=ground.privileged,
            obstacle=ground.obstacle,
            cgroups=ground.cgroups,
            homes=ground.homes | _homes([caller.home]),
            server=_server(caller, server_places),
        )


def _server(caller: Caller, more: Iterable[str]) -> Server:
    if caller.server is None:
        return this_server(caller.cwd, caller.environment, more)
    return replace(caller.server, more=(*caller.server.more, *more))


def kernel_release() -> tuple[int, int]:
    """Which Linux this is."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _homes(homes: Iterable[str]) -> frozenset[str]:
    """Those of *homes* that are somebody's alone."""
    too_short = {"/", "/bin", "/usr", "/dev", "/nonexistent", "/run", "/var", "/proc", "/tmp"}
    return frozenset(home.rstrip("/") for home in homes if home.startswith("/")) - too_short - {""}


def is_privileged() -> bool:
    """Whether we are the machine's own root: a root that a container limits is not."""
    status = Path("/proc/self/status").read_text()
    return _is_root(status) and _has_capability(21, status) and _maps_all_ids()


def _is_root(status: str) -> bool:
    """By proc_pid_status(5): the second number is the effective one."""
    match = re.search(r"^Uid:\s*\d+\s+(\d+)", status, re.M)
    return bool(match and match[1] == "0")


def _has_capability(number: int, status: str) -> bool:
    match = re.search(r"CapEff:\s*([0-9a-f]+)", status)
    return bool(match and int(match[1], 16) >> number & 1)


def _maps_all_ids() -> bool:
    """Whether this root is the machine's: a container's user namespace maps fewer ids."""
    first = Path("/proc/self/uid_map").read_text().split()
    return first[:2] == ["0", "0"] and int(first[2]) >= 1 << 31


def _obstacle(machine: Machine, *, privileged: bool) -> HostError | None:
    """Why user namespaces, and with them every sandbox, cannot be had here; None where they can."""
    attempt = "use namespaces on this machine"
    kernel = machine.kernel
    if kernel < OLDEST_KERNEL:
        return HostError(
            attempt=attempt,
            answer=f"this is Linux {kernel[0]}.{kernel[1]}",
            remedy=f"Linux {OLDEST_KERNEL[0]}.{OLDEST_KERNEL[1]} or newer is needed.",
        )
    if machine.architecture not in MACHINES:
        return HostError(
            attempt=attempt,
            answer=f"there is no system call filter for {machine.architecture}",
            remedy=f"The machines that have one are: {', '.join(MACHINES)}.",
        )
    cause = current_obstacle(privileged=privileged)
    if cause is None:
        return None
    return HostError(attempt=attempt, answer=cause.found, remedy=cause.steps)


def memory_bytes() -> int:
    """How much memory a kernel could have here at the most: the machine's, or what a group above
    its own leaves it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *memory_bounds(survey())])


def count_tasks(uid: int) -> int:
    """How many processes and threads *uid* has: what RLIMIT_NPROC counts (getrlimit(2))."""
    count = 0
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}/task").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue  # it has ended
    return count


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkdirFacts:
    """What is true of a work directory, which is open as *place*. *path* is where it shows inside.

    *covered* is what `Covers` means here, *unmapped* are the mounts below it whose ids cannot be
    mapped although its own can: a kernel of a root server may only read there. *quota* is what it
    may hold.
    """

    place: Place
    idmappable: bool
    unmapped: tuple[Mount, ...] = ()
    covered: Covered = field(default_factory=Covered)
    quota: WorkdirQuota | None = None

    @property
    def path(self) -> str:
        """What was asked for, which is also where it shows inside."""
        return self.place.path

    @property
    def source(self) -> str:
        """Its real path, "" if there is none."""
        return self.place.source

    @property
    def out_of_reach(self) -> tuple[str, ...]:
        """What lies in it and no kernel that works there may write: real paths."""
        found = self.covered
        names = (*found.directories, *found.files, *found.links, *found.sockets, *found.frozen)
        return tuple(f"{self.source}/{name}" for name in names)

    @classmethod
    def nowhere(cls) -> WorkdirFacts:
        """For a box that has none."""
        return cls(
            place=Place.nowhere(), idmappable=True,
        )  # fmt: skip

    @classmethod
    def probe(cls, path: str, facts: HostFacts, covers: Covers, opened: ExitStack) -> WorkdirFacts:
        """Open *path* until *opened* closes, and look at it; SpecError where it cannot be anybody's
        work directory."""
        attempt = f"use {path!r} as the work directory"
        place = place_of(path, facts, opened, attempt)
        answer = place.refusal(facts.asker) or place.shows_host() or place.not_own(facts.asker)
        if answer or not place.is_directory:
            raise bad_workdir(path, answer or "it is not a directory")
        try:
            run_by_host = find_run_by_host(
                place.source,
                facts.server,
                f"/proc/self/fd/{place.fd}",
                servers_alone=covers.whole,
            )
            covered = find_covered(
                place,
                covers,
                home=facts.caller.home,
                homes=facts.homes,
                own_folders=facts.caller.own_folders,
                run_by_host=run_by_host,
            )
        except TooManyFolders as error:
            raise bad_workdir(path, f"{error}, so what the host runs cannot be found") from None
        place = place.looked_again()
        return cls(
            place=place,
            idmappable=is_idmappable(place.mount, facts.machine.kernel),
            unmapped=_unmapped(place, facts),
            covered=covered,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeFacts:
    """What is true of a volume's source, which is open as *place*, and whether its ids can be
    mapped, so that what belongs to the owner outside belongs to the kernel's user inside;
    *unmapped* is as for a work directory."""

    volume: Volume
    place: Place
    idmappable: bool
    unmapped: tuple[Mount, ...] = ()

    @property
    def source(self) -> str:
        """Its real path."""
        return self.place.source

    @classmethod
    def probe(cls, volume: Volume, facts: HostFacts, opened: ExitStack) -> VolumeFacts:
        """Open the source of *volume* until *opened* closes, and look at it; SpecError if it is not
        there, or is what no kernel may write to."""
        attempt = f"use the volume {volume.source!r}"
        if granted := facts.caller.granted.get(volume):
            place, asker = granted, Asker.of(0, facts.homes)
        else:
            place, asker = place_of(volume.source, facts, opened, attempt), facts.asker
        if facts.caller.opened is not None and place.source != volume.source:
            # What a policy has judged is the path.
            answer, remedy = f"it is {place.source} now", "Name that, or start again."
            raise SpecError(attempt=attempt, answer=answer, remedy=remedy)
        if place.source == "/" or place.source.split("/")[1] in {"proc", "sys", "dev"}:
            answer, remedy = f"it leads to {place.source}", "Name a directory of files."
            raise SpecError(attempt=attempt, answer=answer, remedy=remedy)
        if answer := place.shows_host():
            remedy = "Name a directory in it, or one of files."
            raise SpecError(attempt=attempt, answer=answer, remedy=remedy)
        not_own = place.not_own(asker)
        if answer := "" if volume.readonly else place.refusal(asker) or not_own:
            remedy = "Show it read-only, or a part of it."
            raise SpecError(attempt=attempt, answer=answer, remedy=remedy)
        # What only root may read of the system stays root's, and another user's stays theirs.
        mapped = not is_of_system(place.source) and not not_own
        idmappable = mapped and is_idmappable(place.mount, facts.machine.kernel)
        unmapped = _unmapped(place, facts) if idmappable else ()
        return cls(volume=volume, place=place, idmappable=idmappable, unmapped=unmapped)

    @classmethod
    def of_root(cls, volume: Volume, opened: ExitStack) -> VolumeFacts:
        """The same for what root's own configuration names, whoever asks; ids are not mapped."""
        attempt = f"use the volume {volume.source!r}"
        place = Place.open(volume.source, Asker.of(0, ()), opened, attempt=attempt)
        return cls(volume=volume, place=place, idmappable=False)


def place_of(path: str, facts: HostFacts, opened: ExitStack, attempt: str) -> Place:
    """*path*, which we open, or who asks has opened; SpecError if that cannot be."""
    brought = facts.caller.opened
    if brought is None:
        return Place.open(path, facts.asker, opened, attempt=attempt)
    return Place.brought(path, brought.get(path, -1), opened, attempt=attempt)


def is_idmappable(mount: Mount, kernel: tuple[int, int]) -> bool:
    """mount_setattr(2): the file system can do it, and nobody has done it yet."""
    since = _IDMAPPED_SINCE.get(mount.filesystem, (1 << 16, 0))
    return kernel >= since and not mount.idmapped


def _unmapped(place: Place, facts: HostFacts) -> tuple[Mount, ...]:
    """Linux maps the ids of a tree of mounts whole, or of its top alone: where one below cannot be
    mapped, none below is. An ordinary user maps none."""
    if not facts.privileged or not is_idmappable(place.mount, facts.machine.kernel):
        return ()
    every = all(is_idmappable(mount, facts.machine.kernel) for mount in place.below)
    return () if every else place.below
