"""app/leftovers.py - a command of its own: what killed servers left, found and removed.

A sandbox's record is made before its control group and removed after it, so that a group without a
record is nobody's, unless its server keeps its records in another directory than we look in. Hence
only groups in which processes have been and are no more count as left.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from sandbox_provisioner.facilities.caps import cgroup
from sandbox_provisioner.facilities.network.card import maker, table
from sandbox_provisioner.facilities.storage import folders, images
from sandbox_provisioner.records import all_records, open_init, start_time
from sandbox_provisioner.traces import Traces

_SETTLE_SECONDS = 5.0


def left_sandboxes(runtime: Path) -> tuple[str, ...]:
    """The ids of the sandboxes whose server is gone, and that were not asked to outlive it."""
    found = []
    for folder, record in all_records(runtime):
        if not folder.own_if_orphan():
            continue
        folder.release()
        pidfd = open_init(record)
        if pidfd is not None:
            os.close(pidfd)
        stays = pidfd is not None or folder.is_asked_for()
        if not (stays and record.survives_server):
            found.append(record.sandbox_id)
    return tuple(found)


def left_groups(runtime: Path) -> tuple[str, ...]:
    """The names of the control groups that nobody uses any more and of which no record tells."""
    facts = cgroup.survey()
    names = cgroup.leftover_names(facts)
    recorded = {record.tree for _, record in all_records(runtime)}
    return tuple(name for name in names if name not in recorded and _is_used_up(facts, name))


def _is_used_up(facts: cgroup.CgroupFacts, name: str) -> bool:
    tree = cgroup.open_existing(facts, name)
    used = tree.usage().cpu_seconds
    return not tree.pids() and (used is None or used > 0)


def remove_left_groups(runtime: Path) -> tuple[str, ...]:
    """Remove the `left_groups`, and tell their names; HostError if somebody moves in meanwhile.

    Looks twice: a server that keeps its records elsewhere may still want to read from the group
    why its kernel has ended, and learns within 3 s that it has.
    """
    found = left_groups(runtime)
    if found:
        time.sleep(_SETTLE_SECONDS)
        found = tuple(name for name in left_groups(runtime) if name in found)
    for name in found:
        tree = cgroup.open_existing(cgroup.survey(), name)
        Traces(tree=tree, kill=True).remove_now()
    return found


def remove_left_images() -> tuple[str, ...]:
    """Remove the images that no box has any more; the ids of their sandboxes. An ordinary user has
    none, and may not even look."""
    try:
        return images.sweep()
    except PermissionError:
        return ()


def remove_left_folders() -> tuple[str, ...]:
    """The same of folders with a limit."""
    try:
        return folders.sweep()
    except PermissionError:
        return ()


def remove_left_table() -> bool:
    """Remove what all network cards have together, if there is none; whether there was anything.
    An ordinary user has none, and may not even look."""
    try:
        return table.remove_unused()
    except PermissionError:
        return False


def remove_left_cards() -> tuple[str, ...]:
    """Remove what our table has for boxes without a record that have ended, as has who made them;
    the ids of their sandboxes. An ordinary user has none, and may not even look."""
    try:
        return tuple(maker.sweep(lambda pid, began: start_time(pid) == began))
    except PermissionError:
        return ()
