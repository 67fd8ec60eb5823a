"""squash.py - in who makes images: from a tree and its layers to a squashfs file.

`sqfstar` (squashfs-tools) reads a tar that we write: it sees no byte of a head, and no name, that
has not been through `tree.py`. The same tree comes to the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from sandbox_provisioner.errors import COMMAND, HostError, joined
from sandbox_provisioner.images.layers import Layer
from sandbox_provisioner.images.tree import Entry, Kind, Node, Refused, Tree

_CHUNK = 1 << 20
# Fast to write and to read: a kernel that starts waits for it.
_COMPRESSION = "lz4"
_TRIES = 3
_MOST_TOLD = 1 << 16
_TYPES = {Kind.FOLDER: tarfile.DIRTYPE, Kind.FILE: tarfile.REGTYPE, Kind.SYMLINK: tarfile.SYMTYPE}
Progress = Callable[[int, int], None]


def squash(tree: Tree, layers: Sequence[Layer], file: Path, time: int, tell: Progress) -> None:
    """Write *tree*, whose files stand in *layers*, to the new *file*, as made at *time*, nothing in
    it later; *tell* is told how many bytes of how many are written. HostError, Refused."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(_WithoutAWord):
            _squash(tree, layers, file, time, tell)
            return
        file.unlink(missing_ok=True)
    _squash(tree, layers, file, time, tell)


def _squash(tree: Tree, layers: Sequence[Layer], file: Path, time: int, tell: Progress) -> None:
    with _sqfstar(file, time) as pipe:
        writer = _Writer(tree, pipe, tell)
        for number, layer in enumerate(layers):
            writer.write_files(number, layer)
        writer.end()


class _WithoutAWord(HostError):
    """On a busy machine sqfstar (4.5.1) ends so now and then, of which its threads are the reason:
    the same bytes make an image the next time."""


class _Writer:
    """The tar: folders and links first, then files as they come, each with all its names."""

    def __init__(self, tree: Tree, pipe: IO[bytes], tell: Progress) -> None:
        self._tar = tarfile.TarFile(fileobj=_Pipe(pipe), mode="w", format=tarfile.GNU_FORMAT)  # type: ignore[arg-type]
        self._names: dict[Node, list[str]] = {}
        self._sources: dict[tuple[int, int], Node] = {}
        self._tell = tell
        self._written = 0
        for path, node in tree.walk():
            if node.kind is Kind.FILE:
                self._names.setdefault(node, []).append(path)
                self._sources[node.source] = node
            else:
                self._tar.addfile(_info(path, node))
        self._whole = sum(node.size_bytes for node in self._names)

    def write_files(self, number: int, layer: Layer) -> None:
        """Those of *layer*, the *number*-th one; Refused if it is not what it was before."""
        for at, (entry, content) in enumerate(layer.members()):
            node = self._sources.pop((number, at), None)
            if node is not None:
                self._write(node, entry, content)

    def _write(self, node: Node, entry: Entry | None, content: IO[bytes] | None) -> None:
        if entry is None or content is None or entry.size_bytes != node.size_bytes:
            raise Refused("it changes while it is read")
        first, *others = self._names[node]
        self._tar.addfile(_info(first, node), content)
        for path in others:
            link = tarfile.TarInfo(path)
            link.type, link.linkname = tarfile.LNKTYPE, first
            self._tar.addfile(link)
        self._written += node.size_bytes
        self._tell(self._written, self._whole)

    def end(self) -> None:
        """Refused where a file has not come."""
        if self._sources:
            raise Refused("it changes while it is read")
        self._tar.close()


class _Pipe:
    """What `tarfile` wants to know of a file, for a *pipe*."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._at = 0

    def tell(self) -> int:
        return self._at

    def write(self, data: bytes) -> int:
        self._at += len(data)
        return self._pipe.write(data)


def _info(path: str, node: Node) -> tarfile.TarInfo:
    found = tarfile.TarInfo(path)
    found.type, found.linkname = _TYPES[node.kind], node.target
    found.mode, found.uid, found.gid, found.mtime = node.mode, node.uid, node.gid, node.mtime
    found.size = node.size_bytes if node.kind is Kind.FILE else 0
    return found


@contextlib.contextmanager
def _sqfstar(file: Path, time: int) -> Iterator[IO[bytes]]:
    """Its standard input; HostError where it cannot do it."""
    program = shutil.which("sqfstar")
    if program is None:
        raise HostError(
            attempt="make an image",
            answer="there is no sqfstar here, which writes squashfs files",
            remedy=("Install squashfs-tools, 4.5 or newer:",
                    f"{COMMAND}apt install squashfs-tools"),
        )  # fmt: skip
    words = [
        program, "-quiet", "-no-progress", "-exit-on-error", "-no-xattrs", "-comp", _COMPRESSION,
        "-root-mode", "755", str(file),
    ]  # fmt: skip
    # Its options for the time and the owner of the topmost folder do nothing (4.5.1): they are the
    # variable's, and those of who runs it.
    if os.geteuid() != 0:
        words = ["unshare", "--user", "--map-root-user", *words]
    variables = {**os.environ, "SOURCE_DATE_EPOCH": str(time)}
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said, env=variables
        ) as process,
    ):
        assert process.stdin
        try:
            yield process.stdin
            process.stdin.close()
            broken = False
        except BrokenPipeError:
            broken = True  # it has said why
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        except BaseException:
            process.kill()
            raise
        if process.wait() != 0 or broken:
            raise _failed(file, _end_of(said))


def _end_of(said: IO[bytes]) -> str:
    """What it has told at last. Nobody reads it before, as a pipe would have to be."""
    said.seek(max(0, said.seek(0, os.SEEK_END) - _MOST_TOLD))
    return said.read().decode(errors="backslashreplace")


def _failed(file: Path, told: str) -> HostError:
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    is_full = "No space left" in told or "Disk quota exceeded" in told
    remedy = "Make room there: the image did not fit." if is_full else "See what sqfstar says."
    kind = HostError if lines else _WithoutAWord
    return kind(
        attempt=f"write {file}", answer=joined(lines[-3:]) or "sqfstar was ended", remedy=remedy
    )
