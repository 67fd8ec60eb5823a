"""stand_ins.py - any process outside: mount points that covers made in a work directory, and their
end.

They are made by PID 1 (`facilities/workdir/inside/covers.py`), noted down in the record, and
removed with the last sandbox of the tree.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import replace
from pathlib import Path

from sandbox_provisioner.host import WorkdirFacts
from sandbox_provisioner.locks import locked
from sandbox_provisioner.places import open_again
from sandbox_provisioner.records import (
    UNREADABLE,
    Record,
    RecordFolder,
    all_records,
    joined_stand_ins,
)
from sandbox_provisioner.spec import WRITTEN_THROUGH, Covers, relative

# The texts of files that are made for covers.
_UNTOUCHED = {b"", *(text.encode() for _, text in Covers().repository_placed)}


def planned_stand_ins(workdir: WorkdirFacts) -> tuple[tuple[str, str], ...]:
    """(kind, path) of what the covers of *workdir* will have to make, outermost first.

    It stands in the record before it is done: if the server is killed meanwhile, `sweep` finds it.
    """
    covered = workdir.covered
    wanted = dict.fromkeys((*covered.files, *(path for path, _ in covered.placed)), "file")
    wanted |= dict.fromkeys(covered.links, "link") | dict.fromkeys(covered.sockets, "socket")
    wanted |= dict.fromkeys(covered.directories, "directory")
    homes = {os.path.dirname(link) for link in covered.links}
    wanted |= {os.path.join(home, WRITTEN_THROUGH): "directory" for home in homes}
    for path in tuple(wanted):
        while path := os.path.dirname(path):
            wanted[path] = "directory"
    full = ((kind, os.path.join(workdir.source, path)) for path, kind in sorted(wanted.items()))
    return tuple((kind, path) for kind, path in full if not os.path.lexists(path))


def remove_stand_ins(runtime: Path, record: Record) -> None:
    """Remove the mount points that *record*'s sandbox made in its work directory, and those that
    others have left to it.

    Not while another sandbox works in the same tree: rmdir(2) of a directory that is a mount point
    in another namespace takes the mount away there, and what it covered would be open.
    """
    if not record.made and not (runtime / record.sandbox_id).exists():
        return  # it was refused before there was a record, and nobody can have left it anything
    with locked(runtime):
        record = _leaving(RecordFolder(runtime / record.sandbox_id), record)
        if not record.made:
            return
        others = [o for _, o in all_records(runtime) if o.sandbox_id != record.sandbox_id]
        if any(_same_tree(record, other) for other in others):
            _bequeath(runtime, record)
            return
        try:
            workdir = open_again(record.workdir, record.device, record.inode)
        except OSError:
            return  # it has gone, or is somewhere else: what stands at its path is not ours
        try:
            # What was written through links lies in a directory: that one goes after them.
            made = sorted(reversed(record.made), key=lambda pair: pair[0] == "directory")
            for kind, path in made:
                with contextlib.suppress(OSError):
                    _remove_empty(kind, _below(record, path), workdir)
        finally:
            os.close(workdir)


def _below(record: Record, path: str) -> str:
    """*path* of a stand-in as seen from the work directory, "" if it lies elsewhere: who made it
    knew the path inside, who planned it the real one."""
    return relative(path, record.workdir) or relative(path, record.shown_at) or ""


def _leaving(folder: RecordFolder, record: Record) -> Record:
    """*record* with what others have left to it; from now on nobody leaves it anything."""
    try:
        found = folder.read()
    except UNREADABLE:
        return record
    if not found.workdir:
        return record
    with contextlib.suppress(OSError):  # on a full disk it may be left something, and lose it
        folder.write(replace(found, workdir="", made=()))
    return replace(record, made=joined_stand_ins(record.made, found.made))


def _bequeath(runtime: Path, record: Record) -> None:
    """Let another living sandbox of the same tree remove them at its own end."""
    for folder, other in all_records(runtime):
        is_other = other.sandbox_id != record.sandbox_id
        if is_other and _same_tree(record, other):
            folder.write(replace(other, made=(*record.made, *other.made)))
            return


def _same_tree(one: Record, other: Record) -> bool:
    """Whether one work directory is the other, by whatever name, or lies in it; a nursery has
    none."""
    if not one.workdir or not other.workdir:
        return False
    if one.inode and (one.device, one.inode) == (other.device, other.inode):
        return True
    pairs = (one.workdir, other.workdir), (other.workdir, one.workdir)
    return any(relative(path, base) is not None for path, base in pairs)


def _remove_empty(kind: str, path: str, workdir: int) -> None:
    """rmdir or unlink *path* below the descriptor *workdir* if it is as empty as it was made; no
    symbolic link is followed."""
    names = path.split("/")
    fd = os.dup(workdir)
    try:
        for name in names[:-1]:
            below = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = below
        if kind == "directory":
            os.rmdir(names[-1], dir_fd=fd)
        elif kind == "link":
            _remove_link(names[-1], fd)
        elif kind == "socket":
            if stat.S_ISSOCK(os.stat(names[-1], dir_fd=fd, follow_symlinks=False).st_mode):
                os.unlink(names[-1], dir_fd=fd)
        elif _is_untouched(names[-1], fd):
            os.unlink(names[-1], dir_fd=fd)
    finally:
        os.close(fd)


def _is_untouched(name: str, dir_fd: int) -> bool:
    """Whether the file still holds what we put into it, so that nothing of anybody's is lost."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    with open(fd, "rb") as file:
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        return regular and file.read(4096) in _UNTOUCHED


def _remove_link(name: str, home_fd: int) -> None:
    """A link that stands in for the file *name* of a home gives way to what a program outside has
    written through it, if any has."""
    if os.readlink(name, dir_fd=home_fd) != f"{WRITTEN_THROUGH}/{name}":
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            fd = home_fd
            for part in WRITTEN_THROUGH.split("/"):
                fd = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                stack.callback(os.close, fd)
            if stat.S_ISREG(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                os.rename(name, name, src_dir_fd=fd, dst_dir_fd=home_fd)
                return
        os.unlink(name, dir_fd=home_fd)
