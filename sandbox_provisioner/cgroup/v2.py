"""cgroup/v2.py - in the launching process: a sandbox's group in the one hierarchy of cgroup v2.

The kernel facts are from the kernel's admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import time
from collections.abc import Iterator
from dataclasses import replace

from sandbox_provisioner.cgroup import files
from sandbox_provisioner.cgroup.above import Above, times_full
from sandbox_provisioner.cgroup.files import Setting
from sandbox_provisioner.cgroup.tree import (
    CPU_PERIOD_US,
    FREEZE_SECONDS,
    Tree,
    Usage,
    kill_listed,
    whole_pages,
)
from sandbox_provisioner.errors import HostError, Remedy
from sandbox_provisioner.spec import Limits, format_cpuset

# The kernel's default weight is 100, so a guaranteed core weighs as much as a default group.
_WEIGHT_PER_CORE = 100
_SMALLEST_WEIGHT, _LARGEST_WEIGHT = 1, 10_000

_ALWAYS = frozenset({"memory", "pids"})


class V2Tree(Tree):
    """The tree of one sandbox on cgroup v2; `open_tree` makes it, `CgroupTree` documents it."""

    @property
    def groups(self) -> tuple[str, ...]:
        return (self._group,)

    @property
    def memory_group(self) -> tuple[int, str] | None:
        return (2, self._group) if "memory" in self._asked else None

    def usage(self) -> Usage:
        cpu_microseconds = files.read_keyed(self._file("cpu.stat")).get("usage_usec")
        return Usage(
            memory_bytes=files.read_number(self._file("memory.current")),
            memory_peak_bytes=files.read_number(self._file("memory.peak")),
            memory_limit_bytes=files.read_number(self._file("memory.max")),
            cpu_seconds=None if cpu_microseconds is None else cpu_microseconds / 1e6,
            pids=files.read_number(self._file("pids.current")),
            oom_kills=files.read_keyed(self._file("memory.events")).get("oom_kill"),
            pids_limit_hits=files.read_keyed(self._file("pids.events")).get("max"),
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
        return self._file("cpu.weight"), str(_SMALLEST_WEIGHT), str(_WEIGHT_PER_CORE)

    async def _pause(self, seconds: float) -> None:
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

    def _prepare(self, parent: str) -> None:
        for directory in (self._base, parent):
            self._hand_down(directory)
            self._weigh(directory)

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
        lacking = sorted(self._controllers - files.read_words(path))
        if not lacking:
            return
        Setting(
            path=path,
            value=" ".join(f"+{controller}" for controller in lacking),
            attempt=f"enable {', '.join(lacking)} for sandbox {self._name}",
            remedy=self._enabling_remedy(directory),
            same=_are_enabled,
        ).apply()

    def _enabling_remedy(self, directory: str) -> Remedy:
        return (
            f"On EBUSY, {directory} has processes of its own, which have to move to a group of "
            "their own first. Otherwise:",
            *self._facts.remedy("cpu"),
        )

    @property
    def _controllers(self) -> frozenset[str]:
        return (_ALWAYS | self._asked) & self._facts.bases.keys()

    def _available_cpus(self) -> str:
        return files.read(f"{self._base}/cpuset.cpus.effective") or ""

    def _settings(self, limits: Limits) -> Iterator[Setting]:
        if limits.memory_bytes is not None:
            yield from self._memory(limits, whole_pages(limits.memory_bytes))
        if limits.cpu_cores is not None:
            value = f"{round(limits.cpu_cores * CPU_PERIOD_US)} {CPU_PERIOD_US}"
            yield self._setting(self._file("cpu.max"), value, "cpu", limits)
        if limits.cpu_guarantee_cores is not None:
            weight = str(weight_of(limits.cpu_guarantee_cores))
            yield self._setting(self._file("cpu.weight"), weight, "cpu", limits)
        if limits.pids is not None:
            yield self._setting(self._file("pids.max"), str(limits.pids), "pids", limits)
        if limits.io_bytes_per_second is not None:
            each = limits.io_bytes_per_second
            value = f"{self._device} rbps={each} wbps={each}"
            path = self._file("io.max")
            yield replace(self._setting(path, value, "io", limits), same=_begins_a_line)
        if limits.cpuset is not None:
            cpus = format_cpuset(limits.cpuset)
            path = self._file("cpuset.cpus")
            yield self._setting(path, cpus, "cpuset", limits)

    def _memory(self, limits: Limits, value: str) -> Iterator[Setting]:
        yield self._setting(self._file("memory.max"), value, "memory", limits)
        # Absent without CONFIG_SWAP.
        swap = self._file("memory.swap.max")
        yield self._setting(swap, "0", "memory", limits).if_present()
        # All or none: a kernel whose helper alone was ended would go on half dead. Linux 4.19.
        group = self._file("memory.oom.group")
        yield self._setting(group, "1", "memory", limits).if_present()

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


def weight_of(cores: float) -> int:
    """The cpu.weight that stands for a guarantee of *cores*."""
    return max(_SMALLEST_WEIGHT, min(round(cores * _WEIGHT_PER_CORE), _LARGEST_WEIGHT))


def _begins_a_line(written: str, back: str) -> bool:
    """io.max tells limits on operations behind those on bytes."""
    return any(line.startswith(f"{written} ") for line in back.splitlines())


def _are_enabled(written: str, back: str) -> bool:
    return {word.removeprefix("+") for word in written.split()} <= set(back.split())


def _reads(descriptor: int, line: str) -> bool:
    """Whether a key of cgroup.events has this value; reading also arms the next POLLPRI."""
    try:
        return line in os.pread(descriptor, 4096, 0).decode().splitlines()
    except OSError:
        # ENODEV: the group is gone.
        return False
