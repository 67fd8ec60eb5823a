"""files.py - in the launching process: the files of a cgroup hierarchy, and honest errors.

A cgroup's interface is files (cgroups(7)). This room knows how to read and write one, and that its
error has to name the file, the value and the errno; it knows no controller.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sandbox_provisioner.errors import HostError, Remedy
from sandbox_provisioner.facilities.caps.wish.cap import same_text

PARENT = "sandbox-provisioner"
# In it, the groups of people's sums: hub/NAME/KIND/ID.
HUB = "hub"

# A group that has been removed answers ENOENT to open and ENODEV to those who had its file open.
_GONE = frozenset({errno.ENOENT, errno.ENODEV})
_NOT_TOLD = _GONE | {errno.EOPNOTSUPP}

_READ_BYTES = 1 << 16

# How often another process may remove our empty parent directory between our two mkdirs.
_RACES = 100

_OTHER_PROGRAM = "Look for another program that manages this cgroup, and start again."
_BAD_VALUE = "A group above this one may allow less, or this kernel not know such a value."


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One value for one file of a group: what the drivers decide, and `apply` does.

    *attempt* and *remedy* are for the error, should the kernel refuse. *same* compares what was
    written with what the file reads afterwards, for files that answer in another notation.
    """

    path: str
    value: str
    attempt: str
    remedy: Remedy
    same: Callable[[str, str], bool] = same_text

    def is_in_force(self) -> bool:
        """Whether the file tells the value already."""
        back = read(self.path)
        return back is not None and self.same(self.value, back)

    def is_kept(self) -> bool:
        """Whether the file tells the value already, or a smaller one."""
        back = read(self.path)
        if back is None or self.same(self.value, back):
            return back is not None
        most, *period = back.split() or [""]
        value, *same_period = self.value.split()
        if not most.isdecimal() or period != same_period:
            return False
        return value in {"max", "-1"} or (value.isdecimal() and int(most) <= int(value))

    def apply(self) -> None:
        """Write the value and read it back.

        Raises HostError if the file refuses the value, or accepts it and then tells another one.
        """
        write(self.path, self.value, attempt=self.attempt, remedy=self.remedy)
        back = read(self.path)
        if back is None:
            error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            act = f"reading {self.path} back"
            raise refused(act, error, self.attempt, _OTHER_PROGRAM) from error
        if not self.same(self.value, back):
            raise HostError(
                attempt=self.attempt,
                answer=f"{self.path} reads {back!r} after {self.value!r} was written to it",
                remedy=_OTHER_PROGRAM,
            )


def apply_again(settings: Iterable[Setting]) -> None:
    """Apply those *settings* of a group that others live in which it does not have yet.

    Memory plus swap may not be less than memory: a larger value for both is refused in the order
    that a smaller one needs (memory.rst, 5.3), so what was refused is tried once more, last.
    """
    due = [setting for setting in settings if not setting.is_in_force()]
    last = []
    for setting in due:
        try:
            setting.apply()
        except HostError:
            last.append(setting)
    for setting in last:
        setting.apply()


def put(path: str, value: str) -> None:
    """Write *value* in one write(2), which is how a cgroup file takes it; raises OSError.

    Without O_CREAT, so that a missing file is ENOENT instead of whatever the cgroup file system
    answers to the wish for a new one.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    finally:
        os.close(descriptor)


def write(path: str, value: str, *, attempt: str, remedy: Remedy) -> None:
    """Write *value* to a cgroup file; raises HostError that names the file, the value and errno."""
    try:
        put(path, value)
    except OSError as error:
        if error.errno == errno.EINVAL:
            remedy = _BAD_VALUE
        raise refused(f"writing {value!r} to {path}", error, attempt, remedy) from error


def read(path: str) -> str | None:
    """What a cgroup file says, stripped; None where the group or, in this kernel, the file is not.

    Raises HostError if the file is there and cannot be read.
    """
    try:
        return _whole(path).decode("ascii").strip()
    except OSError as error:
        if error.errno in _NOT_TOLD:
            return None
        remedy = "Check who owns the cgroup and how its file system is mounted."
        raise refused(f"reading {path}", error, "read from a cgroup", remedy) from error


def _whole(path: str) -> bytes:
    """What is in the file, by a third of the time of `Path.read_text`: a start reads dozens."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = b""
        while more := os.read(descriptor, _READ_BYTES):
            found += more
        return found
    finally:
        os.close(descriptor)


