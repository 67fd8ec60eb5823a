"""quotas.py - who launches, as the machine's root: the limit of one directory, by a project quota.

XFS and ext4 count what belongs to a *project*, a number that each file has. A directory with a
limit has a project of its own, which all that is in it has, too, and what is made in it begins
with::

    the directory    its project, one of `OF_WORKDIRS`, and that what is made in it inherits this;
                     the attribute trusted.sandbox_provisioner, which root alone can read and write:
                     "PROJECT INODE counted", or "PROJECT INODE" until all that is in it is counted
    file system      the limit of this project, and what it has

So nothing is kept elsewhere: it goes with the directory, wherever its disk is attached. Linux lets
nothing of another project come into such a directory by a name, only as a copy (rename(2), link(2):
EXDEV), and lets nobody change a project who is in another user namespace than the first.

An earlier kernel has made what is in the directory. So it is walked below a descriptor, and no link
is followed, no mount entered.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass

from sandbox_provisioner.errors import COMMAND, HostError, Remedy
from sandbox_provisioner.facilities.storage.facts import WorkdirQuota, not_enforced
from sandbox_provisioner.facilities.storage.images import make_directory
from sandbox_provisioner.facilities.storage.projects import OF_WORKDIRS, free_project
from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.locks import locked

_SWITCHED_OFF = "Switch them on: sudo quotaon -P and the path that its disk is mounted at."
_MARK = "trusted.sandbox_provisioner"
_MARKED = re.compile(rb"(\d{1,10}) (\d{1,20})( counted)?")
# A start waits for it; a command may take its time.
START_SECONDS = 20.0
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
# A file may have become something else meanwhile, which is not waited for.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_BELOW = (
    kernel.RESOLVE_BENEATH
    | kernel.RESOLVE_NO_XDEV
    | kernel.RESOLVE_NO_SYMLINKS
    | kernel.RESOLVE_NO_MAGICLINKS
)
# openat2(2): it has gone, has become a link or something else, or is another mount. What has moved
# meanwhile is found where it is now: into a directory that is counted already Linux moves nothing.
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.ENXIO}


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a directory, or one around it unless it *is_own*, has of its limit; 0: no limit."""

    project: int
    is_own: bool
    size_bytes: int
    inodes: int
    used_bytes: int
    used_inodes: int


class NotCounted(Exception):
    """Not all in a directory can be counted: the text is why, a clause, and *remedy* what helps."""

    def __init__(self, text: str, remedy: Remedy) -> None:
        super().__init__(text)
        self.remedy = remedy


def hold(
    fd: int, quota: WorkdirQuota, seconds: float = START_SECONDS, *, since: float | None = None
) -> None:
    """Let the directory *fd* hold no more than *quota* from now on; HostError if that cannot be,
    or its files are so many that they are not counted after some *seconds*, from now on or *since*
    then (monotonic)."""
    since = time.monotonic() if since is None else since
    with _told(quota.path, f"in {seconds:g} s"), _opened(fd) as top:
        _hold(top, quota, since + seconds)


def look(fd: int, path: str) -> Held | None:
    """What limit holds for the directory *fd*, None where there is none of ours; HostError."""
    with _told(path), _opened(fd) as top:
        try:
            project, _ = kernel.project_of(top)
        except OSError as error:
            if error.errno in {errno.ENOTTY, errno.EOPNOTSUPP}:  # a file system without projects
                return None
            raise
        if project not in OF_WORKDIRS:
            return None
        size, inodes, used, used_inodes = kernel.project_quota(top, project)
        return Held(
            project=project,
            is_own=_mark_of(top)[0] == project,
            size_bytes=size,
            inodes=inodes,
            used_bytes=used,
            used_inodes=used_inodes,
        )


def release(fd: int, path: str) -> None:
    """Let the directory *fd* have no limit of its own any more; HostError where it is a part of
    another one that has one."""
    with _told(path), _opened(fd) as top:
        project, _ = kernel.project_of(top)
        if project not in OF_WORKDIRS:
            return
        is_own = _mark_of(top)[0] == project
        if not is_own and _is_part(top, project):
            raise NotCounted("it lies in a directory that has one", "Name that directory.")
        for file, _, is_directory in _all_in(top, float("inf")):
            if kernel.project_of(file)[0] == project:
                kernel.set_project(file, 0, inherit=False)
                if is_directory:
                    _unmark(file)
        if is_own:  # else it has been moved here, and others have that limit, too
            kernel.limit_project(top, project, 0, 0)


@contextlib.contextmanager
def _told(path: str, within: str = "") -> Iterator[None]:
    """What fails is a HostError that names *path*."""
    try:
        yield
    except TimeoutError:
        command = f"{COMMAND}sudo jupyter sandbox quota {shlex.quote(path)} --limit SIZE"
        answer = f"it has more files than can be counted {within}"
        raise cannot(path, answer, ("Have them counted once:", command)) from None
    except NotCounted as error:
        raise cannot(path, str(error), error.remedy) from None
    except OSError as error:
        remedy = "See what the machine's log tells of its file system."
        raise cannot(path, str(error), remedy) from None


def cannot(path: str, answer: str, remedy: Remedy) -> HostError:
    """Why a limit of the work directory *path* cannot be held."""
    return HostError(attempt=f"limit the work directory {path}", answer=answer, remedy=remedy)


@contextlib.contextmanager
def _opened(fd: int) -> Iterator[int]:
    """The directory *fd*, which may stand for it alone (O_PATH), to read it."""
    top = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield top
    finally:
        os.close(top)


