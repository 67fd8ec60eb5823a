"""layers/kept.py - any process outside: folders in which what kernels install outlives them.

::

    <layer directory>/
      kernel/<sandbox id>/      of a kernel, over its restarts; `owner` is locked by the process
                                that restarts it, and without that it goes
      user/<uid>/<root>/        of all kernels of a user with this root, one at a time
        about.json              of which root, and who has it: `Holder`
        lock                    locked by PID 1 of the box for as long as it lives
        box/base                shows as ~/.local; none of this where it is in an image of root's
                                (`layers/disks.py`), which holds a limit as well
        box/upper, box/work     the upper part of an overlay over another root than the host's
        box/trash               what was in the way of the box's own files

Kernels have written all of box/. Nothing of it is ever read here, only counted and removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sandbox_provisioner import ranged_removal, removal
from sandbox_provisioner.descriptors import keep_from_children
from sandbox_provisioner.errors import COMMAND, HostError
from sandbox_provisioner.facilities.ids.facts import FOREIGN_ID
from sandbox_provisioner.facilities.storage.images import used_of
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.layers.changes import open_below
from sandbox_provisioner.layers.place import check_upper
from sandbox_provisioner.locks import is_free, lock, lock_at_once, locked
from sandbox_provisioner.places import Asker, Place
from sandbox_provisioner.records import UNREADABLE, read_small
from sandbox_provisioner.spec import HOST_ROOT, Layer

KERNEL, USER = "kernel", "user"
# Of one for whom somebody else launches: each has its room also when no kernel has it, and there
# is one for each content of each root.
MOST_OF_OTHERS = 8
_FOLDERS = ("base", "upper", "work", "trash")
_KERNELS_ID = 1000
_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_AT_A_START_SECONDS = 0.05
_AN_END_SECONDS = 0.02
# What `images/store.py` calls its files.
_BY_CONTENT = re.compile(r"sha256-[0-9a-f]{64}(\.squashfs)?", re.ASCII)
# What is counted of one that is shown.
_MOST_COUNTED = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who has a layer, or had it last: *kernel* as people know it, *since* when by the wall clock;
    *root* is what it lies over, as it was *asked* for: of the names of images others may have it
    meanwhile. *layer* is the name of that with this content."""

    kernel: str = ""
    name: str = ""
    since: float = 0.0
    root: str = HOST_ROOT
    layer: str = ""
    asked: str = ""


