"""images - who launches, as root: a file for each box whose limit of the disk it holds.

::

    /var/lib/sandbox-provisioner/storage/     root's alone
      lock                 held while an image is made, or a project is chosen (quotas.py)
      folders/             of boxes that have no image: see folders.py
      <sandbox id>         a sparse file with a file system in it; whoever has it open holds its
                           lock of flock(2): who launches, and then the loop device until the box
                           has ended; whoever may start that kernel again holds another one, of
                           fcntl(2), which knows nothing of the first
    /var/lib/sandbox-provisioner/user/<uid>/<root>/disk       or below another layer_dir: the same
                                              of what is kept for a user's next kernels
    layer-dirs           each layer_dir that images were made in, with a NUL behind it

So an image of a sandbox both whose locks are free is nobody's, whoever was killed, and is removed
by the next `sweep`. What is in one at first is made by mkfs.ext4, and kept in memory for the next
one of its size: some 200 KiB.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.storage.facts import BLOCK_BYTES, PEOPLE, STORAGE, Storage, tool
from sandbox_provisioner.facilities.storage.projects import is_something_left, promised
from sandbox_provisioner.locks import locked
from sandbox_provisioner.mounts import mount_at
from sandbox_provisioner.state import make_state
from sandbox_provisioner.units import format_bytes

_LOCK = "lock"
_LAYER_DIRS = "layer-dirs"
_MOST_LAYER_DIRS = 100
# Of the disk this much is never promised to kernels: other programs write there, too.
_KEPT_BYTES = 1 << 30
_KEPT_PART = 20
# mke2fs(8). No reserve; no journal but where it is to outlive a crash of this machine. Inode tables
# are holes of a new file, which the checksums of groups tell Linux.
_FEATURES = (
    "none,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,"
    "dir_nlink,extra_isize,uninit_bg"
)
_FORMAT = (
    "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0",
    "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
)  # fmt: skip
_JOURNAL = ("-J", "size=4")  # MiB, the least that there is
_TOOL_SECONDS = 60
# Linux lets go of a mount a moment after the last process that was in it.
_MOUNT_SECONDS = 10
_AGAIN_SECONDS = 0.002
# So much of them is kept in memory at the most; a large image's has some MiB.
_MEMORY_BYTES = 16 << 20
_Contents = dict[tuple[str, int, int, bool], tuple[tuple[int, bytes], ...]]
_kept: _Contents = {}
_OWN_INODES = 11 + 4  # ext4's own, lost+found among them, and the folders of a layer
_ID = re.compile(r"[0-9a-f]{12}", re.ASCII)
_OF_USERS = ("user/*/*/disk", f"{PEOPLE}/*/user/*/*/disk")
# struct flock of fcntl(2), of the whole file.
_WHOLE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
# open(2): it is gone, a directory, a link, or a socket.
_NO_IMAGE = {errno.ENOENT, errno.EISDIR, errno.ELOOP, errno.ENXIO}
_REMEDY = (
    f"End some kernels, ask for less, make room there, or mount a larger disk at {STORAGE}. With "
    'disk_backend = "tmpfs" it is memory.'
)
_REMOVE = "What ended kernels left there is being removed; at once: sudo jupyter sandbox gc"
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class NoRoom(HostError):
    """The disk has no room for what a kernel may come to write."""


def make_image(
    name: str,
    storage: Storage,
    directory: Path = STORAGE,
    *,
    lasts: bool = False,
    layers: Path | None = None,
) -> int:
    """The descriptor of a new image called *name*, below *directory* or by its whole path, which
    has the file system of *storage*; it *lasts* if it is to outlive a crash of this machine.
    HostError where there is no room for what it may come to hold, besides those of *directory*, and
    those of users below *layers* and wherever else there are any."""
    size = storage.size_bytes
    attempt = _attempt(size)
    try:
        make_directory(directory)
        sweep(directory)
        room = Path(directory / name).parent, directory, layers
        refuse_without_room(size, *room, attempt)  # before memory is spent on it
        content = _formatted(storage.formatter, size, storage.inodes or 0, lasts)
        with locked(directory):  # for what is done at once: others wait for it, mkfs may take long
            for _ in _sweep(directory):
                pass
            refuse_without_room(size, *room, attempt)
            if os.path.isabs(name):
                _note(directory, layers)
            fd = _new_file(directory / name, size)
        try:
            for offset, data in content:
                _write(fd, data, offset)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise _cannot(attempt, f"{directory}: {error.strerror}") from None
    return fd


def _new_file(path: Path, size_bytes: int) -> int:
    """Ours, with its size: whoever asks for room next finds it promised."""
    fd = os.open(path, _OPEN | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, size_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write(fd: int, data: bytes, offset: int) -> None:
    """All of it: of what a disk has no room for, pwrite(2) writes a part first, and says so the
    next time."""
    left = memoryview(data)
    while left:
        written = os.pwrite(fd, left, offset)
        left, offset = left[written:], offset + written


def sweep(directory: Path = STORAGE) -> tuple[str, ...]:
    """Remove the images that nobody has any more; their names. OSError."""
    if not any(True for _ in _opened(directory)):
        return ()
    with locked(directory):
        return tuple(_sweep(directory))


def _sweep(directory: Path) -> Iterator[str]:
    """While nobody makes one: it is nobody's until it is locked."""
    for name, fd in _opened(directory):
        if _is_free(fd) and own(fd):
            os.unlink(directory / name)
            yield name


