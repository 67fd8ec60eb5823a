"""places.py - reads only: a file or directory of the host, opened once by whoever launches.

A path is text. Between two looks at it somebody else may change where it leads: a kernel, in its
work directory, puts a symbolic link to another person's home where a directory was. So what a
kernel is given is opened once; every fact and every refusal comes from that descriptor, and it is
what the launcher mounts.

A symbolic link on the way is followed only where no kernel can have put it (`_may_follow`).
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.mounts import UNKNOWN, Mount, mounts_around
from sandbox_provisioner.spec import relative

SYSTEM_TREES = ("/etc", "/usr", "/boot", "/proc", "/sys", "/dev", "/bin", "/sbin", "/lib")
CROWDED = (
    "/", "/home", "/tmp", "/var", "/var/tmp", "/run", "/opt", "/mnt", "/media", "/srv",
)  # fmt: skip
_SHOWS_MORE = "it would show the sandbox more than one person's files"
_LONGEST_LOOK_SECONDS = 20  # a file server may take its time for each directory
_MOST_LINKS = 40  # as many as path_resolution(7) follows


@dataclass(frozen=True, slots=True)
class Asker:
    """Whose rights open a place: the user *uid*. *crowded* are directories that hold more than one
    person's files: none is anybody's work directory, and so no kernel writes into them. *groups*
    are theirs, where whoever launches is somebody else; None: who launches is that user."""

    uid: int
    crowded: frozenset[str]
    groups: frozenset[int] | None = None

    @classmethod
    def of(cls, uid: int, homes: Iterable[str], groups: frozenset[int] | None = None) -> Asker:
        """The user *uid* of a machine whose users have *homes*. Under root nobody works above a
        home either: a kernel would write there as root."""
        around = {home.rpartition("/")[0] for home in homes} if uid == 0 else set()
        above = (up for path in around for up in _upwards(path))
        return cls(uid, frozenset((*CROWDED, *above)), groups)


def _upwards(path: str) -> Iterator[str]:
    while path not in {"", "/"}:
        yield path
        path = os.path.dirname(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A file or directory that is open. *path* is what was asked for, *source* its real path when
    it was opened; *fd* is a descriptor that stands for it, whatever its names become (O_PATH). It
    lies on *mount*, and the mounts *below* come with it."""

    path: str
    source: str
    fd: int
    device: int
    inode: int
    owner_uid: int
    owner_gid: int
    mount: Mount
    below: tuple[Mount, ...] = ()
    is_directory: bool = True

    @classmethod
    def open(cls, path: str, asker: Asker, opened: ExitStack, *, attempt: str) -> Place:
        """Open *path*, until *opened* closes; SpecError with *attempt* if that cannot be."""
        path, source, fd = open_for_another(path, asker, opened, attempt=attempt)
        try:
            status = os.fstat(fd)
            mount, below = mounts_around(fd, source)
        except OSError as error:
            raise _cannot_open(attempt, error) from None
        return cls._of(path, source, fd, status, mount, below)

    @classmethod
    def brought(cls, path: str, brought: int, opened: ExitStack, *, attempt: str) -> Place:
        """What somebody else has opened for *path* as *brought*, -1 for nothing: it is opened once
        more, with the rights of who calls, by the real path that Linux tells of the descriptor, and
        has to be the same. So it is what this path means here, and not in a mount namespace, or by
        a mount with other ids, of theirs. SpecError with *attempt* if that cannot be."""
        try:
            source = real_path(brought)
            fd = _opened_again(source, os.fstat(brought))
            opened.callback(os.close, fd)
            os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            mount, below = mounts_around(fd, source)
        except OSError as error:
            raise _cannot_open(attempt, error) from None
        return cls._of(path.rstrip("/") or "/", source, fd, os.fstat(fd), mount, below)

    @classmethod
    def _of(
        cls,
        path: str,
        source: str,
        fd: int,
        status: os.stat_result,
        mount: Mount,
        below: tuple[Mount, ...],
    ) -> Place:
        return cls(
            path=path,
            source=source,
            fd=fd,
            device=status.st_dev,
            inode=status.st_ino,
            owner_uid=status.st_uid,
            owner_gid=status.st_gid,
            mount=mount,
            below=below,
            is_directory=stat.S_ISDIR(status.st_mode),
        )

    @classmethod
    def nowhere(cls) -> Place:
        """For a box that is given none."""
        return cls(
            path="", source="", fd=-1, device=0, inode=0, owner_uid=0, owner_gid=0, mount=UNKNOWN
        )

    @property
    def filesystem(self) -> str:
        """Its type."""
        return self.mount.filesystem

    def looked_again(self) -> Place:
        """With the mounts that are below it now: to list a directory makes autofs mount."""
        mount, below = mounts_around(self.fd, self.source)
        return replace(self, mount=mount, below=below)

    def refusal(self, asker: Asker) -> str:
        """Why no kernel may write to it, "" if one may."""
        return _belongs_to_nobody(self.path, asker) or _refusal(
            self.source, (self.device, self.inode), asker
        )

    def not_own(self, asker: Asker) -> str:
        """Why a kernel must not be its owner there, as an id-mapped mount makes it: it is not
        *asker*'s, who has other rights than who launches. "" if it may be."""
        if asker.groups is None:
            return ""
        if self.owner_uid != asker.uid:
            return f"it belongs to uid {self.owner_uid}, and the kernel is started for another user"
        if self.owner_gid not in asker.groups:
            return f"its group is gid {self.owner_gid}, in which the kernel's user is not"
        if self.filesystem.partition(".")[0] == "fuse":
            return "a program serves it, and who launches would have to wait for that one's answers"
        return ""

    def shows_host(self) -> str:
        """Why nobody may be given it, "" if one may: a mount in it that is the host itself, such as
        the /proc of a chroot."""
        for mount in (self.mount, *self.below):
            if mount.shows_host:
                return f"{mount.path} is a mount of {mount.filesystem}, which shows the host"
        return ""