class KeptFolder:
    """The folder at *path*; who has taken it has its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock_fd = -1
        self.is_new = False
        keep_from_children(self)

    def forget(self) -> None:
        """Close our copy of the lock; PID 1 may have another."""
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1

    def read(self) -> Holder:
        """Who has it, or had it; nobody where that cannot be told."""
        try:
            return Holder(**json.loads(read_small(self.path / "about.json")))
        except UNREADABLE:
            return Holder()

    @property
    def disk(self) -> str:
        """The image that holds what root keeps of it."""
        return str(self.path / "disk")

    @property
    def is_folder(self) -> bool:
        """Whether what is kept is a folder of this disk, not an image."""
        return (self.path / "box").exists()

    @property
    def is_held(self) -> bool:
        """Whether a box writes there."""
        return not is_free(self.path / "lock")

    def take(self) -> bool:
        """Lock it, until `forget`; whether it is ours now."""
        try:
            self.lock_fd = lock_at_once(self.path / "lock")
        except (BlockingIOError, FileNotFoundError):
            return False
        return True

    def open(self, asker: Asker, opened: ExitStack) -> Place:
        """What a box is given of it."""
        return Place.open(str(self.path / "box"), asker, opened, attempt="keep what is installed")

    def size(self) -> tuple[int, int]:
        """How many bytes of the disk it takes, and in how many files; no more than are counted. A
        kernel may be at work in there: no link of its is followed."""
        if not self.is_folder:
            return used_of(self.disk)
        size, count, waiting = 0, 0, [""]
        with ExitStack() as opened:
            try:
                box = os.open(self.path / "box", _FOLDER | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                return 0, 0
            opened.callback(os.close, box)
            while waiting and count < _MOST_COUNTED:
                with contextlib.suppress(OSError):
                    for name, status in _entries(box, path := waiting.pop()):
                        count += 1
                        size += status.st_blocks * 512
                        if stat.S_ISDIR(status.st_mode):
                            waiting.append(f"{path}/{name}".lstrip("/"))
                        if count >= _MOST_COUNTED:
                            break
        return size, count

    def remove(self, seconds: float = float("inf")) -> None:
        """Remove all of it; what takes longer than *seconds* goes with the next sweep."""
        with contextlib.suppress(FileNotFoundError):
            aside = removal.set_aside(self.path)
            with contextlib.suppress(OSError):
                ranged_removal.empty(aside, seconds)


def _entries(box: int, path: str) -> Iterator[tuple[str, os.stat_result]]:
    fd = open_below(box, path, _FOLDER)
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                yield entry.name, entry.stat(follow_symlinks=False)
    finally:
        os.close(fd)


def folder_of(
    base: Path, layer: Layer, sandbox_id: str, uid: int, root: str, identity: tuple[object, ...]
) -> KeptFolder:
    """Where what is installed with this *root*, of that *identity*, is kept."""
    if layer is Layer.KERNEL:
        return KeptFolder(base / KERNEL / sandbox_id)
    return KeptFolder(base / USER / str(uid) / layer_name(root, identity))


def layer_name(root: str, identity: tuple[object, ...]) -> str:
    """An overlay is of the very root that it was made over: of that content, where an image of a
    store is called by it, and may have been removed and made again. The first of its *identity* is
    the number of its device, which may be another after the next boot."""
    if root == HOST_ROOT:
        return root
    if _BY_CONTENT.fullmatch(os.path.basename(root)):
        identity = ()
    digest = hashlib.sha256(repr((root, identity[1:])).encode()).hexdigest()[:12]
    plain = re.sub(r"[^\w.-]", "", os.path.basename(root))[:40].lstrip(".")
    return f"{plain or 'root'}-{digest}"


def take_layer(
    base: Path,
    folder: KeptFolder,
    holder: Holder,
    *,
    maps_ids: bool,
    in_image: bool,
    is_owned: bool,
) -> KeptFolder:
    """*folder*, made where there is none yet, without a place for what is kept where that is
    *in_image*; locked for *holder*. It *is_owned* if it is that of a kernel which this process may
    start again. HostError if another kernel has it."""
    attempt = "keep what the kernel installs"
    try:
        for path in (*reversed(folder.path.relative_to(base).parents), Path()):
            (base / path).mkdir(mode=0o700, exist_ok=True)
        if not in_image:
            check_upper(folder.path.parent, maps_ids=maps_ids)
        with locked(base):
            if is_over_another(folder, holder.layer) and not folder.is_held:
                end(base, folder.path.name)
            if not (folder.path / "about.json").exists():
                folder.is_new = True
                _make(folder)
                if not in_image:
                    _make_box(folder.path / "box", maps_ids=maps_ids)
            if not folder.take():
                raise _held(attempt, folder.read())
            if is_owned:
                _own(folder)
            _write(folder, holder)
    except OSError as error:
        folder.forget()
        raise HostError(
            attempt=attempt,
            answer=f"{folder.path}: {error.strerror or error}",
            remedy="Set layer_dir to a directory with free space.",
        ) from None
    return folder


def is_over_another(folder: KeptFolder, layer: str) -> bool:
    """Whether what *folder* has of one kernel is of no use over the root of that name."""
    is_kernels = folder.path.parent.name == KERNEL and (folder.path / "about.json").exists()
    return is_kernels and folder.read().layer != layer


def _held(attempt: str, holder: Holder) -> HostError:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
    who = one_line(f"kernel {holder.kernel} ({holder.name})")
    return HostError(
        attempt=attempt,
        answer=f"{who} has had the layer since {since}, and two must not write to it",
        remedy=(
            "Shut that one down, or start this one without it:",
            f'{COMMAND}layer = "kernel"',
        ),
    )


def _make(folder: KeptFolder) -> None:
    """All of it; a start that was killed in here may have left a part."""
    if folder.path.exists():
        folder.remove()
    folder.path.mkdir(mode=0o700)
    (folder.path / "lock").touch(mode=0o600, exist_ok=False)


def _make_box(box: Path, *, maps_ids: bool) -> None:
    for path in (box, *(box / name for name in _FOLDERS)):
        path.mkdir(mode=0o700)
    for name in ("base", "upper"):
        os.chmod(box / name, 0o755)
    if maps_ids:
        for path in (box, *(box / name for name in _FOLDERS)):
            owner = FOREIGN_ID + (_KERNELS_ID if path.name == "base" else 0)
            os.chown(path, owner, owner)


def _write(folder: KeptFolder, holder: Holder) -> None:
    new = folder.path / "about.new"
    new.write_text(json.dumps(asdict(holder)))
    new.replace(folder.path / "about.json")


# -- of a kernel that this process restarts


class _Owner:
    def __init__(self, fd: int) -> None:
        self.fd = fd
        keep_from_children(self)

    def forget(self) -> None:
        """Another process restarts nothing."""
        os.close(self.fd)


_owned: dict[Path, _Owner] = {}


def _own(folder: KeptFolder) -> None:
    """Keep it over restarts, as long as this process lives or until `end`."""
    if folder.path not in _owned:
        _owned[folder.path] = _Owner(lock(folder.path / "owner", fcntl.LOCK_EX | fcntl.LOCK_NB))


def take_over(base: Path, spare: str, sandbox_id: str) -> None:
    """Let what the *spare* of that id has be the kernel's; nothing if that is in an image."""
    folder = KeptFolder(base / KERNEL / sandbox_id)
    with locked(base), contextlib.suppress(FileNotFoundError):
        (base / KERNEL / spare).rename(folder.path)
        _own(folder)


