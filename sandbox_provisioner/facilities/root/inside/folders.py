"""folders.py - PID 1 of the sandbox: notices that a folder in memory has no room any more.

Who maps a file there and touches a page for which there is none gets SIGBUS (mmap(2)): a kernel,
or a process of it, for which others may wait for ever. No event tells of a file system that is
full, so it is looked at from time to time, more often while something is in /dev/shm.
"""

from __future__ import annotations

import os
import time

from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.watcher import Watcher

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from sandbox_provisioner.inside.watcher import Init

# The word for it in the exit file, and what the person raises for more.
_FOLDERS = (("/dev/shm", wire.SHM_FULL, "shm_limit"), ("/tmp", wire.TMP_FULL, "tmp_limit"))
_EMPTY_SECONDS = 5.0
_USED_SECONDS = 0.5
# How long the end of whoever filled a folder, and freed it by its end, may come after a look.
_A_MOMENT_SECONDS = 1.0
# So much of it is free again: who is at its limit would be told of each page.
_CLEARED_PART = 16
_SIGBUS = 7


class Folders(Watcher):
    """The folders in memory of this sandbox, */dev/shm* and the home that has /tmp in it."""

    def __init__(self, folders: tuple[tuple[str, str, str], ...] = _FOLDERS) -> None:
        self._folders = folders
        self._next = 0.0
        self._full: dict[str, float] = {}  # and when that was seen last

    def patience(self) -> int:
        """In how many milliseconds to look again."""
        return max(0, round(1000 * (self._next - time.monotonic())))

    def look(self) -> list[str]:
        """A sentence for each that is full now and was not before; none if it is not time yet."""
        said: list[str] = []
        now, used = time.monotonic(), False
        if now < self._next:
            return said
        for path, _, option in self._folders:
            found = os.statvfs(path)
            used = used or (path == self._folders[0][0] and found.f_bfree < found.f_blocks)
            if not found.f_bavail:
                if path not in self._full:
                    said.append(_sentence(path, found.f_blocks * found.f_frsize, option))
                self._full[path] = now
            elif found.f_bavail > found.f_blocks // _CLEARED_PART:
                self._full.pop(path, None)
        self._next = now + (_USED_SECONDS if used else _EMPTY_SECONDS)
        return said

    def serve(self, init: Init, ready: dict[int, int]) -> None:
        """Tell of each that is full."""
        for sentence in self.look():
            init.tell(wire.FULL, sentence.partition(" ")[0])
            init.say(sentence)

    def why(self, code: int) -> str:
        """For the end of a kernel by SIGBUS: which one has no room, or had none a moment ago, and
        its size."""
        if code != -_SIGBUS:
            return ""
        now = time.monotonic()
        for path, word, _ in self._folders:
            found = os.statvfs(path)
            seen = self._full.get(path)
            if not found.f_bavail or (seen is not None and now - seen < _A_MOMENT_SECONDS):
                return f"{word} {found.f_blocks * found.f_frsize}"
        return ""


def own_folders() -> Folders:
    """Those of a sandbox with a root of its own: the host's are full of others' files, too. /tmp is
    none of them where a volume stands there: it is the host's disk then, which may not even answer.
    No volume can be at /dev/shm, nor in /run, which is on the same file system as /tmp."""
    is_own = os.stat("/tmp").st_dev == os.stat("/run").st_dev
    return Folders(_FOLDERS if is_own else _FOLDERS[:1])


def _sentence(path: str, size: int, option: str) -> str:
    return (
        f"{path} is full; it holds {size >> 20} MiB.\n"
        "What needs more of it fails, and a process that maps files there is ended\n"
        "by SIGBUS; what waits for that one may wait for ever.\n"
        f"Remove what is not needed there, or raise {option}."
    )
