"""contents/beneath.py - the Jupyter server: files below one directory, by descriptor only.

Code in a kernel may exchange a file for a link between two looks at its name. So a name is resolved
once, by Linux (openat2(2) with RESOLVE_BENEATH), to a descriptor, and everything else goes through
that: it is judged (fstat), opened (by way of /proc/self/fd, which for an O_PATH descriptor opens
that very file), and written. What stands in a directory is named by the directory's descriptor and
one component, which the calls that are used here do not follow.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sandbox_provisioner.inside.kernel_calls import (
    RESOLVE_BENEATH,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    CallFailed,
    openat2,
)

_NO_LINK = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS
_NO_WAY_OUT = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS
# openat2(2): EAGAIN means that a rename came between; whoever asks tries again, but not for ever.
_TRIES = 100
# fcntl(2): whoever opens a file with a lease on it waits up to 45 s, or is refused at once.
_AT_ONCE = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_PIECE_BYTES = 1 << 24
_NOT_FOLLOWED = "which code in a kernel may have put there; it was not followed"


class Refused(Exception):
    """What stands at a path may not be used; the text is a sentence for a person."""


@dataclass(frozen=True)
class Entry:
    """One name in an opened directory. *shown* is the path as a person knows it."""

    folder_fd: int
    name: str
    shown: str

    def status(self) -> os.stat_result | None:
        """lstat(2), None where nothing is."""
        try:
            return os.lstat(self.name, dir_fd=self.folder_fd)
        except FileNotFoundError:
            return None

    def sibling(self, name: str) -> Entry:
        """Another name in the same directory."""
        return Entry(self.folder_fd, name, os.path.join(os.path.dirname(self.shown), name))

    def remove(self) -> None:
        """unlink(2), of a link too; nothing if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.name, dir_fd=self.folder_fd)

    def move(self, target: Entry) -> None:
        """rename(2), of a link too; what stands at *target* is replaced."""
        os.rename(self.name, target.name, src_dir_fd=self.folder_fd, dst_dir_fd=target.folder_fd)

    @contextlib.contextmanager
    def file(self) -> Iterator[int]:
        """An O_PATH descriptor of the regular file; Refused for anything else."""
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        with _closing(os.open(self.name, flags, dir_fd=self.folder_fd)) as fd:
            _require_regular(fd, self.shown)
            yield fd

    @contextlib.contextmanager
    def directory(self) -> Iterator[int]:
        """A descriptor of the directory, for listing; NotADirectoryError for anything else."""
        flags = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        with _closing(os.open(self.name, flags, dir_fd=self.folder_fd)) as fd:
            yield fd

    def create(self, mode: int = 0o666) -> int:
        """A new file, for writing; FileExistsError where anything stands, a link too."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return os.open(self.name, flags, mode, dir_fd=self.folder_fd)

    @contextlib.contextmanager
    def written(self, *, backup: bool) -> Iterator[int]:
        """A descriptor to write the file's new content to, in place: owner, mode and names stay.

        If the body fails, what was there comes back; with *backup*, also if the server ends in it.
        """
        with self._opened_or_made() as (fd, is_new):
            spare = None if is_new or not backup else self._backup()
            os.ftruncate(fd, 0)
            try:
                yield fd
                os.fsync(fd)
            except BaseException:
                if spare:
                    spare.move(self)
                elif is_new:
                    self.remove()
                raise
            if spare:
                spare.remove()

    @contextlib.contextmanager
    def appended(self) -> Iterator[int]:
        """A descriptor to write to the file's end."""
        with self._opened_or_made() as (fd, _):
            os.lseek(fd, 0, os.SEEK_END)
            yield fd

    @contextlib.contextmanager
    def _opened_or_made(self) -> Iterator[tuple[int, bool]]:
        fd, is_new = self._open_or_make()
        with _closing(fd):
            yield fd, is_new

    def _open_or_make(self) -> tuple[int, bool]:
        for _ in range(_TRIES):
            try:
                with self.file() as found:
                    return reopen(found, os.O_WRONLY, self.shown), False
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):
                    return self.create(), True
        raise Refused(f"{self.shown!r} came and went while it was opened")

    def _backup(self) -> Entry | None:
        """A copy beside the file, with the name that Jupyter gives it; None in a directory where
        nothing can be made."""
        spare = self.sibling(f".~{self.name}")
        try:
            spare.remove()
            copy_file(self, spare)
        except PermissionError:
            return None
        return spare


