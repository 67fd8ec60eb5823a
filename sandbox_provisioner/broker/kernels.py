"""broker/kernels.py - the daemon: starts kernels for users, and has them.

Each kernel is a `LocalHandle` as a server has one for its own; who asks hears of none but that
user's. A kernel ends with the server that asked for it, and not with us: PID 1 watches that one.
Who comes after us finds the kernels by their records.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sandbox_provisioner import audit
from sandbox_provisioner.broker.eyes import Eyes
from sandbox_provisioner.broker.peer import Peer
from sandbox_provisioner.broker.sockets import hand_over
from sandbox_provisioner.broker.values import as_json
from sandbox_provisioner.broker.wishes import STREAMS, Question, Wish
from sandbox_provisioner.caller import Caller
from sandbox_provisioner.contract import Stdio
from sandbox_provisioner.errors import LaunchError, SandboxError, SpecError
from sandbox_provisioner.handle import LocalHandle, readable_within
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.plan import LaunchRequest
from sandbox_provisioner.policy.current import PolicyKeeper
from sandbox_provisioner.policy.narrow import narrow
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.records import UNREADABLE, all_records, start_time
from sandbox_provisioner.spec import SandboxSpec
from sandbox_provisioner.story import ExitStory

Answer = dict[str, Any]
Log = Callable[..., None]
# How long it is remembered how a kernel ended whose server does not ask.
_KEPT_SECONDS = 600.0
_READY_SECONDS = 600.0
_SERVER = "server"  # a file in the record's folder
_MOST_KERNELS = 64  # of a user
_MOST_STARTING = 8  # of a user
_TOGETHER = 32


@dataclass(slots=True, kw_only=True)
class _Kernel:
    """One, *of* that user; *watched* is a pidfd of its server, -1 if that is not known."""

    of: int
    handle: LocalHandle
    watched: int = -1
    adopted: bool = False
    burial: asyncio.Task[None] | None = None

    def release(self) -> None:
        """Close what is ours of the server's."""
        if self.watched >= 0:
            os.close(self.watched)
            self.watched = -1


