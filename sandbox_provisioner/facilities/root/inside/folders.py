"""folders.py - PID 1 of the sandbox: notices that a kernel has no room to write any more.

Who maps a file there and touches a page for which there is none gets SIGBUS (mmap(2)): a kernel,
or a process of it, for which others may wait for ever. No event tells of a file system that is
full, so it is looked at from time to time, more often while something is in /dev/shm, or changes.
"""

from __future__ import annotations

import os
import time

from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.watcher import Watcher

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandbox_provisioner.inside.watcher import Init

_SHM, _TMP = "/dev/shm", "/tmp"
# By the option that a person raises for more: the word for it in the exit file.
_DISK, _WORKDIR = "disk_limit", "workdir_limit"
_WORDS = {
    "shm_limit": wire.SHM_FULL, "tmp_limit": wire.TMP_FULL, _DISK: wire.DISK_FULL,
    _WORKDIR: wire.WORKDIR_FULL,
}  # fmt: skip
# Whose number of files is looked at, and what limits that.
_INODES = {"tmp_limit": "inode_limit", _DISK: "inode_limit", _WORKDIR: "workdir_inode_limit"}
_EMPTY_SECONDS = 5.0
_USED_SECONDS = 0.5
# How long the end of whoever filled a folder, and freed it by its end, may come after a look.
_A_MOMENT_SECONDS = 1.0
# So much of it is free again: who is at its limit would be told of each page.
_CLEARED_PART = 16
_KEPT_PART, _MOST_KEPT = 64, 256
_SIGBUS = 7


class Folders(Watcher):
    """What this sandbox can write to and what limits it: */dev/shm*, the home that has /tmp in it,
    and a work directory with a limit."""

    def __init__(self, tmp_option: str = "tmp_limit") -> None:
        self._folders = {_SHM: "shm_limit", _TMP: tmp_option}
        self._next = 0.0
        self._free: dict[str, int] = {}  # at the last look
        self._full: dict[tuple[str, str], float] = {}  # and when that was seen last

    def limited_by(self, option: str) -> None:
        """What limits /tmp, and all that is on the same file system."""
        self._folders[_TMP] = option

    def also(self, path: str, option: str) -> None:
        """A file system of its own for what is kept, or a work directory with a limit: XFS and ext4
        tell that as its size, and what is left of it as free (statfs(2), xfs_qm_statvfs and
        ext4_statfs_project)."""
        self._folders[path] = option

    def own(self) -> Folders:
        """Those of a sandbox with a root of its own: the host's are full of others' files, too.
        /tmp is none of them where a volume stands there: it is the host's disk then, which may not
        even answer. No volume can be at /dev/shm, nor in /run, which is on the same file system."""
        if os.stat(_TMP).st_dev != os.stat("/run").st_dev or not _have_one_size(_TMP, "/run"):
            del self._folders[_TMP]
        return self

    def patience(self) -> int:
        """In how many milliseconds to look again."""
        return max(0, round(1000 * (self._next - time.monotonic())))

    def look(self) -> dict[str, tuple[str, str]]:
        """A sentence for each that is full now and was not before, and which path that is by which
        option; none if it is not time yet."""
        said: dict[str, tuple[str, str]] = {}
        now, used = time.monotonic(), False
        if now < self._next:
            return said
        for path, option, found in self._sizes():
            used = used or (path == _SHM and found.f_bfree < found.f_blocks)
            used = used or self._free.get(path, found.f_bfree) != found.f_bfree
            self._free[path] = found.f_bfree
            said |= self._news(path, option, found, _free(option, found), found.f_blocks)
            if option in _INODES:
                said |= self._news(path, _INODES[option], found, found.f_favail, found.f_files)
        self._next = now + (_USED_SECONDS if used else _EMPTY_SECONDS)
        return said

    def _sizes(self) -> Iterable[tuple[str, str, os.statvfs_result]]:
        """Each with what limits it. Of what leads to a work directory a kernel may have moved a
        part, where it writes into its root file system."""
        for path, option in self._folders.items():
            try:
                yield path, option, os.statvfs(path)
            except OSError:
                if option != _WORKDIR:
                    raise

    def _news(
        self, path: str, option: str, found: os.statvfs_result, free: int, total: int
    ) -> dict[str, tuple[str, str]]:
        """A sentence where nothing is *free* since this look. Of what a file system does not count
        it has none in *total*."""
        is_new = (path, option) not in self._full
        if not free and total:
            self._full[path, option] = time.monotonic()
            return {_sentence(path, option, found): (path, option)} if is_new else {}
        if free > total // _CLEARED_PART:
            self._full.pop((path, option), None)
        return {}

    def serve(self, init: Init, ready: dict[int, int]) -> None:
        """Tell of each that is full."""
        for sentence, (path, option) in self.look().items():
            init.tell(wire.FULL, option, path)
            init.say(sentence)

    def why(self, code: int) -> str:
        """For the end of a kernel by SIGBUS: which one has no room, or had none a moment ago, and
        its size."""
        if code != -_SIGBUS:
            return ""
        now = time.monotonic()
        for path, option, found in self._sizes():
            seen = self._full.get((path, option))
            if not _free(option, found) or (seen is not None and now - seen < _A_MOMENT_SECONDS):
                return f"{_WORDS[option]} {found.f_blocks * found.f_frsize}"
        return ""


def _have_one_size(path: str, other: str) -> bool:
    """A folder with a limit has that as its size, a volume from the same disk that of the disk."""
    return os.statvfs(path).f_blocks == os.statvfs(other).f_blocks


def _free(option: str, found: os.statvfs_result) -> int:
    """How many blocks: 0 where a write may fail. ext4 keeps a few for what is not on disk yet."""
    on_disk = option in {_DISK, _WORKDIR}
    kept = min(found.f_blocks // _KEPT_PART, _MOST_KEPT) if on_disk else 0
    return max(0, found.f_bavail - kept)


def _sentence(path: str, option: str, found: os.statvfs_result) -> str:
    size, files = found.f_blocks * found.f_frsize >> 20, found.f_files - found.f_ffree
    if option in _INODES.values():
        also = " with the home directory and all else on the\nsame file system"
        return (
            f"{path} can hold no more files:{also if path == _TMP else ''} there are {files}.\n"
            "What makes another one fails.\n"
            f"Remove what is not needed there, or raise {option}."
        )
    also = f"\nIn {files} files, those of the home directory too." if path == _TMP else ""
    if path != _TMP and option == _DISK:
        also = f"\nIn {files} files, those written into a root of its own too."
    return (
        f"{path} is full; it holds {size} MiB.{also}\n"
        "What needs more of it fails, and a process that maps files there is ended\n"
        "by SIGBUS; what waits for that one may wait for ever.\n"
        f"Remove what is not needed there, or raise {option}."
    )
