"""sweeping.py - any process outside: removes what servers left that were killed, and at the end of
this process what it still has.

What of a sandbox is removed, and how, is the same as at any end: `traces.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from sandbox_provisioner import audit, removal
from sandbox_provisioner.descriptors import for_clean_up, is_readable
from sandbox_provisioner.facilities.caps import cgroup
from sandbox_provisioner.facilities.caps.cgroup import CgroupTree
from sandbox_provisioner.facilities.network.card import maker
from sandbox_provisioner.handle import story_of
from sandbox_provisioner.locks import Locked, is_free, locked
from sandbox_provisioner.records import (
    BUILDING,
    OF_NOBODY,
    LaterVersion,
    Record,
    RecordFolder,
    cgroup_facts,
    folders_in,
    held,
    joined_stand_ins,
    open_init,
)
from sandbox_provisioner.spec import Network
from sandbox_provisioner.story import ExitStory
from sandbox_provisioner.told import EndKind
from sandbox_provisioner.traces import Traces

# How long is spent on a kernel's many files while somebody waits for a start. What there is more
# goes with the next starts, or with `jupyter sandbox gc`.
_A_SWEEP_SECONDS = 0.1


def sweep(
    runtime: Path,
    warn: Callable[[str], None] = lambda _: None,
    seconds: float = _A_SWEEP_SECONDS,
) -> list[str]:
    """Remove what servers left that were killed; the ids of the sandboxes that are gone now.

    Safe at any time: what a living server owns is locked, and sandboxes that were asked to outlive
    their server are left alone while they live. Whose server lives costs one look at a lock, and
    what is our own nothing: a server's starts must not take the longer the more kernels it has.

    What cannot be removed is told by *warn*, once in the life of this process, and stops nothing
    else. For what was set aside it takes *seconds*, more or less.
    """
    gone = []
    for path in _not_held(runtime):
        folder = RecordFolder(path)
        with _told(path, warn):
            if folder.own_if_orphan() and _sweep_orphan(folder):
                gone.append(path.name)
        folder.release()
    _sweep_unwritten(runtime, warn)
    deadline = time.monotonic() + seconds
    for path in _aside(runtime):
        with _told(path, warn):
            removal.empty(path, deadline - time.monotonic())
    return gone


@contextlib.contextmanager
def _told(path: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Whatever is wrong with *path* is a warning: every start sweeps first, and must not fail of
    what some other sandbox has left."""
    try:
        yield
    except Locked:
        raise  # this concerns the whole directory, and whoever starts a sandbox
    except FileNotFoundError:
        return  # somebody else has removed it
    except LaterVersion as error:
        if path not in _told_of:
            _told_of.add(path)
            warn(f"The sandbox {path} is let alone: {error}.")
    except Exception as error:
        if path not in _told_of:
            _told_of.add(path)
            warn(f"Could not remove {path}, which a sandbox has left: {error}. Remove it by hand.")


_told_of: set[Path] = set()


def _sweep_orphan(folder: RecordFolder) -> bool:
    try:
        record = folder.read()
    except FileNotFoundError:
        return False  # `_sweep_unwritten` looks at it again, under the lock
    except RecursionError:
        raise ValueError("its record is no record") from None
    return _sweep_one(folder, record)


def _sweep_one(folder: RecordFolder, record: Record) -> bool:
    pidfd = open_init(record)
    if pidfd is not None and record.survives_server:
        os.close(pidfd)
        return False
    if pidfd is None and record.survives_server and folder.is_asked_for():
        return False  # how it has ended the next broker, or hub, tells
    if pidfd is not None:
        _end(pidfd, record.end_signal)
    if record.network == Network.CARD:
        maker.remove_those_of(record.sandbox_id)
    tree = cgroup.open_existing(cgroup_facts(record), record.tree)
    made = joined_stand_ins(record.made, record.planned)
    story = _story(record, folder, tree)
    Traces(record=replace(record, made=made), folder=folder, tree=tree, kill=True).remove_now()
    if record.init_pid and record.kind not in OF_NOBODY:
        audit.ended(record, story)
    return True


