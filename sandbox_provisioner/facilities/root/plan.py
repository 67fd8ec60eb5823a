"""facilities/root/plan.py - pure: the root file system, and what of the machine shows in it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from sandbox_provisioner.facilities.root.facts import APT_SETTINGS, IMAGE
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.places import Place
from sandbox_provisioner.plan import (
    HOME,
    LAYER,
    OWN_BASE,
    READ_ONLY,
    REVIEW,
    SCRATCH,
    TAKE_REMEDY,
    Kind,
    Start,
    Step,
)
from sandbox_provisioner.spec import SHM_BYTES, TMP_BYTES, folder_bytes, inodes_of
from sandbox_provisioner.units import format_bytes

# devpts.rst: the machine has kernel.pty.max of them, 4096, less those that it keeps for the host.
MOST_TERMINALS = 64
_SKELETON_BYTES = 4 << 20
_STAGING = "/proc"
# Every place that a kernel may write to and that is not given to it, and the modes of these.
_WRITABLE = {"/tmp": "1777", HOME: "0755", "/run": "0755", "/var/tmp": "1777"}
# What else of another root is the box's own.
_OWN_PLACES = ("/dev", "/etc", "/proc", "/sys")
# The place of an image file, where a program reads it.
IMAGE_FILE = "/.image-file"
_APT_SETTINGS = 'APT::Get::Assume-Yes "true";\n'
FUSE_REMEDY = "Whoever is to use FUSE has to be let: sudo chmod 0666 /dev/fuse (udev does it)."
_OVERLAY_REMEDY = (
    "Linux has to merge them (overlayfs). Where what the root lies on does not do for it, make an "
    "image file of the root: mksquashfs DIRECTORY FILE."
)
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
_SHOWN_FOR_NVIDIA = ("devices", "driver")
_SHOWN_OF_SETTINGS = ("crypto", "fs", "kernel", "net", "user", "vm")
# Below them there are more names than mounts are worth: these count or name what is the host's.
_MASKED = (
    "/proc/sys/fs/binfmt_misc", "/proc/sys/fs/dentry-state", "/proc/sys/fs/file-nr",
    "/proc/sys/fs/inode-nr", "/proc/sys/fs/inode-state", "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/pty", "/proc/sys/kernel/random/boot_id",
)  # fmt: skip


def take_image(start: Start) -> Iterator[Step]:
    """Another root than the host's, with its ids as the box has them."""
    root = start.site.root
    if root.is_own:
        verb = "take-mount" if root.kind else "take-place"
        name = "image" if root.is_callers else start.map_of_box
        mapped = (f"idmap-top={name}",) if start.site.facts.privileged else ()
        why = f"{root.wish}: nothing of the host's programs and libraries shows"
        yield Step(verb, (IMAGE, *mapped, *READ_ONLY), why, TAKE_REMEDY)


def mount_served(facts: HostFacts) -> Iterator[Step]:
    """An image file as an ordinary user has it: a program reads it, for Linux and this user."""
    ids = str(facts.caller.uid), str(facts.caller.gid)
    why = "Linux mounts no file for this user, but asks a program"
    yield Step("mount-served", (IMAGE, *ids), why, FUSE_REMEDY)


def serve(facts: HostFacts, program: str) -> Iterator[Step]:
    """That program: in one thread, and all files are the user's own."""
    ids = f"uid={facts.caller.uid},gid={facts.caller.gid}"
    yield Step("serve", (IMAGE_FILE, program, "-f", "-s", "-o", ids))


def take(start: Start) -> Iterator[Step]:
    """What every sandbox on this machine sees of it."""
    paths = *_of_host(start), *_files_of_host(start)
    if paths:
        why = "the system's programs and what belongs to them, read-only"
        yield Step("take-all", (",".join(READ_ONLY), *paths), why, TAKE_REMEDY)
    yield Step("take-all", ("nosuid,noexec", *_device_paths()), remedy=TAKE_REMEDY)


def _device_paths() -> tuple[str, ...]:
    return tuple(f"/dev/{name}" for name in _DEVICES)