def read_number(path: str) -> int | None:
    """The number in a cgroup file; None for "max" and where `read` gives None."""
    text = read(path)
    return int(text) if text is not None and text.isdecimal() else None


def read_keyed(path: str) -> dict[str, int]:
    """A "flat keyed" file (kernel: admin-guide/cgroup-v2.rst), empty where there is none."""
    pairs = (line.partition(" ") for line in (read(path) or "").splitlines())
    return {key: int(number) for key, _, number in pairs if number.isdecimal()}


def read_words(path: str) -> frozenset[str]:
    """The words of a file such as cgroup.controllers, empty where there is none."""
    return frozenset((read(path) or "").split())


def read_pids(group: str) -> list[int]:
    """The processes of *group*, as seen from our pid namespace.

    Those of a foreign pid namespace read as 0 (cgroups(7)); nobody could signal them by number.
    """
    return [int(line) for line in (read(f"{group}/cgroup.procs") or "").split() if line != "0"]


def refused(act: str, error: OSError, attempt: str, remedy: Remedy) -> HostError:
    """The HostError for a failed *act*, with errno by name: ``EBUSY (Device or resource busy)``."""
    code = errno.errorcode.get(error.errno or 0, str(error.errno))
    return HostError(attempt=attempt, answer=f"{act}: {code} ({error.strerror})", remedy=remedy)


def make_group(
    base: str, name: str, *, attempt: str, remedy: Remedy, prepare: Callable[[str], None]
) -> str:
    """Make and return ``base/sandbox-provisioner/name``; the directories above it, of which *name*
    may name some, may be there already.

    *prepare* is called with each of these before anything is made in it. Raises HostError, also if
    *name* exists: it belongs to another sandbox.
    """
    above = [PARENT, *name.split("/")[:-1]]
    for attempts_left in reversed(range(_RACES)):
        try:
            directory = base
            for part in above:
                directory = f"{directory}/{part}"
                make_shared(directory, attempt=attempt, remedy=remedy)
                prepare(directory)
            return make_directory(f"{base}/{PARENT}/{name}", attempt=attempt, remedy=remedy)
        except HostError as error:
            # The last sandbox of another process may have taken them with it just now.
            if not (attempts_left and _vanished(error)):
                raise
    raise AssertionError("the last attempt returns or raises")


def make_shared(path: str, *, attempt: str, remedy: Remedy) -> None:
    """Make a directory for many groups, if it is not there; HostError."""
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        return
    except OSError as error:
        raise refused(f"making {path}", error, attempt, remedy) from error


def make_directory(path: str, *, attempt: str, remedy: Remedy) -> str:
    """Make one group and return it; HostError, also if it is there."""
    try:
        os.mkdir(path, 0o755)
    except OSError as error:
        if isinstance(error, FileExistsError):
            remedy = "End the sandbox that has this name, or run: jupyter sandbox gc"
        raise refused(f"making {path}", error, attempt, remedy) from error
    return path


def _vanished(error: HostError) -> bool:
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _GONE


def remove_group(group: str) -> bool:
    """Remove one empty group, and those of our directories above it whose last it was; False while
    busy.

    A group that is gone already counts as removed. Raises HostError for anything but EBUSY.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(group)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        remedy = f"Remove it by hand: rmdir {group}"
        raise refused(f"removing {group}", error, "remove a cgroup", remedy) from error
    # Other sandboxes live there, or another process was faster: both are fine.
    with contextlib.suppress(OSError):
        for directory in _above(group):
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(directory)
    return True


def _above(group: str) -> Iterator[str]:
    """Our directories that *group* lies in, the nearest first."""
    base, parent, name = group.rpartition(f"/{PARENT}/")
    if not parent:
        yield os.path.dirname(group)
        return
    while name:
        name = os.path.dirname(name)
        yield f"{base}/{PARENT}/{name}".rstrip("/")
