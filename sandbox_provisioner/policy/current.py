"""current.py - in who launches: the policy as it is now.

Each start asks: the file is looked at (stat(2)), and read again where it is another one, or has
changed.
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass, field

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.policy.policy import Policy
from sandbox_provisioner.policy.read import POLICY_FILE, read_policy
from sandbox_provisioner.policy.terms import PolicyError, Terms

_Mark = tuple[int, ...]


@dataclass(slots=True)
class PolicyKeeper:
    """The policy of *path*, which *owner_uid* has written, and what it has meant for people."""

    path: str = POLICY_FILE
    owner_uid: int = 0
    audit: str = ""
    _mark: _Mark = ()
    _policy: Policy | None = None
    _terms: dict[Person, Terms] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def policy(self) -> Policy | None:
        """It, as it is now; None where there is none. PolicyError."""
        with self._lock:
            return self._now()[0]

    def terms(self, person: Person) -> Terms | None:
        """What *person* may have by it; None where there is none. PolicyError."""
        with self._lock:
            policy, terms = self._now()
        if policy is None:
            return None
        if person not in terms:
            terms[person] = policy.for_person(person)
        return terms[person]

    def _now(self) -> tuple[Policy | None, dict[Person, Terms]]:
        """It, and what it has meant."""
        mark = self._look()
        if not mark or mark != self._mark:
            self._mark = ()  # until it has been read
            self._terms = {}  # who has the older policy still adds to the older ones
            self._policy = read_policy(self.path, self.owner_uid)
            self._mark = mark
        return self._policy, self._terms

    def _look(self) -> _Mark:
        try:
            found = os.stat(self.path)
        except OSError:
            return ()  # why tells who opens it
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


_keeper = PolicyKeeper()


def follow(path: str) -> None:
    """Let *path* be the policy of this process; called once, before anything is asked."""
    _keeper.path = path


def current_policy() -> Policy | None:
    """The policy of this machine; None where there is none. PolicyError."""
    return _keeper.policy()


def audit_place() -> str:
    """Where a line goes for each start and end, by the last policy in order; "": nowhere."""
    with contextlib.suppress(PolicyError):
        policy = current_policy()
        _keeper.audit = policy.audit if policy else ""
    return _keeper.audit


def terms_for(person: Person) -> Terms | None:
    """What *person* may have on this machine; None where no policy says anything. PolicyError."""
    return _keeper.terms(person)


def terms_of_this_process() -> Terms | None:
    """The same for whom this process starts kernels: a server of root's has been told by a hub for
    whom, every other one is its user's. HostError where the policy speaks of groups and the system
    does not know whose they are."""
    policy = current_policy()
    if policy is None:
        return None
    return _keeper.terms(who_asks(must_be_known=bool(policy.groups)))


def who_asks(*, must_be_known: bool = False) -> Person:
    """For whom this process starts kernels; somebody unknown to the system has no groups, or, where
    he *must_be_known*, is an error."""
    uid = os.geteuid()
    name = os.environ.get("JUPYTERHUB_USER", "") if uid == 0 else ""
    try:
        return Person.find(name or uid)
    except HostError:
        if must_be_known:
            raise
        return Person(name or str(uid), -1 if name else uid)
