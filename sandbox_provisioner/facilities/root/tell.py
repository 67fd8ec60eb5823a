"""facilities/root/tell.py - pure: that a folder in memory was full, and which roots can be had."""

from __future__ import annotations

from sandbox_provisioner.checks import Check, Findings, State
from sandbox_provisioner.errors import COMMAND, joined
from sandbox_provisioner.inside import wire
from sandbox_provisioner.told import EndCause, EndKind, Subject

_FULL_FOLDER = (
    "{{name}} ended, since {folder} was full, whose size is {{size}}, when it touched the memory "
    "of a file there. Raise {option}, or remove files from {folder}."
)
ENDS = (
    EndCause(
        EndKind.SHM_FULL,
        _FULL_FOLDER.format(folder="/dev/shm", option="shm_limit"),
        wire.SHM_FULL,
    ),
    EndCause(
        EndKind.TMP_FULL,
        _FULL_FOLDER.format(folder="/tmp", option="tmp_limit"),
        wire.TMP_FULL,
    ),
    EndCause(
        EndKind.DISK_FULL,
        "{name} ended, since it has written all that disk_limit allows, {size}, when it touched "
        "the memory of a file there. Raise disk_limit, or remove files from /tmp and its home.",
        wire.DISK_FULL,
    ),
    EndCause(
        EndKind.WORKDIR_FULL,
        "{name} ended, since its work directory held all that workdir_limit allows, {size}, when "
        "it touched the memory of a file there. Raise workdir_limit, or remove files.",
        wire.WORKDIR_FULL,
    ),
)


def _full(words: str, of: Subject) -> str:
    option, _, path = words.partition(" ")
    if not (option.isidentifier() and path.startswith("/")):
        return ""
    return f"{path} of {of.whom} is full: it holds all that {option} allows."


NOTICES = {wire.FULL: _full}


# What a layer over another root is made with, and what roots that are files are.
_OVERLAY = "overlay"
_FILES = ("squashfs", "erofs", "ext4")


def images(found: Findings) -> Check:
    """Which other roots than the host's kernels can have here."""
    facility, known = "rootfs", found.filesystems
    if _OVERLAY not in known:
        return Check(
            facility=facility,
            state=State.NOTE,
            found="this Linux has no overlay",
            effect="Kernels can have no other root file system than the host's.",
            remedy="Boot a Linux that was built with CONFIG_OVERLAY_FS.",
        )
    if not found.host.privileged:
        return _images_of_user(found, facility)
    there = [name for name in _FILES if name in known]
    text = f"directories, and files of {joined(there)}" if there else "directories"
    return Check(facility=facility, state=State.OK, found=text)


def _images_of_user(found: Findings, facility: str) -> Check:
    if found.broker and isinstance(found.broker, str):
        return Check(
            facility=facility,
            state=State.OK,
            found="directories; through the broker images of root's, and the files that its policy "
            "names, too",
        )
    if not found.image_reader:
        return Check(
            facility=facility,
            state=State.NOTE,
            found="directories; there is no squashfuse",
            effect="Kernels of this user can have no image file as root, unless root starts them.",
            remedy=f"{COMMAND}sudo apt install squashfuse",
        )
    if not found.has_fuse:
        return Check(
            facility=facility,
            state=State.NOTE,
            found="directories; /dev/fuse is closed to this user",
            effect="Kernels of this user can have no image file as root, unless root starts them.",
            remedy=f"{COMMAND}sudo chmod 0666 /dev/fuse",
        )
    return Check(facility=facility, state=State.OK, found="directories, and files of squashfs")