def own(fd: int) -> bool:
    """Let the image that is open as *fd* be nobody's only when that is closed, also while no box
    has it; whether it is not somebody else's."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WHOLE)
    except BlockingIOError:
        return False
    return True


def open_image(name: str, directory: Path = STORAGE) -> int | None:
    """The image *name*, with no lock; None where there is none."""
    return _open(directory / name)


def take_image(fd: int) -> None:
    """Have the lock of the image that is open as *fd*; TimeoutError where a box has it, and its
    mount does not go."""
    deadline = time.monotonic() + _MOUNT_SECONDS
    while not _is_free(fd):
        if time.monotonic() > deadline:
            raise TimeoutError(errno.EBUSY, "the file system in it is still mounted")
        time.sleep(_AGAIN_SECONDS)  # flock(2) has no timeout, and no event to wait for


def used_of(name: str, directory: Path = STORAGE) -> tuple[int, int]:
    """How many bytes of the disk the image *name* takes, and in how many inodes, as far as Linux
    has written that down: ext4's super.rst, s_inodes_count and s_free_inodes_count."""
    fd = _open(directory / name)
    if fd is None:
        return 0, 0
    try:
        total, *_, free = _numbers(fd, 5, 1024)
        return os.fstat(fd).st_blocks * 512, max(0, total - free - _OWN_INODES)
    finally:
        os.close(fd)


def grow(fd: int, size_bytes: int, directory: Path = STORAGE, layers: Path | None = None) -> None:
    """Let the image that is open as *fd*, and mounted nowhere, have *size_bytes*; HostError where
    there is no room, or a program refuses."""
    path = f"/proc/self/fd/{fd}"
    try:
        _run([tool("e2fsck"), "-fp", path], fd, answers=(0, 1))
        old, before = os.fstat(fd).st_size, _superblock(fd)
        with locked(directory):
            if size_bytes > old:  # or else all of that is promised
                more = size_bytes - old
                refuse_without_room(more, Path(path), directory, layers, _attempt(more))
            os.ftruncate(fd, size_bytes + 1)
        try:
            _run([tool("resize2fs"), path], fd)
        except OSError:
            # It writes there first of all, that the file system is not whole.
            if _superblock(fd) == before:
                os.ftruncate(fd, old)
            raise
        os.ftruncate(fd, size_bytes)
    except OSError as error:
        raise _cannot(_attempt(size_bytes), f"{directory}: {error.strerror}") from None


def size_of(fd: int) -> int:
    """How large the file system of the image that is open as *fd* is, or is to become."""
    size = os.fstat(fd).st_size
    return size - size % BLOCK_BYTES


