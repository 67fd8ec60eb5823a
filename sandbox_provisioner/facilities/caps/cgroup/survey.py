"""survey.py - any process, reads only: which cgroups we may make here, and why not more.

Linux has two forms of control groups (cgroups(7)). In *v1* each controller has a hierarchy of its
own, or shares one with others (cpu,cpuacct). In *v2* there is one, and a controller works in a
group only if every ancestor hands it down in cgroup.subtree_control. A hybrid machine mounts both,
and a controller serves only one of them.

Where systemd runs, v2's hierarchy is its own. It delegates parts of it: to a service with
``Delegate=yes``, in which we make groups ourselves, and to the manager of each user who is logged
in, whom we ask for one (`systemd.py`). Daemons of root's ask for one that holds all (`common.py`).
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from sandbox_provisioner.facilities.caps.cgroup.remedies import (
    DELEGATE,
    DROP_IN,
    MANAGER_REMEDIES,
    MOUNT,
    READ_ONLY,
    Steps,
    leaf,
    not_offered,
    own_v1,
)
from sandbox_provisioner.facilities.caps.wish import CAPS, CONTROLLERS, FACILITIES, Cap

# cpuacct only counts; the freezer stops and, on v1, makes killing safe from forks. On v2 these two
# need no controller, and "freezer" stands for what every group there can do.
V1_CONTROLLERS = (*CONTROLLERS, "cpuacct", "freezer", "devices")
# Who may write there may open any device: it is root's alone, and no remedy hands it out.
_ROOTS = {"devices"}
# What v1 calls otherwise.
_V1_NAMES = {cap.controller: cap.v1_controller for cap in CAPS if cap.v1_controller}

_UNIT = re.compile(r"\.(service|scope|slice|mount|swap|socket)$")
_SLICES = {"user": "app.slice", "system": "system.slice"}
# The scope that `common.py` has systemd make.
COMMON = "jupyter-sandboxes.scope"


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupFacts:
    """What this process may do with cgroups, as `host.HostFacts` holds it and `open_tree` uses it.

    *version* is 1 or 2, and 0 where no group can be made. *bases* leads from a controller to the
    directory below which its groups go; on v2 it is the same for all, and "freezer" is always
    there. *manager* is "user" or "system" where that manager of systemd has to make them, and the
    bases are then the directory of a slice. *missing* leads from the facility of a cap (memory,
    cpu, ...) to the reason why it cannot be enforced here. *surroundings* are the version
    and the directory of the group whose memory we are charged to ourselves; 0 where none is shown.
    *favors_moves* is False where v2 is mounted without that option (favordynmods): then Linux takes
    a grace period of RCU to move a process into a group (cgroup-v2.rst, since Linux 6.0).
    """

    version: int
    bases: Mapping[str, str]
    missing: Mapping[str, str]
    manager: str = ""
    remedies: Mapping[str, Steps] = field(default_factory=lambda: MappingProxyType({}))
    surroundings: tuple[int, str] = (0, "")
    favors_moves: bool = True

    def remedy(self, facility: str) -> Steps:
        """What a person can do so that *facility* works; for the errors of `open_tree`, doctor."""
        fallback = {0: MOUNT, 1: own_v1((), _user())}.get(self.version, DELEGATE)
        return self.remedies.get(facility, fallback)


def bus_path(manager: str, run: str = "/run") -> str:
    """The socket of the bus on which systemd's *manager*, "user" or "system", answers."""
    return (
        f"{run}/user/{os.geteuid()}/bus" if manager == "user" else f"{run}/dbus/system_bus_socket"
    )


@dataclass(frozen=True, slots=True)
class _Mount:
    root: str
    point: str
    kind: str
    options: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Survey:
    """Facts about one form of cgroups, and how many of the controllers that we use are here."""

    facts: CgroupFacts
    present: int

    @property
    def rank(self) -> tuple[int, int]:
        return len(FACILITIES) - len(self.facts.missing), self.present


