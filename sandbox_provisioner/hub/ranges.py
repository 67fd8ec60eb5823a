"""hub/ranges.py - whoever starts boxes for people, as root: which range of ids is whose, for ever.

A kernel's range is anybody's when it has ended. That of a person's server is never somebody else's:
what a process of it leaves behind, in a file or a message queue, is then no stranger's. One file
tells, with a line for each person, "NAME FIRST"; nothing is ever taken out of it. A range becomes
another person's only where an administrator writes that one's name in place of the first.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.ids.facts import FIRST_PERSONS_ID, IDS, LAST_ID
from sandbox_provisioner.locks import locked
from sandbox_provisioner.state import STATE, make_state

FOLDER = STATE
_NAME = "ranges"
_HEADER = (
    "# Whose range of 65536 ids begins where. Written by sandbox-provisioner; take nothing out.\n"
    "# Where none is left: write a new name in place of one who will never come back, and whose\n"
    "# files are gone.\n"
)


def range_of(name: str, folder: Path = FOLDER) -> int:
    """The first id of the range of the person called *name*, who gets one if there is none yet.

    HostError where the file cannot be trusted, or no range is left.
    """
    if not name or not name.isprintable() or any(letter.isspace() for letter in name):
        raise _refused(folder, f"{name!r} is no name of a person", "Use the name of the account.")
    try:
        _make(folder)
        with locked(folder):
            found = _read(folder / _NAME)
            if name not in found:
                found[name] = _next(found, folder)
                _write(folder / _NAME, found)
            return found[name]
    except OSError as error:
        answer = f"{error.filename or folder}: {error.strerror}"
        raise _refused(folder, answer, "It has to be a directory of root's.") from error


def _make(folder: Path) -> None:
    if folder == FOLDER:
        make_state(folder)
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    _judge(folder, folder.stat())


def _judge(path: Path, status: os.stat_result) -> None:
    """What others may write would give them the ids of anybody."""
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        answer = f"others than root may write to {path}"
        raise _refused(path, answer, f"chown root {path} && chmod go-w {path}")


def _read(path: Path) -> dict[str, int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}
    with open(fd, encoding="utf-8") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _refused(path, f"{path} is no file", "Move it away.")
        _judge(path, status)
        lines = file.read().splitlines()
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        name, _, first = line.partition(" ")
        if not first.isdecimal() or name in found or int(first) in found.values():
            answer = f"line {number} of {path} is {line!r}"
            raise _refused(path, answer, "Restore it from a backup: each line is NAME FIRST, once.")
        found[name] = int(first)
    return found


def _next(found: dict[str, int], folder: Path) -> int:
    """One that nobody has ever had."""
    first = max(found.values(), default=FIRST_PERSONS_ID - IDS) + IDS
    if first + IDS - 1 > LAST_ID:
        answer = f"all {len(found)} ranges have been given to somebody"
        remedy = (
            f"In {folder / _NAME}, write the new name in place of one who will never come back, "
            "and whose files are gone."
        )
        raise _refused(folder, answer, remedy)
    return first


def _write(path: Path, found: dict[str, int]) -> None:
    """Whole or not at all, also where the machine loses its power now."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(_HEADER)
        file.writelines(f"{name} {first}\n" for name, first in found.items())
        file.flush()
        os.fsync(fd)
    new.replace(path)
    above = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(above)
    finally:
        os.close(above)


def _refused(path: Path, answer: str, remedy: str) -> HostError:
    return HostError(
        attempt=f"find a person's range of ids in {path}", answer=answer, remedy=remedy
    )
