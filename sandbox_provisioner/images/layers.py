"""layers.py - in who makes images: what layers of a root file system can be read from.

A layer is read twice: what it has, and then what is in its files. It may be somebody else's text:
it is read as a stream, piece by piece, and has to be the same bytes both times.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import math
import os
import shutil
import stat
import subprocess
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from sandbox_provisioner.errors import COMMAND, HostError
from sandbox_provisioner.images.tree import Entry, Kind, Refused

_CHUNK = 1 << 20
# What stands before an entry, such as its long name, `tarfile` reads as a whole, and keeps.
_LONGEST_HEAD, _MOST_HEADS = 1 << 16, 1 << 20
_NOBODY = 65534
# os.fwalk has a descriptor of each folder on the way, and up to Python 3.12 a call.
_DEEPEST = 512
_ZSTD_MEMORY = "128MB"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_NOT_TAR = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, RecursionError,
            OverflowError, IndexError)  # fmt: skip
_KINDS = {tarfile.DIRTYPE: Kind.FOLDER, tarfile.SYMTYPE: Kind.SYMLINK,
          tarfile.LNKTYPE: Kind.HARD_LINK}  # fmt: skip
Member = tuple[Entry | None, IO[bytes] | None]


class Layer(Protocol):
    """Names, each with its content where it is a file; None for what is left out."""

    def members(self) -> Iterator[Member]:
        """All of it; Refused."""
        ...


@dataclass(frozen=True, slots=True)
class TarLayer:
    """A tar, compressed or not, that *opened* gives, of this SHA-256 (""; nobody has said), with no
    more than *most_bytes* in it."""

    opened: Callable[[], IO[bytes]]
    digest: str
    most_bytes: int

    def members(self) -> Iterator[Member]:
        """All of it; Refused, also at its end, where it is not of that digest."""
        with self.opened() as file:
            raw = _Hashed(file)
            try:
                with _plain(raw) as plain:
                    yield from _members(_Forward(plain, self.most_bytes))
            except Refused:
                self._check(raw)
                raise
            except _NOT_TAR as error:
                self._check(raw)
                raise Refused(f"a layer is broken: {error}") from None
            self._check(raw)

    def _check(self, raw: _Hashed) -> None:
        if self.digest and raw.digest() != self.digest:
            raise Refused(f"a layer is not what its digest says (sha256:{self.digest[:12]}…)")


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


@dataclass(frozen=True, slots=True)
class FolderLayer:
    """What is in *folder*, which *opened* opens, as *prefix* in the image, of one owner and one
    time."""

    folder: Path
    prefix: str
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    opened: Callable[[Path], int] = _opened

    def members(self) -> Iterator[Member]:
        """In one order for all; links are links, wherever they lead. Refused."""
        yield self._entry("", Kind.FOLDER, 0o755), None
        top = self.opened(self.folder)
        try:
            yield from self._below(top)
        finally:
            os.close(top)

    def _below(self, top: int) -> Iterator[Member]:
        for place, folders, files, fd in os.fwalk(".", follow_symlinks=False, dir_fd=top):
            folders.sort()
            below = os.path.normpath(place)
            if below.count("/") >= _DEEPEST:
                raise Refused(f"folders in {self.folder} are too deep in one another")
            for name in sorted((*folders, *files)):
                path = name if below == "." else f"{below}/{name}"
                yield from self._one(path, name, fd)

    def _one(self, path: str, name: str, fd: int) -> Iterator[Member]:
        status = os.lstat(name, dir_fd=fd)
        if stat.S_ISDIR(status.st_mode):
            yield self._entry(path, Kind.FOLDER, status.st_mode), None
        elif stat.S_ISLNK(status.st_mode):
            target = os.readlink(name, dir_fd=fd)
            yield self._entry(path, Kind.SYMLINK, 0o777, target=target), None
        elif stat.S_ISREG(status.st_mode):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open(name, flags, dir_fd=fd), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise Refused(f"{path} changes while it is read")
                entry = self._entry(path, Kind.FILE, status.st_mode, size=status.st_size)
                yield entry, file
        else:
            yield None, None

    def _entry(self, path: str, kind: Kind, mode: int, *, size: int = 0, target: str = "") -> Entry:
        return Entry(
            name=f"{self.prefix}/{path}", kind=kind, mode=stat.S_IMODE(mode), uid=self.uid,
            gid=self.gid, mtime=self.mtime, size_bytes=size, target=target,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileLayer:
    """One *file*, which *opened* opens, as *name* in the image."""

    file: Path
    name: str
    mtime: int = 0
    opened: Callable[[Path], int] = _opened

    def members(self) -> Iterator[Member]:
        """It alone."""
        with open(self.file, "rb", opener=lambda path, _: self.opened(Path(path))) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Refused(f"{self.file} is no file")
            mode = stat.S_IMODE(status.st_mode)
            entry = Entry(name=self.name, kind=Kind.FILE, mode=mode, mtime=self.mtime,
                          size_bytes=status.st_size)  # fmt: skip
            yield entry, file


# -- tar


def _members(file: _Forward) -> Iterator[Member]:
    # Not a stream of tarfile's own, which reads headers of any size into memory.
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (found := tar.next()) is not None:
            forget_entries(tar)
            content = tar.extractfile(found) if found.isreg() else None
            with file.content():
                yield _entry(found), content
    file.drain()


def _entry(found: tarfile.TarInfo) -> Entry | None:
    kind = Kind.FILE if found.isreg() else _KINDS.get(found.type)
    if kind is None:
        return None
    if not math.isfinite(found.mtime):
        raise Refused(f"{found.name[:80]!r} has a time that is none")
    return Entry(
        name=found.name, kind=kind, mode=found.mode, uid=found.uid, gid=found.gid,
        mtime=found.mtime, size_bytes=found.size if kind is Kind.FILE else 0,
        target=found.linkname if kind in (Kind.SYMLINK, Kind.HARD_LINK) else "",
    )  # fmt: skip


def forget_entries(tar: tarfile.TarFile) -> None:
    """It would keep a value for each entry that it has come to, and all that global heads say."""
    vars(tar)["members"].clear()
    vars(tar)["pax_headers"].clear()


class _Hashed(io.RawIOBase):
    """*file*, read from its beginning to its end, with the SHA-256 of all that it has."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._found = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._found.update(data)
        return data

    def digest(self) -> str:
        """Of all of it, also what nobody has read yet."""
        while self.read(_CHUNK):
            pass
        return self._found.hexdigest()


