"""layers/disks.py - any process outside, as root: file systems that keep what kernels install.

Each is an image of `facilities/storage/images`: of a kernel, over its restarts, by the name of its
sandbox, until this process lets go of it; or of a user's next kernels, in the folder that
`kept.KeptFolder` is. In it are ::

    base, upper, work, trash    as in a folder of `kept.py`
    all else                    what the last box had of its own, where one limit holds for both:
                                /tmp, its home; no next one finds it

Kernels have written all of it, but through Linux: none has ever had the file or its device, and
root alone has the folder that it lies in. So Linux may read it again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from sandbox_provisioner import removal
from sandbox_provisioner.descriptors import keep_from_children
from sandbox_provisioner.errors import COMMAND, HostError
from sandbox_provisioner.facilities.storage import images
from sandbox_provisioner.facilities.storage.facts import STORAGE, Storage, image_of
from sandbox_provisioner.facilities.storage.images.mounting import mount_image
from sandbox_provisioner.facilities.storage.wish import DiskWish
from sandbox_provisioner.locks import Locked, locked
from sandbox_provisioner.units import format_bytes

_FOLDERS = {"base": 0o755, "upper": 0o755, "work": 0o700, "trash": 0o700}
_KEPT = {*_FOLDERS, "lost+found"}
_KERNELS_ID = 1000
# Where nobody has set a limit: as much as people need, but a part of what is left, so that others
# find room as well; and not worth it with less than that.
_MOST_BYTES = 8 << 30
_LEAST_BYTES = 256 << 20
_PART = 8
# A kernel may have left millions of files in /tmp. What takes longer counts a little more.
_CLEARING_SECONDS = 5.0
_MOST_READY = 2
_ATTEMPT = "keep what the kernel installs"


def usual_size(at: Path = STORAGE, layers: Path | None = None) -> int:
    """How large one is on the disk of *at* where nobody has set a limit, of few different sizes; 0
    where there is not enough room for one, besides those of users below *layers*."""
    free, promised, kept = images.room_bytes(STORAGE, layers, at)
    part = min(_MOST_BYTES, max(0, free - promised - kept) // _PART)
    size = 1 << part.bit_length() >> 1
    return min(size, part) if size >= _LEAST_BYTES else 0


def storage_for(name: str, wish: DiskWish, layers: Path) -> Storage:
    """What the image *name* is to be: as *wish* has it, or else as it is; HostError where there is
    no room for a new one."""
    at = (STORAGE / name).parent
    if wish.disk_bytes is not None:
        return image_of(wish.disk_bytes, wish.inodes)
    if size := _size_of(name) or _usual_ready(name) or usual_size(at, layers):
        return image_of(size, wish.inodes)
    free, promised, _ = images.room_bytes(STORAGE, layers, at)
    raise HostError(
        attempt=_ATTEMPT,
        answer=f"the disk of {at} has {format_bytes(free)} free, of which kernels may fill "
        f"{format_bytes(promised)}: too little for one more",
        remedy='Make room there, set disk_limit to what is enough, or layer to "auto" or "none".',
    )


def _usual_ready(name: str) -> int:
    """The size of one that is ready for a kernel: there was room for it."""
    usual = usual_size()
    wanted = () if os.path.isabs(name) else (2 * usual, usual)  # its own room is promised by now
    return next((size for size in _ready.sizes() if size in wanted), 0)


def _size_of(name: str) -> int:
    fd = images.open_image(name)
    if fd is None:
        return 0
    try:
        return images.size_of(fd)
    finally:
        os.close(fd)


class Mounts:
    """Two mounts of one file system, attached nowhere: for what is kept, and for all else that its
    box writes."""

    def __init__(self, layer: int, scratch: int) -> None:
        self.layer, self.scratch = layer, scratch
        keep_from_children(self)

    def forget(self) -> None:
        """Close them: a child of ours would hold the file system when its box has ended."""
        for fd in (self.layer, self.scratch):
            os.close(fd)


class Disk:
    """The image *name*, which is *storage*. It *keeps* a layer, or nothing; it *lasts* if that is a
    user's; it is *owned_over* the root of that name if it is that of a kernel which this process
    may start again. Locked as long as any of its mounts is there."""

    def __init__(
        self,
        name: str,
        storage: Storage,
        layers: Path,
        *,
        keeps: bool = False,
        lasts: bool = False,
        owned_over: str = "",
    ) -> None:
        self.name, self.storage, self.layers = name, storage, layers
        self.keeps, self.lasts, self.owned_over = keeps, lasts, owned_over
        self.is_new = False  # from `mount` on

    def mount(self) -> Mounts:
        """Its mounts, which the caller forgets; it is made where there is none. HostError where it
        cannot be had as it is to be: then all that it has stays."""
        if not (self.lasts or self._is_owned_so):
            self._begin_anew()
        may_be_ready = not self.lasts and not images.is_there(self.name)
        if may_be_ready and (mounts := _ready.take(self.storage, self.name)):
            self.is_new = True
        else:
            mounts = self._mounted()
        try:
            if self.owned_over:
                own(self.name, self.owned_over)
            if self.keeps:
                _make_ready(mounts.layer)
        except BaseException:
            mounts.forget()
            raise
        return mounts

    @property
    def _is_owned_so(self) -> bool:
        """Whether an earlier box of the same kernel has kept there what this one wants."""
        return bool(self.owned_over) and is_owned_over(self.name, self.owned_over)

    def _begin_anew(self) -> None:
        """What the image of that name has is nobody's layer, or lies over another root."""
        image = images.open_image(self.name)
        if image is None:
            return
        try:
            images.take_image(image)
        except TimeoutError as error:
            raise self._not_mounted(error) from None
        finally:
            os.close(image)
        end(self.name)
        images.sweep()
        if images.is_there(self.name):
            raise _others()

    def _mounted(self) -> Mounts:
        image = self._taken()
        try:
            return Mounts(*mount_image(image, 2, lasts=self.lasts, is_new=self.is_new))
        except OSError as error:
            raise self._not_mounted(error) from None
        finally:
            os.close(image)

    def _taken(self) -> int:
        """It is open, and locked."""
        image = images.open_image(self.name)
        if image is None:
            return self._made()
        try:
            images.take_image(image)
            if os.fstat(image).st_nlink:
                if self.lasts:  # it may have been made by a release that noted nothing
                    images.note(self.layers)
                self._fit(image)
                return image
        except TimeoutError as error:
            os.close(image)
            raise self._not_mounted(error) from None
        except BaseException:
            os.close(image)
            raise
        os.close(image)  # it was nobody's, and has been swept meanwhile
        return self._made()

    def _made(self) -> int:
        self.is_new = True
        return images.make_image(self.name, self.storage, lasts=self.lasts, layers=self.layers)

    def _fit(self, image: int) -> None:
        """Let it be as large as it is to be. Nothing is ever taken from it."""
        size, asked = images.size_of(image), self.storage.size_bytes
        self._check_inodes(images.inodes_of(image, max(size, asked)))
        if asked > size or (asked == size and images.is_half_grown(image)):
            images.grow(image, asked, layers=self.layers)
        elif asked < size:
            raise HostError(
                attempt=f"{_ATTEMPT} within a disk_limit of {format_bytes(asked)}",
                answer=f"the layer that there is has {format_bytes(size)}, and cannot be made "
                "smaller",
                remedy=(f"Set disk_limit to {format_bytes(size)} or more.", *self._anew),
            )

    def _check_inodes(self, there: int) -> None:
        """HostError where *there* are more than were asked for."""
        asked = self.storage.inodes or 0
        if self.storage.limits_inodes and there > asked:
            raise HostError(
                attempt=f"{_ATTEMPT} within an inode_limit of {asked}",
                answer=f"the file system of the layer that there is has {there} inodes with this "
                "disk_limit, and cannot have fewer",
                remedy=(f"Set inode_limit to {there} or more.", *self._anew),
            )

    def _not_mounted(self, error: OSError) -> HostError:
        path, why = STORAGE / self.name, error.strerror or str(error)
        if self.is_new:
            return HostError(
                attempt=f"mount an image of {format_bytes(self.storage.size_bytes)} for a kernel",
                answer=why,
                remedy="See the machine's log, and who has the loop devices: losetup. With "
                'layer = "none" or "auto", and disk_backend = "tmpfs", it is memory.',
            )
        return HostError(
            attempt=_ATTEMPT,
            answer=f"the file system in {path} cannot be mounted: {why}",
            remedy=(
                "It is as it was. See the machine's log, and have it repaired:",
                f"{COMMAND}e2fsck -f {path}",
                *self._anew,
            ),
        )

    @property
    def _anew(self) -> tuple[str, ...]:
        if not self.lasts:
            return ("Or shut the kernel down: a new one begins with an empty layer.",)
        name = os.path.basename(os.path.dirname(self.name))
        return "Or begin with an empty layer:", f"{COMMAND}jupyter sandbox layer reset {name}"


