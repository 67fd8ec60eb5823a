"""broker/eyes.py - the daemon: looks at the host with the rights of a user.

A thread of its own takes the user's ids for files and groups (credentials(7): those are of each
thread), looks, and ends with them; one does for all looks of a start. Linux takes the rights that
root has over files from it as well (capabilities(7)), and so opens for it what that user could
open, at that very moment. Nobody can signal or trace it: its other ids stay root's.

Those of a server in a box look from the box's root, which is the thread's alone (credentials and
root directory are of each thread, clone(2), CLONE_FS): they see what that server sees.

A file system that the user serves (FUSE) may never answer. Then the thread stays, and nobody waits
for it any more; a user who has some of these looks at nothing further. So it is where root looks
for what it has given that user (`look_as_root`).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from sandbox_provisioner.broker.peer import Peer
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.off_loop import within

_Found = TypeVar("_Found")
# Less than a start waits for all that is given to a kernel (`launch.py`): who waits shorter tells.
_PATIENCE_SECONDS = 25.0
_MOST_STUCK = 4  # of a user
_lock = threading.Lock()
_stuck: dict[int, set[threading.Thread]] = {}  # by users; some look at the same time


class Eyes:
    """Those of the user *uid*, as `launch.SeenBy` wants them."""

    def __init__(
        self,
        uid: int,
        gid: int,
        groups: frozenset[int],
        seconds: float = _PATIENCE_SECONDS,
        root: int = -1,
    ) -> None:
        """*seconds* is how long a look may take; *root* a descriptor of the root directory, -1 for
        our own."""
        if uid == 0:
            raise ValueError("root's eyes see everything")
        self._uid, self._gid, self._groups = uid, gid, tuple(sorted(groups))
        self._seconds = seconds
        self._root = root
        self._thread: _Looker | None = None
        self._stays = False

    @classmethod
    def of(cls, peer: Peer, seconds: float = _PATIENCE_SECONDS) -> Eyes:
        """Those of the *peer*."""
        return cls(peer.uid, peer.gid, peer.groups, seconds)

    def begin(self) -> None:
        """Let the thread begin before there is anything to look at, until `end`."""
        self._stays = True
        self._thread = self._begun()

    def end(self) -> None:
        """Let it end."""
        self._stays = False
        self._let_go(self._thread)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Meanwhile it is one thread that looks."""
        self._stays = True
        try:
            yield
        finally:
            self.end()

    def __call__(self, look: Callable[..., _Found], *arguments: object) -> _Found:
        """What *look* returns or raises, called in such a thread; HostError if that takes too
        long."""
        _refuse_after_many(self._uid)
        # Whoever waits for us may give up before we do, and let it go.
        if (thread := self._thread) is None:
            thread = self._thread = self._begun()
        thread.looks.put(partial(look, *arguments))
        try:
            found, failed = thread.outcomes.get(timeout=self._seconds)
        except Empty:
            _note_stuck(self._uid, thread)
            self._let_go(thread)
            raise _too_long(_after(self._seconds)) from None
        if not self._stays:
            self._let_go(thread)
        if failed:
            raise failed
        value: _Found = found
        return value

    def _begun(self) -> _Looker:
        thread = _Looker(self._become_user)
        thread.start()
        return thread

    def _become_user(self) -> None:
        if self._root >= 0:
            kernel_calls.unshare(kernel_calls.CLONE_FS)
            os.fchdir(self._root)
            os.chroot(".")
        kernel_calls.set_own_groups(self._groups)
        kernel_calls.set_filesystem_ids(self._uid, self._gid)

    def _let_go(self, thread: _Looker | None) -> None:
        """Let it end as soon as what it looks at answers."""
        if self._thread is thread:
            self._thread = None
        if thread:
            thread.looks.put(None)


class _Looker(threading.Thread):
    """A thread that becomes somebody, calls *looks* until there is None, and tells what they have
    returned or raised."""

    def __init__(self, become: Callable[[], None]) -> None:
        super().__init__(name="sandbox-eyes", daemon=True)
        self._become = become
        self.looks: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self.outcomes: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def run(self) -> None:
        """Called by the thread; who cannot become that user looks at nothing."""
        try:
            self._become()
        except BaseException as error:
            self.outcomes.put((None, error))
            return
        while look := self.looks.get():
            try:
                self.outcomes.put((look(), None))
            except BaseException as error:
                self.outcomes.put((None, error))


def look_as_root(uid: int, look: Callable[[], _Found], undo: Callable[[_Found], object]) -> _Found:
    """What *look* returns or raises, called with root's rights for the user *uid*; HostError if
    that takes too long. What it returns later is undone."""
    _refuse_after_many(uid)
    threads: list[threading.Thread] = []

    def noted() -> _Found:
        threads.append(threading.current_thread())
        return look()

    try:
        return within(_PATIENCE_SECONDS, noted, undo)
    except TimeoutError:
        for thread in threads:
            _note_stuck(uid, thread)
        raise _too_long(_after(_PATIENCE_SECONDS)) from None


def _refuse_after_many(uid: int) -> None:
    """HostError where too many threads of the user *uid* look in vain."""
    with _lock:
        found = {thread for thread in _stuck.pop(uid, ()) if thread.is_alive()}
        if found:
            _stuck[uid] = found
    if len(found) >= _MOST_STUCK:
        raise _too_long(f"{len(found)} looks before have not ended yet")


def _note_stuck(uid: int, thread: threading.Thread) -> None:
    with _lock:
        _stuck.setdefault(uid, set()).add(thread)


def _after(seconds: float) -> str:
    return f"it takes more than {seconds:g} s"


def _too_long(answer: str) -> HostError:
    return HostError(
        attempt="look at the work directory and at the kernel's files",
        answer=answer,
        remedy="Look what they lie on: something does not answer, such as a file server.",
    )
