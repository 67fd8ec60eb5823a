"""disks.py - in the test process: file systems with quotas of projects, in files of their own."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sandbox_provisioner.host import kernel_release

# mkfs.xfs makes none that is smaller; the files are sparse.
_SIZE_BYTES = 384 << 20
_FORMATS = {
    "xfs": ("mkfs.xfs", "-q"),
    "ext4": (
        "mkfs.ext4",
        "-q",
        "-F",
        "-b",
        "4096",
        "-O",
        "project,quota",
        "-E",
        "quotatype=prjquota",
    ),
}
KINDS = tuple(_FORMATS)
# Kconfig: XFS's own quotas, and the format that ext4's are in.
_BUILT_WITH = ("CONFIG_XFS_QUOTA", "CONFIG_QFMT_V2", "CONFIG_QUOTACTL", "CONFIG_BLK_DEV_LOOP")


def obstacle() -> str:
    """Why there can be none here, "" if there can."""
    if missing := [words[0] for words in _FORMATS.values() if not shutil.which(words[0])]:
        return f"no {' and no '.join(missing)} on PATH"
    known = _configuration().splitlines()
    lacks = [name for name in _BUILT_WITH if not {f"{name}=y", f"{name}=m"} & {*known}]
    return f"this Linux was built without {', '.join(lacks)}" if lacks else ""


def btrfs_obstacle() -> str:
    """The same of btrfs with simple quotas."""
    if not (shutil.which("mkfs.btrfs") and shutil.which("btrfs")):
        return "no mkfs.btrfs and no btrfs on PATH"
    if "\tbtrfs\n" not in Path("/proc/filesystems").read_text():
        return "this Linux has no btrfs"
    return "" if kernel_release() >= (6, 7) else "Linux before 6.7 has no simple quotas"


def _configuration() -> str:
    """That of this Linux, where it tells."""
    with contextlib.suppress(OSError):
        return gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
    with contextlib.suppress(OSError):
        return Path(f"/boot/config-{os.uname().release}").read_text()
    return ""


@contextlib.contextmanager
def disk_with_quotas(kind: str) -> Iterator[Path]:
    """Where a new file system of that *kind* is mounted, with its quotas of projects."""
    with tempfile.TemporaryDirectory(prefix="sbx-disk-", dir="/srv") as folder:
        os.chmod(folder, 0o755)
        image, mounted = Path(folder, "image"), Path(folder, "disk")
        mounted.mkdir()
        with image.open("wb") as file:
            file.truncate(_SIZE_BYTES)
        subprocess.run([*_FORMATS[kind], str(image)], check=True)
        options = "loop,prjquota"
        subprocess.run(["mount", "-t", kind, "-o", options, str(image), str(mounted)], check=True)
        try:
            yield mounted
        finally:
            subprocess.run(["umount", str(mounted)], check=True)