def _story(record: Record, folder: RecordFolder, tree: CgroupTree) -> ExitStory:
    """How it ended, which nobody has watched. PID 1 that could leave nothing has ended with its
    server."""
    story = story_of(record, folder, tree)
    if story.code is None and story.kind is EndKind.OUTSIDE and not record.survives_server:
        return replace(story, kind=EndKind.ASKED, reason="")
    return story


def _not_held(runtime: Path) -> list[Path]:
    """The folders that are not this process's own."""
    ours = {folder.path for folder in list(held)}
    return [path for path in folders_in(runtime) if path not in ours]


def _aside(runtime: Path) -> list[Path]:
    return [runtime / name for name in os.listdir(runtime) if removal.is_aside(name)]


def _sweep_unwritten(runtime: Path, warn: Callable[[str], None]) -> None:
    """Remove the folders whose server was killed before it had written a record into them, or while
    it removed them; links that lead to nothing: to nurseries, and to the owners of ranges of ids;
    and the locks of those who were killed while they made a nursery."""
    with locked(runtime):
        for path in _not_held(runtime):
            folder = RecordFolder(path)
            with _told(path, warn):
                if not (path / "owner").exists():
                    folder.remove()  # who makes one has the lock; who removes one does not mind
                elif not (path / "record.json").exists() and folder.own_if_orphan():
                    folder.remove()
        with os.scandir(runtime) as entries:
            for entry in entries:
                dangling = entry.is_symlink() and not os.path.exists(entry.path)
                if dangling or (entry.name.endswith(BUILDING) and is_free(Path(entry.path))):
                    with _told(Path(entry.path), warn):
                        # Who removes a record does it too.
                        Path(entry.path).unlink(missing_ok=True)


def _end(pidfd: int, number: int) -> None:
    """End PID 1 by *number*, by force if need be, and wait until it and all inside are gone."""
    for attempt in (number, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, attempt)
        if is_readable(pidfd, 5):
            break
    os.close(pidfd)


def _remove_held() -> None:
    """At the end of this process: end and remove what it still owns.

    A Jupyter server that is interrupted ends its event loop at once, and a script may end without a
    shutdown: then nobody waits for a kernel, and nobody closes its handle. Without us it would end
    all the same, but what is around it would stay until the next start.
    """
    ours = list(held)
    if ours:
        _remove(ours)
    for act in _afterwards:
        act()


def _remove(ours: list[RecordFolder]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a hub sends the second when it is impatient
        with contextlib.suppress(ValueError):  # only the main thread may
            signal.signal(number, signal.SIG_IGN)
    with for_clean_up():
        for act in (_end_held, _sweep_held):  # all of them end while one is waited for
            for folder in ours:
                with contextlib.suppress(Exception):  # what is left goes with the next sweep
                    act(folder)
        for runtime in {folder.path.parent for folder in ours}:
            with contextlib.suppress(Exception):  # spares are nobody's, and end with their nursery
                sweep(runtime)


def _end_held(folder: RecordFolder) -> None:
    record = folder.read()
    pidfd = None if record.survives_server else open_init(record)
    if pidfd is not None:
        try:
            signal.pidfd_send_signal(pidfd, record.end_signal)
        finally:
            os.close(pidfd)


def _sweep_held(folder: RecordFolder) -> None:
    _sweep_one(folder, folder.read())


atexit.register(_remove_held)


_afterwards: list[Callable[[], None]] = []


def after_removal(act: Callable[[], None]) -> None:
    """Let *act* be called once at the end of this process, after all of its own was removed."""
    if act not in _afterwards:
        _afterwards.append(act)


def before_removal(act: Callable[[], None]) -> None:
    """Let *act* be called at the end of this process, before what it still has is removed: what was
    registered last is called first."""
    atexit.register(act)
