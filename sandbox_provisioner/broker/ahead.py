"""broker/ahead.py - the daemon: has nurseries and spares made for users, and keeps them apart.

What one user has made takes nobody else's turn: of each user it is one thing at a time, the last
that was asked for, and a few of all at once. A nursery ends with the server that it is for, or by
itself, and not with us: whoever comes after us finds it by its record, and ends what was half made.

PID 1 of a kernel that comes from a nursery is a fork of it. That of a cold one is root's code, and
so it shall be here: only what root alone may change is imported ahead, and with no variable by
which a Python can be told to run something (PYTHONWARNINGS imports, BROWSER is a command).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from weakref import WeakValueDictionary

from sandbox_provisioner.broker.burials import Burials, broken_off
from sandbox_provisioner.contract import WarmUnavailable
from sandbox_provisioner.errors import SandboxError, told_as_internal_error
from sandbox_provisioner.facilities.environment.plan.variables import HARMLESS
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.plan import Site
from sandbox_provisioner.records import OF_NOBODY, UNREADABLE, Record, RecordFolder
from sandbox_provisioner.trust import not_roots_in
from sandbox_provisioner.warm.ahead import idle
from sandbox_provisioner.warm.found import forget, is_served, leads_to

_HARMLESS = re.compile("|".join(map(translate, HARMLESS)))
_INLINE = ("MPLBACKEND", "module://matplotlib_inline.backend_inline")
_TOGETHER = max(4, len(os.sched_getaffinity(0)) // 2)
_PATIENCE_SECONDS = 10.0
_MOST_NURSERIES = 4  # of a user
_MOST_FILES = 400_000  # of all that a nursery may import
_AGAIN_SECONDS = 10.0
_AGAIN_AT_MOST_SECONDS = 1800.0
_MOST_FAILED = 64  # of a user
_MOST_TOLD = 16

Name = tuple[str, str]  # of a kernelspec: a digest of its program, and what people call it
Log = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Job:
    """Something to make for the user *of*, for starts of *name*: *make* returns how many that were,
    *drop* closes what it has open."""

    of: int
    name: Name
    make: Callable[[], Awaitable[int]]
    drop: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Failure:
    times: int
    until: float
    why: WarmUnavailable


class Prepared:
    """What is ready for the users of one desk, which *has* what its records tell; *log* is told
    what goes wrong."""

    def __init__(self, has: Callable[[Record], bool], log: Log) -> None:
        self._has = has
        self._log = log
        self._gate = asyncio.Semaphore(_TOGETHER)
        self._turns: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._next: dict[int, Job] = {}
        self._failed: dict[int, dict[Name, _Failure]] = {}
        self._told: dict[int, list[str]] = {}
        self._nurseries: dict[str, tuple[int, LocalHandle, asyncio.Task[None]]] = {}
        self._burials = Burials()

    # -- what is made

    def want(self, job: Job) -> None:
        """Do the *job* when there is time for it."""
        failed = self._failed.get(job.of, {}).get(job.name)
        if failed and time.monotonic() < failed.until:
            job.drop()
            return
        if before := self._next.pop(job.of, None):
            before.drop()
        self._next[job.of] = job
        if job.of not in self._tasks:
            self._tasks[job.of] = asyncio.create_task(self._work(job.of))

    async def _work(self, uid: int) -> None:
        try:
            while job := self._next.pop(uid, None):
                try:
                    with contextlib.ExitStack() as dropped:
                        dropped.callback(job.drop)
                        await idle(_PATIENCE_SECONDS)
                        dropped.pop_all()
                    await self.now(job)
                except (SandboxError, WarmUnavailable, OSError) as error:
                    self._log("warning", of=uid, text=f"Nothing is ready for a user: {error}")
        finally:
            del self._tasks[uid]

    async def now(self, job: Job) -> int:
        """Do it; how many were made. Raises why there is nothing."""
        try:
            async with self._turns.setdefault(job.of, asyncio.Lock()), self._gate:
                with told_as_internal_error("prepare a start", but=(WarmUnavailable,)):
                    made = await job.make()
        except (SandboxError, WarmUnavailable, OSError) as error:
            self._note(job, error)
            raise
        finally:
            job.drop()
        self._failed.get(job.of, {}).pop(job.name, None)
        return made

    def _note(self, job: Job, error: Exception) -> None:
        """What has failed is tried again each time twice as late: nobody is to pay for it after
        each start. Its user is told once."""
        of_user = self._failed.setdefault(job.of, {})
        if len(of_user) >= _MOST_FAILED:
            of_user.clear()
        times = of_user[job.name].times if job.name in of_user else 0
        seconds = min(_AGAIN_SECONDS * 2**times, _AGAIN_AT_MOST_SECONDS)
        why = error if isinstance(error, WarmUnavailable) else WarmUnavailable(str(error))
        if why.never:
            seconds = _AGAIN_AT_MOST_SECONDS
        elif not times:
            self.tell(job.of, f"Kernels go on to start without preparation: {error}")
        of_user[job.name] = _Failure(times + 1, time.monotonic() + seconds, why)

    def why_not(self, uid: int, name: Name) -> WarmUnavailable | None:
        """Why there is nothing for starts of *name*, where that is known."""
        failed = self._failed.get(uid, {}).get(name)
        return failed.why if failed and failed.why.never else None

    def tell(self, uid: int, text: str) -> None:
        """Keep *text* for that user, who hears it with their next start."""
        told = self._told.setdefault(uid, [])
        if text not in told and len(told) < _MOST_TOLD:
            told.append(text)

    def told(self, uid: int) -> list[str]:
        """What there is to say to that user."""
        return self._told.pop(uid, [])

    # -- what is there

    def why_no_more(self, uid: int) -> str:
        """Why that user may not have one more nursery, "" if they may. Of one that has ended PID 1
        stays while its kernels do; nothing comes of it any more."""
        handles = self.handles(uid)
        if len(handles) < _MOST_NURSERIES:
            return ""
        count = sum(is_served(handle.folder.path) for handle in handles)
        return f"this user has {count} nurseries already" if count >= _MOST_NURSERIES else ""

    def keep(self, uid: int, handle: LocalHandle) -> None:
        """Have a nursery of that user's until it ends."""
        self._have(uid, handle)
        self._log("nursery", of=uid, id=handle.record.sandbox_id, name=handle.record.name)

    def _have(self, uid: int, handle: LocalHandle) -> asyncio.Task[None]:
        burial = asyncio.create_task(self._bury(handle))
        self._nurseries[handle.record.sandbox_id] = uid, handle, burial
        return burial

    async def _bury(self, handle: LocalHandle) -> None:
        await handle.wait()
        self._nurseries.pop(handle.record.sandbox_id, None)
        await self._burials.begin(self._remove(handle))

    async def _remove(self, handle: LocalHandle) -> None:
        forget(handle.record.sandbox_id)
        with contextlib.suppress(SandboxError):
            await handle.close()  # or what is left goes with the next sweep
        self._log(f"{handle.record.kind}-end", of=handle.record.uid, id=handle.record.sandbox_id)

    def handles(self, uid: int) -> list[LocalHandle]:
        """The nurseries of that user."""
        return [handle for of, handle, _ in list(self._nurseries.values()) if of == uid]

    async def adopt(
        self, launcher: LocalLauncher, found: Sequence[tuple[RecordFolder, Record]]
    ) -> None:
        """Take over the nurseries among *found* that somebody can find, or that have kernels, which
        end with them; and end whatever was being made when who made it was killed. What takes long
        to end does so while others are served."""
        linked = await off_loop(leads_to, launcher.runtime())
        parents = {record.nursery for _, record in found}
        ending = []
        for folder, record in found:
            if record.kind not in OF_NOBODY or not self._has(record):
                continue
            is_ready = record.sandbox_id in linked
            if is_ready and record.kind == "spare":
                continue  # nobody's, until it is claimed
            with contextlib.suppress(SandboxError, *UNREADABLE):
                handle = await off_loop(launcher.adopt, folder.path)
                if handle and (is_ready or record.sandbox_id in parents):
                    self.keep(record.uid, handle)
                elif handle:
                    await off_loop(handle.kill)
                    ending.append(self._have(record.uid, handle))
        if ending:
            await asyncio.wait(ending, timeout=_PATIENCE_SECONDS)

    def let_go(self) -> None:
        """Make nothing more, and leave what is there to whoever comes after us."""
        self._drop_next()
        for task in self._tasks.values():
            task.cancel()
        for _, handle, burial in self._nurseries.values():
            burial.cancel()
            handle.let_go()
        self._nurseries.clear()

    async def stop(self) -> None:
        """Let what is half made be undone."""
        self._drop_next()
        await broken_off(list(self._tasks.values()))

    def _drop_next(self) -> None:
        while self._next:
            self._next.popitem()[1].drop()

    async def end(self) -> None:
        """All end; with a nursery its spares do."""
        await self.stop()
        ours = list(self._nurseries.values())
        self._nurseries.clear()
        for _, handle, burial in ours:
            self._burials.begin(self._end(handle, burial))
        await self._burials.over()

    async def _end(self, handle: LocalHandle, burial: asyncio.Task[None]) -> None:
        burial.cancel()
        await asyncio.wait([burial])  # it may be looking at what is closed then
        await self._remove(handle)


def why_not_ahead(site: Site, variables: Mapping[str, str]) -> str:
    """Why nothing may be imported before a start at *site* with *variables* that its user has
    chosen: others than root could change it, or say what it does. Its user looks for that, where
    a file system may never answer."""
    for name, value in variables.items():
        if not _HARMLESS.fullmatch(name) and (name, value) != _INLINE:
            return f"the broker imports nothing with {name} before a kernel starts"
    files = site.files
    paths = (files.behind, *(files.real.get(path, path) for path in files.readonly))
    if site.root.place:  # all of these are in it
        paths = (site.root.place.source,)
    if found := not_roots_in(paths, _MOST_FILES):
        return (
            f"others than root may change {found}, and the broker imports nothing of theirs "
            "before a kernel starts"
        )
    return ""
