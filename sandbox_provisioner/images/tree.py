"""tree.py - pure: a root file system as names in names, made of layers, whoever wrote them.

Nothing of an image is unpacked anywhere before all of it is known: a name leads from folder to
folder of this tree, through the image's own links, and so to nothing of the host, whatever it says.
What no box could use is left out (device nodes, set-id bits, attributes); what no honest image has
refuses all of it (`Refused`): names with "..", links to nothing, more than `Bounds`.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

_MOST_LINKS = 40  # path_resolution(7)
_LONGEST_NAME, _LONGEST_PATH = 255, 4096
_DEEPEST = 1024
_IDS = 1 << 16
_NOBODY = 65534
_MODE = 0o1777
_LATEST = (1 << 32) - 1  # squashfs has 32 bits for a time
_PLAIN = re.compile(r"/[A-Za-z0-9._+/-]*")
Names = tuple[str, ...]


class Refused(ValueError):
    """The image has something in it that no honest one has."""


class TooMuch(Refused):
    """It has more of something than `Bounds`."""


class Kind(Enum):
    """What a name can be; anything else is left out."""

    FOLDER = stat.S_IFDIR
    FILE = stat.S_IFREG
    SYMLINK = stat.S_IFLNK
    HARD_LINK = 0


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that an image may have."""

    size_bytes: int = 64 << 30
    entries: int = 600_000
    path_bytes: int = 256 << 20  # of all paths: links make long ones of few bytes
    steps: int = 20_000_000  # from name to name, on the way to all of them: links make long ways


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One name in a layer, as it stands there; *target* is that of a link."""

    name: str
    kind: Kind
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: float = 0
    size_bytes: int = 0
    target: str = ""


@dataclass(slots=True, eq=False)
class Node:
    """A folder, a file or a symbolic link in the tree. Two names for one are hard links.

    *source* is where the content of a file stands: which layer, and the how manieth entry in it.
    *born* is the layer that each name in a folder came with; of layers below *cleared* it has
    nothing any more.
    """

    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime: int
    size_bytes: int = 0
    target: str = ""
    source: tuple[int, int] = (0, 0)
    children: dict[str, Node] = field(default_factory=dict)
    born: dict[str, int] = field(default_factory=dict)
    cleared: int = 0


class Tree:
    """What the layers so far come to."""

    def __init__(self, bounds: Bounds) -> None:
        self.root = _new_folder()
        self.size_bytes = self.entries = self._steps = 0
        self._bounds = bounds

    # -- adding

    def add(self, entry: Entry, layer: int, number: int) -> None:
        """Take *entry*, the *number*-th one of *layer*; Refused."""
        names = names_of(entry.name)
        self.count(entry)
        if not names:
            return  # the root itself
        if entry.kind is Kind.SYMLINK:
            _check_target(entry)
        folder = self._folder(names[:-1], layer)
        if entry.kind is Kind.HARD_LINK:
            node = self._linked(entry)
        else:
            node = _node(entry, (layer, number))
            before = folder.children.get(names[-1])
            if before and before.kind is node.kind is Kind.FOLDER:
                node.children, node.born = before.children, before.born
                node.cleared = before.cleared
        folder.children[names[-1]] = node
        folder.born[names[-1]] = layer

    def count(self, entry: Entry | None = None) -> None:
        """Of whatever stands in a layer, also where nothing comes of it: TooMuch above `Bounds`."""
        self.entries += 1
        if entry is not None:
            if entry.size_bytes < 0:
                raise Refused(f"{entry.name!r} has a size below zero")
            self.size_bytes += entry.size_bytes
        if self.entries > self._bounds.entries:
            raise TooMuch(f"it has more than {self._bounds.entries} entries")
        if self.size_bytes > self._bounds.size_bytes:
            raise TooMuch(f"its files have more than {self._bounds.size_bytes >> 20} MiB")

    def _go(self, steps: int) -> None:
        """TooMuch where all ways together are longer than `Bounds`."""
        self._steps += steps
        if self._steps > self._bounds.steps:
            raise TooMuch(f"to its files it is more than {self._bounds.steps} steps")

    def _folder(self, names: Names, layer: int) -> Node:
        """The folder *names*, through the image's own links; what is missing of it is made."""
        return self._walk(names, layer)[-1]

    def _walk(self, names: Names, layer: int | None) -> list[Node]:
        """The folders from the root to *names*. Without a *layer* nothing is made: Refused."""
        way, rest, links = [self.root], list(reversed(names)), 0
        self._go(len(rest))
        while rest:
            name = rest.pop()
            if name == "..":  # of a link of the image's: above the root is the root
                del way[max(len(way) - 1, 1) :]
                continue
            node = way[-1].children.get(name)
            if node is None:
                node = self._made(way[-1], name, layer)
            if node.kind is Kind.SYMLINK:
                links += 1
                if links > _MOST_LINKS:
                    raise Refused(f"{'/'.join(names)!r} goes through too many links")
                if node.target.startswith("/"):
                    del way[1:]
                parts = node.target.split("/")
                self._go(len(parts))
                rest += reversed([part for part in parts if part not in ("", ".")])
            elif node.kind is Kind.FOLDER:
                if layer is not None:  # it is of this layer, too
                    way[-1].born[name] = layer
                way.append(node)
                if len(way) > _DEEPEST:  # each folder is kept, and walked, with its whole path
                    raise Refused(f"it has folders more than {_DEEPEST} deep")
            else:
                raise Refused(f"{'/'.join(names)!r} goes through a file")
        return way

    def _made(self, folder: Node, name: str, layer: int | None) -> Node:
        if layer is None:
            raise Refused(f"{name!r} is not in it")
        self.count()
        folder.children[name] = _new_folder()
        folder.born[name] = layer
        return folder.children[name]

    def _linked(self, entry: Entry) -> Node:
        *names, last = names_of(entry.target) or ("",)
        node = self._walk(tuple(names), None)[-1].children.get(last)
        if node is None or node.kind is Kind.FOLDER:
            raise Refused(f"{entry.name!r} is a hard link to {entry.target!r}, which is no file")
        return node

    # -- taking away

    def remove(self, name: str, layer: int) -> None:
        """Take away what layers below *layer* have as *name*."""
        *names, last = names_of(name)
        try:
            folder = self._walk(tuple(names), None)[-1]
        except TooMuch:
            raise
        except Refused:
            return  # nothing is there
        if last in folder.children:
            _remove(folder, last, layer)

    def clear(self, name: str, layer: int) -> None:
        """Take away all that layers below *layer* have in the folder *name*."""
        _clear(self._folder(names_of(name), layer), layer)

    # -- looking

    def latest(self) -> int:
        """The time of what was changed last."""
        return max((node.mtime for _, node in self.walk()), default=0)

    def find(self, path: str) -> Node | None:
        """What *path* leads to, as a program in this root would find it."""
        names = tuple(part for part in path.split("/") if part not in ("", "."))
        for _ in range(_MOST_LINKS):
            try:
                way = self._walk(names[:-1], None)
            except TooMuch:
                raise
            except Refused:
                return None
            node = way[-1].children.get(names[-1]) if names else self.root
            if node is None or node.kind is not Kind.SYMLINK:
                return node
            above = () if node.target.startswith("/") else names[:-1]
            names = (*above, *(part for part in node.target.split("/") if part not in ("", ".")))
        return None

    def walk(self) -> Iterator[tuple[str, Node]]:
        """Every name with what it is, a folder before what is in it, in one order for all;
        Refused."""
        waiting, left = [("", self.root)], self._bounds.path_bytes
        while waiting:
            path, node = waiting.pop()
            if path:
                yield path, node
            for name in sorted(node.children, reverse=True):
                below = f"{path}/{name}" if path else name
                left -= len(below)
                if left < 0:
                    most = self._bounds.path_bytes >> 20
                    raise TooMuch(f"the paths of its files come to more than {most} MiB")
                waiting.append((below, node.children[name]))


