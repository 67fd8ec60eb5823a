"""facilities/storage/tell.py - pure: what holds a limit of the disk, and what that costs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from sandbox_provisioner.checks import Check, Findings, State, lines
from sandbox_provisioner.errors import COMMAND, SandboxError
from sandbox_provisioner.facilities.storage.facts import (
    PROJECT_FILESYSTEMS,
    STORAGE,
    Storage,
    workdir_obstacle,
)
from sandbox_provisioner.facilities.storage.wish import DiskBackend
from sandbox_provisioner.mounts import Mount
from sandbox_provisioner.spec import Limits
from sandbox_provisioner.units import format_bytes


def in_memory(storage: Storage, limits: Limits) -> str:
    """A notice where a limit of the disk can only be kept by what is memory, and more of it than
    the kernel may have; "" otherwise."""
    cap = limits.memory_bytes
    if storage.is_on_disk or cap is None or storage.size_bytes <= cap:
        return ""
    why = "; ".join(storage.lacks.values())
    return (
        f"disk_limit is {format_bytes(storage.size_bytes)}, more than the {format_bytes(cap)} of "
        f"mem_limit, and what it limits is memory here{f' ({why})' if why else ''}: a kernel that "
        "writes so much is killed at mem_limit."
    )


def disk_words(storage: Storage | None, limits: Limits) -> str:
    """What disk_limit comes to on this machine."""
    if storage is None:
        return ""
    size, kind = format_bytes(storage.size_bytes), storage.backend.value
    text = f"disk_limit is {size} here, "
    if storage.is_image:
        text += f"held by an ext4 file system in a file in {STORAGE} ({kind}), "
        return f"{text}with {storage.inodes} inodes; its own tables are a part of that."
    if storage.is_folder:
        text += f"held by a project quota of a folder in {STORAGE} ({kind}), with {storage.inodes} "
        text += "inodes."
    else:
        text += f"held by a {kind}: memory, which counts towards mem_limit."
    for backend, why in storage.lacks.items():
        text += f" Not by {_NAMES[backend]}, since {why}."
    return " ".join(filter(None, (text, in_memory(storage, limits))))


_NAMES = {
    DiskBackend.IMAGE: "an image",
    DiskBackend.PROJECT: "a project quota",
}

# What an administrator does who wants directories to have limits.
_OF_OTHERS = {
    "btrfs": (
        "Make the directory a subvolume of its own, and limit it:",
        f"{COMMAND}sudo btrfs quota enable {{path}}",
        f"{COMMAND}sudo btrfs qgroup limit 10G DIRECTORY",
    ),
    "zfs": (
        "Make the directory a dataset of its own, with a quota:",
        f"{COMMAND}sudo zfs set quota=10G DATASET",
    ),
    "nfs": ("Set a quota at its server.",),
    "nfs4": ("Set a quota at its server.",),
}
_ELSEWHERE = ("Put it on a file system of its own, or on XFS or ext4 with project quotas.",)
_OPTION = "From then on: add prjquota to its options in /etc/fstab."


def _remedy(mount: Mount) -> tuple[str, ...]:
    """With the commands for this very *mount*."""
    device, path = shlex.quote(mount.device), shlex.quote(mount.path)
    if mount.filesystem not in PROJECT_FILESYSTEMS:
        steps = _OF_OTHERS.get(mount.filesystem, _ELSEWHERE)
        return tuple(step.format(path=path) for step in steps)
    if mount.limits_projects:
        return ("Boot a newer Linux.",)
    if mount.path == "/":
        return _of_root(mount)
    ext4 = (f"{COMMAND}sudo tune2fs -O project,quota -Q prjquota {device}",)
    return (
        "While nobody uses it:",
        f"{COMMAND}sudo umount {path}",
        *(ext4 if mount.filesystem == "ext4" else ()),
        f"{COMMAND}sudo mount -o prjquota {device} {path}",
        _OPTION,
    )


def _of_root(mount: Mount) -> tuple[str, ...]:
    """Linux mounts it before it reads /etc/fstab, and nobody can unmount it."""
    begin = "Boot with rootflags=prjquota (GRUB_CMDLINE_LINUX in /etc/default/grub)"
    if mount.filesystem == "xfs":
        return (f"{begin}.",)
    device = shlex.quote(mount.device)
    return (
        f"{begin}, once this was done from a rescue system:",
        f"{COMMAND}tune2fs -O project,quota -Q prjquota {device}",
    )


def workdir_size(found: Findings) -> Iterator[Check]:
    """disk_limit is not for it: it is the host's."""
    if isinstance(found.workdir, SandboxError):
        return
    mount, facility = found.workdir.place.mount, "size of work directory"
    obstacle = workdir_obstacle(mount, found.host.machine.kernel)
    if not obstacle:
        yield Check(
            facility=facility,
            state=State.OK,
            found=f"{mount.filesystem} with prjquota: workdir_limit can limit it",
            effect="A kernel's files count for it; no kernel can change a file's project."
            if found.host.privileged
            else "Root sets such a limit: a server of root's, or the broker.",
        )
        return
    yield Check(
        facility=facility,
        state=State.OK,
        found=f"that of the disk: {obstacle}",
        effect="A kernel can fill the disk that its work directory is on, and does not start with "
        "workdir_limit; disk_limit is for what is its own. For a limit there:",
        remedy=lines(_remedy(mount)),
    )


def disk(found: Findings) -> Check:
    """What would hold it for a kernel that has one."""
    facility, privileged = "disk limit", found.host.privileged
    have = [name for name, lack in _found(found) if not lack]
    lack = "; ".join(f"no {name}: {lack}" for name, lack in _found(found) if lack)
    if not have:
        return Check(
            facility=facility,
            state=State.NOTE if privileged else State.OK,
            found=f"{DiskBackend.TMPFS.value}; {lack}",
            effect="What disk_limit limits is memory, and counts towards mem_limit.",
            remedy="Install e2fsprogs, and load the module loop." if privileged else "",
        )
    free, promised, kept = found.storage_room
    text = f"{', or '.join(have)} in {STORAGE}: {format_bytes(free)} free"
    if promised:
        text += f", of which kernels may still fill {format_bytes(promised)}"
    if free - promised <= kept:
        return Check(
            facility=facility,
            state=State.MISSING,
            found=text,
            effect="Kernels that set disk_limit do not start: there is no room for more.",
            remedy=f"End some kernels, make room, or mount a larger disk at {STORAGE}.",
        )
    return Check(facility=facility, state=State.OK, found=f"{text}; {lack}" if lack else text)


def _found(found: Findings) -> tuple[tuple[str, str], ...]:
    """The back ends on disk, the best first, each with what it lacks here."""
    return (
        (DiskBackend.IMAGE.value, found.image_obstacle),
        (DiskBackend.PROJECT.value, found.project_obstacle),
    )
