"""warm/launch.py - in the launching process: a start from a nursery, in place of a new process.

::

    nursery   "fork" ─▶ child                        while we survey and make the record
    launcher  opens what touches the host ─▶ us      (a launcher as always, `spawn.py`)
    child     "here" ─▶ we move it into the groups   "joined"
              performs its part of the plan          PID 1: "init" ─▶ pidfd, "known"
    LocalHandle

Nothing here falls back by itself: `WarmUnavailable` says why there is no start from a nursery, and
the caller starts cold.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from sandbox_provisioner.cgroup import CgroupTree
from sandbox_provisioner.errors import LaunchError, SandboxError
from sandbox_provisioner.handle import LocalHandle, readable
from sandbox_provisioner.launch import Labels, LocalLauncher, Start
from sandbox_provisioner.plan import LaunchRequest, Plan, Site
from sandbox_provisioner.records import Record, start_time
from sandbox_provisioner.spawn import FAIL_AT, LAUNCH_SECONDS, LauncherProcess, Report, Stdio
from sandbox_provisioner.warm import plans
from sandbox_provisioner.warm.found import Command, find, key_of

_HERE_SECONDS = 5
_CREDENTIALS = struct.Struct("3i")


class WarmUnavailable(Exception):
    """No start from a nursery: the text says why, for a log. A cold start may do.

    *failed*: there was one, and it could not.
    """

    def __init__(self, why: str, *, failed: bool = False) -> None:
        super().__init__(why)
        self.failed = failed


async def start_warm(
    launcher: LocalLauncher,
    request: LaunchRequest,
    labels: Labels,
    stdio: Stdio,
    preload: tuple[str, ...],
) -> LocalHandle:
    """Start *request* from its nursery.

    Raises WarmUnavailable where there is none that is ready, or it failed; SandboxError for what no
    start could do. In both cases nothing is left of it.
    """
    if Command.of(request.argv) is None:
        raise WarmUnavailable("its command is not one that a nursery knows")
    site, tree = launcher.survey(request)
    if why := plans.obstacle(request, site):
        raise WarmUnavailable(why)
    runtime = launcher.runtime()
    found = find(runtime, key_of(request, site, preload))
    if found is None:
        raise WarmUnavailable("there is no nursery for it (yet)")
    channel, nursery = found
    opener = LauncherProcess(Stdio(subprocess.DEVNULL, subprocess.DEVNULL, None))
    child = ForkedProcess(channel, stdio)
    labels = replace(labels, nursery=nursery.sandbox_id)
    start = WarmStart(request, opener, child, runtime, labels)
    start.nursery = nursery
    try:
        return await start.run(site, tree)
    except SandboxError as error:
        await start.undo()
        why = f"a start from the nursery failed: {error}"
        raise WarmUnavailable(why, failed=True) from error
    except BaseException:
        await start.undo()
        raise


class WarmStart(Start):
    """A `Start` whose plan has two parts."""

    nursery: Record

    def __init__(
        self,
        request: LaunchRequest,
        opener: LauncherProcess,
        child: ForkedProcess,
        runtime: Path,
        labels: Labels,
    ) -> None:
        super().__init__(request, child, runtime, labels)
        self.opener: LauncherProcess | None = opener
        self.child = child

    async def run(self, site: Site, tree: CgroupTree) -> LocalHandle:
        site, folder = self.make_record(site)
        await self.child.here()
        self.create_cgroup(tree)
        family = plans.Family(self.nursery.init_pid, self.child.pid)
        outside, inside = plans.compile_warm_plan(self.request, site, family)
        await self.child.go(inside, await self.open(outside, site), tree.join_files)
        self.check(self.child.report, inside, site)
        return self.hand_over(tree, folder)

    async def open(self, plan: Plan, site: Site) -> list[int]:
        """Let a launcher open what the child cannot."""
        assert self.opener
        fds = await self.opener.open(plan)
        if not fds:
            self.check(self.opener.report, plan, site)
        await self.end_opener()
        return fds

    async def end_opener(self) -> None:
        opener, self.opener = self.opener, None
        if opener:
            await opener.end()

    async def undo(self) -> None:
        await self.end_opener()
        await super().undo()


class ForkedProcess:
    """The nursery's child from its fork to its end: what `LauncherProcess` is for a cold start.

    It is a child of the nursery's PID 1 and not of ours: nobody but that one can wait for it.
    """

    def __init__(self, channel: socket.socket, stdio: Stdio) -> None:
        """Ask for the fork."""
        self.report = Report()
        self.pid = 0
        self.pidfd = -1
        self.init_pid = 0
        self.init_start = 0
        self.end_signal: int = signal.SIGKILL
        self.status: int | None = None
        self._own_pidfd = -1
        self._report, report_write = os.pipe()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.pipes, standard, ours = _standard(stdio)
        with channel, theirs:
            socket.send_fds(channel, [b"fork"], [theirs.fileno(), report_write, *standard])
        for fd in (report_write, *ours):
            os.close(fd)

    async def here(self) -> None:
        """Wait until it is there; WarmUnavailable if the nursery does not answer soon."""
        try:
            async with asyncio.timeout(_HERE_SECONDS):
                self.pid = await self._hear(plans.HERE)
        except TimeoutError:
            why = f"the nursery has not answered for {_HERE_SECONDS} s"
            raise WarmUnavailable(why, failed=True) from None
        if not self.pid:
            raise WarmUnavailable("the nursery has ended", failed=True)
        with contextlib.suppress(ProcessLookupError):
            self._own_pidfd = os.pidfd_open(self.pid)

    async def _hear(self, word: str) -> int:
        """The sender's pid, as unix(7) translates it for us, once it says *word*; 0 at its end."""
        await readable(self._control.fileno())
        text, ancillary, _, _ = self._control.recvmsg(64, socket.CMSG_SPACE(_CREDENTIALS.size))
        if text != word.encode():
            return 0
        (_, _, credentials), *_ = ancillary
        return int(_CREDENTIALS.unpack(credentials)[0])

    async def go(self, plan: Plan, fds: Sequence[int], join_files: Sequence[str]) -> None:
        """Let it perform *plan* with *fds*; returns when the kernel runs, or nothing does."""
        memfd = os.memfd_create("plan")
        try:
            os.pwrite(memfd, plan.encode(), 0)
            word = b"go " + os.fsencode(os.environ.get(FAIL_AT, ""))
            socket.send_fds(self._control, [word], [memfd, *fds])
        finally:
            for fd in (memfd, *fds):
                os.close(fd)
        try:
            async with asyncio.timeout(LAUNCH_SECONDS):
                await asyncio.gather(
                    self._join(join_files), self._meet_init(), self.report.read(self._report)
                )
        except TimeoutError:
            raise LaunchError(
                attempt="start the sandbox",
                answer=f"the nursery's child was not done after {LAUNCH_SECONDS} s",
                remedy="The machine may be overloaded; try again.",
                step="read-report",
            ) from None

    async def _join(self, files: Sequence[str]) -> None:
        """Move it into its groups: it sees none of their files. Nothing runs before that."""

        def move() -> None:
            for path in files:
                with open(path, "w") as file:
                    file.write(str(self.pid))

        try:
            await asyncio.to_thread(move)
        except ProcessLookupError:
            return  # it has failed, and its report says why
        self._say(plans.JOINED)

    async def _meet_init(self) -> None:
        """PID 1 waits for us, so that its pid cannot be given away before we hold a pidfd."""
        pid = await self._hear(plans.INIT)
        if not pid:
            return
        self.pidfd = os.pidfd_open(pid)
        self.init_start = start_time(pid)
        self.init_pid = pid
        self._say(plans.KNOWN)

    def _say(self, word: str) -> None:
        with contextlib.suppress(OSError):
            self._control.send(word.encode())

    def hand_over(self) -> tuple[int, int]:
        """The pidfd of PID 1 and our end of its control socket, for the handle to own."""
        os.close(self._report)
        self._close_own()
        return self.pidfd, self._control.detach()

    def _close_own(self) -> None:
        if self._own_pidfd >= 0:
            os.close(self._own_pidfd)
            self._own_pidfd = -1

    async def end(self) -> None:
        """Kill it, and PID 1, and wait for both: a start has failed."""
        self._control.close()
        for pidfd in (self._own_pidfd, self.pidfd):
            if pidfd >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, self.end_signal)
                await readable(pidfd)
        if self.pidfd >= 0:
            os.close(self.pidfd)
        self._close_own()
        for pipe in self.pipes:
            pipe.close()
        os.close(self._report)


def _standard(stdio: Stdio) -> tuple[tuple[IO[bytes], ...], list[int], list[int]]:
    """Our ends of the pipes that were asked for; descriptors for 0, 1 and 2; which to close."""
    pipes: list[IO[bytes]] = []
    standard: list[int] = []
    made: list[int] = []
    for number, wish in enumerate((stdio.stdin, stdio.stdout, stdio.stderr)):
        if wish is None:
            fd = number
        elif wish == subprocess.DEVNULL:
            fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            made.append(fd)
        elif wish == subprocess.PIPE:
            read_end, write_end = os.pipe()
            mine, fd = (write_end, read_end) if number == 0 else (read_end, write_end)
            pipes.append(os.fdopen(mine, "wb" if number == 0 else "rb", buffering=0))
            made.append(fd)
        elif wish == subprocess.STDOUT:
            fd = standard[1]
        else:
            fd = wish if isinstance(wish, int) else wish.fileno()
        standard.append(fd)
    return tuple(pipes), standard, made