def survey(*, proc: str = "/proc", pid: str = "self", run: str = "/run") -> CgroupFacts:
    """Look at the mounts and the own groups of process *pid*; called by `host.HostFacts.probe`.

    Where there are several ways, the one that can enforce more counts. *run* is where systemd keeps
    its sockets. Raises OSError only if *proc* is no proc(5) file system.
    """
    mounts = _cgroup_mounts(f"{proc}/{pid}/mountinfo")
    own = _own_groups(f"{proc}/{pid}/cgroup")
    # max() takes the first of equals, so v2 where both do the same.
    forms = [*_survey_v2(mounts, own, run), _survey_v1(mounts, own)]
    facts = max(forms, key=lambda form: form.rank).facts
    return replace(
        facts,
        surroundings=_surroundings(mounts, own),
        favors_moves=all("favordynmods" in m.options for m in mounts if m.kind == "cgroup2"),
    )


def own_directories(pid: str) -> tuple[str, ...]:
    """The directories of all groups that process *pid* is in, as far as mounts show them here."""
    own = _own_groups(f"/proc/{pid}/cgroup")
    found = set()
    for mount in _cgroup_mounts("/proc/self/mountinfo"):
        names = {""} if mount.kind == "cgroup2" else mount.options & own.keys()
        found |= {_directory(mount, own[name]) for name in names if name in own}
    return tuple(sorted(filter(None, found)))


def _surroundings(mounts: Collection[_Mount], own: Mapping[str, str]) -> tuple[int, str]:
    for mount in mounts:
        is_v1 = mount.kind == "cgroup" and "memory" in mount.options
        found = _directory(mount, own.get("memory" if is_v1 else "", "/"))
        if found is None:
            continue
        if is_v1:
            return 1, found
        # A group without the controller is a part of the nearest one above that has it.
        for group in _upwards(found, mount.point) if mount.kind == "cgroup2" else ():
            if "memory" in _words(f"{group}/cgroup.controllers"):
                return 2, group
    return 0, ""


def memory_bounds(facts: CgroupFacts) -> list[int]:
    """The caps on memory, in bytes, of the group that ours go below, and of those above it."""
    base = facts.bases.get("memory", "")
    if not base:
        return []
    if facts.version == 1:
        # memory.rst, 5.2: the smallest of all that are above.
        return _numbers(f"{base}/memory.stat", r"hierarchical_memory_limit (\d+)")
    bounds = []
    while os.path.exists(f"{base}/cgroup.controllers"):
        bounds += _numbers(f"{base}/memory.max", r"(\d+)")
        base = os.path.dirname(base)
    return bounds


def _numbers(path: str, pattern: str) -> list[int]:
    """What stands in the line of the file that *pattern* fits; nothing where there is none."""
    try:
        text = Path(path).read_text()
    except OSError:
        return []
    return [int(number) for number in re.findall(f"^{pattern}$", text, re.M)]


def _cgroup_mounts(path: str) -> tuple[_Mount, ...]:
    """The cgroup mounts in a mountinfo file, whose fields proc(5) explains; none where Landlock
    lets nobody read it."""
    try:
        return _listed(Path(path).read_text(encoding="utf-8", errors="surrogateescape"))
    except PermissionError:
        return ()


@lru_cache(maxsize=4)  # a start reads the list several times, and it is nearly always the same
def _listed(table: str) -> tuple[_Mount, ...]:
    return tuple(_cgroup_mounts_in(table))


