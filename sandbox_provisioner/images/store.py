"""store.py - whoever makes images, and whoever launches: where they lie, by name and content.

::

    blobs/sha256-<64 digits>.squashfs     an image; never written to again
    blobs/sha256-<64 digits>              the same unpacked, for users, who may mount none
    names/NAME.json                       which of them NAME means, and what it was made of
    layers/<64 digits>.tar                what a build can go on from
    layers/<64 digits>/                   what one has fetched, for the next one
    work/<random>/                        what is not whole yet; its lock is held by who makes it
    locks/NAME                            who builds that name now
    lock                                  held while a name changes, or what no name needs goes

Two stores: root's, which everybody reads, and the user's own, below a directory that is hidden from
kernels. What somebody else could have written counts for nothing: root mounts none of a user's
images, since Linux does not promise to withstand a file system that was made to break it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sandbox_provisioner import removal
from sandbox_provisioner.caller import Caller
from sandbox_provisioner.errors import COMMAND, HostError, SpecError, did_you_mean, joined
from sandbox_provisioner.locks import lock, lock_soon, unlock
from sandbox_provisioner.state import STATE, make_state

ROOTS_STORE = STATE / "images"
# Below what the covers of a home directory always hide.
_OWN_STORE = ".local/share/jupyter/sandbox/images"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_BLOB = re.compile(r"sha256-[0-9a-f]{64}\.squashfs")
# Values of `rootfs` that are no names.
_RESERVED = ("host",)
_FOLDERS = ("names", "blobs", "layers", "work", "locks")
# Twice as long as builds begin with one: whose build is long keeps his.
_KEPT_SECONDS = 48 * 3600
_LATEST = 1 << 40
_LONGEST_RECORD = 1 << 16
_WAITING = "Waiting for another build of the same packages"
_CHUNK = 1 << 20
_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What the store knows of one name. *origin* tells what it was made of, *python* is the
    interpreter in it that has ipykernel, "" where none has."""

    name: str
    blob: str
    size_bytes: int
    origin: str
    python: str = ""
    made_at: float = 0.0

    @property
    def digest(self) -> str:
        """As other tools write it."""
        return self.blob.removesuffix(".squashfs").replace("-", ":", 1)


def find_image(name: str, caller: Caller) -> Path:
    """The file that the image *name* of *caller* is; SpecError where there is none."""
    return find(name, caller)[1]


def find(name: str, caller: Caller) -> tuple[Image, Path]:
    """What is known of the image *name* of *caller*, and its file; SpecError."""
    check_name(name)
    stores = stores_of(caller)
    for store in stores:
        if image := store.image(name):
            return image, store.root(image)
    known = sorted({image.name for store in stores for image in store.images()})
    there = f"There are: {', '.join(known)}." if known else "There is none yet."
    hint = did_you_mean(name, known, there)
    raise SpecError(
        attempt=f"find the image {name!r}",
        answer=f"there is none in {' or '.join(str(store.path) for store in stores)}",
        remedy=(hint, "To make one, see docs/images.md:",
                f"{COMMAND}jupyter sandbox image build {name} RECIPE"),
    )  # fmt: skip


def check_name(name: str) -> None:
    """SpecError unless *name* can be an image's."""
    if _NAME.fullmatch(name) and name not in _RESERVED:
        return
    raise SpecError(
        attempt=f"use the image {name!r}",
        answer="no image can have that name",
        remedy="Small letters, digits, dots, dashes and underscores, at most 64, and not host.",
    )


def stores_of(caller: Caller) -> tuple[Store, ...]:
    """Where images are looked for, the first one first."""
    roots = Store(ROOTS_STORE, 0)
    # With *groups* it is somebody else who launches, with rights that the caller lacks.
    if caller.uid == 0 or caller.groups is not None:
        return (roots,)
    return Store(Path(caller.home, _OWN_STORE), caller.uid, unpacks=True), roots


def store_of(caller: Caller) -> Store:
    """The one that *caller* writes to."""
    return stores_of(caller)[0]


