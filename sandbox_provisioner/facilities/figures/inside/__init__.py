"""inside - runs in the launcher and in PID 1: files that stand for those of /proc and /sys.

May import: os, time, text, watch, inside.kernel_calls.
May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

import os
import time

from sandbox_provisioner.facilities.figures.inside.text import (
    CpuText,
    MemoryText,
    cpu_seconds,
    cpus_of,
    keyed,
    mask,
)
from sandbox_provisioner.facilities.figures.inside.watch import Figures
from sandbox_provisioner.inside import kernel_calls as kernel

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Callable

    from sandbox_provisioner.inside.box import Box

# Of the root that is let go of by the pivot, and this with it: to take a mount away by itself is to
# wait for an RCU grace period. There is one in every root, and nobody needs it by now.
_FOLDER = "/tmp"
_CLOSED = kernel.MOUNT_RDONLY | kernel.MOUNT_NOSUID | kernel.MOUNT_NODEV | kernel.MOUNT_NOEXEC
_MOST_BYTES = 1 << 14
_PART_BYTES = 1 << 16
_OTHER_BYTES = 1 << 20
# Seven files in its directory, and its parts of stat and of cpuinfo, which has some 2 KiB of each.
_PAGES_OF_CPU = 10
_CPUS = "sys/devices/system/cpu"


class Told:
    """What the files are made from, and what is written when somebody reads; *leased* are those
    whose first reader waits for us. They become the *owner*'s."""

    def __init__(self) -> None:
        self.texts: dict[int, Callable[[], bytes]] = {}
        self.looks: list[Callable[[], None]] = []
        self.leased: set[int] = set()
        self.owner = -1, -1

    def begin(self, *, is_served: bool) -> None:
        """Before anybody can read them: they are empty, and ours, so that we can have leases. Let
        whoever opens one wait, if he *is served* soon; else write them."""
        for fd, text in self.texts.items():
            if is_served and kernel.take_lease(fd):
                self.leased.add(fd)
            else:
                os.write(fd, text())
            os.fchown(fd, *self.owner)

    def watch(self) -> Figures | None:
        """Who writes them; None where nothing of the box is told."""
        return Figures(self.texts, self._look, self.leased) if self.texts else None

    def _look(self) -> None:
        for look in self.looks:
            look()


