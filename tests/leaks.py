"""leaks.py - in the test process: what a test has left behind, of everything that it made.

Other test runs may use this machine at the same time: control groups, folders and stand-ins are
those whose making was seen in this process, or that a test told of (`Watch.expect_gone`).
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import shutil
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox_provisioner.facilities.caps.cgroup import open_existing
from sandbox_provisioner.facilities.caps.cgroup.tree import Tree
from sandbox_provisioner.facilities.storage import images
from sandbox_provisioner.facilities.storage.facts import STORAGE
from sandbox_provisioner.mounts import mounts_around
from sandbox_provisioner.records import Record, RecordFolder, cgroup_facts
from sandbox_provisioner.spec import WRITTEN_THROUGH
from sandbox_provisioner.stem import stem

# ZeroMQ closes sockets in a thread of its own, and the Linux kernel network namespaces in a queue
# of its own; neither tells when it is done, nor how long it takes on a machine with other work.
SETTLE_SECONDS = 30.0
_LOOK_AGAIN_MS = 10
_NETWORK_NAMES = ("/run/netns", "/sys/class/net")


@dataclass(frozen=True)
class Snapshot:
    """What there is to compare before and after."""

    mounts: frozenset[str]
    network: frozenset[str]
    descriptors: Counter[str]
    children: frozenset[str]

    @classmethod
    def take(cls) -> Snapshot:
        """Without the stem, which stays from one start to the next, as in a server; but with the
        launchers that it has forked."""
        pid, held = _of_the_stem()
        children = (child for child in _children() if not child.startswith(f"{pid} ("))
        launchers = _processes_of(pid) if pid else ()
        return cls(
            _mount_points(), _network(), _descriptors() - held, frozenset((*children, *launchers))
        )


@dataclass
class Watch:
    """What the running test has made, and its temporary folders, which go when it was looked at."""

    before: Snapshot = field(default_factory=Snapshot.take)
    groups: set[str] = field(default_factory=set)
    folders: set[Path] = field(default_factory=set)
    stand_ins: set[str] = field(default_factory=set)
    images: set[Path] = field(default_factory=set)
    temporary: list[Path] = field(default_factory=list)

    def expect_gone(self, record: Record, runtime: Path) -> None:
        """Watch a sandbox that another process made, by its record in *runtime*."""
        self.folders.add(runtime / record.sandbox_id)
        self.images.add(STORAGE / record.sandbox_id)
        self.stand_ins.update(path for _, path in (*record.made, *record.planned))
        tree = open_existing(cgroup_facts(record), record.tree)
        self.groups.update(os.path.dirname(file) for file in tree.join_files)

    def leaks(self) -> list[str]:
        """What is left, in words; waits for what goes by itself."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while (found := self._look()) and time.monotonic() < deadline:
            gc.collect()
            select.poll().poll(_LOOK_AGAIN_MS)
        return found

    def _look(self) -> list[str]:
        after = Snapshot.take()
        found = {
            "mount": after.mounts - self.before.mounts,
            "network": after.network - self.before.network,
            "descriptor": set(after.descriptors - self.before.descriptors),
            "child": after.children - self.before.children,
            "cgroup": set(filter(_is_group, self.groups)),
            "image": {str(path) for path in self.images if _is_there(path)},
            "folder": {str(path) for path in self.folders if path.exists()},
            "stand-in": {path for path in self.stand_ins if is_stand_in(path)},
        }
        return [f"{kind}: {name}" for kind, names in found.items() for name in sorted(names)]

    def clean(self) -> None:
        """Remove the temporary folders."""
        for path in self.temporary:
            shutil.rmtree(path, ignore_errors=True)


def _is_there(path: Path) -> bool:
    """An ordinary user makes no images, and does not see into the folder of root's."""
    return os.access(path, os.F_OK)


def _mount_points() -> frozenset[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return frozenset(" ".join(line.split()[3:5]) for line in lines)


def _network() -> frozenset[str]:
    found = set()
    for folder in _NETWORK_NAMES:
        with contextlib.suppress(FileNotFoundError):
            found.update(f"{folder}/{name}" for name in os.listdir(folder))
    return frozenset(found)


def _descriptors() -> Counter[str]:
    """What each open descriptor is; "socket:[123]" and "pipe:[123]" have a number each."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that reads this very list
            found[os.readlink(f"/proc/self/fd/{name}")] += 1
    return found


def _children() -> frozenset[str]:
    """Our children, the dead whom nobody has waited for too."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return frozenset()
    return frozenset(_processes_of(os.getpid()))


def _of_the_stem() -> tuple[int, Counter[str]]:
    """Its process, 0 if there is none, and what we hold of it: its end is waited for by a thread
    with a descriptor of its own."""
    if not stem._process or not stem._requests:
        return 0, Counter()
    fds = (stem._pidfd, stem._pidfd, stem._requests.fileno())
    return stem._process.pid, Counter(os.readlink(f"/proc/self/fd/{fd}") for fd in fds)


def _processes_of(parent: int) -> Iterator[str]:
    """proc(5): each thread tells of the children that it has made, if Linux was built to tell."""
    pids: Iterable[str] = filter(str.isdecimal, os.listdir("/proc"))
    with contextlib.suppress(OSError):
        threads = Path(f"/proc/{parent}/task").iterdir()
        pids = " ".join((thread / "children").read_text() for thread in threads).split()
    for pid in pids:
        with contextlib.suppress(OSError):
            head, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
            if int(rest.split()[1]) == parent:
                yield f"{head}) dead" if rest.split()[0] == "Z" else f"{head})"


def _is_group(path: str) -> bool:
    """A test may also make believe, in a folder that is no cgroup's."""
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        return mounts_around(fd, path)[0].filesystem.startswith("cgroup")
    finally:
        os.close(fd)


def is_stand_in(path: str) -> bool:
    """Whether what we made is still there as it was; a user's file in its place is no leak."""
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            return WRITTEN_THROUGH in os.readlink(path)
        if stat.S_ISSOCK(status.st_mode):
            return True
        if stat.S_ISDIR(status.st_mode):
            return not os.listdir(path)
        regular = stat.S_ISREG(status.st_mode)
        return regular and Path(path).read_text() in {"", ".\n"}
    except (OSError, UnicodeDecodeError):
        return False


def note_what_is_made(patch: Callable[[Any, str, Any], None], watch: Watch) -> None:
    """Let the makers of groups, folders, images and stand-ins in this process tell *watch*."""
    create_tree, create_folder, write = Tree.create, RecordFolder.create, RecordFolder.write
    make_image = images.make_image

    def noting_tree(tree: Tree, limits: Any, pid: int = 0) -> None:
        watch.groups.update(tree.groups)
        create_tree(tree, limits, pid)

    def noting_folder(runtime: Path, record: Record, **options: Any) -> Any:
        watch.folders.add(runtime / record.sandbox_id)
        return create_folder(runtime, record, **options)

    def noting_write(folder: RecordFolder, record: Record) -> None:
        watch.stand_ins.update(path for _, path in (*record.made, *record.planned))
        write(folder, record)

    def noting_image(name: str, *rest: Any, **options: Any) -> int:
        if not os.path.isabs(name):  # what is kept lies in a folder of the test's
            watch.images.add(STORAGE / name)
        return make_image(name, *rest, **options)

    patch(images, "make_image", noting_image)
    patch(Tree, "create", noting_tree)
    patch(RecordFolder, "create", staticmethod(noting_folder))
    patch(RecordFolder, "write", noting_write)
