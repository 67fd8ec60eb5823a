"""common.py - in a daemon of root's that starts sandboxes for others (the broker, a hub): has
systemd make a scope for the groups of all of them.

The groups of a person lie in one that holds the person's sum, and stay while the daemon is started
anew. A service can have both where systemd knows DelegateSubgroup= (254). Before, systemd starts
the next main process of a service in the service's own group, which Linux refuses as long as groups
below it have controllers (admin-guide/cgroup-v2.rst, "No Internal Process Constraint"). So there is
one group of nobody's::

    system.slice/
      jupyter-sandboxes.scope/    the manager's, delegated, without a cap
        keeper/                   one process that waits
        sandbox-provisioner/      ours, as anywhere

Whoever has the rights of root here makes groups in it, as long as it is there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.caps.cgroup import files, manager
from sandbox_provisioner.facilities.caps.cgroup.survey import COMMON, CgroupFacts, survey
from sandbox_provisioner.facilities.caps.wish.cap import Property

# It is nobody's child, so that it is waited for whoever ends.
_WAIT = "sleep infinity < /dev/null > /dev/null 2>&1 & echo $!"
_NO_LIMIT = (1 << 64) - 1  # systemd's "infinity"


def make_common_scope() -> None:
    """Have the scope, where systemd would make a scope for each sandbox otherwise; HostError."""
    facts = survey()
    if facts.manager != "system":
        return
    keeper, is_ours = _start_keeper(), False
    try:
        manager.start_scope("system", COMMON, [*_properties(keeper)])
        is_ours = True
        _move_below(keeper, facts)
    except HostError:
        with contextlib.suppress(ProcessLookupError):  # its end may be what went wrong
            os.kill(keeper, signal.SIGKILL)
        # Where somebody else was faster there is one; ours goes with its keeper.
        if is_ours or survey().manager:
            raise


def _move_below(keeper: int, facts: CgroupFacts) -> None:
    group = f"{facts.bases['freezer']}/{COMMON}/keeper"
    told = {"attempt": f"make {group}", "remedy": f"See: journalctl --unit {COMMON}"}
    files.make_directory(group, **told)
    files.write(f"{group}/cgroup.procs", str(keeper), **told)


def _start_keeper() -> int:
    """The pid of a process that does nothing; Ctrl-C does not reach it."""
    try:
        told = subprocess.run(
            ["/bin/sh", "-c", _WAIT],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin"}, cwd="/", start_new_session=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        raise HostError(
            attempt=f"start a process that keeps {COMMON}",
            answer=str(error),
            remedy="The machine may be out of processes or memory.",
        ) from error
    return int(told.stdout)


def _properties(keeper: int) -> Iterator[Property]:
    """systemd.scope(5), with the types of org.freedesktop.systemd1(5)."""
    yield "Description", ("s", "Sandboxes of this machine's users")
    yield "CollectMode", ("s", "inactive-or-failed")
    yield "Delegate", ("b", True)
    yield "TasksMax", ("t", _NO_LIMIT)
    yield "PIDs", ("au", [keeper])