def open_figures(box: Box, *paths: str) -> None:
    """Open what tells of a group, for `show_figures`, while it can be reached."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    box.named["figures"] = [os.open(path, flags) for path in paths]


def show_figures(
    box: Box, uid: str, gid: str, memory: str, swap: str, cpus: str, *names: str
) -> None:
    """Files in place of /proc/meminfo where there is a cap of *memory* bytes, and of those about
    CPUs where there is one that comes to so many *cpus*; *names* are of what was opened.

    They stand in a file system of their own, which shows nowhere in the new root: the kernel has
    them on mounts that are read-only, and we write by descriptors.
    """
    opened = dict(zip(names, box.named.pop("figures"), strict=True))
    # Whoever gives way where the machine is short of memory looks at the machine's.
    box.named["machine"] = [os.open("proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)]
    size = str(_room_bytes(int(cpus)))
    folder = kernel.new_mount("tmpfs", {"mode": "0755", "size": size}, _CLOSED & ~1)
    over = os.open(_FOLDER, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    kernel.move_mount(folder, over, source="figures", target=_FOLDER)
    os.close(over)
    os.close(folder)
    told = box.part(Told)
    box.files_as = told.owner = int(uid), int(gid)
    if int(memory):
        _show_memory(box, told, int(memory), int(swap), opened)
    if int(cpus):
        _show_cpus(box, told, int(cpus), opened["cpu"])


def _room_bytes(cpus: int) -> int:
    """What the files can come to, where each has a page at the least; it is a limit, and costs
    nothing where there are fewer CPUs."""
    return _OTHER_BYTES + _PAGES_OF_CPU * os.sysconf("SC_PAGE_SIZE") * cpus


def _show_memory(box: Box, told: Told, memory: int, swap: int, opened: dict[str, int]) -> None:
    (machine,) = box.named["machine"]
    made: list[MemoryText] = []

    def text() -> bytes:
        if not made:
            made.append(MemoryText(_read(machine)))
        stat = keyed(_read(opened["stat"]))
        limit = _read(opened["limit"]).strip()
        total = min(memory, int(limit)) if limit.isdigit() else memory
        swapped = int(_read(opened["swap"])) if "swap" in opened else stat.get(b"swap", 0)
        return made[0].text(total, int(_read(opened["usage"])), (swap, swapped), stat)

    told.texts[_shown(box, "proc/meminfo")] = text


def _show_cpus(box: Box, told: Told, cpus: int, usage: int) -> None:
    stat = _all_of("proc/stat")
    boot_time = int(stat.partition(b"btime ")[2].split(None, 1)[0])
    cpus = min(cpus, len([line for line in stat.splitlines() if line.startswith(b"cpu")]) - 1)
    texts = CpuText(cpus, time.monotonic(), boot_time)
    before = cpu_seconds(_read(usage))

    def look() -> None:
        texts.saw(cpu_seconds(_read(usage)) - before, time.monotonic())

    def load() -> bytes:
        return texts.load([int(name) for name in os.listdir("/proc") if name.isdigit()])

    told.looks.append(look)
    told.texts[_shown(box, "proc/stat")] = texts.stat
    told.texts[_shown(box, "proc/loadavg")] = load
    info = cpus_of(_all_of("proc/cpuinfo"), cpus)
    os.close(_shown(box, "proc/cpuinfo", info))
    _show_folder(box, cpus)


def _show_folder(box: Box, cpus: int) -> None:
    """/sys/devices/system/cpu: which there are, each with a directory. Nothing tells of caches."""
    folder = f"{_FOLDER}/cpu"
    os.mkdir(folder)
    listed = b"0-%d\n" % (cpus - 1) if cpus > 1 else b"0\n"
    for name in ("online", "possible", "present"):
        _write(f"{folder}/{name}", listed)
    for number in range(cpus):
        place = f"{folder}/cpu{number}/topology"
        os.makedirs(place)
        for name, text in _topology(number, listed):
            _write(f"{place}/{name}", text)
    _attach(box, folder, f"/{_CPUS}")


def _topology(number: int, listed: bytes) -> tuple[tuple[str, bytes], ...]:
    """One core each, all in one package."""
    own = b"%d\n" % number
    return (
        ("core_id", own),
        ("physical_package_id", b"0\n"),
        ("core_cpus_list", own),
        ("thread_siblings_list", own),
        ("thread_siblings", mask(number)),
        ("package_cpus_list", listed),
        ("core_siblings_list", listed),
    )


def _shown(box: Box, path: str, text: bytes = b"") -> int:
    """A file with *text* at *path*, and a descriptor to write it by."""
    place = f"{_FOLDER}/{os.path.basename(path)}"
    fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    os.write(fd, text)
    _attach(box, place, f"/{path}")
    return fd


def _write(path: str, text: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    os.write(fd, text)
    os.close(fd)


def _attach(box: Box, place: str, target: str) -> None:
    mount = kernel.open_tree(place)
    kernel.mount_setattr(mount, add=_CLOSED, propagation=kernel.MS_PRIVATE)
    box.mounts.put(mount, target)
    os.close(mount)


def _read(fd: int) -> bytes:
    return os.pread(fd, _MOST_BYTES, 0)


def _all_of(path: str) -> bytes:
    fd, parts = os.open(path, os.O_RDONLY | os.O_CLOEXEC), list[bytes]()
    while part := os.read(fd, _PART_BYTES):
        parts.append(part)
    os.close(fd)
    return b"".join(parts)


VERBS = (
    open_figures,
    show_figures,
)
