"""common.py - statistics and tables (pure), and what /proc tells of machines and processes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

_RARE = 0.05
_PACKAGES = ("sandbox-provisioner", "jupyter_client", "ipykernel", "ipython", "pyzmq")


# -- statistics


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of some samples, and how far they lie apart: a tenth of them is below *low*, a
    tenth above *high*."""

    count: int
    low: float
    median: float
    high: float


def quantile(samples: Sequence[float], part: float) -> float:
    """The value below which *part* (0 to 1) of *samples* lies, linear between two of them."""
    ordered = sorted(samples)
    place = part * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(samples: Sequence[float]) -> Spread | None:
    """The `Spread` of *samples*, None where there are none."""
    if not samples:
        return None
    return Spread(
        count=len(samples),
        low=quantile(samples, 0.1),
        median=statistics.median(samples),
        high=quantile(samples, 0.9),
    )


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Between which two of *samples* the median of endlessly many lies, 19 times of 20, however
    they are spread: as many of *n* lie below it as heads are thrown with *n* coins."""
    ordered, below, chance = sorted(samples), 0, 0.0
    while below < (len(ordered) - 1) // 2:
        chance += math.comb(len(ordered), below) / 2 ** len(ordered)
        if chance > _RARE / 2:
            break
        below += 1
    first = max(0, below - 1)
    return ordered[first], ordered[-1 - first]


def paired_ratio(samples: Sequence[float], base: Sequence[float]) -> float | None:
    """The median of sample / base, pair by pair: a slow minute of the machine hits both alike."""
    ratios = [one / other for one, other in zip(samples, base, strict=True) if other]
    return statistics.median(ratios) if ratios else None


# -- tables


def format_spread(found: Spread | None, digits: int = 0) -> str:
    """Such as "250 (240-300)": median, low and high; "-" for nothing."""
    if found is None:
        return "-"
    low, median, high = (f"{value:.{digits}f}" for value in (found.low, found.median, found.high))
    return f"{median} ({low}-{high})"


def format_ratio(ratio: float | None) -> str:
    """Such as "x1.25", "-" for nothing."""
    return "-" if ratio is None else f"x{ratio:.2f}"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """*rows* with aligned columns, the first to the left; row 0 is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_format_row(row, widths) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _format_row(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join(cells).rstrip()


def save_json(path: str, content: Mapping[str, Any]) -> None:
    """Write the raw samples, for whoever wants other statistics."""
    Path(path).write_text(json.dumps(content, indent=1, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value)


# -- the machine


def machine() -> dict[str, str]:
    """What a reader has to know to compare figures; nothing that names the machine."""
    info = Path("/proc/cpuinfo").read_text()
    return {
        "CPU": _cpu_model(info) + (", virtual machine" if " hypervisor" in info else ""),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / (1 << 30):.0f} GiB",
        "Linux": platform.release(),
        "Python": platform.python_version(),
        "packages": ", ".join([*_versions(_PACKAGES), *_bubblewrap()]),
        "load": Path("/proc/loadavg").read_text().split()[0],
    }


def _cpu_model(cpuinfo: str) -> str:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _versions(names: Iterable[str]) -> list[str]:
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} (not installed)")
    return found


def _bubblewrap() -> list[str]:
    if not shutil.which("bwrap"):
        return []
    told = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=False)
    return [told.stdout.strip()]


def format_machine(facts: Mapping[str, str]) -> str:
    """One line a fact."""
    return "\n".join(f"{name + ':':10}{value}" for name, value in facts.items())


# -- processes


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told from later ones with the same pid by its start time (proc(5))."""

    pid: int
    start: str

    def exists(self) -> bool:
        """Whether it is still there. A zombie counts if it is ours to reap; those that went to
        the machine's PID 1 wait for that one."""
        found = _status(self.pid)
        if found is None or found.start != self.start:
            return False
        return not found.is_zombie or found.parent == os.getpid()


def process(pid: int) -> Process:
    """The process *pid* that lives now."""
    found = _status(pid)
    return Process(pid, found.start if found else "")


class _Status(NamedTuple):
    parent: int
    start: str
    is_zombie: bool


def descendants(root: int) -> set[Process]:
    """All living processes below *root*, by their parents' pids."""
    table = _process_table()
    children: dict[int, list[int]] = {}
    for pid, status in table.items():
        children.setdefault(status.parent, []).append(pid)
    found: set[Process] = set()
    waiting = [root]
    while waiting:
        for pid in children.get(waiting.pop(), ()):
            found.add(Process(pid, table[pid].start))
            waiting.append(pid)
    return found


def _process_table() -> dict[int, _Status]:
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return {pid: found for pid in pids if (found := _status(pid))}


def _status(pid: int) -> _Status | None:
    """None where there is no such process."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return _Status(int(words[1]), words[19], words[0] == "Z")


def cpu_ms(processes: Iterable[Process]) -> float:
    """For how long all threads of *processes* have had a CPU (Documentation/scheduler,
    sched-stats: the first number of schedstat, in ns); those that have ended left out."""
    return sum(_cpu_ns(path) for process in processes for path in _tasks(process.pid)) / 1e6


def _tasks(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").glob("*/schedstat"))


def _cpu_ns(path: Path) -> int:
    try:
        return int(path.read_text().split()[0])
    except OSError:
        return 0


def pss_bytes(processes: Iterable[Process]) -> int:
    """The memory of *processes*, in which a page that n processes share counts as 1/n."""
    return sum(_pss(process.pid) for process in processes)


def _pss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass  # it has just ended, or is a zombie
    return 0


def own_cgroups(processes: Iterable[Process]) -> set[str]:
    """The directories of the cgroups that *processes* are in and this process is not."""
    ours = _cgroup_directories("self")
    theirs = (_cgroup_directories(str(process.pid)) for process in processes)
    return set().union(*theirs) - ours


def _cgroup_directories(pid: str) -> set[str]:
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return set()
    pairs = (line.split(":", 2)[1:] for line in lines)
    points = _cgroup_points()
    return {
        f"{point}{path}"
        for controllers, path in pairs
        for options, point in points
        if set(controllers.split(",")) <= options
    }


def _cgroup_points() -> list[tuple[frozenset[str], str]]:
    """Each mount of a cgroup hierarchy with its options; that of v2 has the option ""."""
    points = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, options = line.split()[:4]
        if kind in {"cgroup", "cgroup2"}:
            known = {""} if kind == "cgroup2" else set(options.split(","))
            points.append((frozenset(known), point))
    return points


def mount_count() -> int:
    """How many mounts this process sees."""
    return len(Path("/proc/self/mountinfo").read_text().splitlines())


def wait_until(
    done: Callable[[], bool], deadline_seconds: float, sleep: Callable[[float], None]
) -> bool:
    """Ask *done* every 10 ms until it says so or the time is over; its last answer."""
    for _ in range(max(1, round(deadline_seconds / 0.01))):
        if done():
            return True
        sleep(0.01)
    return done()