class Kernels:
    """All that this daemon has. *log* is told of starts, refusals and ends."""

    def __init__(self, runtime_dir: str, policy: str, log: Log) -> None:
        """*policy* is the path of the administrator's."""
        self._runtime_dir = runtime_dir
        self._terms = PolicyKeeper(policy).terms
        self._log = log
        self._all: dict[str, _Kernel] = {}
        self._starting: dict[int, int] = {}  # how many, of which user
        self._gate = asyncio.Semaphore(_TOGETHER)
        self._told: dict[int, set[str]] = {}  # of which user

    def _launcher(self, warn: Callable[[str], None], **more: Any) -> LocalLauncher:
        return LocalLauncher(runtime_dir=self._runtime_dir, warn=warn, **more)

    async def adopt(self) -> list[str]:
        """Take over what another broker has left; the ids."""
        launcher = self._launcher(lambda text: self._log("warning", text=text))
        runtime = launcher.runtime()
        await off_loop(os.chmod, runtime, 0o711)  # the sockets below it are for their users
        for folder, record in await off_loop(all_records, runtime):
            if record.uid and record.kind == "kernel" and record.survives_server:
                await self._adopt(launcher, folder.path, record.uid)
        await off_loop(launcher.sweep)
        return list(self._all)

    async def _adopt(self, launcher: LocalLauncher, path: Path, uid: int) -> None:
        with contextlib.suppress(LaunchError, *UNREADABLE):
            handle = await off_loop(launcher.adopt, path)
            if handle:
                server = await off_loop(_noted_server, handle)
                kernel = _Kernel(of=uid, handle=handle, watched=server, adopted=True)
                self._add(path.name, kernel)

    def _add(self, sandbox_id: str, kernel: _Kernel) -> None:
        self._all[sandbox_id] = kernel
        kernel.burial = asyncio.create_task(self._bury(sandbox_id, kernel))

    async def _bury(self, sandbox_id: str, kernel: _Kernel) -> None:
        """When a kernel has ended and its server asks no more, remove what it had."""
        story = await kernel.handle.wait()
        self._log("end", of=kernel.of, id=sandbox_id, kind=story.kind.value, reason=story.reason)
        if kernel.watched >= 0:
            await readable_within(kernel.watched, _KEPT_SECONDS)
        else:
            await asyncio.sleep(_KEPT_SECONDS)
        self._all.pop(sandbox_id, None)
        await self._close(kernel)
        self._log("removed", of=kernel.of, id=sandbox_id)

    async def _close(self, kernel: _Kernel) -> None:
        kernel.release()
        try:
            await kernel.handle.close()
        except SandboxError as error:
            self._log("warning", text=str(error))  # what is left goes with the next sweep

    def let_go(self) -> None:
        """All live on, for whoever comes after us."""
        for kernel in self._all.values():
            if kernel.burial:
                kernel.burial.cancel()
            kernel.release()
            kernel.handle.let_go()
        self._all.clear()

    # -- a start

    async def start(
        self, peer: Peer, wish: Wish, fds: Sequence[int], watched: int
    ) -> tuple[Answer, int]:
        """Start what *wish* asks for, with *fds* that came with it, which stay the caller's, as
        *watched* does; the answer, and a descriptor of its end, which is the caller's to close."""
        if len(fds) != STREAMS + len(wish.sources):
            raise SpecError(
                attempt="start a kernel through the sandbox broker",
                answer=f"{len(fds)} descriptors came for {STREAMS + len(wish.sources)} places",
                remedy="This is a mistake of the program that asked.",
            )
        with self._counted(peer.uid):
            async with self._gate:
                try:
                    return await self._start(peer, wish, fds, watched)
                except SandboxError as error:
                    told = partial(audit.refused, person=peer.name, name=wish.labels.name)
                    await off_loop(partial(told, error, asked=wish.spec))
                    raise

    @contextlib.contextmanager
    def _counted(self, uid: int) -> Any:
        running = sum(kernel.of == uid for kernel in self._all.values())
        if self._starting.get(uid, 0) >= _MOST_STARTING:
            raise SpecError(
                attempt="start a kernel through the sandbox broker",
                answer=f"{_MOST_STARTING} kernels of this user start at this moment",
                remedy="Try again in a moment.",
            )
        if running + self._starting.get(uid, 0) >= _MOST_KERNELS:
            raise SpecError(
                attempt="start a kernel through the sandbox broker",
                answer=f"{_MOST_KERNELS} kernels of this user run, which is the most",
                remedy="End some kernels that you do not need.",
            )
        self._starting[uid] = self._starting.get(uid, 0) + 1
        try:
            yield
        finally:
            self._starting[uid] -= 1
            if not self._starting[uid]:
                del self._starting[uid]

    async def _start(
        self, peer: Peer, wish: Wish, fds: Sequence[int], watched: int
    ) -> tuple[Answer, int]:
        told: list[str] = []
        asked, opened = _by_real_paths(wish, fds[STREAMS:])
        caller = _caller(peer, wish, opened)
        eyes = Eyes(peer.uid, peer.gid, peer.groups)
        launcher = self._launcher(
            told.append,
            told=self._told.setdefault(peer.uid, set()),
            caller=lambda: caller,
            seen_by=eyes,
        )
        await off_loop(launcher.sweep)
        labels = replace(wish.labels, user=peer.name)
        terms = await off_loop(self._terms, Person(peer.name, peer.uid, peer.group_names))
        spec, notices = narrow(asked, terms) if terms else (asked, ())
        told += notices
        request = _in_sums(wish.request(spec, watched, terms), peer)
        request = replace(request, asked=wish.spec if terms else None)
        handle = await launcher.start(request, labels, Stdio(*fds[:STREAMS]))
        kernel = _Kernel(of=peer.uid, handle=handle)
        if request.watched >= 0:
            kernel.watched = os.dup(watched)
            await off_loop(_note_server, handle, watched)
        self._add(wish.sandbox_id, kernel)
        self._log("start", of=peer.uid, user=peer.name, id=wish.sandbox_id, argv=wish.argv[0])
        return _told_of(handle) | {"warnings": told}, handle.end_descriptor()

    async def undo(self, sandbox_id: str) -> None:
        """End a kernel whose server never heard of it."""
        kernel = self._all.pop(sandbox_id, None)
        if kernel:
            await self._end(kernel)

    async def _end(self, kernel: _Kernel) -> None:
        if kernel.burial:
            kernel.burial.cancel()
        await self._close(kernel)

    # -- while it runs

    async def answer(self, peer: Peer, question: Question) -> tuple[Answer, int]:
        """What *question* asks, of a kernel of the *peer*'s; and a descriptor, -1 for none."""
        kernel = self._all.get(question.sandbox_id)
        if kernel is None or kernel.of != peer.uid:
            raise _no_such(question.sandbox_id)
        handle = kernel.handle
        match question.ask:
            case "find":
                if (handle.record.init_pid, handle.record.init_start) != tuple(question.init):
                    raise _no_such(question.sandbox_id)
                return _told_of(handle), handle.end_descriptor()
            case "ready":
                return {"mistake": await _ready(kernel, peer)}, -1
            case "look":
                return {"story": _story(await handle.look()), "notices": handle.notices()}, -1
            case "signal":
                await off_loop(handle.signal, question.signal)
            case "kill":
                await off_loop(handle.kill)
            case "note":
                await off_loop(lambda: handle.note_activity(busy=question.busy))
            case "close":
                self._all.pop(question.sandbox_id)
                return await self._closed(kernel), -1
        return {}, -1

    async def _closed(self, kernel: _Kernel) -> Answer:
        handle = kernel.handle
        await self._end(kernel)
        story = await handle.look()
        return {
            "story": _story(story),
            "notices": handle.notices(),
            "left_behind": list(handle.left_behind),
        }