def names_of(path: str) -> Names:
    """The names in the *path* of an entry, which is meant from the root of the image; Refused."""
    names = tuple(part for part in path.split("/") if part not in ("", "."))
    if ".." in names or "\0" in path:
        raise Refused(f"{path!r} leads out of it")
    encoded = path.encode("utf-8", "surrogateescape")
    if len(encoded) > _LONGEST_PATH or any(
        len(name.encode("utf-8", "surrogateescape")) > _LONGEST_NAME for name in names
    ):
        raise Refused(f"a name is too long: {path[:80]!r}…")
    return names


def is_plain(path: str) -> bool:
    """Whether *path* has nothing in it that some program gives a meaning: jupyter_client fills
    ${VARIABLE} and {name} of a kernelspec, with the server's secrets, too."""
    return bool(_PLAIN.fullmatch(path))


def _check_target(entry: Entry) -> None:
    length = len(entry.target.encode("utf-8", "surrogateescape"))
    if not 0 < length <= _LONGEST_PATH or "\0" in entry.target:
        raise Refused(f"{entry.name[:80]!r} is a link to what can be no path")


def _new_folder() -> Node:
    return Node(kind=Kind.FOLDER, mode=0o755, uid=0, gid=0, mtime=0)


def _node(entry: Entry, source: tuple[int, int]) -> Node:
    return Node(
        kind=entry.kind,
        mode=entry.mode & _MODE,
        uid=entry.uid if 0 <= entry.uid < _IDS else _NOBODY,
        gid=entry.gid if 0 <= entry.gid < _IDS else _NOBODY,
        mtime=min(max(int(entry.mtime), 0), _LATEST),
        size_bytes=entry.size_bytes,
        target=entry.target,
        source=source,
    )


def _remove(folder: Node, name: str, layer: int) -> None:
    """What *layer* itself has put there stays."""
    if folder.born[name] < layer:
        del folder.children[name], folder.born[name]
    else:
        _clear(folder.children[name], layer)


def _clear(folder: Node, layer: int) -> None:
    """Once for each layer: who asks for it again and again has us walk no more."""
    waiting = [folder]
    while waiting:
        node = waiting.pop()
        if node.cleared == layer:
            continue
        node.cleared = layer
        for name in [name for name, born in node.born.items() if born < layer]:
            del node.children[name], node.born[name]
        waiting += node.children.values()
