"""grade/copies.py - whoever grades: the files of a submission, which somebody else has named.

They are copied name by name from directories that are open, no symbolic link is followed (one of a
submission's may lead to the answer key), and what is no regular file is left out.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.inside.printable import one_line

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DEEPEST = 20
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """How much a submission may be: files, and their bytes together."""

    most_files: int = 2000
    most_bytes: int = 100 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """A regular file of a submission, open as *fd*, by its *path* in it."""

    path: str
    fd: int
    size: int


def files_of(
    top: Path, ignored: Collection[str] = (), measure: Measure | None = None
) -> Iterator[Found]:
    """The regular files in *top*, in order, each open until the next one is asked for. SpecError
    where they are more than *measure*; OSError where *top* is no directory."""
    left = measure or Measure()
    count = size = 0
    fd = os.open(top, _OPEN | os.O_DIRECTORY)
    try:
        for found in _walk(fd, "", ignored, 0):
            count, size = count + 1, size + found.size
            if count > left.most_files or size > left.most_bytes:
                raise _too_much(top, left)
            yield found
    finally:
        os.close(fd)


def _too_much(top: Path, measure: Measure) -> SpecError:
    return SpecError(
        attempt=f"read the submission {one_line(str(top))}",
        answer=f"it is more than {measure.most_files} files or {measure.most_bytes >> 20} MiB",
        remedy="Look at it, and remove what does not belong to it.",
    )


def _walk(folder: int, above: str, ignored: Collection[str], depth: int) -> Iterator[Found]:
    for name in sorted(os.listdir(folder)):
        if any(fnmatch(name, pattern) for pattern in ignored):
            continue
        try:
            fd = os.open(name, _OPEN, dir_fd=folder)
        except OSError:  # a link, a socket, or not ours to read
            continue
        try:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode) and depth < _DEEPEST:
                yield from _walk(fd, f"{above}{name}/", ignored, depth + 1)
            elif stat.S_ISREG(status.st_mode):
                yield Found(above + name, fd, status.st_size)
        finally:
            os.close(fd)


def copy(
    source: Path, target: Path, ignored: Collection[str] = (), but: Collection[str] = ()
) -> None:
    """Copy the files of *source* into the folder *target*, over what is there, *but* those of these
    paths; see `files_of`."""
    target.mkdir(mode=0o755, exist_ok=True)
    for found in files_of(source, ignored):
        if found.path in but:
            continue
        path = target / found.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with open(found.fd, "rb", closefd=False) as reader, open(path, "xb") as writer:
            _pour(reader, writer, found.size)
        path.chmod(0o644)


def _pour(reader: BinaryIO, writer: BinaryIO, left: int) -> None:
    """So much of a file as was counted, though somebody may write to it now."""
    while left > 0 and (data := reader.read(min(left, _CHUNK))):
        writer.write(data)
        left -= len(data)


def digest_of(top: Path, ignored: Collection[str] = ()) -> str:
    """What tells the files of *top* from others: their names and what is in them."""
    whole = hashlib.sha256()
    for found in files_of(top, ignored):
        with open(found.fd, "rb", closefd=False) as reader:
            one = hashlib.file_digest(reader, "sha256").hexdigest()
        whole.update(f"{found.path.encode('utf-8', 'surrogateescape').hex()} {one}\n".encode())
    return whole.hexdigest()
