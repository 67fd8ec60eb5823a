"""text.py - PID 1: what the files tell, as Linux writes them (proc(5)).

May import: nothing.  Each text has the same length every time, so that whoever reads while it is
written anew finds lines that are whole.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Mapping

TICKS_PER_SECOND = 100  # USER_HZ
# Of the machine, and true of the box as well.
_KEPT = {b"Hugepagesize", b"VmallocTotal"}
_MINUTES = (1, 5, 15)


def keyed(text: bytes) -> dict[bytes, int]:
    """The numbers of a file of cgroups by their names, those of all groups below where v1 has
    them."""
    pairs = (line.split() for line in text.splitlines())
    found = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
    below = {name[6:]: value for name, value in found.items() if name.startswith(b"total_")}
    return found | below


def cpu_seconds(text: bytes) -> float:
    """Of cpuacct.usage, nanoseconds, or of cpu.stat, microseconds."""
    if text.startswith(b"usage_usec"):
        return int(text.split(None, 2)[1]) / 1e6
    return int(text) / 1e9


class MemoryText:
    """/proc/meminfo, with the lines that this Linux has, *of_machine*."""

    def __init__(self, of_machine: bytes) -> None:
        self._lines = [line.partition(b":")[::2] for line in of_machine.splitlines()]

    def text(
        self, total: int, used: int, swap: tuple[int, int], stat: Mapping[bytes, int]
    ) -> bytes:
        """*total* and *used* bytes; of *swap* how much there is, and how much is used."""
        known = _memory(total, min(used, total), swap, stat)
        return b"".join(self._line(name, rest, known) for name, rest in self._lines)

    def _line(self, name: bytes, rest: bytes, known: Mapping[bytes, int]) -> bytes:
        if name in _KEPT:
            return b"%s:%s\n" % (name, rest)
        if not rest.endswith(b"kB"):  # a count of pages
            return b"%-16s%8d\n" % (name + b":", 0)
        return b"%-16s%12d kB\n" % (name + b":", known.get(name, 0) >> 10)


def _memory(
    total: int, used: int, swap: tuple[int, int], stat: Mapping[bytes, int]
) -> dict[bytes, int]:
    """By the names of meminfo: what a group counts, where it is the same thing."""
    get = stat.get
    shmem = get(b"shmem", 0)
    cached = get(b"cache", get(b"file", 0))  # both with shmem
    files = get(b"inactive_file", 0) + get(b"active_file", 0)
    reclaimable = get(b"slab_reclaimable", 0)
    free = total - used
    return {
        b"MemTotal": total,
        b"MemFree": free,
        b"MemAvailable": min(total, free + files + reclaimable),
        b"Cached": cached,
        b"Active": get(b"active_anon", 0) + get(b"active_file", 0),
        b"Inactive": get(b"inactive_anon", 0) + get(b"inactive_file", 0),
        b"Active(anon)": get(b"active_anon", 0),
        b"Inactive(anon)": get(b"inactive_anon", 0),
        b"Active(file)": get(b"active_file", 0),
        b"Inactive(file)": get(b"inactive_file", 0),
        b"Unevictable": get(b"unevictable", 0),
        b"SwapTotal": swap[0],
        b"SwapFree": max(swap[0] - swap[1], 0),
        b"Dirty": get(b"dirty", get(b"file_dirty", 0)),
        b"Writeback": get(b"writeback", get(b"file_writeback", 0)),
        b"AnonPages": get(b"rss", get(b"anon", 0)),
        b"Mapped": get(b"mapped_file", get(b"file_mapped", 0)),
        b"Shmem": shmem,
        b"KReclaimable": reclaimable,
        b"Slab": get(b"slab", 0),
        b"SReclaimable": reclaimable,
        b"SUnreclaim": get(b"slab_unreclaimable", 0),
        b"KernelStack": get(b"kernel_stack", 0),
        b"PageTables": get(b"pagetables", 0),
        b"CommitLimit": total + swap[0],
        b"Committed_AS": used,
    }


def cpus_of(info: bytes, count: int) -> bytes:
    """The first *count* processors of /proc/cpuinfo, which has one empty line behind each; they
    are so many cores of one package."""
    processors = info.split(b"\n\n")[:count]
    return b"".join(_processor(text, n, count) for n, text in enumerate(processors))


def _processor(text: bytes, number: int, count: int) -> bytes:
    own = {b"physical id": 0, b"siblings": count, b"core id": number, b"cpu cores": count}
    lines = []
    for line in text.splitlines():
        label, colon, value = line.partition(b":")
        known = own.get(label.rstrip())
        lines.append(label + colon + (value if known is None else b" %d" % known) + b"\n")
    return b"".join((*lines, b"\n"))


def mask(number: int) -> bytes:
    """A set of one CPU as Linux writes it: words of 32 bits in hexadecimal (cputopology.rst)."""
    words = [b"%08x" % (1 << number % 32), *[b"00000000"] * (number // 32)]
    return b",".join(words) + b"\n"


class CpuText:
    """/proc/stat and /proc/loadavg of *cpus* CPUs, since *began* seconds, when *boot_time* was the
    machine's."""

    def __init__(self, cpus: int, began: float, boot_time: int) -> None:
        self._cpus = cpus
        self._began = self._seen = began
        self._boot_time = boot_time
        self._used = 0.0
        self._idle = 0
        self._loads = [0.0] * len(_MINUTES)

    def saw(self, used: float, now: float) -> None:
        """So many seconds of CPU time were *used* until *now*. The load is their average, which
        fades as that of Linux does; of what waits for a CPU nobody tells."""
        passed = now - self._seen
        if passed > 0:
            rate = max(used - self._used, 0.0) / passed
            for number, minutes in enumerate(_MINUTES):
                kept = 2.718281828459045 ** (-passed / (60 * minutes))
                self._loads[number] = self._loads[number] * kept + rate * (1 - kept)
        self._used, self._seen = used, now

    def stat(self) -> bytes:
        """All time is the users', or idle; every CPU has the same share of it."""
        used = int(self._used * TICKS_PER_SECOND)
        whole = int((self._seen - self._began) * TICKS_PER_SECOND) * self._cpus
        self._idle = max(self._idle, whole - used)
        lines = [_cpu_line(b"cpu ", used, self._idle)]
        for number in range(self._cpus):
            share = used // self._cpus, self._idle // self._cpus
            lines.append(_cpu_line(b"cpu%d" % number, *share))
        lines += [
            b"intr 0\nctxt 0\nbtime %d\nprocesses 0\n" % self._boot_time,
            b"procs_running 1\nprocs_blocked 0\nsoftirq 0 0 0 0 0 0 0 0 0 0 0\n",
        ]
        return b"".join(lines)

    def load(self, processes: list[int]) -> bytes:
        """With how many *processes* there are, and the last one."""
        loads = " ".join(f"{load:.2f}" for load in self._loads)
        text = f"{loads} 1/{len(processes)} {max(processes, default=1)}"
        return f"{text:<63}\n".encode()


def _cpu_line(name: bytes, used: int, idle: int) -> bytes:
    return b"%s %12d 0 0 %12d 0 0 0 0 0 0\n" % (name, used, idle)
