"""orders/landlock.py - pure: the order of a start where there are no namespaces to be had."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from sandbox_provisioner.facilities.caps import plan as caps
from sandbox_provisioner.facilities.environment import plan as environment
from sandbox_provisioner.facilities.landlock import plan as landlock
from sandbox_provisioner.facilities.namespaces import plan as namespaces
from sandbox_provisioner.facilities.process import plan as process
from sandbox_provisioner.facilities.rights import plan as rights
from sandbox_provisioner.facilities.rights.plan.seccomp import SHARED
from sandbox_provisioner.orders.variables import variables_for
from sandbox_provisioner.plan import Plan, Start, Step


def set_variables(start: Start) -> Iterator[Step]:
    """As `orders.namespaces.set_variables`, with folders that are the host's."""
    home, tmp = landlock.homes(start)
    limits = start.request.spec.limits
    found = variables_for(start.request, start.site, home=home, limits=limits)
    yield environment.variables_step(start, found | {"TMPDIR": tmp})


def filter_kernel(start: Start) -> Iterator[Step]:
    """Stricter than in namespaces: whom a kernel could connect to is the host."""
    why = "an allow-list of what the kernel may ask Linux, and no connection to anybody"
    yield rights.filter_step(start, SHARED, why)


# L: the launcher, 1: init, a process outside of the rules that watches the kernel, K: the kernel.
ORDER: tuple[tuple[str, Callable[[Start], Iterable[Step]]], ...] = (
    ("L", landlock.receive_places),
    ("L", landlock.share_namespaces),
    ("L", process.exit_file),
    ("L", caps.join),
    ("L", caps.oom_score),
    ("L", namespaces.fork_init),
    ("1", namespaces.new_session),
    ("1", landlock.make_folders),
    ("1", landlock.connection_file),
    ("1", landlock.seal),
    ("1", landlock.keep_paths),
    ("1", process.survive_server),
    ("1", process.stdio),
    ("1", process.fork_kernel),
    ("K", landlock.end_with_init),
    ("K", process.terminal),
    ("K", caps.limit_all),
    ("K", process.umask),
    ("K", landlock.limit_without_groups),
    ("K", landlock.renounce),
    ("K", set_variables),
    ("K", landlock.chdir),
    ("K", landlock.allow),
    ("K", landlock.restrict),
    ("K", filter_kernel),
    ("K", process.execute),
)


def cold(start: Start) -> Plan:
    """The plan; HostError or SpecError if it cannot be as asked."""
    landlock.check(start)
    return Plan(tuple(step for _, line in ORDER for step in line(start)))
