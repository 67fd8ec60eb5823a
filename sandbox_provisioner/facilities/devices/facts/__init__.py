"""facts - whoever launches; reads only: what the devices that are asked for are on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sandbox_provisioner.errors import COMMAND, SpecError
from sandbox_provisioner.facilities.devices.facts import cdi, libraries
from sandbox_provisioner.facilities.devices.facts.nodes import Node, find_node
from sandbox_provisioner.facilities.devices.wish import is_path
from sandbox_provisioner.root_files import RootFiles

__all__ = ["Devices", "Node", "find_devices"]

_HOOKLESS = "nvidia-ctk cdi generate --class=box --disable-hook=all --output=/etc/cdi/box.yaml"
# What is there in any case, or would hide what is.
_OF_BOX = (
    "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/fd",
    "/dev/stdin", "/dev/stdout", "/dev/stderr", "/dev/ptmx", "/dev/pts", "/dev/shm",
)  # fmt: skip
_NVIDIAS = "/dev/nvidia"
_SEARCHED = "LD_LIBRARY_PATH"


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """The *nodes* of what was asked for, and the *mounts*, *links*, *folders* of libraries and
    *variables* that a specification adds to them."""

    nodes: tuple[Node, ...] = ()
    mounts: tuple[cdi.MountWish, ...] = ()
    links: tuple[cdi.Link, ...] = ()
    folders: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def are_nvidias(self) -> bool:
        """Whether programs read in /proc/driver/nvidia what there is of them."""
        return any(node.path.startswith(_NVIDIAS) for node in self.nodes)

    def in_hosts_root(self) -> Devices:
        """Where everything of the driver's is, and linked, as the host has it."""
        return replace(self, links=())

    def in_root(self, files: RootFiles) -> Devices:
        """In another one: what *files* of it are links stays so, as /lib often is, and programs
        there find the libraries."""
        mounts = tuple(replace(m, target=_led_to(m.target, files)) for m in self.mounts)
        taken = {mount.target for mount in mounts}
        links: dict[str, str] = {}
        for link in (*libraries.sonames(mounts), *self.links):
            links.setdefault(_led_to(link.path, files), link.text)
        listed = {os.path.dirname(_led_to(f"{folder}/x", files)) for folder in self.folders}
        variables, folders = dict(self.variables), libraries.unsearched(mounts, listed, files)
        if folders:
            before = filter(None, [variables.get(_SEARCHED, "")])
            variables[_SEARCHED] = ":".join((*before, *folders))
        made = tuple(cdi.Link(path=path, text=links[path]) for path in links if path not in taken)
        return replace(self, mounts=mounts, links=made, variables=variables)


def find_devices(
    names: tuple[str, ...],
    *,
    privileged: bool,
    granted: bool,
    is_broker: bool = False,
) -> Devices:
    """What *names* are; SpecError. Where who launches is *privileged*, a path has to be *granted*
    by a policy: a node can be anything, and a specification was written for containers. A broker
    gives nothing to others that is not granted."""
    if not names:
        return Devices()
    known = cdi.Specifications(cdi.FOLDERS) if not all(map(is_path, names)) else None
    edits = cdi.Edits(variables={})
    for name in names:
        if not granted and (is_broker or (privileged and is_path(name))):
            raise _not_granted(name)
        if is_path(name):
            edits += cdi.Edits(
                nodes=(cdi.NodeWish(path=name, source=name, access="rw"),), variables={}
            )
        elif known:
            edits += _edits_of(known, name)
    nodes = tuple(_node(wish, privileged=privileged) for wish in edits.nodes)
    return Devices(
        nodes=nodes,
        mounts=edits.mounts,
        links=edits.links,
        folders=edits.folders,
        variables=edits.variables,
    )


def _led_to(path: str, files: RootFiles) -> str:
    """*path* with its folders as they are called in *files*, as far as they are there."""
    folder, name = os.path.split(path)
    if folder == "/":
        return path
    return f"{(files.real_path(folder) or _led_to(folder, files)).rstrip('/')}/{name}"


def _edits_of(known: cdi.Specifications, name: str) -> cdi.Edits:
    try:
        return known.edits(name)
    except cdi.BadSpecification as error:
        raise SpecError(
            attempt=f"give the kernel the device {name}",
            answer=str(error),
            remedy=(
                "Write a specification for it without that (docs/devices.md); for GPUs of NVIDIA, "
                'which are then "nvidia.com/box=0":',
                f"{COMMAND}sudo {_HOOKLESS}",
            ),
        ) from None


def _not_granted(name: str) -> SpecError:
    return SpecError(
        attempt=f"give the kernel the device {name}",
        answer="root starts it, and no policy says that it may have that",
        remedy=f'Let the administrator write devices = ["{name}"] below ceilings or forced in '
        "the policy (docs/policy.md).",
    )


def _node(wish: cdi.NodeWish, *, privileged: bool) -> Node:
    attempt = f"give the kernel the device {wish.path}"
    below = any(wish.path == path or wish.path.startswith(f"{path}/") for path in _OF_BOX)
    if not wish.path.startswith("/dev/") or below:
        raise SpecError(
            attempt=attempt,
            answer="a device shows in /dev, and hides nothing that is there",
            remedy="Name another one, or write a specification that shows it in /dev.",
        )
    return find_node(wish.path, wish.source, wish.access, privileged=privileged, attempt=attempt)
