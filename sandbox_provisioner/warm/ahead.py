"""warm/ahead.py - in the server, in a thread: prepares the next start when the last one is done.

A nursery, then spares: not in the way of what somebody waits for, and only while there is memory.
The thread ends when there is nothing left to do.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sandbox_provisioner.contract import Labels, Warmth, WarmUnavailable
from sandbox_provisioner.errors import SandboxError, told_as_internal_error
from sandbox_provisioner.facilities.caps.cgroup import free_bytes, reap_keepers, survey
from sandbox_provisioner.facilities.caps.inside.memory import available_bytes
from sandbox_provisioner.facilities.process.plan import least_available_bytes
from sandbox_provisioner.facilities.root.facts.kept import drop_kept
from sandbox_provisioner.handle import LocalHandle, reap
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.layers.disks import drop_ready
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.plan import LaunchRequest
from sandbox_provisioner.stem import stem
from sandbox_provisioner.sweeping import sweep
from sandbox_provisioner.warm.make_nursery import make_nursery
from sandbox_provisioner.warm.make_spare import make_spare

THREAD = "sandbox-ahead"
# For the client that now connects.
_AFTER_SECONDS = 0.2
_IDLE_SHARE = 0.5
_LOOK_SECONDS = 0.05
_PATIENCE_SECONDS = 10.0
_AGAIN_SECONDS = 10.0
_STOP_SECONDS = 3.0
_AGAIN_AT_MOST_SECONDS = 1800.0
# A spare is made only where twice as much memory is free as a spare needs to stay.
_ROOM = 2
# Some four nurseries: kernels are to come, too.
_ROOM_BYTES = 256 << 20


def count_start(name: str) -> int:
    """How many kernels of *name* this process has started, with this one."""
    with _lock:
        _starts[name] += 1
        return _starts[name]


def prepare(
    launcher: LocalLauncher, request: LaunchRequest, labels: Labels, warmth: Warmth
) -> None:
    """Prepare a start such as *request*, in the background; what goes wrong is told by the
    launcher's ``warn``."""
    with _lock:
        if time.monotonic() < _failed.get((request.argv[0], labels.name), (0, 0.0))[1]:
            return
        _waiting[(request.argv[0], labels.name)] = (launcher, request, labels, warmth)
        if _threads:
            return
        thread = threading.Timer(_AFTER_SECONDS, _work)
        thread.name, thread.daemon = THREAD, True
        _threads.append(thread)
    thread.start()


_lock = threading.Lock()
# Held as long as handles are closed, so that all are when `end_own` returns.
_burial = threading.Lock()
Wish = tuple[LocalLauncher, LaunchRequest, Labels, Warmth]
_starts: Counter[str] = Counter()
_waiting: dict[tuple[str, str], Wish] = {}
_threads: list[threading.Timer] = []
# The loop of that thread, and what it does.
_at_work: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[None] | None]] = []
_over: list[str] = []
# How often its preparation has failed, and when it is tried again.
_failed: dict[tuple[str, str], tuple[int, float]] = {}
# The nurseries that are children of this process: somebody has to wait for them when they end.
_made: list[LocalHandle] = []


def _work() -> None:
    try:
        while wish := _next():
            bury()
            try:
                with _told():
                    asyncio.run(_prepare(*wish))
                _failed.pop(_name_of(wish), None)
            except (SandboxError, WarmUnavailable, OSError) as error:
                times = _back_off(_name_of(wish))
                if times == 1 or not wish[3].owner:  # nobody has asked for it: once is enough
                    wish[0].warn(f"Kernels go on to start without preparation: {error}")
    except BaseException as error:
        with _lock:
            _threads.clear()
        # Threads are refused before `_stop` is called, where this process has come to its end.
        is_end = isinstance(error, RuntimeError) and "cannot schedule new futures" in str(error)
        if not (_over or is_end):
            raise


def _told() -> contextlib.AbstractContextManager[None]:
    """A mistake of ours as one; a RuntimeError may be this process' end."""
    return told_as_internal_error("prepare a start", but=(WarmUnavailable, RuntimeError))


def _name_of(wish: Wish) -> tuple[str, str]:
    _, request, labels, _ = wish
    return request.argv[0], labels.name


def _back_off(name: tuple[str, str]) -> int:
    """What has failed is tried again later, and each time twice as late: nobody is to pay for it
    after each start. How often it has failed."""
    times = _failed.get(name, (0, 0.0))[0]
    seconds = min(_AGAIN_SECONDS * 2**times, _AGAIN_AT_MOST_SECONDS)
    _failed[name] = times + 1, time.monotonic() + seconds
    return times + 1


def _next() -> Wish | None:
    """What to prepare; None if there is nothing left, and this thread ends."""
    with _lock:
        if not _waiting or _over:
            _threads.clear()
            return None
        return _waiting.popitem()[1]


