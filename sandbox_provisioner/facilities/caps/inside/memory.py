"""memory.py - PID 1 of the sandbox: notices that the kernel comes close to its memory cap,
and that Linux has ended one of its processes there.

The files are opened by the launcher, while the host's cgroup tree can still be reached; the rest
happens in PID 1, which waits for an event and then looks at what is really used::

    v1   thresholds of memory.usage_in_bytes, memory.pressure_level, memory.oom_control ──▶ eventfd
    v2   memory.high at the level, which counts in memory.events, as kills do           ──▶ POLLPRI

Both count the page cache, which gives way before anybody is killed, so neither is an answer by
itself: *used* below is what does not give way. What the kernel documents of it stands in
admin-guide/cgroup-v1/memory.rst (9, 11) and admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import os
import select
import time

from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.watcher import Watcher

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sandbox_provisioner.inside.watcher import Init

# v1 counts kernel memory as a whole, caches of file names included. We take no more of it to be no
# cache than the cap divided by this.
_KERNEL_PART = 32
# Between two interrupts without a fall below the share; it also bounds their number.
_SMALLEST_STEP = 64
# A second interrupt while the first one's traceback is made cuts that off, and the cell ends
# without an error; or ipykernel's reply is lost ("KeyboardInterrupt caught in kernel", in 4 of 160
# tries), and who waits for it waits for ever. A call in C has the first one waiting for its return.
_BETWEEN_SECONDS = 1.0
_HURRIED_SECONDS = 0.1
_WAITING_PART = 0.125
_CLEARED_PART = 0.75
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
# How long after an event to go on looking: v1 tells of a kill before it has counted it.
_LOOK_ON_SECONDS = 1.0
_KILLED_MS = 20
_FALLEN_MS = 100
_LOOKS_MS = 250
# A kill is counted a moment before its signal is sent (mm/oom_kill.c, __oom_kill_process).
_SENT_SECONDS = 0.05
# How long after an interrupt a kernel that ends is taken to have ended of it.
_ENDED_OF_IT_SECONDS = 1.0
_ENODEV = 19
_SIGINT = 2
_SIGKILL = 9
_PF_EXITING = 0x4


class Level:
    """From which use on the next interrupt is due; *share* and *cap* are bytes.

    One interrupt at the share. If the use goes on growing, that cell has not heard it, or another
    one runs: again when half of what was left is gone, but not while the first one is still being
    heard (a call in C has to return, a traceback to be shown). Below the share it begins anew, and
    at once where somebody has made room: a little less is what the cell that ends was making.
    """

    def __init__(self, share: int, cap: int) -> None:
        self.share = share
        self.cap = cap
        self.next = share
        self._not_before = 0.0

    @property
    def raised(self) -> bool:
        """Whether there was an interrupt, and no fall below the share since."""
        return self.next != self.share

    def reached(self, used: int, now: float) -> bool:
        """Whether *used* calls for an interrupt *now*; the level is then the next one."""
        if used < self.share:
            self.next = self.share
        if used < self.share * _CLEARED_PART:
            self._not_before = now
        if used < self.next or now < self._not_before - self._hurry_seconds(used):
            return False
        self._not_before = now + _BETWEEN_SECONDS
        self.next = used + max((self.cap - used) // 2, self.cap // _SMALLEST_STEP)
        return True

    def _hurry_seconds(self, used: int) -> float:
        """How much sooner: who is about to be killed loses more than the end of a traceback."""
        is_urgent = used >= (self.next + self.cap) // 2
        return _BETWEEN_SECONDS - _HURRIED_SECONDS if is_urgent else 0.0


def thresholds(level: Level) -> list[int]:
    """Where v1 shall tell of a crossing: at the share and, as some of the usage is cache, above.

    Ever further apart, since setting one up costs an RCU grace period (some 10 ms).
    """
    found, step = [level.share], level.cap // 100
    while level.share + step < level.cap:
        found.append(level.share + step)
        step *= 2
    return found


FILES = {
    1: (
        "cgroup.event_control", "memory.usage_in_bytes", "memory.pressure_level", "memory.stat",
        "memory.oom_control",
    ),
    2: ("memory.events", "memory.high", "memory.stat"),
}  # fmt: skip
_WRITTEN = ("cgroup.event_control", "memory.high")


def open_files(version: int, group: str) -> list[int]:
    """Descriptors of what `Memory` needs of *group*, while it can be reached."""
    found = []
    for name in FILES[version]:
        how = os.O_WRONLY if name in _WRITTEN else os.O_RDONLY
        found.append(os.open(f"{group}/{name}", how | os.O_CLOEXEC))
    return found


class _V1:
    mask = select.POLLIN
    # Its thresholds are for the cap that it began with.
    looks_ms = _LOOKS_MS

    def __init__(self, files: list[int]) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.control, self.usage, self.pressure, self.stat, self.oom = files

    def arm(self, level: Level | None) -> None:
        """Crossing a threshold tells where there is no cache, and reclaim where there is."""
        os.write(self.control, b"%d %d" % (self.fd, self.oom))
        if level:
            os.write(self.control, b"%d %d low" % (self.fd, self.pressure))
            for at in thresholds(level):
                os.write(self.control, b"%d %d %d" % (self.fd, self.usage, at))
        os.close(self.control)

    def clear(self) -> bool:
        """Whether there was an event."""
        try:
            return bool(os.eventfd_read(self.fd))
        except BlockingIOError:
            return False

    def used(self, cap: int) -> int:
        return used_v1(_keyed(self.stat), int(os.pread(self.usage, 64, 0)), cap)

    def kills(self) -> int:
        return _keyed(self.oom).get(b"oom_kill", 0)

    def follow(self, level: Level) -> None:
        """The thresholds stay where they are."""


class _V2:
    mask = select.POLLPRI
    looks_ms = None

    def __init__(self, files: list[int]) -> None:
        self.fd, self.high, self.stat = files

    def arm(self, level: Level | None) -> None:
        self.clear()
        if level:
            self.follow(level)

    def clear(self) -> bool:
        """Reading the file is what arms its next event; it tells none of its own."""
        os.pread(self.fd, 4096, 0)
        return False

    def used(self, cap: int) -> int:
        return min(used_v2(_keyed(self.stat)), cap)

    def kills(self) -> int:
        return _keyed(self.fd).get(b"oom_kill", 0)

    def follow(self, level: Level) -> None:
        """Above memory.high the allocator is slowed down, which gives an interrupt its time; once
        it has been sent nobody shall stay slow, so the mark goes up with the level."""
        os.pwrite(self.high, b"%d" % level.next if level.next < level.cap else b"max", 0)


class Memory(Watcher):
    """Watches one group by its *files* (`open_files`); *version* is that of its cgroups. Without a
    *level* it tells of kills only. *sentence* has "{}" for the use, *killed* is what to say when
    Linux has ended a process other than the kernel's."""

    def __init__(
        self, version: int, files: list[int], level: Level | None, sentence: str, killed: str
    ) -> None:
        self._events: _V1 | _V2 = _V1(files) if version == 1 else _V2(files)
        self._level = level
        self._sentence = sentence
        self.killed = killed
        # Of the kills that were counted, those that have not ended the kernel; when there was one
        # more, and until when more may come without an event.
        self._outlived = self._events.kills()
        self._seen = 0.0
        self._look_until = 0.0
        self._is_armed = False
        self._looks_ms: int | None = None
        self._interrupted_until = 0.0

    @property
    def fd(self) -> int:
        """What to poll for `mask`."""
        return self._events.fd

    @property
    def mask(self) -> int:
        """The event of it."""
        return self._events.mask

    def cap_is(self, cap: int, sentence: str, killed: str) -> None:
        """Somebody has changed the group's cap: the share of it is as before."""
        if self._level:
            self._level = Level(self._level.share * cap // self._level.cap, cap)
            self._events.follow(self._level)
            self._looks_ms = self._events.looks_ms
        self._sentence, self.killed = sentence, killed

    def begin(self, init: Init) -> None:
        """Not until the kernel listens."""
        if not init.is_starting:
            self.arm()

    def waits(self) -> Iterable[tuple[int, int]]:
        """Nothing until it has asked for events."""
        return ((self.fd, self.mask),) if self._is_armed else ()

    def patience(self) -> int | None:
        """No event tells that the use has fallen, or who was killed."""
        if self._seen or time.monotonic() < self._look_until:
            return _KILLED_MS
        return _FALLEN_MS if self._level is not None and self._level.raised else self._looks_ms

    def arm(self) -> None:
        """Ask for the events, once. On v1 it takes some 10 ms a threshold."""
        if not self._is_armed:
            self._events.arm(self._level)
            self._is_armed = True

    def serve(self, init: Init, ready: dict[int, int]) -> None:
        """Tell of a process that was killed, and interrupt a kernel near its cap."""
        if not self._is_armed:
            self.begin(init)
        elif self.fd in ready or self.patience():
            self._serve(init)

    def _serve(self, init: Init) -> None:
        try:
            used = self.look(init.kernel_pid)
            kills = self.child_killed(init.kernel_pid)
        except OSError as error:
            if error.errno != _ENODEV:
                raise
            init.give_up(wire.GROUP_LOST)  # somebody has removed it: no limit holds any more
        if kills:
            # The server first: who reads the sentence may ask it at once.
            init.tell(wire.KILLED, str(kills))
            if self.killed:
                init.say(self.killed)
        if used and hears(init.kernel_pid, _SIGINT):
            self._interrupt(init, used)

    def _interrupt(self, init: Init, used: int) -> None:
        """Tell first: the cell that the interrupt ends is the one to show it."""
        init.say(self.sentence(used))
        init.relay(_SIGINT)
        self._interrupted_until = time.monotonic() + _ENDED_OF_IT_SECONDS
        init.tell(wire.MEMORY, str(used))

    def why(self, code: int) -> str:
        """Whether Linux has killed it, or it has ended just after an interrupt."""
        if code == -_SIGKILL:
            return self._why_killed()
        return wire.INTERRUPTED if time.monotonic() < self._interrupted_until else ""

    def _why_killed(self) -> str:
        try:
            return wire.MEMORY_CAP if self.has_ended_it() else ""
        except OSError as error:
            if error.errno != _ENODEV:
                raise
            return wire.GROUP_LOST

    def look(self, pid: int) -> int:
        """The bytes in use if an interrupt of the kernel, *pid*, is due now, else 0."""
        if self._events.clear():
            self._look_until = time.monotonic() + _LOOK_ON_SECONDS
        if self._level is None:
            return 0
        before, used = self._level.next, self._events.used(self._level.cap)
        due = self._level.reached(used, _patience_clock(pid))
        if self._level.next != before:
            self._events.follow(self._level)
        return used if due else 0

    def sentence(self, used: int) -> str:
        """For the person at the notebook."""
        return self._sentence.replace("{}", f"{used >> 20} MiB")

    def child_killed(self, pid: int) -> int:
        """How many kills there were, if there was one more that has not ended the kernel, *pid*;
        else 0. It is known `_SENT_SECONDS` later."""
        kills, now = self._events.kills(), time.monotonic()
        if kills <= self._outlived:
            return 0
        self._seen = self._seen or now
        if now - self._seen < _SENT_SECONDS or is_dying(pid):
            return 0
        self._outlived, self._seen = kills, 0.0
        return kills

    def has_ended_it(self) -> bool:
        """Of a kernel that SIGKILL has ended: whether Linux sent it for want of memory."""
        return self._events.kills() > self._outlived


def used_v1(told: Mapping[bytes, int], usage: int, cap: int) -> int:
    """What reclaim cannot get back, in bytes, from memory.stat and memory.usage_in_bytes."""
    processes = told[b"total_rss"] + told.get(b"total_shmem", 0)
    kernel = max(usage - told[b"total_rss"] - told[b"total_cache"], 0)
    return processes + min(kernel, cap // _KERNEL_PART)


def used_v2(told: Mapping[bytes, int]) -> int:
    """The same from v2's memory.stat, which tells caches of the Linux kernel's own apart."""
    kernel = told.get(b"kernel", 0) - told.get(b"slab_reclaimable", 0)  # "kernel": Linux 5.18
    return told[b"anon"] + told[b"shmem"] + max(kernel, 0)


def _keyed(fd: int) -> dict[bytes, int]:
    pairs = (line.split() for line in os.pread(fd, 1 << 14, 0).splitlines())
    return {key: int(value) for key, value in pairs}


def hears(pid: int, number: int) -> bool:
    """Whether process *pid* has a handler for signal *number* now: one without it would end.

    proc_pid_status(5): SigCgt is a mask of signals that are caught. A kernel between two cells may
    ignore its interrupts; then there is nothing to interrupt.
    """
    with open(f"/proc/{pid}/status", "rb", buffering=0) as status:
        _, _, rest = status.readall().partition(b"\nSigCgt:")
    return bool(int(rest.split(None, 1)[0], 16) >> (number - 1) & 1)


def is_dying(pid: int) -> bool:
    """Whether SIGKILL is on its way to process *pid*, or it ends already.

    proc_pid_status(5): SigPnd is of its first thread, and a deadly signal waits at each of them
    (kernel/signal.c, complete_signal). proc_pid_stat(5): the flags are the sixth from the state on.
    """
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as status:
            pending = status.readall().partition(b"\nSigPnd:")[2].split(None, 1)[0]
        state, *fields = _stat(pid)
    except OSError:
        return True
    ends = state in b"ZX" or bool(int(fields[5]) & _PF_EXITING)
    return ends or bool(int(pending, 16) >> (_SIGKILL - 1) & 1)


def _patience_clock(pid: int) -> float:
    """Seconds by which to judge whether process *pid* has made something of an interrupt: those in
    which it ran, which are few of those that pass on a busy machine, and a part of the latter, as
    it may only wait for others."""
    try:
        fields = _stat(pid)
        ran = (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND
    except OSError:
        ran = 0.0
    return ran + time.monotonic() * _WAITING_PART


def _stat(pid: int) -> list[bytes]:
    """proc_pid_stat(5) from the state on: the name before it may hold anything."""
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
        return file.readall().rpartition(b")")[2].split()


def available_bytes(meminfo: int = -1) -> int:
    """MemAvailable of the machine (proc_meminfo(5)), for whatever gives way where that is short.
    *meminfo* is open on the machine's where that at /proc is another one."""
    if meminfo >= 0:
        text = os.pread(meminfo, 1 << 14, 0)
    else:
        with open("/proc/meminfo", "rb", buffering=0) as file:
            text = file.readall()
    _, _, rest = text.partition(b"MemAvailable:")
    return int(rest.split(None, 1)[0]) << 10