def _hold(top: int, quota: WorkdirQuota, until: float) -> None:
    if lack := not_enforced(top):
        raise NotCounted(lack, _SWITCHED_OFF)
    if _needs_project(top):
        _give_project(top, quota)
    project, _ = kernel.project_of(top)
    marked, counted = _mark_of(top)
    if project not in OF_WORKDIRS:
        raise _of_other_project("it", project)
    if marked != project:
        _check_around(top, project, quota)
        return
    kernel.limit_project(top, project, quota.size_bytes, quota.inodes)
    if not counted:
        _count(top, project, until)
        _mark(top, project, b" counted")


def _needs_project(top: int) -> bool:
    """Whether *top* has no project, or has one of its own that what is made there would not."""
    project, inherits = kernel.project_of(top)
    return not project or (not inherits and project == _mark_of(top)[0])


def _check_around(top: int, project: int, quota: WorkdirQuota) -> None:
    """What it lies in has a limit, which is its own, too: another one here would take from that
    one what is here."""
    size, inodes, _, _ = kernel.project_quota(top, project)
    for name, asked, has in (
        ("workdir_limit", quota.size_bytes, size),
        ("workdir_inode_limit", quota.inodes, inodes),
    ):
        if asked is not None and not 0 < has <= asked:
            raise NotCounted(
                f"it lies in a directory with a limit, whose {name} is {has or 'none'}, and "
                f"not {asked} or less",
                f"Set {name} to that of the other directory, or clear that one: jupyter sandbox "
                "quota DIRECTORY --clear",
            )


def _of_other_project(path: str, project: int) -> NotCounted:
    return NotCounted(
        f"{path} belongs to project {project}, which is not one of ours",
        "Leave out workdir_limit where an administrator limits that project; else give the file to "
        "project 0: chattr -p 0 FILE",
    )


def _give_project(top: int, quota: WorkdirQuota) -> None:
    """One that nobody has, for *top*; from here on what is made there is counted."""
    with locked(make_directory()):
        if not _needs_project(top):  # another start has given it one meanwhile
            return
        project = free_project(top, OF_WORKDIRS)
        # By its limit others see that it is somebody's.
        kernel.limit_project(top, project, quota.size_bytes, quota.inodes)
        _mark(top, project)
        kernel.set_project(top, project, inherit=True)


def _mark_of(top: int) -> tuple[int, bool]:
    """The project that *top* has been given, 0 for none, and whether all in it is counted. One that
    was copied with its attributes has another inode."""
    try:
        found = _MARKED.fullmatch(os.getxattr(top, _MARK))
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.EOPNOTSUPP}:
            return 0, False
        raise
    if not found or int(found[2]) != os.fstat(top).st_ino:
        return 0, False
    return int(found[1]), bool(found[3])


def _mark(top: int, project: int, counted: bytes = b"") -> None:
    os.setxattr(top, _MARK, b"%d %d%s" % (project, os.fstat(top).st_ino, counted))


def _unmark(directory: int) -> None:
    with contextlib.suppress(OSError):  # it has none
        os.removexattr(directory, _MARK)


def _is_part(top: int, project: int) -> bool:
    """Whether the directory that *top* lies in is of the same project."""
    above = os.open("..", _DIRECTORY | os.O_CLOEXEC, dir_fd=top)
    try:
        same = os.fstat(above).st_dev == os.fstat(top).st_dev
        return same and kernel.project_of(above)[0] == project
    finally:
        os.close(above)


def _count(top: int, project: int, until: float) -> None:
    """Let all that is in *top* be of *project*. A file of another owner's that has names outside,
    too, is not taken from them: NotCounted."""
    owner = os.fstat(top).st_uid
    outside: dict[int, tuple[int, str]] = {}
    for file, path, is_directory in _all_in(top, until):
        has, inherits = kernel.project_of(file)
        if has == project and inherits is is_directory:
            continue
        if has and has not in OF_WORKDIRS:
            raise _of_other_project(path, has)
        status = os.fstat(file)
        if not is_directory and status.st_nlink > 1 and status.st_uid != owner:
            seen, _ = outside.pop(status.st_ino, (0, ""))
            if seen + 1 < status.st_nlink:
                outside[status.st_ino] = seen + 1, path
                continue
        kernel.set_project(file, project, inherit=is_directory)
        if is_directory and path != ".":  # it had a limit of its own: it is a part of this one now
            _unmark(file)
    for _, path in outside.values():
        raise NotCounted(
            f"{path} in it belongs to somebody else, and has names outside of it, too",
            "Replace it by a copy, or remove it.",
        )


def _all_in(top: int, until: float) -> Iterator[tuple[int, str, bool]]:
    """A descriptor of *top*, of each directory in it, and of each file of those, until the next one
    is asked for, with its path and whether it is a directory. A directory comes before it is
    listed. What is neither takes no room. TimeoutError when it is past *until*."""
    waiting = ["."]
    while waiting:
        with _below(top, waiting[-1], _DIRECTORY) as directory:
            above = waiting.pop()
            if directory < 0:
                continue
            yield directory, above, True
            with os.scandir(directory) as entries:
                for entry in entries:
                    if time.monotonic() > until:
                        raise TimeoutError
                    path = entry.name if above == "." else f"{above}/{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(path)
                    elif entry.is_file(follow_symlinks=False):
                        with _below(directory, entry.name, _FILE) as file:
                            if file >= 0:
                                yield file, path, False


@contextlib.contextmanager
def _below(directory: int, path: str, flags: int) -> Iterator[int]:
    """What *path* is below *directory*, -1 where it is not there any more."""
    try:
        fd = kernel.openat2(directory, path, flags, _BELOW)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            text = f"{path[:64]}... has more folders in each other than a path can name"
            raise NotCounted(text, "Take them apart, or remove them.") from None
        if error.errno not in _NOT_THERE:
            raise
        fd = -1
    try:
        yield fd
    finally:
        if fd >= 0:
            os.close(fd)
