"""facts.py - reads only: which of the host's ids an ordinary user may map, and by which helpers.

subuid(5) and subgid(5) give them; newuidmap(1) and newgidmap(1), which are set-uid, map them.
"""

from __future__ import annotations

import os
import pwd
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sandbox_provisioner.errors import COMMAND, HostError

# systemd's table of ids (UIDS-GIDS) leaves 0x70000000-0x7FFDFFFF unused.
FIRST_ID, LAST_ID = 0x70000000, 0x7FFDFFFF
IDS = 1 << 16
# Of PID 1, where the kernel is root: Debian gives it to nobody, and the kernel's namespace lacks
# it.
INIT_ID = IDS - 1
# From here on ranges belong to people, for ever (`hub/ranges.py`); below, to whoever runs now.
FIRST_PERSONS_ID = FIRST_ID + 2048 * IDS
# From here on systemd's table has IDS of them that are for files on disks, and no process ever has:
# what belongs to ids of a box there belongs to the same number of these.
FOREIGN_ID = 0x7FFE0000
ATTEMPT = 'map a range of user ids (user_ids = "range")'
_FIRST_USUAL = 100000
_SUBUID = "/etc/subuid"
# Not from PATH: these run with more rights than ours.
_HELPER_FOLDERS = ("/usr/bin", "/bin", "/usr/local/bin", "/run/wrappers/bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class IdRange:
    """The host's ids from *first_uid* and *first_gid* on, `IDS` of each, are this user's to map."""

    first_uid: int
    first_gid: int
    newuidmap: str
    newgidmap: str

    def maps(self, uid: int, gid: int, inside_uid: int, inside_gid: int) -> tuple[str, str]:
        """The maps in which one id inside is the user's own, and all others are of the range."""
        return id_map(inside_uid, uid, self.first_uid), id_map(inside_gid, gid, self.first_gid)


def id_map(inside: int, outside: int, first: int) -> str:
    """user_namespaces(7): *inside* is *outside*, every other id below 65536 lies from *first* on.

    >>> id_map(1000, 1000, 100000)
    '0 100000 1000\\n1000 1000 1\\n1001 101001 64535'
    """
    if outside == first + inside:
        return f"0 {first} {IDS}"
    if inside >= IDS:
        return f"0 {first} {IDS}\n{inside} {outside} 1"
    after = inside + 1
    below = [f"0 {first} {inside}"] if inside else []
    above = [f"{after} {first + after} {IDS - after}"] if after < IDS else []
    return "\n".join([*below, f"{inside} {outside} 1", *above])


def find_id_range(uid: int) -> IdRange:
    """The range of user *uid*; HostError with the administrator's command where there is none."""
    if re.search(r"^NoNewPrivs:\s*1$", Path("/proc/self/status").read_text(), re.M):
        raise _missing(
            "below this server no program can gain rights (no_new_privs), so newuidmap cannot",
            "Start the server without NoNewPrivileges=yes (systemd) or with "
            "allowPrivilegeEscalation: true (Kubernetes)",
        )
    helpers = [_helper(name) for name in ("newuidmap", "newgidmap")]
    name = _name_of(uid)
    if not name:
        raise _missing(
            f"uid {uid} has no name, and newuidmap works only for users of the password file",
            f"sudo useradd --uid {uid} NAME",
        )
    firsts = []
    for kind in ("subuid", "subgid"):
        text = _text(f"/etc/{kind}")
        first = first_of(text, {name, str(uid)})
        if first is None:
            raise _missing(f"/etc/{kind} gives {name} no {IDS} ids", grant(name))
        firsts.append(first)
    return IdRange(
        first_uid=firsts[0], first_gid=firsts[1], newuidmap=helpers[0], newgidmap=helpers[1]
    )


def first_of(text: str, names: set[str]) -> int | None:
    """The first id of the first line of subuid(5) that gives one of *names* enough of them."""
    for owner, first, count in _entries(text):
        if owner in names and count >= IDS:
            return first
    return None


def _entries(text: str) -> Iterator[tuple[str, int, int]]:
    for line in text.splitlines():
        words = line.strip().split(":")
        if len(words) == 3 and words[1].isdecimal() and words[2].isdecimal():
            yield words[0], int(words[1]), int(words[2])


def is_given_away(uid: int) -> bool:
    """Whether subuid(5) gives *uid* to somebody, besides the own one."""
    return _range_of(uid) is not None


def first_of_range(uid: int) -> int:
    """The first of the ids that subuid(5) gives to somebody, *uid* among them; or *uid*."""
    found = _range_of(uid)
    return uid if found is None else found


def _range_of(uid: int) -> int | None:
    """The first of the ids that *uid* is given away with. A loop that serves everybody asks, and
    there may be a line for each of many thousand users: so the file is looked at, stat(2), and read
    where it has changed."""
    return _found(_SUBUID, _mark_of(_SUBUID), uid)


@lru_cache(maxsize=1024)
def _found(path: str, mark: tuple[int, ...], uid: int) -> int | None:
    return next((first for first, end in _ranges(path, mark) if first <= uid < end), None)


@lru_cache(maxsize=1)
def _ranges(path: str, mark: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((first, first + count) for _, first, count in _entries(_text(path)))


def _mark_of(path: str) -> tuple[int, ...]:
    """What is another one where the file at *path* is, or has been changed; () for none."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def grant(name: str) -> str:
    """The command that gives this user ids that nobody else has."""
    given = [*_entries(_text(_SUBUID)), *_entries(_text("/etc/subgid"))]
    first = max([_FIRST_USUAL, *(start + count for _, start, count in given)])
    span = f"{first}-{first + IDS - 1}"
    return f"sudo usermod --add-subuids {span} --add-subgids {span} {name}"


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


def _helper(name: str) -> str:
    """The path of *name*, which can do what it is for; HostError where there is none."""
    for folder in _HELPER_FOLDERS:
        path = f"{folder}/{name}"
        if os.access(path, os.X_OK):
            if _gains_rights(path):
                return path
            raise _missing(f"{path} is not set-uid", f"sudo chmod u+s {path}")
    raise _missing(
        f"there is no {name} in {_HELPER_FOLDERS[0]}",
        "sudo apt install uidmap   (Fedora: sudo dnf install shadow-utils)",
    )


def _gains_rights(path: str) -> bool:
    """By its mode, or by file capabilities as on Fedora and Arch."""
    if os.stat(path).st_mode & stat.S_ISUID:
        return True
    try:
        return bool(os.getxattr(path, "security.capability"))
    except OSError:
        return False


def _missing(answer: str, command: str) -> HostError:
    return HostError(
        attempt=ATTEMPT,
        answer=answer,
        remedy=("As administrator:", COMMAND + command, 'Or set user_ids to "single".'),
    )