def _cgroup_mounts_in(table: str) -> Iterator[_Mount]:
    for line in filter(None, table.split("\n")):
        before, _, after = line.partition(" - ")
        root, point = before.split()[3:5]
        kind, _, options = after.split()[:3]
        if kind in {"cgroup", "cgroup2"}:
            yield _Mount(_unescape(root), _unescape(point), kind, frozenset(options.split(",")))


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _own_groups(path: str) -> dict[str, str]:
    """Controller -> own group, from /proc/PID/cgroup; that of v2 has the empty name."""
    groups = {}
    with Path(path).open(encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            _, controllers, group = line.rstrip("\n").split(":", 2)
            groups.update(dict.fromkeys(controllers.split(","), group))
    return groups


def _directory(mount: _Mount, group: str) -> str | None:
    """Where *mount* shows *group*; None if it shows another part of the hierarchy.

    A container without a cgroup namespace has only its own group mounted, and mountinfo's root
    tells which. Inside a cgroup namespace "/.." is what lies above it (cgroup_namespaces(7)).
    """
    if "/.." in mount.root or "/.." in group:
        return None
    root = mount.root.rstrip("/")
    if f"{group}/".startswith(f"{root}/"):
        return f"{mount.point}{group[len(root) :]}".rstrip("/")
    return None


def _is_writable(directory: str) -> bool:
    return os.access(directory, os.W_OK | os.X_OK)


def _is_read_only(directory: str) -> bool:
    """Whether its mount is: then nobody may write there, root neither."""
    try:
        return bool(os.statvfs(directory).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def _not_writable(directory: str) -> str:
    if _is_read_only(directory):
        return f"{directory} is mounted read-only"
    return f"{directory} is not writable for uid {os.getuid()}"


def _user() -> str:
    """Whom an administrator's commands name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


# --- v1


def _survey_v1(mounts: Collection[_Mount], own: Mapping[str, str]) -> _Survey:
    bases: dict[str, str] = {}
    reasons: dict[str, str] = {}
    remedies: dict[str, Steps] = {}
    closed: list[str] = []
    present = 0
    for controller in V1_CONTROLLERS:
        name = _V1_NAMES.get(controller, controller)
        fitting = [m for m in mounts if m.kind == "cgroup" and name in m.options]
        present += bool(fitting) and controller in CONTROLLERS
        shown = ((d, m) for m in fitting if (d := _directory(m, own.get(name, "/"))))
        base, mount = next(shown, ("", None))
        if not fitting:
            reasons[controller] = f"controller '{name}' is not mounted"
            remedies[controller] = not_offered(name)
        elif mount is None:
            reasons[controller] = f"no mount shows our own group in the hierarchy of '{name}'"
        elif not _is_writable(base):
            reasons[controller] = _not_writable(base)
            closed += [] if controller in _ROOTS else [mount.point]
            if _is_read_only(base):
                remedies[controller] = READ_ONLY
        else:
            bases[controller] = base
    remedy = own_v1(closed, _user())
    return _Survey(_facts(1 if bases else 0, bases, reasons, remedies, remedy), present)


def _facts(
    version: int,
    bases: Mapping[str, str],
    reasons: Mapping[str, str],
    remedies: Mapping[str, Steps],
    remedy: Steps,
    manager: str = "",
) -> CgroupFacts:
    missing: dict[str, str] = {}
    helps: dict[str, Steps] = {}
    for cap in CAPS:
        if cap.controller in reasons:
            missing[cap.facility] = reasons[cap.controller]
            helps[cap.facility] = remedies.get(cap.controller, remedy)
        elif reason := _lacks(version, bases.get(cap.controller, ""), cap):
            missing[cap.facility], helps[cap.facility] = reason, cap.remedy
    return CgroupFacts(
        version=version,
        bases=MappingProxyType(dict(bases)),
        missing=MappingProxyType(missing),
        manager=manager,
        remedies=MappingProxyType(helps),
    )


def _lacks(version: int, base: str, cap: Cap) -> str:
    """Why groups below *base* would not have the file that *cap* needs; "" if they would, and also
    where no group tells."""
    file = cap.needs.get(version, "")
    if not file or not base:
        return ""
    group = base if version == 1 else _telling(base, cap.controller)
    known = not group or os.path.exists(f"{group}/{file}")
    return "" if known else f"this Linux has no {file}"


def _telling(base: str, controller: str) -> str:
    """*base*, or the first group in it, if it has the files of *controller*: the root of v2 has
    none of any."""
    if _has(base, controller):
        return base
    try:
        with os.scandir(base) as entries:
            groups = (entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
            return next((group for group in groups if _has(group, controller)), "")
    except OSError:
        return ""


def _has(group: str, controller: str) -> bool:
    """Whether a *group* of v2 has the files of a *controller*."""
    if not os.path.exists(f"{group}/cgroup.type"):
        return False
    return controller in _words(f"{group}/cgroup.controllers")


# --- v2


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A v2 group below which we may make ours, and the controllers that ours would get."""

    directory: str
    controllers: frozenset[str]
    delegated: bool

    @property
    def enforces(self) -> int:
        return len(self.controllers.intersection(CONTROLLERS))


def _survey_v2(mounts: Collection[_Mount], own: Mapping[str, str], run: str) -> Iterator[_Survey]:
    """Every way that there is on v2, the best first of those that can do the same."""
    group = own.get("", "/")
    for mount in mounts:
        if mount.kind == "cgroup2" and (directory := _directory(mount, group)):
            candidates = list(_candidates(mount.point, directory))
            delegated = [found for found in candidates if found.delegated]
            if delegated:
                yield _survey_direct(mount.point, directory, delegated, run)
            if common := [*_common_scope(mount.point)]:
                yield _survey_direct(mount.point, directory, common, run)
            if os.path.isdir(f"{run}/systemd/system"):
                yield from _survey_systemd(mount.point, run)
            yield _survey_direct(mount.point, directory, candidates, run)
            return
    reason = "no cgroup file system is mounted"
    if any(mount.kind == "cgroup2" for mount in mounts):
        reason = "no mount of cgroup v2 shows our own group"
    yield _Survey(_facts(0, {}, dict.fromkeys(CONTROLLERS, reason), {}, MOUNT), 0)


def _survey_systemd(point: str, run: str) -> Iterator[_Survey]:
    """What the manager of systemd that makes our scopes could enforce, if there is one."""
    manager, directory = "system", point
    if uid := os.geteuid():
        manager, directory = "user", f"{point}/user.slice/user-{uid}.slice/user@{uid}.service"
    if not os.access(bus_path(manager, run), os.W_OK) or not os.path.isdir(directory):
        return
    offered = _words(f"{point}/cgroup.controllers")
    controllers = _words(f"{directory}/cgroup.controllers")
    reasons: dict[str, str] = {}
    remedies: dict[str, Steps] = {}
    for controller in sorted(set(CONTROLLERS) - controllers):
        reasons[controller] = f"controller '{controller}' is not delegated to {directory}"
        remedies[controller] = DROP_IN
        if controller not in offered:
            reasons[controller], remedies[controller] = _not_offered(controller)
    bases = dict.fromkeys(sorted(controllers | {"freezer"}), f"{directory}/{_SLICES[manager]}")
    facts = _facts(2, bases, reasons, remedies, DROP_IN, manager)
    yield _Survey(facts, len(offered.intersection(CONTROLLERS)))


def _not_offered(controller: str) -> tuple[str, Steps]:
    return f"cgroup v2 offers no controller '{controller}' here", not_offered(controller)


def _survey_direct(point: str, own: str, candidates: Collection[_Candidate], run: str) -> _Survey:
    offered = _words(f"{point}/cgroup.controllers")
    best = max(candidates, key=lambda found: found.enforces, default=None)
    controllers = best.controllers if best else frozenset()
    reasons: dict[str, str] = {}
    remedies: dict[str, Steps] = {}
    where = best.directory if best else own
    for controller in sorted(set(CONTROLLERS) - controllers):
        reasons[controller], remedies[controller] = _why_missing(
            controller, offered, where, writable=best is not None, run=run
        )
    bases = dict.fromkeys(sorted(controllers | {"freezer"}), best.directory) if best else {}
    present = len(offered.intersection(CONTROLLERS))
    return _Survey(_facts(2 if best else 0, bases, reasons, remedies, DELEGATE), present)


def _candidates(point: str, own: str) -> Iterator[_Candidate]:
    """The writable groups between our own and the mount's root, the nearest first.

    Who may write everywhere keeps out of systemd's groups ("single writer",
    https://systemd.io/CGROUP_DELEGATION) and takes one that it has delegated, or the root.
    """
    chain = [directory for directory in _upwards(own, point) if _is_writable(directory)]
    delegated = {directory for directory in chain if _is_delegated(directory, own)}
    if point in chain:
        chain = [d for d in chain if d == point or d in delegated]
    for directory in chain:
        yield _Candidate(directory, _controllers_below(directory), directory in delegated)


def _common_scope(point: str) -> Iterator[_Candidate]:
    """The scope for all sandboxes that root starts for others, where there is one (`common.py`)."""
    directory = f"{point}/{_SLICES['system']}/{COMMON}"
    if os.path.isdir(directory) and _is_writable(directory) and _is_delegated(directory, directory):
        yield _Candidate(directory, _controllers_below(directory), delegated=True)


def _upwards(directory: str, top: str) -> Iterator[str]:
    while directory != top:
        yield directory
        directory = os.path.dirname(directory)
    yield top


def _is_delegated(directory: str, own: str) -> bool:
    """Whether systemd delegated *directory* (systemd.resource-control(5), Delegate=) to a service.

    What it delegates to a user's manager has that one for its only writer. A user's manager of
    systemd 252 leaves no mark; but a group of no unit's name can only be made by whom it was
    delegated to, and when our own is one below the unit's, so that is we.
    """
    if re.fullmatch(r"user@\d+\.service", os.path.basename(directory)):
        return False
    below = own.removeprefix(f"{directory}/").partition("/")[0]
    if _UNIT.search(directory) and own != directory and not _UNIT.search(below):
        return True
    for mark in ("user.delegate", "trusted.delegate"):
        try:
            if os.getxattr(directory, mark) == b"1":
                return True
        except OSError:
            continue
    return False


def _controllers_below(directory: str) -> frozenset[str]:
    """The controllers that a group made in *directory* has, or has once we enable them.

    A group with processes of its own cannot enable any; only the true root can, and it is the one
    without cgroup.type (admin-guide/cgroup-v2.rst, "No Internal Process Constraint").
    """
    enabled = _words(f"{directory}/cgroup.subtree_control")
    is_root = not os.path.exists(f"{directory}/cgroup.type")
    may_enable = os.access(f"{directory}/cgroup.subtree_control", os.W_OK)
    if may_enable and (is_root or not _words(f"{directory}/cgroup.procs")):
        return enabled | _words(f"{directory}/cgroup.controllers")
    return enabled


def _why_missing(
    controller: str, offered: Collection[str], directory: str, *, writable: bool, run: str
) -> tuple[str, Steps]:
    """Reason and remedy for a controller that groups in *directory* would not have."""
    if controller not in offered:
        return _not_offered(controller)
    if not writable and os.path.isdir(f"{run}/systemd/system"):
        # A manager that can be reached would have been asked.
        manager = "user" if os.geteuid() else "system"
        reason = f"systemd's {manager} manager does not answer on {bus_path(manager, run)}"
        return f"{_not_writable(directory)}, and {reason}", MANAGER_REMEDIES[manager]
    if not writable:
        remedy = READ_ONLY if _is_read_only(directory) else DELEGATE
        return _not_writable(directory), remedy
    if controller in _words(f"{directory}/cgroup.controllers"):
        reason = (
            f"{directory} has processes of its own, "
            f"so that the kernel lets it hand down no controller"
        )
        return reason, leaf(directory)
    return f"controller '{controller}' is not delegated to {directory}", DROP_IN


def _words(path: str) -> frozenset[str]:
    try:
        return frozenset(Path(path).read_text(encoding="ascii").split())
    except OSError:
        return frozenset()
