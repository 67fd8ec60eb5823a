"""facilities/root/plan.py - pure: the root file system, and what of the machine shows in it."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.plan import HOME, READ_ONLY, TAKE_REMEDY, Start, Step
from sandbox_provisioner.units import format_bytes

# devpts.rst: the machine has kernel.pty.max of them, 4096, less those that it keeps for the host.
MOST_TERMINALS = 64
_SKELETON_BYTES = 4 << 20
# Where nobody caps them otherwise.
_SHM_BYTES, _TMP_BYTES = 64 << 20, 1 << 30
_STAGING = "/proc"
_TERMINALS = f"newinstance,ptmxmode=0666,mode=0620,max={MOST_TERMINALS}"
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_LINKS_OF_DEVICES = (
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
)
# Of /proc what programs need, the C library above all; everything else there tells of the host.
_SHOWN_OF_PROC = (
    "cpuinfo", "filesystems", "loadavg", "meminfo", "mounts", "net", "self", "stat", "sys",
    "sysvipc", "thread-self", "uptime", "version", "vmstat",
)  # fmt: skip
_SHOWN_OF_SETTINGS = ("crypto", "fs", "kernel", "net", "user", "vm")
# Below them there are more names than mounts are worth: these count or name what is the host's.
_MASKED = (
    "/proc/sys/fs/binfmt_misc", "/proc/sys/fs/dentry-state", "/proc/sys/fs/file-nr",
    "/proc/sys/fs/inode-nr", "/proc/sys/fs/inode-state", "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/pty", "/proc/sys/kernel/random/boot_id",
)  # fmt: skip


def take(start: Start) -> Iterator[Step]:
    """What every sandbox on this machine sees of it."""
    for path in start.site.facts.machine.system_directories:
        words = (path, path, *READ_ONLY)
        yield Step("take", words, "the system's programs, read-only", TAKE_REMEDY)
    for path in start.site.facts.machine.system_files:
        yield Step("take", (path, path, *READ_ONLY), remedy=TAKE_REMEDY)
    for name in _DEVICES:
        device = (f"/dev/{name}", f"/dev/{name}", "nosuid", "noexec")
        yield Step("take", device, remedy=TAKE_REMEDY)


def new(start: Start) -> Iterator[Step]:
    """An empty root, and the system's directories in it."""
    yield Step("new-root", (_STAGING, str(_SKELETON_BYTES)), "an empty tmpfs; only what follows")
    for link, text in start.site.facts.machine.root_links.items():
        yield Step("symlink", (link, text))
    for path in sorted(start.site.facts.machine.system_directories):
        yield Step("attach", (path,))


def system_files(start: Start) -> Iterator[Step]:
    """After the box's own: nothing of the host's replaces those."""
    for path in start.site.facts.machine.system_files:
        yield Step("attach", (path,))


def devices(start: Start) -> Iterator[Step]:
    """/dev, with terminals and shared memory of its own."""
    for name in _DEVICES:
        yield Step("attach", (f"/dev/{name}",))
    for link, text in _LINKS_OF_DEVICES:
        yield Step("symlink", (link, text))
    yield Step(
        "mount",
        ("devpts", "/dev/pts", _TERMINALS, "nosuid", "noexec"),
        f"terminals of its own, {MOST_TERMINALS} at the most",
    )
    size = _size(start, start.request.spec.limits.shm_bytes, _SHM_BYTES)
    yield Step(
        "mount",
        ("tmpfs", "/dev/shm", f"mode=1777,{_room(size)}", "nosuid", "nodev"),
        f"shared memory, {format_bytes(size)} at the most",
    )


def proc(_start: Start) -> Iterator[Step]:
    """proc(5) of its PID namespace."""
    yield Step("mount", ("proc", "/proc", "", "nosuid", "nodev", "noexec"), "only our processes")


def hide_of_proc(_start: Start) -> Iterator[Step]:
    """Not in a nursery: Linux lets nobody mount a new /proc where the old one is not whole."""
    why = "settings of the Linux kernel may be read, not changed"
    yield Step("freeze-paths", ("/proc/sys",), why)
    why = "what programs need; all else there tells of the host, or acts on it"
    yield Step("show-only", ("/proc", *_SHOWN_OF_PROC), why)
    yield Step("show-only", ("/proc/sys", *_SHOWN_OF_SETTINGS))
    yield Step("mask", _MASKED, "the same, where a few are to be hidden among many")


def scratch(start: Start) -> Iterator[Step]:
    """Every place that a kernel may write to and that is not given to it."""
    size = _size(start, start.request.spec.limits.tmp_bytes, _TMP_BYTES)
    places = ("1777:/tmp", f"0755:{HOME}", "0755:/run", "1777:/var/tmp")
    words = (str(start.site.uid), str(start.site.gid), _room(size), *places)
    yield Step("scratch", words, f"every other writable place, {format_bytes(size)} in all")


def _size(start: Start, asked_bytes: int | None, uncapped_bytes: int) -> int:
    """Of a folder in memory. Half of the cap leaves room for the kernel beside it, and is what a
    tmpfs(5) has of a machine's memory; what is in it is charged all the same."""
    limits, facts = start.request.spec.limits, start.site.facts
    if asked_bytes is not None:
        return asked_bytes
    if limits.memory_bytes is None or "memory" in facts.cgroups.missing:
        return uncapped_bytes
    above = start.site.memory_above
    cap = min(limits.memory_bytes, above.limit_bytes) if above else limits.memory_bytes
    return cap // 2


def _room(size_bytes: int) -> str:
    """The options of a tmpfs(5): an empty file takes no page of its size, but a page's worth of
    the Linux kernel's memory."""
    return f"size={size_bytes},nr_inodes={size_bytes // 4096 + 64}"


def pivot(_start: Start) -> Iterator[Step]:
    """pivot_root(2). What comes later is in descriptors already."""
    yield Step("pivot", (), "the new root becomes /; of the host's nothing stays reachable")


def close(_start: Start) -> Iterator[Step]:
    """When everything is in its place."""
    yield Step("close-root", (), "read-only from here on")
