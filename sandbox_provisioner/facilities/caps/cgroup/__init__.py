"""cgroup - in the launching process: a sandbox's control groups, from the survey to the removal.

::

    facts = survey()                                      what may we do here
    tree = open_tree(facts, name, limits, spec.may_lack, warn)    which controllers; nothing made
    tree.join_files                                       for the launcher's plan, or, opened
    open_to_join(tree)                                    here, for a process that could not
    tree.create(limits, pid)                              groups and caps, all or nothing
    tree.usage() · freeze() · thaw() · kill() · pids()    while it runs
    tree.removing() · pause()                             when it is over: `traces.py`

v1, v2 and v2 by systemd differ only in `v1.py`, `v2.py` and `systemd.py`; everyone else sees
`CgroupTree`. What is capped, and by which values, stands in `wish/`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from sandbox_provisioner.errors import HostError, joined
from sandbox_provisioner.facilities.caps.cgroup import files, remedies
from sandbox_provisioner.facilities.caps.cgroup.above import (
    Bound,
    allows_less,
    free_bytes,
    narrowest_bound,
)
from sandbox_provisioner.facilities.caps.cgroup.common import make_common_scope
from sandbox_provisioner.facilities.caps.cgroup.files import PARENT, refused
from sandbox_provisioner.facilities.caps.cgroup.remedies import do_without, unique
from sandbox_provisioner.facilities.caps.cgroup.survey import (
    CgroupFacts,
    memory_bounds,
    own_directories,
    survey,
)
from sandbox_provisioner.facilities.caps.cgroup.systemd import (
    SystemdTree,
    reap_keepers,
    scope_names,
)
from sandbox_provisioner.facilities.caps.cgroup.tree import CgroupTree, NullTree, Tree, Usage
from sandbox_provisioner.facilities.caps.cgroup.v1 import V1Tree
from sandbox_provisioner.facilities.caps.cgroup.v2 import V2Tree
from sandbox_provisioner.facilities.caps.wish import CAPS, Cap
from sandbox_provisioner.spec import Limits

__all__ = [
    "Bound",
    "CgroupFacts",
    "CgroupTree",
    "NullTree",
    "Usage",
    "allows_less",
    "free_bytes",
    "leftover_names",
    "make_common_scope",
    "memory_bounds",
    "narrowest_bound",
    "open_existing",
    "open_to_join",
    "open_tree",
    "own_directories",
    "reap_keepers",
    "survey",
    "write_sum",
]


def _driver(facts: CgroupFacts) -> type[Tree]:
    if facts.manager:
        return SystemdTree
    return {1: V1Tree, 2: V2Tree}[facts.version]


def open_tree(
    facts: CgroupFacts,
    name: str,
    limits: Limits,
    may_lack: Callable[[str], bool],
    warn: Callable[[str], None],
    disk: str = "",
    sums: Mapping[str, Limits] = MappingProxyType({}),
) -> CgroupTree:
    """The tree for sandbox *name*, not made yet; `launch` calls it when it compiles a plan.

    *sums* are the limits, by their names, of groups that *name* says are above its own: all in one
    share what it has. They are written whenever a group is made in it. Nobody does without them.

    A cap that cannot be enforced here is dropped, if nobody has asked for it (`Limits.by_default`),
    or, with a call of *warn*, if ``may_lack(facility)`` (`SandboxSpec.may_lack`); it raises
    HostError otherwise. *disk* is the one of the work directory, "MAJOR:MINOR", "" where there is
    none, or no cap needs to know.
    """
    missing = {cap.facility: why for cap in limits.asked if (why := cap.why_not(disk))}
    missing |= facts.missing
    missing_caps = [cap for cap in limits.asked if cap.facility in missing]
    # Nobody has asked for a default: `explain` and `doctor` tell.
    wished = [cap for cap in missing_caps if cap.facility not in limits.by_default]
    refused = [cap for cap in wished if not may_lack(cap.facility)]
    if refused:
        raise _cannot_cap(facts, limits, {cap: missing[cap.facility] for cap in refused})
    for cap in wished:
        warn(
            f"Kernels start without a cap that their options ask for ({cap.describe(limits)}), as "
            f"on_missing allows: {missing[cap.facility]}."
        )
    _check_sums(facts, name, sums, disk)
    if facts.version == 0:
        return NullTree(facts, name)
    waived = {cap.facility for cap in missing_caps}
    return _driver(facts)(facts, name, limits.without(waived).asked, waived, disk, sums)


def _check_sums(facts: CgroupFacts, name: str, sums: Mapping[str, Limits], disk: str) -> None:
    """Refuse sums that cannot be held; HostError."""
    if facts.manager and "/" in name:
        raise HostError(
            attempt=f"make groups for {os.path.dirname(name)}",
            answer="systemd would have to make them, each in a scope of its own",
            remedy=remedies.DELEGATE,
        )
    for limits in sums.values():
        missing = {cap: why for cap in limits.asked if (why := cap.why_not(disk))}
        missing |= {
            cap: facts.missing[cap.facility]
            for cap in limits.asked
            if cap.facility in facts.missing
        }
        if missing:
            raise _cannot_cap(facts, limits, missing)
    if facts.version == 0 and "/" in name:
        raise HostError(
            attempt=f"make groups for {os.path.dirname(name)}",
            answer="no cgroup is usable here",
            remedy=facts.remedy("memory"),
        )


def write_sum(facts: CgroupFacts, name: str, limits: Limits, disk: str = "") -> bool:
    """Change what the group *name*, which is above those of sandboxes, holds all in it to; False
    where there is none now. HostError where Linux refuses, or a cap cannot be had."""
    _check_sums(facts, f"{name}/", {name: limits}, disk)
    tree = _driver(facts)(
        facts, "/".join([*name.split("/"), "-", "-", "-"][:4]), (), (), disk, {name: limits}
    )
    settings = [*tree.settings_of_sum(name, limits)]
    try:
        files.apply_again(settings)
    except HostError:
        if all(os.path.isdir(os.path.dirname(setting.path)) for setting in settings):
            raise
        return False
    return bool(settings)


def _cannot_cap(facts: CgroupFacts, limits: Limits, missing: Mapping[Cap, str]) -> HostError:
    """The error for caps that were asked for and cannot be had: all of them at once, with what the
    user can do alone before what an administrator has to do."""
    helps = (
        facts.remedy(cap.facility) if cap.facility in facts.missing else cap.remedy
        for cap in missing
    )
    return HostError(
        attempt=joined([cap.describe(limits) for cap in missing]),
        answer="; ".join(dict.fromkeys(missing.values())),
        remedy=(*do_without([cap.facility for cap in missing]), *unique(helps)),
    )


def open_existing(facts: CgroupFacts, name: str) -> CgroupTree:
    """The tree that somebody else made, whatever caps it has; for a sandbox that was only found."""
    if facts.version == 0:
        return NullTree(facts, name)
    return _driver(facts)(facts, name, CAPS)


def leftover_names(facts: CgroupFacts) -> list[str]:
    """The names of all trees that exist now, those of running sandboxes too; for `gc` and doctor.

    Which of them is left over is for the caller to know.
    """
    names: set[str] = set()
    for base in set(facts.bases.values()):
        if facts.manager:
            names.update(scope_names(base))
            continue
        names.update(_names_in(f"{base}/{PARENT}"))
    return sorted(names)


def _names_in(parent: str) -> Iterator[str]:
    for name in _directories(parent):
        if name != files.HUB:
            yield name
            continue
        for person in _directories(f"{parent}/{name}"):
            for kind in _directories(f"{parent}/{name}/{person}"):
                of_kind = f"{name}/{person}/{kind}"
                yield from (f"{of_kind}/{found}" for found in _directories(f"{parent}/{of_kind}"))


def _directories(path: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return [entry.name for entry in os.scandir(path) if entry.is_dir()]
    return []


def join_too(tree: CgroupTree, pidfd: int) -> None:
    """Move another process of ours into the groups, if it is there and we may: systemd alone moves
    one out of a login session's. *pidfd* is closed."""
    with contextlib.suppress(OSError):
        pid = _pid_of(pidfd)
        for path in tree.join_files if pid > 0 else ():
            with open(path, "w") as file:
                file.write(str(pid))
    os.close(pidfd)


def _pid_of(pidfd: int) -> int:
    """proc_pid_fdinfo(5); -1 of one that has ended."""
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        return next((int(line[4:]) for line in file if line.startswith("Pid:")), -1)


def open_to_join(tree: CgroupTree) -> list[int]:
    """Descriptors of the tree's `join_files`: who opens one has to have the right to move, who
    writes to it is moved (credentials are those of the open since Linux 5.16). HostError."""
    fds: list[int] = []
    try:
        for path in tree.join_files:
            fds.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
    except OSError as error:
        for fd in fds:
            os.close(fd)
        remedy = "See: jupyter sandbox doctor"
        raise refused(f"opening {path}", error, "join the groups of a sandbox", remedy) from error
    return fds