async def _ready(kernel: _Kernel, peer: Peer) -> str | None:
    """As `Handle.ready`; then the sockets are the *peer*'s."""
    handle = kernel.handle
    if kernel.adopted:  # whoever heard PID 1's word is gone; what is there tells
        mistake: str | None = handle.meeting.mistake()
    else:
        async with asyncio.timeout(_READY_SECONDS):
            mistake = await handle.ready()
    if mistake == "":
        await off_loop(hand_over, handle.folder.sockets, peer.uid, peer.gid)
    return mistake


def _note_server(handle: LocalHandle, watched: int) -> None:
    """For the next broker: which process the kernel's server is, and so whether anybody may still
    ask how it has ended."""
    found = re.search(r"^Pid:\s*(\d+)", Path(f"/proc/self/fdinfo/{watched}").read_text(), re.M)
    pid = int(found[1]) if found else 0
    with contextlib.suppress(OSError):  # the kernel has ended, and its folder gone
        (handle.folder.path / _SERVER).write_text(f"{pid} {start_time(pid)}")


def _noted_server(handle: LocalHandle) -> int:
    """A pidfd of it; -1 if it is not known. With a server that has ended so has its kernel."""
    try:
        pid, start = map(int, (handle.folder.path / _SERVER).read_text().split())
        pidfd = os.pidfd_open(pid)
    except (OSError, ValueError):
        return -1
    if start_time(pid) == start:
        return pidfd
    os.close(pidfd)
    return -1


def _by_real_paths(wish: Wish, fds: Sequence[int]) -> tuple[SandboxSpec, dict[str, int]]:
    """What is asked for, where volumes are called by what they are, and not by what they are said
    to be: a policy judges paths. With the descriptors by path."""
    opened = dict(zip(wish.sources, fds, strict=True))
    found = {v: os.readlink(f"/proc/self/fd/{opened.pop(v.source)}") for v in wish.spec.volumes}
    volumes = tuple(replace(volume, source=path) for volume, path in found.items())
    opened |= dict(zip(found.values(), fds[len(fds) - len(found) :], strict=True))
    return replace(wish.spec, volumes=volumes), opened


def _in_sums(request: LaunchRequest, peer: Peer) -> LaunchRequest:
    """*request* where the policy's limits of all that the *peer* runs hold, if there are any."""
    if request.terms is None or not request.terms.sum.asked:
        return request
    plain = re.fullmatch(r"[\w-][\w.-]{0,63}", peer.name, re.ASCII)
    person = f"hub/{peer.name if plain else peer.uid}"
    return replace(request, below=f"{person}/kernels", sums={person: request.terms.sum})


def _caller(peer: Peer, wish: Wish, opened: dict[str, int]) -> Caller:
    return Caller(
        uid=peer.uid,
        gid=peer.gid,
        home=wish.home,
        cwd=wish.here,
        umask=wish.umask,
        environment=wish.inherited,
        groups=peer.groups,
        server=wish.server,
        opened=opened,
    )


def _told_of(handle: LocalHandle) -> Answer:
    record = handle.record
    return {
        "init": [record.init_pid, record.init_start],
        "labels": as_json(handle.labels),
        "unseen": list(handle.unseen),
        "shown_at": record.shown_at,
        "workdir": record.workdir,
        "identity": [record.device, record.inode],
        "folder": str(handle.folder.path),
    }


def _story(story: ExitStory | None) -> Answer | None:
    return None if story is None else as_json(story)


def _no_such(sandbox_id: str) -> LaunchError:
    return LaunchError(
        attempt=f"find the sandbox {sandbox_id}",
        answer="it has ended, or was never this user's",
        remedy="Start a new kernel.",
        step="ask-broker",
    )
