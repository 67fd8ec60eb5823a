"""broker/eyes.py - the daemon: looks at the host with the rights of a user.

A thread of its own takes the user's ids for files and groups (credentials(7): those are of each
thread), looks, and ends with them. Linux takes the rights that root has over files from it as well
(capabilities(7)), and so opens for it what that user could open, at that very moment. Nobody can
signal or trace it: its other ids stay root's.

A file system that the user serves (FUSE) may never answer. Then the thread stays, and nobody waits
for it any more; a user who has some of these looks at nothing further.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.inside import kernel_calls

_Found = TypeVar("_Found")
_PATIENCE_SECONDS = 30.0
_MOST_STUCK = 4  # of a user
_stuck: dict[int, set[threading.Thread]] = {}


class Eyes:
    """Those of the user *uid*, as `launch.SeenBy` wants them."""

    def __init__(
        self, uid: int, gid: int, groups: frozenset[int], seconds: float = _PATIENCE_SECONDS
    ) -> None:
        """*seconds* is how long a look may take."""
        if uid == 0:
            raise ValueError("root's eyes see everything")
        self._uid, self._gid, self._groups = uid, gid, tuple(sorted(groups))
        self._seconds = seconds

    def __call__(self, look: Callable[..., _Found], *arguments: object) -> _Found:
        """What *look* returns or raises, called in a thread that is gone afterwards; HostError if
        that takes too long."""
        stuck = {thread for thread in _stuck.get(self._uid, ()) if thread.is_alive()}
        _stuck[self._uid] = stuck
        if len(stuck) >= _MOST_STUCK:
            raise _too_long(f"{len(stuck)} looks before have not ended yet")
        found: list[Any] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                kernel_calls.set_own_groups(self._groups)
                kernel_calls.set_filesystem_ids(self._uid, self._gid)
                found.append(look(*arguments))
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, name="sandbox-eyes", daemon=True)
        thread.start()
        thread.join(self._seconds)
        if thread.is_alive():
            stuck.add(thread)
            raise _too_long(f"it takes more than {self._seconds:g} s")
        if failed:
            raise failed[0]
        value: _Found = found[0]
        return value


def _too_long(answer: str) -> HostError:
    return HostError(
        attempt="look at the work directory and at the kernel's files",
        answer=answer,
        remedy="Look what they lie on: something does not answer, such as a file server.",
    )