def new(start: Start) -> Iterator[Step]:
    """An empty root, and the system's directories in it; or the layer over another root."""
    yield Step("new-root", (_STAGING, str(_SKELETON_BYTES)), "an empty tmpfs; only what follows")
    if start.site.root.is_own:
        yield Step("attach", (IMAGE,), "it will be the lower part of an overlay")
        why = f"its upper part, with every other writable place: {_told(start)} in all"
        words: tuple[str, ...] = (_room_of_scratch(start),)
        if start.keeps_layer:
            words, why = (*words, LAYER, OWN_BASE), "its upper part, which is kept on the disk"
        yield Step("new-layer", words, why)
        return
    for link, text in start.site.facts.machine.root_links.items():
        yield Step("symlink", (link, text))
    if of_host := sorted(_of_host(start)):
        yield Step("attach", tuple(of_host))


def _of_host(start: Start) -> tuple[str, ...]:
    return () if start.site.root.is_own else start.site.facts.machine.system_directories


def _files_of_host(start: Start) -> tuple[str, ...]:
    return () if start.site.root.is_own else start.site.facts.machine.system_files


def apt_settings(start: Start) -> Iterator[Step]:
    """For a kernel that is root, and has nobody at its terminal."""
    if start.request.spec.is_root and start.site.root.has_apt:
        why = "apt install asks nobody whether to go on"
        yield Step("file", (f"/{APT_SETTINGS}/99sandbox", _APT_SETTINGS), why)


def merge(start: Start) -> Iterator[Step]:
    """The other root and its layer become one. Whatever stands in the first one where something is
    to be attached, a link that leads elsewhere above all, is hidden by the second."""
    if start.site.root.is_own:
        places = sorted(_places(start))
        why = "the root; first the places of what is attached, which nothing in the image is then"
        yield Step("merge-layer", tuple(places), why, _OVERLAY_REMEDY)


def clean(
    start: Start, files: Iterable[str], kept: Iterable[str], links: Iterable[str]
) -> Iterator[Step]:
    """Where the layer was kept: nothing of an earlier kernel's stands where the box has *files*,
    *links* and directories of its own, nor on the way to them; where *kept* ones are, nothing but
    files. Links that an earlier box had are gone."""
    if start.site.root.is_own and start.keeps_layer:
        folders = sorted({*_places(start), OWN_BASE, SCRATCH, REVIEW})
        single = (target for target, place in start.site.places if _is_file(target, place))
        words = (
            *(f"file:{path}" for path in (*files, *single)),
            *(f"kept-file:{path}" for path in kept),
            *(f"link:{path}" for path in links),
            *(f"directory:{path}" for path in folders),
        )
        why = "an earlier kernel may have left anything there, such as a link that leads elsewhere"
        yield Step("clean-layer", words, why)


def _is_file(target: str, place: Place) -> bool:
    return target not in {IMAGE, LAYER, REVIEW} and not place.is_directory


def _places(start: Start) -> set[str]:
    return {*_OWN_PLACES, *_WRITABLE, *_attached(start)}


def _attached(start: Start) -> Iterator[str]:
    """The folders of what is given to this kernel."""
    for target, place in start.site.places:
        if target not in {IMAGE, LAYER, REVIEW}:
            yield target if place.is_directory else os.path.dirname(target)
    yield from start.site.files.readonly


def system_files(start: Start) -> Iterator[Step]:
    """After the box's own: nothing of the host's replaces those."""
    if files := _files_of_host(start):
        yield Step("attach", files)


def devices(start: Start) -> Iterator[Step]:
    """/dev, with terminals and shared memory of its own."""
    yield Step("attach", _device_paths())
    for link, text in _LINKS_OF_DEVICES:
        yield Step("symlink", (link, text))
    yield Step(
        "mount",
        ("devpts", "/dev/pts", _TERMINALS, "nosuid", "noexec"),
        f"terminals of its own, {MOST_TERMINALS} at the most",
    )
    size = _size(start, start.request.spec.limits.shm_bytes, SHM_BYTES)
    yield Step(
        "mount",
        ("tmpfs", "/dev/shm", f"mode=1777,{_room(size)}", "nosuid", "nodev"),
        f"shared memory, {format_bytes(size)} at the most",
    )