class _Heads:
    """How much `tarfile` may read before it comes to an entry: maps of sparse files, and heads
    before heads, have no end otherwise."""

    def __init__(self) -> None:
        self._bytes = 0

    def take(self, size: int) -> None:
        """*size* bytes more of them; Refused."""
        if not 0 <= size <= _LONGEST_HEAD:
            raise Refused("the head of an entry is too long")
        self._bytes += size
        if self._bytes > _MOST_HEADS:
            raise Refused("the heads of an entry are too long")

    def end(self) -> None:
        """There is an entry."""
        self._bytes = 0


class SmallReads(io.RawIOBase):
    """*file* for `tarfile`, which reads nothing but heads of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.heads = _Heads()

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        self.heads.take(size)
        return self._file.read(size)


class _Forward(io.RawIOBase):
    """*file* for `tarfile`, which never goes back: no more than *most* bytes, none by the giga."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file = file
        self._most = most
        self._at = 0
        self._heads = _Heads()
        self._in_content = False

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or offset < self._at:
            raise Refused("its entries do not follow one another")
        self._check(offset)
        while self._at < offset and self._next(min(_CHUNK, offset - self._at)):
            pass
        return self._at

    def read(self, size: int = -1) -> bytes:
        if not self._in_content:
            self._heads.take(size)
        return self._next(size)

    @contextlib.contextmanager
    def content(self) -> Iterator[None]:
        """What is read meanwhile is the content of an entry, and no head."""
        self._heads.end()
        self._in_content = True
        yield
        self._in_content = False

    def _next(self, size: int) -> bytes:
        self._check(self._at + size)
        data = self._file.read(size)
        while len(data) < size and (more := self._file.read(size - len(data))):
            data += more  # what decompresses gives what it has
        # umoci ends a layer without the zeros that fill its last block.
        data += bytes(min(size - len(data), -(self._at + len(data)) % tarfile.BLOCKSIZE))
        self._at += len(data)
        return data

    def _check(self, offset: int) -> None:
        if offset > self._most:
            raise Refused(f"a layer has more than {self._most >> 20} MiB")

    def drain(self) -> None:
        """Read what stands behind the end of the archive, which a compressor checks."""
        while self._next(_CHUNK):
            pass


@contextlib.contextmanager
def _plain(raw: _Hashed) -> Iterator[IO[bytes]]:
    """What *raw* is when it is no longer compressed."""
    first = raw.read(4)
    rest = io.BufferedReader(_Joined(first, raw), _CHUNK)
    if first.startswith(_GZIP):
        with gzip.open(rest) as plain:
            yield plain  # type: ignore[misc]
    elif first == _ZSTD:
        with _zstd(rest) as plain:
            yield plain
    else:
        yield rest


class _Joined(io.RawIOBase):
    """*first*, and then *rest*."""

    def __init__(self, first: bytes, rest: _Hashed) -> None:
        self._first = first
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._first[: len(buffer)] or self._rest.read(len(buffer))
        self._first = self._first[len(data) :] if self._first else b""
        buffer[: len(data)] = data
        return len(data)


@contextlib.contextmanager
def _zstd(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Python has no zstd before 3.14: the program of that name does it, as nobody, from pipe to
    pipe."""
    nobody = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    words = ["zstd", "--decompress", "--stdout", "--quiet", f"--memory={_ZSTD_MEMORY}"]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, **nobody)  # type: ignore[call-overload]
    except FileNotFoundError:
        raise HostError(
            attempt="read a layer of the image",
            answer="it is compressed with zstd, and there is no program of that name here",
            remedy=("Install it:", f"{COMMAND}apt install zstd"),
        ) from None
    with process:
        feeder = threading.Thread(target=_feed, args=(file, process.stdin), daemon=True)
        feeder.start()
        try:
            yield process.stdout
            if process.wait() != 0:
                raise Refused("a layer is broken: zstd cannot read it")
        finally:
            process.kill()
            feeder.join()


def _feed(file: IO[bytes], pipe: IO[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError), pipe:
        shutil.copyfileobj(file, pipe, _CHUNK)
