"""gateway/lookups.py - runs in the gateway: the look-ups of names, by the host's own resolver.

getaddrinfo(3) blocks, for as long as a name server does not answer: threads do it, a bounded
number. A box gets the half-free pool's second thread, and otherwise one; the rest of its names wait
in a queue of its own. So one that asks for what nobody answers does not keep another one waiting.

May import: nothing of ours.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

THREADS = 16
MOST_WAITING = 64
# Each is judged before one is dialled.
MOST_ADDRESSES = 64
_STACK_BYTES = 1 << 19  # what getaddrinfo(3) needs is far less than the usual 8 MiB
_NO_SUCH = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
_AT_ONCE = 2


class Found(NamedTuple):
    """The addresses of a name, in the order in which they are to be tried. None: it has none.
    *failed*: nobody knows."""

    addresses: tuple[str, ...]
    failed: bool = False


Then = Callable[[Found], None]


@dataclass(frozen=True, slots=True)
class _Job:
    box: Hashable
    name: str
    then: Then


class Lookups:
    """The pool of threads, and who waits for one. All but `_work` runs in the loop's thread."""

    def __init__(self) -> None:
        self.event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._waiting: dict[Hashable, deque[_Job]] = {}
        self._running: dict[Hashable, int] = {}
        self._jobs: deque[_Job] = deque()
        self._wake = threading.Semaphore(0)
        self._done: deque[tuple[_Job, Found]] = deque()
        self._threads = 0
        self._busy = 0

    def ask(self, box: Hashable, name: str, then: Then) -> bool:
        """Let *then* have the addresses of *name*; False where too many wait already."""
        queue = self._waiting.setdefault(box, deque())
        if len(queue) >= MOST_WAITING:
            return False
        queue.append(_Job(box, name, then))
        self._hand_out()
        return True

    def forget(self, box: Hashable) -> None:
        """It has ended: what runs for it still runs, and nobody hears of it."""
        self._waiting.pop(box, None)

    def collect(self) -> None:
        """Tell of what was found; called when `event` can be read."""
        os.eventfd_read(self.event)
        while self._done:
            job, found = self._done.popleft()
            self._busy -= 1
            self._running[job.box] -= 1
            if not self._running[job.box]:
                del self._running[job.box]
            job.then(found)
        self._hand_out()

    def _hand_out(self) -> None:
        """In turn: a box that was served goes to the end."""
        for box in [*self._waiting]:
            queue = self._waiting[box]
            at_once = _AT_ONCE if self._busy < THREADS // 2 else 1
            while queue and self._busy < THREADS and self._running.get(box, 0) < at_once:
                self._start(queue.popleft())
            self._waiting.pop(box)
            if queue:
                self._waiting[box] = queue

    def _start(self, job: _Job) -> None:
        self._running[job.box] = self._running.get(job.box, 0) + 1
        self._busy += 1
        self._jobs.append(job)
        if self._busy > self._threads:
            before = threading.stack_size(_STACK_BYTES)
            threading.Thread(target=self._work, daemon=True).start()
            threading.stack_size(before)
            self._threads += 1
        self._wake.release()

    def _work(self) -> None:
        while True:
            self._wake.acquire()
            job = self._jobs.popleft()
            self._done.append((job, look_up(job.name)))
            os.eventfd_write(self.event, 1)


def look_up(name: str) -> Found:
    """The addresses of *name* by this machine's own configuration."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return Found((), failed=error.errno not in _NO_SUCH)
    except (OSError, UnicodeError):
        return Found((), failed=True)
    addresses = dict.fromkeys(str(address[0]) for *_, address in found)
    return Found(tuple(addresses)[:MOST_ADDRESSES])