def end(base: Path, sandbox_id: str) -> None:
    """The kernel will not be started again: nothing is kept."""
    path = base / KERNEL / sandbox_id
    owner = _owned.pop(path, None)
    if owner is None:
        return
    owner.forget()
    KeptFolder(path).remove(_AN_END_SECONDS)


def collect_layers(base: Path, seconds: float = _AT_A_START_SECONDS) -> list[str]:
    """Remove what belongs to kernels that nobody restarts any more, and what was set aside; the ids
    of the former."""
    gone: list[str] = []
    until = time.monotonic() + seconds
    for path in (
        *_paths(base / KERNEL),
        *(p for user in _paths(base / USER) for p in _paths(user)),
    ):
        with contextlib.suppress(OSError):
            if removal.is_aside(path.name):
                ranged_removal.empty(path, until - time.monotonic())
            elif path.parent.name == KERNEL and _is_nobodys(path, base):
                KeptFolder(path).remove(_AT_A_START_SECONDS)
                gone.append(path.name)
    return gone


def _is_nobodys(path: Path, base: Path) -> bool:
    if path in _owned:
        return False
    with locked(base):  # who makes one has this lock
        return is_free(path / "owner") and is_free(path / "lock")


def _paths(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def layers_of(base: Path, uid: int) -> Iterator[tuple[KeptFolder, Holder]]:
    """Those of a user, with who has them, by their names."""
    for path in sorted(_paths(base / USER / str(uid))):
        if not removal.is_aside(path.name):
            folder = KeptFolder(path)
            yield folder, folder.read()


def refuse_one_more(base: Path, uid: int, folder: KeptFolder) -> None:
    """HostError where *folder* would be more than a user may have."""
    if folder.path.exists():
        return
    names = [other.path.name for other, _ in layers_of(base, uid)]
    if len(names) >= MOST_OF_OTHERS:
        raise HostError(
            attempt="keep what the kernel installs",
            answer=f"{len(names)} layers of this user are kept, which is the most: "
            f"{', '.join(names)}",
            remedy=(
                "Remove one that is of no use any more:",
                f"{COMMAND}jupyter sandbox layer list",
                f"{COMMAND}jupyter sandbox layer reset NAME",
            ),
        )


def left_behind(base: Path, uid: int, asked: str, folder: KeptFolder) -> str:
    """A sentence where a user's next kernel with the root that is *asked* for has nothing in
    *folder* yet, but something in layers over what that was before; "" else."""
    if folder.path.exists():
        return ""
    found = [other.path.name for other, holder in layers_of(base, uid) if holder.asked == asked]
    if not found:
        return ""
    return (
        f"{asked} has another content than it had: what was installed over that stays in "
        f"{', '.join(found)}, until jupyter sandbox layer reset (see layer list). "
        "This kernel begins with an empty layer."
    )


def told_of(folder: KeptFolder, holder: Holder) -> dict[str, Any]:
    """What lists tell of one."""
    size, count = folder.size()
    return {
        "name": folder.path.name,
        "root": holder.asked or holder.root,
        "size_bytes": size,
        "files": count,
        "held": folder.is_held,
        "kernel": holder.kernel,
        "kernel_name": holder.name,
        "since": holder.since,
    }


def reset(folder: KeptFolder, holder: Holder, seconds: float = float("inf")) -> None:
    """Remove a layer; what takes longer than *seconds* goes with the next sweep. HostError if a
    kernel has it."""
    if not folder.take():
        raise HostError(
            attempt=f"remove the layer {folder.path.name}",
            answer=f"kernel {one_line(holder.kernel)} has it",
            remedy="Shut that kernel down first.",
        )
    try:
        folder.remove(seconds)
    finally:
        folder.forget()
