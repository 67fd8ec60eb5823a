"""person.py - in who launches, reads only: a user of the system for whom something is started."""

from __future__ import annotations

import grp
import os
import pwd
from dataclasses import dataclass

from sandbox_provisioner.errors import HostError


@dataclass(frozen=True, slots=True)
class Person:
    """A user of the system, with the names of all groups that count for it, the primary one first.
    A group without a name is known by its number."""

    name: str
    uid: int
    groups: tuple[str, ...] = ()

    @classmethod
    def find(cls, who: str | int) -> Person:
        """The user with this name or number, as the system's databases tell it now (nsswitch.conf:
        files, LDAP, ...); HostError where they know none."""
        try:
            entry = pwd.getpwuid(who) if isinstance(who, int) else pwd.getpwnam(who)
        except (KeyError, OverflowError, ValueError):
            # ValueError: a name with a NUL.
            raise HostError(
                attempt=f"find out who {who!r} is",
                answer="this system has no such user",
                remedy=f"Check what this prints: getent passwd -- {str(who)!r}",
            ) from None
        numbers = os.getgrouplist(entry.pw_name, entry.pw_gid)
        ordered = sorted(set(numbers), key=lambda gid: (gid != entry.pw_gid, gid))
        return cls(entry.pw_name, entry.pw_uid, tuple(map(group_name, ordered)))


def group_name(gid: int) -> str:
    """The name of the group *gid*, its number where it has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
