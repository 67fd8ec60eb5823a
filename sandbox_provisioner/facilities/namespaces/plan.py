"""facilities/namespaces/plan.py - pure: namespaces(7) of the sandbox's own, but for that of ids."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.plan import Start, Step
from sandbox_provisioner.spec import Network

_ALL = ("mount", "pid", "network", "ipc", "uts", "cgroup")


def unshare_as_user(start: Start) -> Iterator[Step]:
    """An ordinary user's, who has the right to in a user namespace."""
    if not start.site.facts.privileged:
        yield _unshare(start)


def unshare_as_root(start: Start) -> Iterator[Step]:
    """A root server's, once it has entered the user namespace that owns them."""
    if start.site.facts.privileged:
        yield _unshare(start)


def _unshare(start: Start) -> Step:
    if start.request.spec.network.mode is Network.HOST:
        names = tuple(name for name in _ALL if name != "network")
        return Step("unshare", names, "everything below is private, but for the network")
    why = "everything below is private; the network is a loopback and nothing else"
    return Step("unshare", _ALL, why)


def unshare_as_init(_start: Start) -> Iterator[Step]:
    """A nursery's child is PID 1 of a namespace from its beginning."""
    names = tuple(name for name in _ALL if name != "pid")
    why = "everything below is private; it is PID 1 of its namespace already"
    yield Step("unshare", names, why)


def unshare_mounts(start: Start) -> Iterator[Step]:
    """For an ordinary user who only takes mounts for somebody else."""
    if not start.site.facts.privileged:
        yield Step("unshare", ("mount",))


def fork_init(_start: Start) -> Iterator[Step]:
    """The launcher's last act."""
    yield Step("fork-init", (), "a PID namespace begins with a child; that one is PID 1")


def new_session(_start: Start) -> Iterator[Step]:
    """PID 1's first act."""
    yield Step("new-session", (), "no terminal, process group or keyring of the server")


def hostname(start: Start) -> Iterator[Step]:
    """uts_namespaces(7)."""
    yield Step("hostname", (start.request.spec.hostname,))