def inodes_of(fd: int, size_bytes: int) -> int:
    """How many inodes the file system of the image that is open as *fd* has, or would have with
    *size_bytes*: as many in each group (super.rst, s_blocks_per_group, s_inodes_per_group); 0 where
    it is damaged."""
    blocks, _, inodes = _numbers(fd, 3, 1024 + 0x20)
    return -(-size_bytes // (BLOCK_BYTES * blocks)) * inodes if blocks else 0


def is_half_grown(fd: int) -> bool:
    """Whether `grow` was killed: meanwhile an image has one byte more than its file system is to
    have, which is in whole blocks."""
    return os.fstat(fd).st_size % BLOCK_BYTES != 0


def _numbers(fd: int, count: int, offset: int) -> tuple[int, ...]:
    """So many of its superblock, 0 where the file ends before: who made it was killed."""
    return struct.unpack(f"<{count}I", os.pread(fd, 4 * count, offset).ljust(4 * count, b"\0"))


def _superblock(fd: int) -> bytes:
    return os.pread(fd, 1024, 1024)


def is_there(name: str, directory: Path = STORAGE) -> bool:
    """Whether there is an image *name*: none of an ordinary user's, who may not look."""
    return os.access(directory / name, os.F_OK)


def is_held(name: str, directory: Path = STORAGE) -> bool:
    """Whether somebody has the image *name*: a mount and its device go a moment after the last
    process that was in it."""
    fd = _open(directory / name)
    if fd is None:
        return False
    try:
        return not _is_free(fd)
    finally:
        os.close(fd)


def _opened(directory: Path) -> Iterator[tuple[str, int]]:
    """Each image with a descriptor, which is closed then. What is called otherwise than a sandbox
    is somebody else's: a disk that is mounted here has its lost+found."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return
    for name in filter(_ID.fullmatch, names):
        fd = _open(directory / name)
        if fd is not None:
            try:
                yield name, fd
            finally:
                os.close(fd)


def _open(path: Path) -> int | None:
    """None where somebody has removed it, or it is no file, and so none of ours."""
    try:
        fd = os.open(path, _OPEN)
    except OSError as error:
        if error.errno in _NO_IMAGE:
            return None
        raise
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return None


def _is_free(fd: int) -> bool:
    """Whether nobody else has it: then it is ours until *fd* is closed."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def make_directory(directory: Path = STORAGE) -> Path:
    """Make what is root's alone; OSError if others can write to it."""
    if directory == STORAGE:
        make_state(directory.parent)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (directory, directory.parent):
        status = os.stat(path, follow_symlinks=False)
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise PermissionError(errno.EPERM, f"others than root can write to {path}")
    return directory


def room_bytes(
    directory: Path = STORAGE, layers: Path | None = None, at: Path | None = None
) -> tuple[int, int, int]:
    """What is free on the disk of *at*, or else where the images are; of that what the images and
    folders of *directory* may still fill, and the images of users below *layers* and wherever
    others have made some, as far as they are there; and what the machine's other programs keep."""
    at = at or directory
    there = next(path for path in (at, *at.parents) if path.exists())
    disk, device = os.statvfs(there), there.stat().st_dev
    found = [os.fstat(fd) for _, fd in _opened(directory)]
    for whole in {_whole(layers or directory.parent), *_noted_for(there, directory)}:
        for path in _of_users(whole):
            with contextlib.suppress(OSError):
                found.append(path.stat(follow_symlinks=False))
    each = {one.st_ino: one for one in found if one.st_dev == device}  # one by several names
    of_images = sum(max(0, one.st_size - 512 * one.st_blocks) for one in each.values())
    of_folders, _ = promised(directory, device)
    kept = min(_KEPT_BYTES, disk.f_blocks * disk.f_frsize // _KEPT_PART)
    return disk.f_bavail * disk.f_frsize, of_images + of_folders, kept


def _whole(layers: Path) -> Path:
    """The directory of all people's where *layers* is one's of many."""
    return layers.parent.parent if layers.parent.name == PEOPLE else layers


def _of_users(whole: Path) -> Iterator[Path]:
    for pattern in _OF_USERS:
        yield from whole.glob(pattern)


def _noted(directory: Path) -> list[Path]:
    """Each layer_dir of this machine in which there are images of users, whoever made them: several
    may lie on one disk."""
    try:
        text = (directory / _LAYER_DIRS).read_bytes()
    except FileNotFoundError:
        return []
    return [Path(os.fsdecode(line)) for line in text.split(b"\0") if line]


def _noted_for(at: Path, directory: Path) -> Iterator[Path]:
    """Those that may lie on the disk of *at*: a start waits for no file server of others."""
    noted = _noted(directory)
    here = mount_at(os.path.realpath(at)).device if noted else ""
    for path in noted:
        mount = mount_at(str(path))
        if mount.device == here or not mount.may_hang:
            yield path


def note(layers: Path, directory: Path = STORAGE) -> None:
    """Let everybody know that there are images below *layers*; OSError."""
    if _real(layers) not in _noted(directory):
        with locked(directory):
            _note(directory, layers)


def _note(directory: Path, layers: Path | None) -> None:
    """The same while nobody else notes anything. What is not there now may be mounted again."""
    whole, known = _real(layers or directory.parent), _noted(directory)
    if whole in known:
        return
    new = directory / f"{_LAYER_DIRS}.new"
    listed = [*known, whole][-_MOST_LAYER_DIRS:]
    new.write_bytes(b"".join(os.fsencode(path) + b"\0" for path in listed))
    new.rename(directory / _LAYER_DIRS)


def _real(layers: Path) -> Path:
    return Path(os.path.realpath(_whole(layers)))


def refuse_without_room(
    size_bytes: int, at: Path, directory: Path, layers: Path | None, attempt: str
) -> None:
    """A file system in a file on a full disk would lose what was written: each image has its room,
    or is not made, and so each folder. HostError of *attempt*."""
    free, others, kept = room_bytes(directory, layers, at)
    if size_bytes > free - others - kept:
        raise NoRoom(
            attempt=attempt,
            answer=f"the disk of {directory} has {format_bytes(free)} free, of which other kernels "
            f"may fill {format_bytes(others)}, and {format_bytes(kept)} is kept for the machine",
            remedy=_room_remedy(directory),
        )


def refuse_without_inodes(inodes: int, at: Path, directory: Path, attempt: str) -> None:
    """The same of what a folder on the disk of *at* may have of inodes: an empty file takes no
    other room. ext4 has as many as it was made with; XFS makes them of free space."""
    there = next(path for path in (at, *at.parents) if path.exists())
    disk = os.statvfs(there)
    _, others = promised(directory, there.stat().st_dev)
    kept = disk.f_files // _KEPT_PART
    if inodes > disk.f_favail - others - kept:
        raise NoRoom(
            attempt=attempt,
            answer=f"it may have {inodes} inodes, of which the disk of {directory} has "
            f"{disk.f_favail} free; other kernels may take {others}, and {kept} are kept for the "
            "machine",
            remedy=f"Set inode_limit to less. {_room_remedy(directory)}",
        )


def _room_remedy(directory: Path) -> str:
    return f"{_REMOVE}. {_REMEDY}" if is_something_left(directory) else _REMEDY


def _attempt(size_bytes: int) -> str:
    return f"make an image of {format_bytes(size_bytes)} for a kernel, which disk_limit asks for"


def _cannot(attempt: str, answer: str) -> HostError:
    return HostError(attempt=attempt, answer=answer, remedy=_REMEDY)


def _formatted(
    formatter: str, size_bytes: int, inodes: int, lasts: bool
) -> tuple[tuple[int, bytes], ...]:
    """What mkfs.ext4 writes into a file of zeros: where, and what."""
    global _kept  # noqa: PLW0603  # replaced as a whole: other threads look at it meanwhile
    key = formatter, size_bytes, inodes, lasts
    content = _kept.get(key) or _format(*key)
    _kept = _that_fit({key: content, **_kept})
    return content


def _that_fit(contents: _Contents) -> _Contents:
    """As many as there is memory for, the newest, which are the first ones, before others."""
    fitting, left = {}, _MEMORY_BYTES
    for key, content in contents.items():
        size = sum(len(data) for _, data in content)
        if size <= left:
            fitting[key], left = content, left - size
    return fitting


def _format(
    formatter: str, size_bytes: int, inodes: int, lasts: bool
) -> tuple[tuple[int, bytes], ...]:
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    journal, feature = (_JOURNAL, ",has_journal") if lasts else ((), "")
    features = ("-O", _FEATURES + feature, *journal)
    try:
        os.ftruncate(fd, size_bytes)
        path = f"/proc/self/fd/{fd}"
        _run([formatter, *_FORMAT, *features, "-N", str(inodes), path], fd)
        return tuple(_pieces(fd, size_bytes))
    finally:
        os.close(fd)


def _run(command: list[str], fd: int, answers: tuple[int, ...] = (0,)) -> None:
    """Run a program of e2fsprogs on what is open as *fd*, which no Ctrl-C of ours interrupts;
    OSError with what it says."""
    name = os.path.basename(command[0])
    try:
        answer = subprocess.run(
            command, env={}, cwd="/", stdin=subprocess.DEVNULL, capture_output=True,
            pass_fds=[fd], timeout=_TOOL_SECONDS, check=False, start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise OSError(errno.ETIMEDOUT, f"{name} took {_TOOL_SECONDS} s") from None
    if answer.returncode not in answers:
        text = (answer.stderr or answer.stdout).decode(errors="replace").strip()
        raise OSError(errno.EIO, f"{name} answers {answer.returncode}: {text[-300:]}")


def _pieces(fd: int, size_bytes: int) -> Iterator[tuple[int, bytes]]:
    """What is in the sparse file *fd*, by lseek(2)."""
    end = 0
    while end < size_bytes:
        try:
            begin = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing more
            return
        end = os.lseek(fd, begin, os.SEEK_HOLE)
        yield begin, os.pread(fd, end - begin, begin)