class Beneath:
    """All that is below *root*, which is a person's own word and may be a link itself."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)

    def holds(self, os_path: str) -> bool:
        """Whether *os_path*, by its text, lies below."""
        return os.path.normpath(os_path).startswith(self.root.rstrip("/") + "/")

    @contextlib.contextmanager
    def entry(self, os_path: str) -> Iterator[Entry]:
        """The last component of *os_path* in its directory, to which no link has led."""
        shown = self._relative(os_path)
        folder, name = os.path.split(shown)
        with self._resolved(folder or ".", os.O_DIRECTORY, _NO_LINK) as fd:
            yield Entry(fd, name, shown)

    @contextlib.contextmanager
    def readable(self, os_path: str, *, links: bool, hidden: bool) -> Iterator[int]:
        """A descriptor to read the regular file *os_path*. With *links* one that leads to a file
        below is followed, but without *hidden* not to one whose name begins with a dot."""
        shown = self._relative(os_path)
        with self._resolved(shown, 0, _NO_WAY_OUT if links else _NO_LINK) as fd:
            _require_regular(fd, shown)
            self._require_seen(fd, shown, hidden=hidden)
            with _closing(reopen(fd, os.O_RDONLY, shown)) as file:
                yield file

    def refuse_hidden_directory(self, os_path: str) -> None:
        """Refused where a link leads *os_path* out, or to what is hidden."""
        shown = self._relative(os_path)
        with self._resolved(shown, os.O_DIRECTORY, _NO_WAY_OUT) as fd:
            self._require_seen(fd, shown, hidden=False)

    def refuse_way_out(self, os_path: str) -> None:
        """Refused where a link on the way to the last component leads out; not where nothing is."""
        folder = os.path.dirname(self._relative(os_path))
        with (
            contextlib.suppress(OSError),
            self._resolved(folder or ".", os.O_DIRECTORY, _NO_WAY_OUT),
        ):
            pass

    def make_directories(self, os_path: str) -> None:
        """mkdir -p below, through no link."""
        made = self.root
        for part in self._relative(os_path).split("/"):
            made = os.path.join(made, part)
            with self.entry(made) as entry, contextlib.suppress(FileExistsError):
                os.mkdir(part, dir_fd=entry.folder_fd)

    def _relative(self, os_path: str) -> str:
        relative = os.path.relpath(os.path.normpath(os_path), self.root)
        if relative.split("/")[0] == "..":
            raise Refused(f"{os_path!r} is not below {self.root!r}")
        return relative

    @contextlib.contextmanager
    def _resolved(self, relative: str, flags: int, resolve: int) -> Iterator[int]:
        with _closing(os.open(self.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
            opened = self._resolve(root, relative, flags | os.O_PATH, resolve)
        with _closing(opened) as fd:
            yield fd

    def _resolve(self, root_fd: int, relative: str, flags: int, resolve: int) -> int:
        for _ in range(_TRIES):
            try:
                return openat2(root_fd, relative, flags, resolve)
            except CallFailed as error:
                number = error.errno or errno.EIO
            if number == errno.EXDEV:
                raise Refused(f"{relative!r} leads out by a symbolic link, {_NOT_FOLLOWED}")
            if number == errno.ELOOP and resolve == _NO_LINK:
                raise Refused(f"{self._link_of(relative)!r} is a symbolic link, {_NOT_FOLLOWED}")
            if number != errno.EAGAIN:
                raise OSError(number, os.strerror(number), os.path.join(self.root, relative))
        raise Refused(f"{relative!r} was moved about while it was opened")

    def _link_of(self, relative: str) -> str:
        """The first link on the way, for a sentence; the whole path if there is none any more."""
        parts = relative.split("/")
        ways = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        links = (way for way in ways if os.path.islink(os.path.join(self.root, way)))
        return next(links, relative)

    def _require_seen(self, fd: int, shown: str, *, hidden: bool) -> None:
        """By where the descriptor really is, which proc(5) tells. What is hidden by the name that
        was asked for is the base class's to refuse."""
        real = os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), os.path.realpath(self.root))
        if not hidden and _is_hidden(real) and not _is_hidden(shown):
            raise Refused(f"{shown!r} leads to a hidden file by a symbolic link, {_NOT_FOLLOWED}")