def _make_ready(mount: int) -> None:
    """Its folders, and nothing of what the last box had besides."""
    top = f"/proc/self/fd/{mount}"
    names = os.listdir(top)
    for name, mode in _FOLDERS.items():
        if name not in names:
            os.mkdir(name, mode, dir_fd=mount)
            if name == "base":
                os.chown(name, _KERNELS_ID, _KERNELS_ID, dir_fd=mount)
    left = [name for name in names if name not in _KEPT]
    if left or os.listdir(f"{top}/trash"):
        _clear(mount, left)


def _clear(mount: int, names: list[str]) -> None:
    """It may be full: then there is room for a folder, or a name more, when others have gone."""
    until = time.monotonic() + _CLEARING_SECONDS
    _empty_trash(mount, until)
    for name in names:
        # Its name may be one that an earlier box has left in there.
        os.rename(name, f"trash/{secrets.token_hex(6)}", src_dir_fd=mount, dst_dir_fd=mount)
    if names:
        _empty_trash(mount, until)


def _empty_trash(mount: int, until: float) -> None:
    gone = False
    with contextlib.suppress(OSError):
        gone = removal.empty(Path(f"/proc/self/fd/{mount}/trash"), until - time.monotonic())
    if gone:
        os.mkdir("trash", _FOLDERS["trash"], dir_fd=mount)