class Store:
    """The images below one *path*, which *owner_uid* alone may write; with *unpacks* each is there
    as a directory as well."""

    def __init__(self, path: Path, owner_uid: int, *, unpacks: bool = False) -> None:
        self.path = path
        self.owner_uid = owner_uid
        self.unpacks = unpacks
        self._names = path / "names"
        self._blobs = path / "blobs"

    # -- looking

    def image(self, name: str) -> Image | None:
        """What *name* means here, None where it means nothing; HostError where somebody else could
        have said so."""
        path = self._names / f"{name}.json"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._unusable(path, error.strerror or str(error)) from None
        with open(fd, "rb") as file:
            self._check_owner(path, os.fstat(fd))
            text = file.read(_LONGEST_RECORD)
        try:
            return _read(name, json.loads(text))
        except (ValueError, TypeError, LookupError, RecursionError, OverflowError):
            raise self._unusable(path, "it is no record of an image") from None

    def images(self) -> list[Image]:
        """All that can be used, by name."""
        return self._looked_at()[0]

    def unusable(self) -> list[str]:
        """The names whose records cannot be read, or could be somebody else's."""
        return self._looked_at()[1]

    def _looked_at(self) -> tuple[list[Image], list[str]]:
        try:
            names = sorted(path.stem for path in self._names.glob("*.json"))
        except OSError:
            return [], []
        usable, unusable = [], []
        for name in filter(_NAME.fullmatch, names):
            try:
                if image := self.image(name):
                    usable.append(image)
            except HostError:
                unusable.append(name)
        return usable, unusable

    def root(self, image: Image) -> Path:
        """What *image* is for `rootfs`: its file, or the directory; HostError as `file`."""
        file = self.file(image)
        if not self.unpacks:
            return file
        folder = file.with_suffix("")
        if not folder.is_dir() or folder.is_symlink():
            raise self._unusable(folder, "it is not there any more")
        self._check_owner(folder, folder.lstat())
        return folder

    def file(self, image: Image) -> Path:
        """The file that *image* is; HostError where it is gone, or others could have changed it."""
        path = self._blobs / image.blob
        try:
            status = path.lstat()
        except OSError as error:
            raise self._unusable(path, error.strerror or str(error)) from None
        if not stat.S_ISREG(status.st_mode) or status.st_size != image.size_bytes:
            raise self._unusable(path, "it is not the file that was put there")
        self._check_owner(path, status)
        return path

    def _check_owner(self, path: Path, status: os.stat_result) -> None:
        """HostError where others could have written to *path*, or put it there. What is above the
        store is as safe as /var/lib is, or a home directory."""
        above = () if path == self.path else (path.parent.lstat(), self.path.lstat())
        for found in (status, *above):
            if found.st_uid != self.owner_uid or found.st_mode & _BY_OTHERS:
                raise self._unusable(path, "others than its owner could have changed it")

    def _unusable(self, path: Path, answer: str) -> HostError:
        return HostError(
            attempt=f"use {path}",
            answer=answer,
            remedy=("Make the image anew, or remove it:", f"{COMMAND}jupyter sandbox image list"),
        )

    def wrong_bytes(self, image: Image) -> bool:
        """Whether the file of *image* has changed: all of it is read."""
        return f"sha256-{digest_of(self.file(image))}.squashfs" != image.blob

    # -- changing

    def prepare(self) -> None:
        """Make the store; HostError where it cannot be written to."""
        folders = (self.path, *(self.path / name for name in _FOLDERS))
        try:
            if self.path == ROOTS_STORE:
                make_state(self.path.parent)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for folder in folders:
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    folder.chmod(0o755)  # whatever the umask is: all users read root's
            for folder in folders:
                self._check_owner(folder, folder.lstat())
            # A user's are that user's alone: what of an unpacked one everybody may write to is so
            # in the image, for who is in a box.
            self.path.chmod(0o700 if self.unpacks else 0o755)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> HostError:
        return HostError(
            attempt=f"keep images in {self.path}",
            answer=error.strerror or str(error),
            remedy="It has to be a directory of yours, with free space.",
        )

    @contextlib.contextmanager
    def building(self, name: str) -> Iterator[None]:
        """Be the only one who makes *name*; HostError, which tells who does, where somebody is."""
        path = self.path / "locks" / name
        try:
            fd = lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _is_building(name, path) from None
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            os.truncate(fd, 0)
            os.pwrite(fd, json.dumps({"pid": os.getpid(), "since": time.time()}).encode(), 0)
            yield
        finally:
            unlock(fd)

    @contextlib.contextmanager
    def workplace(self) -> Iterator[Path]:
        """An empty folder on the file system of the store, which is gone afterwards."""
        with self._locked():
            self._sweep()
            folder = Path(tempfile.mkdtemp(dir=self.path / "work"))
            try:
                folder.chmod(0o711)  # apt downloads as a user of its own
                fd = lock(folder / "lock", fcntl.LOCK_EX)
            except BaseException:
                _remove_folder(folder)
                raise
        try:
            yield folder
        finally:
            unlock(fd)
            _remove_folder(folder)

    def _sweep(self) -> None:
        """Remove what killed builders left: nobody holds its lock any more."""
        for folder in (self.path / "work").iterdir():
            with contextlib.suppress(OSError):
                if removal.is_aside(folder.name):
                    removal.empty(folder)
                    continue
                with contextlib.suppress(FileNotFoundError):  # it was killed before it had one
                    unlock(lock(folder / "lock", fcntl.LOCK_EX | fcntl.LOCK_NB, make=False))
                _remove_folder(folder)

    def for_a_box(self, file: Path) -> Path:
        """What *file*, an image of our own making, is for `rootfs` before it is in the store: it,
        or a directory in its place."""
        if not self.unpacks:
            return file
        folder = _unpacked(file)
        file.unlink()
        return folder

    def drop(self, root: Path) -> None:
        """No box needs what `for_a_box` has given any more."""
        if root.is_dir():
            _remove_folder(root)
        else:
            root.unlink()

    def layer(self, key: str) -> Path:
        """Where the layer is kept that a build with this *key* can go on from."""
        return self.path / "layers" / f"{key}.tar"

    def cache(self, key: str) -> Path:
        """The folder in which builds with this *key* keep what they have fetched."""
        path = self.path / "layers" / key
        with self._written():
            path.mkdir(mode=0o755, exist_ok=True)
            os.utime(path)  # as old as its last build
        return path

    @contextlib.contextmanager
    def making_layer(self, key: str, tell: Callable[[str], None]) -> Iterator[None]:
        """Be the only one who makes it; *tell* is told whom we wait for."""
        path = self.path / "locks" / f"layer-{key}"
        fd = _lock_telling(path, tell)
        while not os.fstat(fd).st_nlink:  # whoever had it has removed it: others lock a new one
            unlock(fd)
            fd = _lock_telling(path, tell)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            unlock(fd)

    def keep_layer(self, file: Path, key: str) -> None:
        """Put *file*, which is on our file system, where `layer` says; whole, or not at all."""
        with self._written():
            os.utime(file)  # it is as old as what it was made of
            _sync(file)
            file.rename(self.layer(key))
            _sync(self.layer(key).parent)

    def add(self, file: Path, **image: Any) -> Image:
        """Put *file*, which is on our file system, into the store, as what *image* tells of it.

        It is there as a whole or not at all, also when the machine stops meanwhile.
        """
        blob = f"sha256-{digest_of(file)}.squashfs"
        made = Image(blob=blob, size_bytes=file.stat().st_size, made_at=time.time(), **image)
        folder = _unpacked(file) if self.unpacks else None
        with self._written():
            if folder:
                os.sync()  # its name is there only after all that is in it
            file.chmod(0o444)
            _sync(file)
        stays = self._has_whole(made)
        with self._locked():
            if folder:
                _replace(folder, (self._blobs / blob).with_suffix(""))
            if not (stays and (self._blobs / blob).exists()):
                file.rename(self._blobs / blob)
            _sync(self._blobs)
            self._write_name(made)
            self._collect()
        return made

    def _has_whole(self, image: Image) -> bool:
        """Whether the file of *image* is there, as it was put there: then it stays, since what
        kernels have installed over it goes with the very file."""
        with contextlib.suppress(HostError, OSError):
            return not self.wrong_bytes(image)
        return False

    def _write_name(self, image: Image) -> None:
        told = {name: value for name, value in asdict(image).items() if name != "name"}
        with tempfile.NamedTemporaryFile("w", dir=self.path / "work", delete=False) as file:
            json.dump(told, file, indent=1)
            os.fchmod(file.fileno(), 0o644)
        _sync(Path(file.name))
        os.rename(file.name, self._names / f"{image.name}.json")
        _sync(self._names)

    def remove(self, name: str) -> None:
        """Take the *name* away, whatever it says, and its file where no other means it; SpecError.

        Who has the file open, as a kernel has whose root it is, keeps it until he ends.
        """
        record = self._names / f"{name}.json"
        if not os.path.lexists(record):
            known = [image.name for image in self.images()]
            raise SpecError(
                attempt=f"remove the image {name!r}",
                answer=f"there is none in {self.path}",
                remedy=did_you_mean(name, known, f"There are: {', '.join(known) or 'none'}."),
            )
        with self._locked():
            record.unlink(missing_ok=True)
            self._collect()

    def collect(self) -> None:
        """Remove all that no name needs; for somebody who knows that no kernel runs on one of our
        directories, which cannot be taken away from under it as an open file can."""
        if self._blobs.is_dir():
            with self._locked():
                self._collect(directories=True)

    def _collect(self, *, directories: bool = False) -> None:
        """Remove each file that no name means, and each old layer."""
        images, unusable = self._looked_at()
        meant = {image.blob for image in images}
        # What a record means that cannot be read nobody knows.
        for path in () if unusable else tuple(self._blobs.iterdir()):
            if f"{path.name.removesuffix('.squashfs')}.squashfs" in meant:
                continue
            if not path.is_dir():
                path.unlink()
            elif directories:
                _remove_folder(path)
        for path in (self.path / "layers").iterdir():
            # A build that failed is tried again, perhaps.
            if time.time() - path.stat().st_mtime <= _KEPT_SECONDS:
                continue
            if path.is_dir():
                _remove_folder(path)
            else:
                path.unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._written():
            fd = lock_soon(self.path / "lock")
            try:
                yield
            finally:
                unlock(fd)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Let it be told where the disk is full, or not ours."""
        try:
            yield
        except OSError as error:
            raise self._unwritable(error) from None


def _read(name: str, told: Mapping[str, Any]) -> Image:
    image = Image(
        name=name,
        blob=str(told["blob"]),
        size_bytes=int(told["size_bytes"]),
        origin=str(told["origin"]),
        python=str(told["python"]),
        made_at=float(told["made_at"]),
    )
    if not _BLOB.fullmatch(image.blob) or not 0 <= image.made_at < _LATEST:
        raise ValueError(told)
    return image


def _lock_telling(path: Path, tell: Callable[[str], None]) -> int:
    try:
        return lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        tell(_WAITING)
        return lock(path, fcntl.LOCK_EX)


def _is_building(name: str, path: Path) -> HostError:
    who = "another process"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        told = json.loads(path.read_bytes()[:_LONGEST_RECORD])
        since = time.strftime("%H:%M:%S", time.localtime(told["since"]))
        who = f"process {int(told['pid'])} has been at it since {since}"
    return HostError(
        attempt=f"make the image {name!r}",
        answer=who,
        remedy="Wait for its end, or choose another name.",
    )


def digest_of(path: Path) -> str:
    """SHA-256 of all that is in *path*."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _unpacked(file: Path) -> Path:
    """What is in the image *file*, which is of our own making, as a directory beside it."""
    folder = file.with_name(f"{file.name}.root")
    words = ["unsquashfs", "-quiet", "-no-progress", "-no-xattrs", "-dest", str(folder), str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(
            attempt=f"unpack {file}",
            answer=joined(done.stderr.splitlines()[-2:])
            or f"unsquashfs ended with status {done.returncode}",
            remedy="It needs room for all files of the image.",
        )
    # Others than its owner write to nothing of it: whom the image's ids are is not known here.
    folder.chmod(0o755)
    return folder


def _replace(folder: Path, target: Path) -> None:
    """Let *folder* be *target*, unless that looks the same: what kernels have installed over it
    goes with the very directory. What else was there goes aside until `collect`: kernels may have
    it as their root."""
    with contextlib.suppress(FileNotFoundError):
        if {*_listed(folder)} == {*_listed(target)}:
            return
        removal.set_aside(target)
    folder.rename(target)


def _listed(folder: Path) -> Iterator[tuple[object, ...]]:
    """What is in *folder*, as unsquashfs has made it: who changes a file changes its time."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            found = os.lstat(path)
            size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
            yield os.path.relpath(path, folder), found.st_mode, size, found.st_mtime_ns


def _sync(path: Path) -> None:
    """Until it is on the disk: of a folder, its entries."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_folder(folder: Path) -> None:
    """Whatever a box has left in it."""
    removal.empty(removal.set_aside(folder))
