"""facilities/landlock/tell.py - pure: where this confinement can be had, and what it does not give.

The kernel stays among the host's processes, mounts and sockets, as the server's own user.
"""

from __future__ import annotations

from sandbox_provisioner.checks import Check, Findings, State, lines
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.host import HostFacts

# What each version of Landlock's ABI brought that nothing else of this plan has instead.
_SIGNALS_SINCE = 6


def obstacle(facts: HostFacts) -> HostError | None:
    """Why this confinement cannot be had by this user here; None where it can."""
    attempt = 'use confinement = "landlock"'
    if facts.machine.landlock < 1:
        return HostError(
            attempt=attempt,
            answer="this Linux has no Landlock, or it is not switched on",
            remedy="Boot Linux 5.13 or newer with CONFIG_SECURITY_LANDLOCK=y and landlock in the "
            "parameter lsm= (see /sys/kernel/security/lsm); a container's system call filter has "
            "to allow landlock_create_ruleset.",
        )
    if facts.caller.uid == 0:
        return HostError(
            attempt=attempt,
            answer="the server is root, and the kernel would be, too",
            remedy='Run the server as an ordinary user, or use confinement = "namespaces".',
        )
    return None


def losses(facts: HostFacts) -> tuple[str, ...]:
    """What this confinement does not give here and namespaces do, a clause each."""
    lost: tuple[str, ...] = (
        "the kernel has the server's user id, and runs among the host's processes",
        "names, sizes and times of the user's files anywhere can be looked up by their paths",
        "there is no network at all, not even 127.0.0.1, and no connect(2): no debugger, no "
        "output of forked processes",
        "no /tmp, /dev/shm, terminals or other processes' /proc: !command in IPython and "
        "multiprocessing's locks do not work",
        "no mode, owner or attribute changes by a file's name: shutil.copy and git init fail",
        "tmp_limit, shm_limit and hostname have no effect",
    )
    if (known := facts.machine.landlock) < _SIGNALS_SINCE:
        lost += (
            f"version {known} of Landlock cannot keep back signals (6 can, Linux 6.12): "
            "the kernel can end any process of its user, the server too",
        )
    return lost


def version(found: Findings) -> Check:
    """Whether it can be had, and how much of it."""
    facility, problem = "landlock", obstacle(found.host)
    known = found.host.machine.landlock
    if known < 1 and problem:
        return Check(
            facility=facility,
            state=State.NOTE,
            found=problem.answer,
            effect='Kernels with confinement = "landlock" do not start. (It is for places without '
            "namespaces, and weaker.)",
            remedy=lines(problem.steps),
        )
    lost = "" if known >= _SIGNALS_SINCE else "; signals are kept back since ABI 6 only"
    refused = f"; this server cannot use it: {problem.answer}" if problem else ""
    text = f"ABI {known}{lost}{refused}"
    return Check(facility=facility, state=State.OK, found=text)