# -- of a kernel that this process restarts


class _Owner:
    def __init__(self, fd: int, root: str) -> None:
        self.fd, self.root = fd, root
        keep_from_children(self)

    def forget(self) -> None:
        """Another process restarts nothing."""
        os.close(self.fd)


_owned: dict[str, _Owner] = {}


def own(name: str, root: str) -> None:
    """Let the image *name*, whose layer is over the *root* of that name, stay over restarts of its
    kernel, as long as this process lives or until `end`; HostError if another one does."""
    if name in _owned:
        return
    fd = images.open_image(name)
    if fd is None:
        raise _others()
    if not images.own(fd):
        os.close(fd)
        raise _others()
    _owned[name] = _Owner(fd, root)


def _others() -> HostError:
    return HostError(
        attempt=_ATTEMPT,
        answer="another server may start this kernel again",
        remedy="Shut it down there.",
    )


def is_owned_over(name: str, root: str) -> bool:
    """Whether the image *name* stays so, with a layer over that *root*."""
    owner = _owned.get(name)
    return owner is not None and owner.root == root


def is_over_another(name: str, root: str) -> bool:
    """Whether it stays so with a layer that is of no use over that *root*."""
    return name in _owned and not is_owned_over(name, root)


def take_over(spare: str, name: str, root: str) -> bool:
    """Let what the spare of that id has be the kernel *name*'s, over that *root*; whether it has an
    image."""
    with locked(STORAGE):
        try:
            (STORAGE / spare).rename(STORAGE / name)
        except (FileNotFoundError, PermissionError):  # an ordinary user may not even look
            return False
    own(name, root)
    return True


def end(name: str) -> None:
    """The kernel will not be started again: nothing is kept."""
    owner = _owned.pop(name, None)
    if owner is None:
        return
    with contextlib.suppress(TimeoutError):  # the next sweep finds it
        images.take_image(owner.fd)
    owner.forget()
    with contextlib.suppress(OSError, Locked):
        images.sweep()


# -- made before anybody asks for it


class _Ready:
    """One image in which nobody has written, mounted, of each of a few sizes. It belongs to this
    process, and goes with it, or when nobody has come for it for long."""

    def __init__(self) -> None:
        self.forget()
        keep_from_children(self)

    def forget(self) -> None:
        """In a child that was forked: those that are there are its parent's (`Mounts.forget`)."""
        self._lock = threading.Lock()
        self._there: dict[tuple[int, int | None], tuple[str, Mounts, threading.Timer]] = {}

    def take(self, storage: Storage, name: str) -> Mounts | None:
        """The mounts of one that is *storage*, and called *name* from now on; None where there is
        none, or somebody has had that name."""
        found = self._pop(_kind_of(storage))
        if found is None:
            return None
        old, mounts, _ = found
        try:
            with locked(STORAGE):
                os.link(STORAGE / old, STORAGE / name)  # which replaces nothing, as rename(2) does
                os.unlink(STORAGE / old)
        except BaseException as error:
            mounts.forget()
            if isinstance(error, FileExistsError):
                return None
            raise
        return mounts

    def _pop(self, kind: tuple[int, int | None]) -> tuple[str, Mounts, threading.Timer] | None:
        with self._lock:
            found = self._there.pop(kind, None)
        if found:
            found[2].cancel()
        return found

    def sizes(self) -> Iterator[int]:
        """The sizes of those that are there."""
        with self._lock:
            return iter([size for size, _ in self._there])

    def add(self, storage: Storage, layers: Path, seconds: float) -> None:
        """Make one that is *storage* ready for so long, unless there is one, or room is scarce."""
        kind = _kind_of(storage)
        with self._lock:
            if kind in self._there or len(self._there) >= _MOST_READY:
                return
        if storage.size_bytes > 2 * usual_size(layers=layers):
            return
        disk = Disk(secrets.token_hex(6), storage, layers)
        mounts = disk.mount()
        timer = threading.Timer(seconds, self._drop, (kind,))
        timer.daemon = True
        with self._lock:
            self._there[kind] = disk.name, mounts, timer
        timer.start()

    def _drop(self, kind: tuple[int, int | None]) -> None:
        if found := self._pop(kind):
            name, mounts, _ = found
            image = images.open_image(name)
            mounts.forget()
            if image is not None:
                with contextlib.suppress(TimeoutError):  # the next sweep finds it
                    images.take_image(image)
                os.close(image)
            with contextlib.suppress(OSError, Locked):
                images.sweep()

    def drop_all(self) -> None:
        """All that are there."""
        for kind in list(self._there):
            self._drop(kind)


def _kind_of(storage: Storage) -> tuple[int, int | None]:
    return storage.size_bytes, storage.inodes


_ready = _Ready()
add_ready, drop_ready = _ready.add, _ready.drop_all