def reopen(fd: int, flags: int, shown: str) -> int:
    """Open the file that the O_PATH descriptor *fd* holds."""
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | _AT_ONCE)
    except BlockingIOError:
        raise Refused(f"{shown!r} is held by a lease of another process; try again") from None


def copy_file(source: Entry, target: Entry) -> None:
    """A new file with the content, mode and times of another, both by descriptor."""
    with source.file() as found, _closing(reopen(found, os.O_RDONLY, source.shown)) as read_fd:
        status = os.fstat(read_fd)
        with _closing(target.create(mode=0o600)) as write_fd:
            _copy_content(read_fd, write_fd)
            _copy_status(status, write_fd)


def copy_over(source: Entry, target: Entry) -> None:
    """Put the content, mode and times of one file in the place of another's, or make it.

    As jupyter_server does it, only of a file that can be written to.
    """
    with source.file() as found, _closing(reopen(found, os.O_RDONLY, source.shown)) as read_fd:
        if not os.access(f"/proc/self/fd/{found}", os.W_OK):
            raise PermissionError(errno.EACCES, "File is not writable", source.shown)
        with target.written(backup=False) as write_fd:
            _copy_content(read_fd, write_fd)
            _copy_status(os.fstat(read_fd), write_fd)


def move(old: Entry, new: Entry) -> None:
    """rename(2); a file goes to another file system too."""
    try:
        old.move(new)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy_file(old, new)
        old.remove()


def _copy_content(read_fd: int, write_fd: int) -> None:
    """From where both stand to the end."""
    while os.sendfile(write_fd, read_fd, None, _PIECE_BYTES):
        pass


def _copy_status(status: os.stat_result, fd: int) -> None:
    """Times and mode, but no set-id bits; a file of somebody else's keeps its own."""
    with contextlib.suppress(PermissionError):
        os.fchmod(fd, stat.S_IMODE(status.st_mode) & 0o777)
        os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))


def copy_tree(source: Entry, target: Entry) -> None:
    """A new directory with copies of what is in another: links as links, and nothing special."""
    os.mkdir(target.name, dir_fd=target.folder_fd)
    with source.directory() as from_fd, target.directory() as to_fd:
        for name in os.listdir(from_fd):
            shown = os.path.join(source.shown, name)
            _copy_entry(Entry(from_fd, name, shown), Entry(to_fd, name, shown))


def _copy_entry(source: Entry, target: Entry) -> None:
    status = source.status()
    if status is not None and (copy := _COPIES.get(stat.S_IFMT(status.st_mode))):
        copy(source, target)


def _copy_link(source: Entry, target: Entry) -> None:
    text = os.readlink(source.name, dir_fd=source.folder_fd)
    os.symlink(text, target.name, dir_fd=target.folder_fd)


_COPIES: dict[int, Callable[[Entry, Entry], None]] = {
    stat.S_IFREG: copy_file,
    stat.S_IFDIR: copy_tree,
    stat.S_IFLNK: _copy_link,
}


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/") if part != ".")


def _require_regular(fd: int, shown: str) -> None:
    mode = os.fstat(fd).st_mode
    if stat.S_ISLNK(mode):
        raise Refused(f"{shown!r} is a symbolic link, {_NOT_FOLLOWED}")
    if not stat.S_ISREG(mode):
        raise Refused(f"{shown!r} is not a regular file, and was not opened")


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)
