"""plan - pure: a box's /dev has what every box has, what was asked for, and nothing else.

What is not named is not there, and with rights on the host it cannot be opened either, even if a
node of it could be had: Linux is told so for the group of the box.
"""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.facilities.devices.facts import Node
from sandbox_provisioner.facilities.devices.plan.program import Allowed, program
from sandbox_provisioner.plan import Start, Step

# devices.txt: null, zero, full, random, urandom; tty and ptmx; pairs of terminals.
_USUAL = (
    *(Allowed(1, minor) for minor in (3, 5, 7, 8, 9)),
    *(Allowed(5, minor) for minor in (0, 2)),
    *(Allowed(major, None) for major in range(136, 144)),
)
FOLDER = "/.devices"
_REMEDY = "See the device's driver, and that nobody has unloaded it."


def take(start: Start) -> Iterator[Step]:
    """Root makes nodes of its own, by numbers, which belong to nobody inside; a user has those of
    the host, which are compared with what was judged."""
    nodes = start.site.devices.nodes
    if not nodes:
        return
    if start.site.facts.privileged:
        made = (f"{node.major}:{node.minor}:{node.access}" for node in nodes)
        why = ", ".join(node.path for node in nodes) + ", asked for by devices"
        yield Step("make-devices", (FOLDER, str(start.site.outside_gid), *made), why, _REMEDY)
        return
    for node in nodes:
        words = (node.path, node.source, str(node.major), str(node.minor))
        yield Step("take-device", words, "asked for by devices", _REMEDY)


def attach(start: Start) -> Iterator[Step]:
    """In /dev, with the box's own."""
    nodes = start.site.devices.nodes
    if nodes and start.site.facts.privileged:
        yield Step("attach-devices", (FOLDER, *(node.path for node in nodes)))
        return
    for node in nodes:
        yield Step("attach", (node.path,))


def links(start: Start) -> Iterator[Step]:
    """In another root, before it becomes one with its layer: as a driver's packages have them."""
    why = "so programs find the libraries of the device's driver"
    for link in start.site.devices.links:
        yield Step("symlink", (link.path, link.text), why)


def limit(start: Start) -> Iterator[Step]:
    """For who has rights on the host; what is opened for a start has been by now."""
    if not start.site.facts.privileged or start.site.device_group is None:
        return
    version, group = start.site.device_group
    asked = tuple(map(_allowed, start.site.devices.nodes))
    entries = (*_USUAL, *asked)
    # Those have to hold. Without any the list is a second wall, behind a /dev that has none.
    count = str(len(asked))
    listed: tuple[str | bytes, ...] = tuple(entry.of_v1() for entry in entries)
    if version == 2:
        listed = (program(entries),)
    words = (count, str(version), group, *listed)
    shown = (count, str(version), group, f"({len(entries)} kinds of devices)")
    told = ", ".join(
        f"{node.path} ({node.major}:{node.minor})" for node in start.site.devices.nodes
    )
    why = "no other device can be opened, whatever nodes there are"
    why += f": terminals, null, zero, full, random{', ' if told else ''}{told}"
    remedy = "Mount the hierarchy of devices, or leave out the option devices."
    yield Step("limit-devices", words, why, remedy, shown=shown)


def _allowed(node: Node) -> Allowed:
    return Allowed(node.major, node.minor, node.access)
