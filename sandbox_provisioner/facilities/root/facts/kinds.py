"""kinds.py - reads only, whoever launches: what a file holds that shall be a root file system.

By its first bytes, as squashfs.rst, erofs.rst and ext4/super.rst have them. Linux gets what is what
it says, and is as long as it says: it is not asked to find that out.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sandbox_provisioner.errors import SpecError

_HEAD_BYTES = 4096
_SUPER = 1024  # of erofs and ext4
_TAR = 257
_ARCHIVES = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}


@dataclass(frozen=True, slots=True)
class ImageKind:
    """A file system that lies in a file: *options* keep its mount from writing, and from ending
    the machine where the file is damaged. Its mounts can be id-mapped since a Linux."""

    filesystem: str
    idmapped_since: tuple[int, int]
    options: Mapping[str, str | None] = field(default_factory=dict)


KINDS = {
    kind.filesystem: kind
    for kind in (
        ImageKind("squashfs", (6, 2)),
        ImageKind("erofs", (5, 19)),
        # ext4(5): no look at its journal, which would be written back; and what is wrong is an
        # error to who reads, whatever the file itself asks for (a panic, say).
        ImageKind("ext4", (5, 12), {"noload": None, "errors": "continue"}),
    )
}


def _of_squashfs(head: bytes) -> int:
    """How many bytes it says it has; 0 if it is none."""
    return _number(head, "<Q", 40) if head[:4] == b"hsqs" else 0


def _of_erofs(head: bytes) -> int:
    if head[_SUPER : _SUPER + 4] != b"\xe2\xe1\xf5\xe0":
        return 0
    return max(1, _number(head, "<I", _SUPER + 36) << min(head[_SUPER + 12], 16))


def _of_ext4(head: bytes) -> int:
    if head[_SUPER + 56 : _SUPER + 58] != b"\x53\xef":
        return 0
    return max(1, _number(head, "<I", _SUPER + 4) << (10 + min(head[_SUPER + 24], 6)))


_SIZES: Mapping[str, Callable[[bytes], int]] = {
    "squashfs": _of_squashfs,
    "erofs": _of_erofs,
    "ext4": _of_ext4,
}


def _number(head: bytes, form: str, at: int) -> int:
    number: int = struct.unpack_from(form, head, at)[0]
    return number


def kind_of(fd: int, attempt: str) -> ImageKind:
    """What the file *fd* holds; SpecError with *attempt* if that is no root, or not all of it."""
    head, size = os.pread(fd, _HEAD_BYTES, 0), os.fstat(fd).st_size
    padded = head.ljust(_HEAD_BYTES, b"\0")
    for name, size_of in _SIZES.items():
        if said := size_of(padded):
            if said > size:
                raise SpecError(
                    attempt=attempt,
                    answer=f"it is a file of {name} of {said} bytes, of which {size} are there",
                    remedy="Copy or make it again: it has been cut off.",
                )
            return KINDS[name]
    raise SpecError(
        attempt=attempt,
        answer=_other(padded),
        remedy="Name a directory, or a file of squashfs, erofs or ext4. An archive of an image "
        "becomes one by: jupyter sandbox image import FILE",
    )


def _other(head: bytes) -> str:
    if head[_TAR : _TAR + 5] == b"ustar":
        return "it is an archive of tar"
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            return f"it is a file that {name} has compressed"
    if head[:4] == b"QFI\xfb":
        return "it is the disk of a virtual machine (qcow2)"
    if head[510:512] == b"\x55\xaa":
        return "it is a whole disk, with a table of partitions"
    return "it is no file system that can be a root"