def proc(_start: Start) -> Iterator[Step]:
    """proc(5) of its PID namespace."""
    yield Step("mount", ("proc", "/proc", "", "nosuid", "nodev", "noexec"), "only our processes")


def hide_of_proc(start: Start) -> Iterator[Step]:
    """Not in a nursery: Linux lets nobody mount a new /proc where the old one is not whole."""
    drivers = _SHOWN_FOR_NVIDIA if start.site.devices.are_nvidias else ()
    why = "settings of the Linux kernel may be read, not changed"
    yield Step("freeze-paths", ("/proc/sys", *(f"/proc/{name}" for name in drivers)), why)
    why = "what programs need; all else there tells of the host, or acts on it"
    yield Step("show-only", ("/proc", *_SHOWN_OF_PROC, *drivers), why)
    if drivers:
        why = "NVIDIA's libraries read there what GPUs there are, and by which numbers"
        yield Step("show-only", ("/proc/driver", "nvidia"), why)
    yield Step("show-only", ("/proc/sys", *_SHOWN_OF_SETTINGS))
    yield Step("mask", _MASKED, "the same, where a few are to be hidden among many")


def scratch(start: Start) -> Iterator[Step]:
    """Every place that a kernel may write to and that is not given to it."""
    places = (f"{mode}:{path}" for path, mode in _WRITABLE.items())
    option, _ = _limit_of_scratch(start)
    words = (str(start.site.uid), str(start.site.gid), _room_of_scratch(start), option, *places)
    yield Step("scratch", words, f"every other writable place, {_told(start)} in all")


def watch_workdir(start: Start) -> Iterator[Step]:
    """Where it has a limit, which was set when it was opened."""
    quota = start.site.workdir.quota
    if quota:
        why = f"it may hold {quota.told}, with what is there: a project quota of {quota.filesystem}"
        yield Step("watch-folder", (quota.path, "workdir_limit"), why)


def _limit_of_scratch(start: Start) -> tuple[str, int]:
    """Which option limits it, and to how many bytes: what is on disk has nothing to do with a limit
    of memory; of two in memory the smaller one counts."""
    storage, asked = start.site.storage, start.request.spec.limits.tmp_bytes
    size = _size(start, asked, TMP_BYTES)
    if storage and (storage.is_on_disk or asked is None or storage.size_bytes < size):
        return "disk_limit", storage.size_bytes
    return "tmp_limit", size


def _room_of_scratch(start: Start) -> str:
    """The options of a tmpfs, "" where it is none."""
    storage, (_, size) = start.site.storage, _limit_of_scratch(start)
    if storage and storage.is_on_disk:
        return ""
    return _room(size, start.request.spec.limits.inodes)


def _told(start: Start) -> str:
    return format_bytes(_limit_of_scratch(start)[1])


def _size(start: Start, asked_bytes: int | None, uncapped_bytes: int) -> int:
    """Of a folder in memory."""
    limits, facts = start.request.spec.limits, start.site.facts
    if asked_bytes is not None:
        return asked_bytes
    if limits.memory_bytes is None or "memory" in facts.cgroups.missing:
        return folder_bytes(None, uncapped_bytes)
    above = start.site.memory_above
    cap = min(limits.memory_bytes, above.limit_bytes) if above else limits.memory_bytes
    return folder_bytes(cap, uncapped_bytes)


def _room(size_bytes: int, inodes: int | None = None) -> str:
    """The options of a tmpfs(5)."""
    most = inodes_of(size_bytes) if inodes is None else inodes
    return f"size={size_bytes},nr_inodes={most}"


def pivot(_start: Start) -> Iterator[Step]:
    """pivot_root(2). What comes later is in descriptors already."""
    yield Step("pivot", (), "the new root becomes /; of the host's nothing stays reachable")


def close(start: Start) -> Iterator[Step]:
    """When everything is in its place."""
    if start.request.spec.writes_layer and start.kind is not Kind.NURSERY:
        yield Step("close-root", ("writable",), "the kernel writes into its layer")
    else:
        yield Step("close-root", (), "read-only from here on")
