"""v2.py - in the launching process: a sandbox's group in the one hierarchy of cgroup v2.

The kernel facts are from the kernel's admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import time
from collections.abc import Iterator

from sandbox_provisioner.errors import HostError, Remedy
from sandbox_provisioner.facilities.caps.cgroup import files
from sandbox_provisioner.facilities.caps.cgroup.above import Above, times_full
from sandbox_provisioner.facilities.caps.cgroup.files import Setting
from sandbox_provisioner.facilities.caps.cgroup.tree import (
    FREEZE_SECONDS,
    Tree,
    Usage,
    hits_of,
    kill_listed,
)
from sandbox_provisioner.facilities.caps.wish import Cap, Write
from sandbox_provisioner.facilities.caps.wish.cpu import V2_WEIGHT
from sandbox_provisioner.spec import Limits

_ALWAYS = frozenset({"memory", "pids"})


class V2Tree(Tree):
    """The tree of one sandbox on cgroup v2; `open_tree` makes it, `CgroupTree` documents it."""

    version = 2

    @property
    def groups(self) -> tuple[str, ...]:
        return (self._group,)

    @property
    def memory_group(self) -> tuple[int, str] | None:
        return (2, self._group) if "memory" in self._asked else None

    @property
    def device_group(self) -> tuple[int, str] | None:
        return (2, self._group)

    def usage(self) -> Usage:
        cpu_microseconds = files.read_keyed(self._file("cpu.stat")).get("usage_usec")
        return Usage(
            memory_bytes=files.read_number(self._file("memory.current")),
            memory_peak_bytes=files.read_number(self._file("memory.peak")),
            memory_limit_bytes=files.read_number(self._file("memory.max")),
            cpu_seconds=None if cpu_microseconds is None else cpu_microseconds / 1e6,
            processes=files.read_number(self._file("pids.current")),
            oom_kills=files.read_keyed(self._file("memory.events")).get("oom_kill"),
            pids_limit_hits=hits_of(self._group),
        )

    def _look_above(self) -> Above:
        return Above(2, os.path.dirname(self._group))

    def full_above(self) -> str:
        if "memory" in self._asked and self._was_full():
            return ""
        return self._above.full()

    def _was_full(self) -> bool:
        """Whether our own limit was met in vain."""
        if "oom" not in files.read_keyed(self._file("memory.events")):
            return True  # not known: then it is as it was asked for
        return times_full(2, self._group) > 0

    def freeze(self) -> None:
        self._write_core("cgroup.freeze", "1", "freeze")
        if not self._await_frozen():
            self.thaw()
            raise HostError(
                attempt=f"freeze sandbox {self._name}",
                answer=f"its processes were still running after {FREEZE_SECONDS:g} seconds",
                remedy="A process waits for a device or a file server; try again when it goes on.",
            )

    def thaw(self) -> None:
        self._write_core("cgroup.freeze", "0", "thaw")

    def is_frozen(self) -> bool:
        with contextlib.ExitStack() as stack:
            events = self._open_events(stack)
            return events is not None and _reads(events, "frozen 1")

    def kill(self) -> None:
        if os.path.exists(self._file("cgroup.kill")):
            self._write_core("cgroup.kill", "1", "end")
        else:
            # Before Linux 5.14. SIGKILL reaches frozen processes on v2, and they cannot fork.
            with contextlib.suppress(HostError):
                self.freeze()
            kill_listed(self._group)

    @property
    def _weight(self) -> tuple[str, str, str]:
        file, smallest, usual = V2_WEIGHT
        return self._file(file), smallest, usual

    async def pause(self, seconds: float) -> None:
        """Wait for an event of cgroup.events, in which "populated" becomes 0.

        The file polls as readable all the time and tells its events as POLLPRI, for which asyncio
        has no callback. An epoll descriptor that watches only POLLPRI is readable just then.
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        with contextlib.ExitStack() as stack:
            events = self._open_events(stack)
            if events is None or not _reads(events, "populated 1"):
                # Empty by now, or busy with groups below it, of which there is no event.
                return await asyncio.sleep(min(0.01, seconds))
            epoll = stack.enter_context(select.epoll())
            epoll.register(events, select.EPOLLPRI)
            loop.add_reader(epoll.fileno(), changed.set)
            stack.callback(loop.remove_reader, epoll.fileno())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), seconds)

    def _await_frozen(self) -> bool:
        deadline = time.monotonic() + FREEZE_SECONDS
        with contextlib.ExitStack() as stack:
            events = self._open_events(stack)
            while events is not None and not _reads(events, "frozen 1"):
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                poll = select.poll()
                poll.register(events, select.POLLPRI)
                poll.poll(left * 1000)
        return True

    def _open_events(self, stack: contextlib.ExitStack) -> int | None:
        try:
            descriptor = os.open(self._file("cgroup.events"), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        stack.callback(os.close, descriptor)
        return descriptor

    def _prepare(self, base: str, directory: str) -> None:
        for group in (base, directory) if os.path.dirname(directory) == base else (directory,):
            self._hand_down(group)
            self._weigh(group)

    def _weigh(self, directory: str) -> None:
        """Let the groups below *directory* share the CPU by their weights, where that can be had:
        threads that spin in a sandbox are then one group against the server's, not many against
        one. Nobody has asked for it, so a refusal (of real-time threads, say) is none of a start.
        """
        path = f"{directory}/cgroup.subtree_control"
        if "cpu" in self._facts.bases and "cpu" not in files.read_words(path):
            with contextlib.suppress(HostError):
                files.write(path, "+cpu", attempt="share the CPU by weights", remedy="None.")

    def _hand_down(self, directory: str) -> None:
        """Enable in the groups below *directory* what the tree needs and they have not yet."""
        path = f"{directory}/cgroup.subtree_control"
        used = (_ALWAYS | self._controllers) & self._facts.bases.keys()
        missing = sorted(used - files.read_words(path))
        if not missing:
            return
        Setting(
            path=path,
            value=" ".join(f"+{controller}" for controller in missing),
            attempt=f"enable {', '.join(missing)} for sandbox {self._name}",
            remedy=self._enabling_remedy(directory),
            same=_are_enabled,
        ).apply()

    def _enabling_remedy(self, directory: str) -> Remedy:
        return (
            f"On EBUSY, {directory} has processes of its own, which have to move to a group of "
            "their own first. Otherwise:",
            *self._facts.remedy("cpu"),
        )

    def _above_of(self, controller: str) -> str:
        return self._base

    def _group_of(self, controller: str, name: str = "") -> str:
        return f"{self._base}/{files.PARENT}/{name}" if name else self._group

    def _writes(self, cap: Cap, limits: Limits) -> Iterator[Write]:
        return cap.v2(limits, self._disk)

    @property
    def _base(self) -> str:
        return self._facts.bases["freezer"]

    @property
    def _group(self) -> str:
        return f"{self._base}/{files.PARENT}/{self._name}"

    def _file(self, name: str) -> str:
        return f"{self._group}/{name}"

    def _write_core(self, file: str, value: str, verb: str) -> None:
        files.write(
            self._file(file),
            value,
            attempt=f"{verb} sandbox {self._name}",
            remedy="It may have ended already.",
        )


def _are_enabled(written: str, back: str) -> bool:
    return {word.removeprefix("+") for word in written.split()} <= set(back.split())


def _reads(descriptor: int, line: str) -> bool:
    """Whether a key of cgroup.events has this value; reading also arms the next POLLPRI."""
    try:
        return line in os.pread(descriptor, 4096, 0).decode().splitlines()
    except OSError:
        # ENODEV: the group is gone.
        return False