def open_for_another(
    path: str, asker: Asker, opened: ExitStack, *, attempt: str
) -> tuple[str, str, int]:
    """As `Place.open`, for who only hands it on: *path* as it is written plainly, its real path,
    and a descriptor."""
    path = "/" + "/".join(reversed(_names(path)))
    try:
        fd = _walk(path, asker, attempt)
        opened.callback(os.close, fd)
        return path, real_path(fd), fd
    except OSError as error:
        raise _cannot_open(attempt, error) from None


def _belongs_to_nobody(path: str, asker: Asker) -> str:
    """Why what *path* names is no single person's, "" if it may be."""
    if tree := is_of_system(path):
        return f"it lies in {tree}, which belongs to the system"
    return _SHOWS_MORE if path in asker.crowded else ""


def is_of_system(path: str) -> str:
    """The tree of the system that *path* lies in, "" if it lies in none."""
    return next((tree for tree in SYSTEM_TREES if relative(path, tree) is not None), "")


def _refusal(source: str, identity: tuple[int, int], asker: Asker) -> str:
    """The same for a directory: also of a bind mount, which is another name for it."""
    if answer := _belongs_to_nobody(source, asker):
        return answer
    if _is_one_of(identity, SYSTEM_TREES):
        return "it is a directory that belongs to the system, by another name"
    return _SHOWS_MORE if _is_one_of(identity, asker.crowded) else ""


def _is_one_of(identity: tuple[int, int], paths: Iterable[str]) -> bool:
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            continue
        if (status.st_dev, status.st_ino) == identity:
            return True
    return False


def _cannot_open(attempt: str, error: OSError) -> SpecError:
    return SpecError(
        attempt=attempt,
        answer=error.strerror or str(error),
        remedy="Create it, make its path one that this user may follow, or name another one.",
    )


# -- the way to it


def _walk(path: str, asker: Asker, attempt: str) -> int:
    """An O_PATH descriptor of *path*, reached name by name from "/". OSError if that fails,
    SpecError where a symbolic link on the way is not to be followed.

    ".." goes back the way that we came, since a directory may be moved while we stand in it.
    """
    names, links = _names(path), 0
    with ExitStack() as opened:
        way = [_enter(None, "/", opened)]
        while names:
            name = names.pop()
            if name == "..":
                way = way[:-1] or way
                continue
            found = _enter(way[-1], name, opened)
            link = os.fstat(found)
            if not stat.S_ISLNK(link.st_mode):
                way.append(found)
                continue
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            text = os.readlink("", dir_fd=found)
            if not _may_follow(way[-1], link, asker):
                raise _not_followed(os.path.join(real_path(way[-1]), name), text, attempt)
            way = way[:1] if text.startswith("/") else way
            names += _names(text)
        return os.dup(way[-1])


def _names(path: str) -> list[str]:
    """The names in *path*, the last one first."""
    return [name for name in path.split("/") if name not in {"", "."}][::-1]


def _enter(parent: int | None, name: str, opened: ExitStack) -> int:
    """A descriptor of *name* in *parent*, of a symbolic link itself if it is one.

    O_DIRECTORY comes first since with O_PATH nothing else makes autofs mount a home.
    """
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(name, flags | os.O_DIRECTORY, dir_fd=parent)
    except NotADirectoryError:
        fd = os.open(name, flags, dir_fd=parent)
    opened.callback(os.close, fd)
    return fd


def _may_follow(parent: int, link: os.stat_result, asker: Asker) -> bool:
    """Whether no kernel can have put *link* into the directory *parent*.

    A kernel writes what its server may write, in work directories and writable volumes alone. That
    of an ordinary user cannot write to what belongs to root and is closed to others; that of root
    can, unless the directory is one that nobody may give to a kernel. In a directory such as /tmp
    anybody can make a link: there its owner counts.
    """
    status = os.fstat(parent)
    if status.st_uid != 0:
        return False
    is_shared = bool(_refusal(real_path(parent), (status.st_dev, status.st_ino), asker))
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        is_sticky = bool(status.st_mode & stat.S_ISVTX)
        return is_shared and is_sticky and link.st_uid in {0, asker.uid}
    return is_shared or asker.uid != 0


