"""policy/hub.py - pure: what the policy lets a hub have that is not root.

::

    [hub]
    account = "jupyterhub"                       as whom the hub runs
    groups = ["jupyter-users"]                   whose people it may have servers for
    volumes = ["/srv/shared:/shared:rw"]         what its servers may show beyond a person's rights
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sandbox_provisioner.facilities.volumes.wish import as_texts
from sandbox_provisioner.policy.meaning import for_user, parse
from sandbox_provisioner.policy.terms import Kind
from sandbox_provisioner.spec import Volume

VOLUMES = "volumes"
# Where a name stands in for the users whose own it will be.
_ANYBODY = "username"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubTerms:
    """The broker starts servers for whoever asks as *account*. *volumes* are as they were written:
    a server may be shown these though its person could not open them. None as *groups* is everybody
    of this machine."""

    account: str
    groups: tuple[str, ...] | None = None
    volumes: tuple[str, ...] = ()
    line: int = 0

    @classmethod
    def read(
        cls, account: str, groups: tuple[str, ...] | None, written: Any, line: int
    ) -> HubTerms:
        """With the volumes that are *written* in the file, in any spelling; SpecError."""
        written = [written] if isinstance(written, str) else written
        _volumes(written, _ANYBODY)
        return cls(account=account, groups=groups, volumes=tuple(as_texts(written)), line=line)

    def is_for(self, groups: Iterable[str]) -> bool:
        """Whether who is in these *groups* may have a server."""
        return self.groups is None or not set(self.groups).isdisjoint(groups)

    def volumes_for(self, person: str) -> tuple[Volume, ...]:
        """What the server of *person* may be shown; SpecError for a name that is none of a path."""
        return _volumes(list(self.volumes), person)


def _volumes(written: Any, person: str) -> tuple[Volume, ...]:
    found: tuple[Volume, ...] = parse(Kind.FORCED, VOLUMES, for_user(written, person))[VOLUMES]
    return found
