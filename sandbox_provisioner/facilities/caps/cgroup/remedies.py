"""remedies.py - pure: what a person can do where a cap cannot be had, for errors and doctor.

Each is for `errors.in_lines`: sentences, and commands that begin with blanks. First comes what the
user can do alone (`do_without`), then what an administrator has to do (`CgroupFacts.remedies`).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence

from sandbox_provisioner.errors import joined
from sandbox_provisioner.facilities.caps.wish import BY_FACILITY, CONTROLLERS

Steps = tuple[str, ...]

DROP_IN: Steps = (
    "As administrator, let systemd delegate the controllers to its users' managers:",
    "  sudo mkdir -p /etc/systemd/system/user@.service.d &&",
    f"  printf '[Service]\\nDelegate={' '.join(sorted(CONTROLLERS))}\\n' |",
    "  sudo tee /etc/systemd/system/user@.service.d/delegate.conf &&",
    "  sudo systemctl daemon-reload",
    "Then end all sessions of this user (or restart the machine), and log in again.",
)
DELEGATE: Steps = (
    "Start the server where control groups are delegated to it: in a login session of systemd,",
    "  systemd-run --user --scope --property=Delegate=yes jupyter lab",
    "or in a service with Delegate=yes and DelegateSubgroup=server, or in a container with "
    "writable control groups of its own.",
)
FAVOR_MOVES: Steps = (
    "As administrator, if starts matter more than the speed of every fork on this machine:",
    "  sudo mount -o remount,favordynmods /sys/fs/cgroup",
    "From Linux 6.7 on cgroup_favordynmods=true on the kernel's command line does it for good.",
)
# What helps where a manager of systemd is to make our groups and cannot be reached.
MANAGER_REMEDIES: dict[str, Steps] = {
    "user": (
        "By yourself: log in anew (by ssh or on the screen, not with su or sudo -u), so that a "
        "manager of your own runs, which this shows:",
        "  systemctl --user status",
        "As administrator, let it run without a login (on Debian and Ubuntu it needs the package "
        "dbus-user-session):",
        "  sudo loginctl enable-linger USER",
    ),
    "system": ("See why it does not answer:", "  systemctl status dbus.socket"),
}
MOUNT: Steps = (
    "As administrator, mount the controllers, or start systemd:",
    "  sudo mount -t cgroup2 none /sys/fs/cgroup",
)
READ_ONLY: Steps = (
    "Start the container so that its control groups are writable:",
    "  podman run --cgroupns=private --security-opt unmask=/sys/fs/cgroup",
    "or, with fewer walls around all of it:",
    "  docker run --privileged",
    "In Kubernetes: securityContext: {privileged: true}.",
)


def leaf(group: str) -> Steps:
    """For a group of v2 that has processes of its own, and hands down no controller for that."""
    return (
        "Move its processes to a group of their own, as containers do at their start:",
        f"  mkdir {group}/init &&",
        f"  for pid in $(cat {group}/cgroup.procs); do",
        f"    echo $pid > {group}/init/cgroup.procs;",
        "  done",
        "or start the server as a service with Delegate=yes and DelegateSubgroup=server.",
    )


def not_offered(controller: str) -> Steps:
    """For a controller that this Linux, or the container, has not."""
    return (
        f"The controller {controller!r} has to be built into the Linux kernel and enabled: see "
        "/proc/cgroups and the kernel's command line (cgroup_disable=, cgroup_no_v1=).",
        "In a container, the engine that started it has to delegate it.",
    )


def own_v1(points: Collection[str], user: str) -> Steps:
    """For somebody who may not write to the groups of v1 below the mount *points*."""
    top = os.path.commonpath([os.path.dirname(point) for point in points] or ["/sys/fs/cgroup"])
    names = " ".join(sorted({os.path.relpath(point, top) for point in points}))
    group = f"{top}/$c/jupyter-{user}"
    cpuset = f"{top}/cpuset"
    whole = (
        "  for f in cpuset.cpus cpuset.mems; do",
        f"    sudo cp {cpuset}/$f {cpuset}/jupyter-{user}/;",
        "  done",
    )
    return (
        f"As administrator, make control groups for {user}, after each boot:",
        f"  for c in {names}; do",
        f"    sudo mkdir -p {group} &&",
        f"    sudo chown -R {user} {group};",
        "  done",
        *(whole if "cpuset" in names.split() else ()),
        "Then, by yourself, start the server in them:",
        f"  for c in {names}; do",
        f"    echo $$ > {group}/cgroup.procs;",
        "  done; jupyter lab",
    )


def do_without(facilities: Sequence[str]) -> Steps:
    """What a user can do alone, and what is lost by it."""
    lost = joined([BY_FACILITY[facility].noun for facility in facilities])
    words = " ".join(f"--on-missing={facility}=warn" for facility in facilities)
    setting = ", ".join(f'"{facility}": "warn"' for facility in facilities)
    return (
        "By yourself you can do without: then nothing but the machine limits a kernel's "
        f"{lost}. For Python kernels:",
        f"  jupyter sandbox install --replace {words}",
        "For all kernels of your server, in ~/.jupyter/jupyter_server_config.py:",
        f"  c.SandboxProvisioner.on_missing = {{{setting}}}",
        "",
    )


def unique(remedies: Iterable[Steps]) -> Steps:
    """All *remedies*, each once."""
    return tuple(step for remedy in dict.fromkeys(remedies) for step in remedy)
