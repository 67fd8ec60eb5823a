"""trust.py - any process outside; reads only: who could change what a path leads to.

Whoever may write to a file, or to a directory on the way to it, decides what is read there; and who
owns it may let himself write. So the way is walked name by name, as path_resolution(7) has it, and
every directory and link on it is looked at, also where a link leads. What is found out stays true:
whoever was asked about can change nothing of the way.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_MOST_LINKS = 40  # as many as path_resolution(7) follows
_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class Writer:
    """A user *uid* in the groups *gids*, who may want to change something."""

    uid: int
    gids: frozenset[int]

    @classmethod
    def this_process(cls) -> Writer:
        """Who runs us."""
        return cls(os.geteuid(), frozenset((os.getegid(), *os.getgroups())))

    def may_change(self, status: os.stat_result) -> bool:
        """Whether one with *status* is theirs to change. To root all is: of it we ask who else
        may, since a server of root's is not where its files are attacked from."""
        if self.uid == 0:
            return not is_roots_alone(status)
        writable_by = stat.S_IWOTH
        if status.st_gid in self.gids:
            writable_by |= stat.S_IWGRP  # with an access list this is its mask: acl(5)
        return status.st_uid == self.uid or bool(status.st_mode & writable_by)


def is_roots_alone(status: os.stat_result) -> bool:
    """Whether root owns it, and nobody else may write to it."""
    return status.st_uid == 0 and not status.st_mode & _BY_OTHERS


def changeable(path: str, writer: Writer) -> str:
    """What *writer* may change of *path* or on the way to it, "" if nothing. What is missing, or
    cannot be looked at, counts: we cannot tell."""
    for place, status in _way(path):
        if status is None:
            return place
        # The mode of a symbolic link says nothing: symlink(7). Its directory comes before it.
        if not stat.S_ISLNK(status.st_mode) and writer.may_change(status):
            return place
        if writer == Writer.this_process() and _is_granted(place, status, writer):
            return place
    return ""


def _is_granted(place: str, status: os.stat_result, writer: Writer) -> bool:
    """Whether an access list lets us write: acl(5). Of another user only its mask can be seen."""
    if writer.uid == 0 or stat.S_ISLNK(status.st_mode):
        return False
    return os.access(place, os.W_OK, effective_ids=True)


def is_roots(path: str) -> bool:
    """Whether root alone decides what *path* leads to, and what is in it, for all that who asks
    could reach. A folder that root has closed counts though we cannot look: whatever others have
    put there is nothing that could be run from here (*path* is a real one: no link leads on)."""
    folder = None
    for place, status in _way(path):
        if status is None:
            return folder is not None and _is_closed(folder) and _is_denied(place)
        if not _is_roots_or_link(status):
            return False
        folder = status
    return True


def _is_closed(status: os.stat_result) -> bool:
    """Whether it is a folder that its owner alone may enter; what an access list grants shows in
    the group's bits: acl(5)."""
    return stat.S_ISDIR(status.st_mode) and not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)


def _is_denied(place: str) -> bool:
    """Whether it may be there, for all that we may know."""
    try:
        os.lstat(place)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def not_roots_in(paths: Iterable[str], most: int) -> str:
    """The first on the way to one of *paths*, or in it, about which others than root may decide, ""
    if there is none. Who finds more than *most* in all of them cannot tell, and says which it was.
    Somebody may call it who has fewer rights than root: what is closed to that one is nothing that
    they could run."""
    for path in paths:
        if not is_roots(path):
            return path
        folders = [path] if os.path.isdir(path) else []
        while folders:
            for entry in _entries(folder := folders.pop()):
                most -= 1
                if entry is None or most < 0:
                    return folder if entry is None else path
                if not _is_roots_or_link(entry.stat(follow_symlinks=False)):
                    return entry.path
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
    return ""


def _entries(folder: str) -> Iterator[os.DirEntry[str] | None]:
    """What is in *folder*, nothing where neither we nor everybody can reach that; None where it can
    be reached, but not be listed."""
    if _look(f"{folder}/.") is None and not os.lstat(folder).st_mode & stat.S_IXOTH:
        return
    try:
        entries = os.scandir(folder)
    except PermissionError:
        yield None
        return
    with entries:
        yield from entries


def is_led_to_by_root(path: str) -> bool:
    """Whether root alone decides what *path* leads to, whoever may write to that."""
    way = list(_way(path))[:-1]
    return all(status is not None and _is_roots_or_link(status) for _, status in way)


def _is_roots_or_link(status: os.stat_result) -> bool:
    """The mode of a symbolic link says nothing: symlink(7)."""
    return stat.S_ISLNK(status.st_mode) or is_roots_alone(status)


def _way(path: str) -> Iterator[tuple[str, os.stat_result | None]]:
    """Every directory, link and file on the way to *path*, which is absolute, each with what it is;
    the last one with None where the way ends early. Each is looked at when whoever asks has judged
    those before: what others decide about may never answer."""
    names, links = _names(path), 0
    here, status = "/", _look("/")
    yield here, status
    while names and status is not None:
        name = names.pop()
        if name == "..":
            here = os.path.dirname(here)
            continue
        place = os.path.join(here, name)
        status = _look(place)
        yield place, status
        if status is None or not stat.S_ISLNK(status.st_mode):
            here = place
            continue
        links += 1
        text = _text_of(place) if links <= _MOST_LINKS else ""
        if not text:
            yield place, None
            return
        here = "/" if text.startswith("/") else here
        names += _names(text)


def _names(path: str) -> list[str]:
    """The names in *path*, the last one first."""
    return [name for name in path.split("/") if name not in {"", "."}][::-1]


def _look(place: str) -> os.stat_result | None:
    try:
        return os.lstat(place)
    except (OSError, ValueError):
        return None


def _text_of(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""