def _not_followed(link: str, text: str, attempt: str) -> SpecError:
    return SpecError(
        attempt=attempt,
        answer=f"{link!r} is a symbolic link to {text!r}, and lies where a kernel could have made "
        "it, so it is not followed",
        remedy="If you want what it leads to, name the real path, or start the notebook there.",
    )


def _opened_again(path: str, wanted: os.stat_result) -> int:
    """The same for who has it still open; what is neither directory nor file is refused, since to
    open it may act on something."""
    if not (stat.S_ISDIR(wanted.st_mode) or stat.S_ISREG(wanted.st_mode)):
        raise OSError(errno.EINVAL, "it is neither a directory nor a file", path)
    return open_again(path, wanted.st_dev, wanted.st_ino, 0)


def open_again(path: str, device: int, inode: int, kind: int = os.O_DIRECTORY) -> int:
    """A descriptor of the directory, or whatever *kind* says, that was open once, by its real
    *path* then; OSError if it is not there any more, whatever is there now."""
    no_links = kernel_calls.RESOLVE_NO_SYMLINKS | kernel_calls.RESOLVE_NO_MAGICLINKS
    flags = os.O_PATH | kind
    fd = kernel_calls.openat2(kernel_calls.AT_FDCWD, path, flags, no_links)
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) != (device, inode):
        os.close(fd)
        raise OSError(errno.ESTALE, "another directory has taken its place", path)
    return fd


def find_shown(path: str, shown_at: str, source: str, identity: tuple[int, int]) -> str | None:
    """Where a kernel's *path* is outside, whose work directory *source*, of that *identity*, shows
    at *shown_at*; None for what lies elsewhere, or is not there (any more)."""
    below = relative(os.path.normpath(os.path.join(shown_at, path)), shown_at)
    if below is None:
        return None
    try:
        workdir = open_again(source, *identity)
    except OSError:
        return None
    try:
        return find_below(workdir, below)
    finally:
        os.close(workdir)


def find_below(directory: int, path: str) -> str | None:
    """The real path of *path*, as seen from *directory*, None if there is no such thing in it. Who
    follows a link that leads out is told nothing of what is there."""
    stays = kernel_calls.RESOLVE_BENEATH | kernel_calls.RESOLVE_NO_MAGICLINKS
    try:
        fd = kernel_calls.openat2(directory, path or ".", os.O_PATH, stays)
    except OSError:
        return None
    try:
        return real_path(fd)
    except OSError:
        return None
    finally:
        os.close(fd)


class TooManyFolders(Exception):
    """There are more than are looked at: a kernel could have hidden among them what the host runs.
    The text is an answer for a person."""


class Folders:
    """Lists directories, and counts what it has found: a look has to end, but not so early that
    whoever makes many names keeps others from being found."""

    def __init__(self, most_entries: int = 1 << 20, most_folders: int = 1 << 16) -> None:
        self._entries = self._most_entries = most_entries
        self._folders = self._most_folders = most_folders
        self._until = time.monotonic() + _LONGEST_LOOK_SECONDS

    def of(self, path: str) -> Iterator[os.DirEntry[str]]:
        """The directories in *path*, and the links, which may lead to one, as the listing itself
        tells them; none if it cannot be listed. Raises TooManyFolders."""
        if time.monotonic() > self._until:
            raise TooManyFolders(f"listing its directories takes over {_LONGEST_LOOK_SECONDS} s")
        try:
            listing = os.scandir(path)
        except OSError:
            return
        with listing:
            for entry in listing:
                self._entries -= 1
                if entry.is_dir(follow_symlinks=False) or entry.is_symlink():
                    self._folders -= 1
                    yield entry
                if self._entries < 0:
                    raise TooManyFolders(f"more than {self._most_entries} names lie in it")
                if self._folders < 0:
                    raise TooManyFolders(f"more than {self._most_folders} directories lie in it")


# -- what is true of a descriptor


def real_path(fd: int) -> str:
    """The path of what is open as *fd*, at this moment; OSError if it has none (any more)."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    # proc_pid_fd(5) marks what was removed with " (deleted)", which may also be part of a name.
    if not os.path.samestat(os.lstat(path), os.fstat(fd)):
        raise OSError(errno.ESTALE, "it is being moved or replaced", path)
    return path


def disk_of(device: int) -> str:
    """The disk that a file of *device* lies on, as the "MAJOR:MINOR" that cgroups know it by; ""
    where it lies on no disk of its own (overlay, btrfs, tmpfs, a file server). They know no
    partitions."""
    try:
        name = f"{os.major(device)}:{os.minor(device)}"
        place = os.path.realpath(f"/sys/dev/block/{name}", strict=True)
        if os.path.exists(f"{place}/partition"):
            place = os.path.dirname(place)
        return Path(f"{place}/dev").read_text().strip()
    except OSError:
        return ""