async def _prepare(
    launcher: LocalLauncher, request: LaunchRequest, labels: Labels, warmth: Warmth
) -> None:
    with _lock:
        _at_work[:] = [(asyncio.get_running_loop(), asyncio.current_task())]
    request = launcher.settled(request)
    launcher.sweep()
    await off_loop(launcher.prepare_disk, request, warmth.idle_seconds)
    lonely = warmth.lonely_seconds
    stem.stay(warmth.idle_seconds if lonely is None else lonely)
    await fill(launcher, request, labels, warmth, patience_seconds=_PATIENCE_SECONDS)


async def fill(
    launcher: LocalLauncher,
    request: LaunchRequest,
    labels: Labels,
    warmth: Warmth,
    *,
    patience_seconds: float = 0.0,
    keep: Callable[[LocalHandle], None] | None = None,
) -> int:
    """Make the nursery and the spares that *warmth* wants and that are not there yet; how many were
    made. Before each it waits so long for the machine to be idle. *keep* is who has the nursery
    from then on, in place of us."""
    await idle(patience_seconds)
    if warmth.owner and not _has_room():
        return 0
    handle = await make_nursery(launcher, request, labels, warmth)
    if handle:
        (keep or _keep)(handle)
    made = int(handle is not None)
    while warmth.spares:
        await idle(patience_seconds)
        if available_bytes() < _ROOM * least_available_bytes():
            break
        ended = partial(_sweep_after, launcher.runtime())
        if not await make_spare(launcher, request, labels, warmth, ended):
            break
        made += 1
    return made


def _keep(handle: LocalHandle) -> None:
    with _lock:
        _made.append(handle)
        handle.when_ended(_take_in)


async def idle(patience_seconds: float) -> None:
    """Wait until half of the machine's CPU time is idle, but no longer than that."""
    until = time.monotonic() + patience_seconds
    while (left := until - time.monotonic()) > 0:
        before = _cpu_times()
        await asyncio.sleep(min(_LOOK_SECONDS, left))  # /proc/stat has no event
        idle, whole = (now - then for now, then in zip(_cpu_times(), before, strict=True))
        if idle >= _IDLE_SHARE * whole:
            return


def _cpu_times() -> tuple[int, int]:
    """Idle time and all time of all CPUs, in clock ticks (proc_stat(5))."""
    with open("/proc/stat") as file:
        times = [int(word) for word in file.readline().split()[1:]]
    return times[3] + times[4], sum(times)


def _has_room() -> bool:
    """Whether a nursery that nobody has asked for is in nobody's way: of the machine, and of a
    group around this process that may have much less."""
    if available_bytes() < _ROOM * least_available_bytes():
        return False
    free = free_bytes(survey())
    return free is None or free >= _ROOM_BYTES


def bury() -> None:
    """Remove what is left of our nurseries that have ended."""
    with _burial:
        reap_keepers()
        with _lock:
            ended = [handle for handle in _made if handle.poll()]
            _made[:] = [handle for handle in _made if handle not in ended]
        for handle in ended:
            asyncio.run(handle.close())


def _forget() -> None:
    """In a child that was forked: none of our threads is there, and no nursery is its own."""
    global _lock, _burial  # a thread that is not there may hold them
    _lock, _burial = threading.Lock(), threading.Lock()
    for known in (_made, _threads, _waiting, _at_work, _starts):
        known.clear()


os.register_at_fork(after_in_child=_forget)


def _take_in(pidfd: int) -> None:
    """A nursery has ended: also one that we have let go of is our child."""
    with contextlib.suppress(SandboxError, OSError):  # what is left goes with the next sweep
        bury()
    reap(pidfd)


def _sweep_after(runtime: Path, _: int) -> None:
    """A spare has ended, perhaps long before the PID 1 of its nursery, which has kernels: nobody
    owns what it leaves."""
    with contextlib.suppress(SandboxError, OSError), _burial:
        sweep(runtime)


def wait() -> None:
    """Wait until all that was asked for is prepared."""
    for thread in [thread for thread in threading.enumerate() if thread.name == THREAD]:
        thread.join()


def end_own() -> None:
    """End what this process has prepared, and is preparing: with a nursery its spares end."""
    wait()
    stem.end()
    drop_ready()
    drop_kept()
    _failed.clear()
    _starts.clear()
    with _burial:
        with _lock:
            made = _made[:]
            _made.clear()
        for handle in made:
            asyncio.run(handle.close())
            sweep(handle.folder.path.parent)  # of what its spares leave
        reap_keepers()


def _stop() -> None:
    """At the end of this process: prepare nothing more. What is half made, and what is this
    process's alone, goes with its other sandboxes (`sweeping.py`)."""
    drop_ready()
    with _lock:
        _over.append("this process ends")
        _waiting.clear()
        for timer in _threads:
            timer.cancel()
        for loop, task in _at_work:
            with contextlib.suppress(RuntimeError):  # it is closed: the task is done
                loop.call_soon_threadsafe(task.cancel if task else loop.stop)
        _made.clear()
    for thread in [thread for thread in threading.enumerate() if thread.name == THREAD]:
        thread.join(_STOP_SECONDS)


atexit.register(_stop)


def let_go() -> None:
    """Leave the nurseries of this process to whoever finds them."""
    with _lock:
        made = _made[:]
        _made.clear()
    for handle in made:
        handle.let_go()
