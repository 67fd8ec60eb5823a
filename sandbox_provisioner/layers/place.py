"""layers/place.py - whoever launches: the directory in which lies what outlives kernels."""

from __future__ import annotations

import os
from pathlib import Path

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.storage.facts import PEOPLE
from sandbox_provisioner.host import is_idmappable, kernel_release
from sandbox_provisioner.mounts import mounts_around
from sandbox_provisioner.state import STATE, make_state

# Below a place that the covers of a home directory always hide.
_OF_USER = ".local/share/jupyter/sandbox"
# overlayfs.rst: an upper one makes whiteouts and extended attributes, and tells types in listings.
_NEVER_UPPER = {
    "9p", "afs", "ceph", "cifs", "ecryptfs", "exfat", "hfs", "hfsplus", "msdos", "nfs", "nfs4",
    "ntfs3", "overlay", "smb3", "vfat", "virtiofs",
}  # fmt: skip
_TRIAL = "user.sandbox-provisioner.trial"
_REMEDY = (
    "Set layer_dir to a directory on ext4, xfs or btrfs, or on tmpfs from Linux 6.6 on, that is "
    "this user's alone."
)


def layer_path(configured: str = "") -> Path:
    """Where it is, or would be: *configured*, or the place that this user has for it."""
    if configured:
        return Path(os.path.abspath(configured))
    return STATE if os.geteuid() == 0 else Path(os.path.expanduser("~"), _OF_USER)


def of_person(base: Path, uid: int, where: str = "") -> Path:
    """Where in *base*, which is root's, lies what root keeps for the user *uid*: a layer directory
    of its own, so that nobody's names, locks and numbers meet another one's. *where* tells what
    that user has at another place than most, and sees there alone."""
    return base / PEOPLE / f"{uid}{where}"


def all_bases(base: Path) -> list[Path]:
    """*base*, and those of all people in it, as far as we may look."""
    try:
        people = sorted((base / PEOPLE).iterdir())
    except OSError:
        people = []
    return [base, *people]


def layer_directory(configured: str = "") -> Path:
    """The same, made where it is missing; HostError if it cannot be had, or others may write to
    it."""
    path = layer_path(configured)
    if not path.is_absolute():
        raise _cannot(path, "nobody knows the home directory of this user")
    try:
        if path == STATE:
            make_state(path)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise _cannot(path, error.strerror or str(error)) from None
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise _cannot(path, "others than this user can write to it")
    return path


def check_upper(path: Path, *, maps_ids: bool) -> None:
    """HostError where *path* cannot be the upper directory of an overlay; with *maps_ids* also
    where Linux cannot map the ids of a mount of it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mount, _ = mounts_around(fd, str(path))
        kind = mount.filesystem
        if kind in _NEVER_UPPER or kind.startswith("fuse"):
            raise _cannot(path, f"an upper directory of an overlay cannot lie on {kind}")
        if maps_ids and not is_idmappable(mount, kernel_release()):
            raise _cannot(path, f"Linux cannot map the ids of this mount of {kind}")
        os.setxattr(fd, _TRIAL, b"")
        os.removexattr(fd, _TRIAL)
    except OSError as error:
        answer = f"an upper directory of an overlay needs extended attributes: {error.strerror}"
        raise _cannot(path, answer) from None
    finally:
        os.close(fd)


def _cannot(path: Path, answer: str) -> HostError:
    return HostError(attempt=f"keep what kernels write in {path}", answer=answer, remedy=_REMEDY)
