"""facts.py - reads only: who around us may forbid namespaces, and the setting that lifts it.

`Surroundings.probe()` is called when a start was refused, and by `doctor`; `cause_of` judges, pure.
Linux answers EPERM to all of these alike, so the cause is what is found to be in force here.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sandbox_provisioner.told import Cause, setting

MOST_USER_NAMESPACES = "user.max_user_namespaces"
UNPRIVILEGED = "kernel.unprivileged_userns_clone"
APPARMOR = "kernel.apparmor_restrict_unprivileged_userns"
_KINDS = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
_SYSCTLS = (UNPRIVILEGED, APPARMOR, *(f"user.max_{kind}_namespaces" for kind in _KINDS))
PROFILE = "/etc/apparmor.d/jupyter-sandbox"
ALLOW_BY_PROFILE = (
    f"jupyter sandbox install --apparmor-profile | sudo tee {PROFILE} "
    f"&& sudo apparmor_parser -r {PROFILE}"
)
# What each engine calls the setting that lifts its filter, its AppArmor profile, and its masks.
_SETTINGS = {
    "docker": (
        "--security-opt seccomp=unconfined",
        "--security-opt apparmor=unconfined",
        "--security-opt systempaths=unconfined",
    ),
    "podman": (
        "--security-opt seccomp=unconfined",
        "--security-opt apparmor=unconfined",
        "--security-opt unmask=ALL",
    ),
    "kubernetes": (
        "seccompProfile: {type: Unconfined}",
        "appArmorProfile: {type: Unconfined}",
        "procMount: Unmasked",
    ),
}
_FILTER, _PROFILE, _PROC = 0, 1, 2
# What `namespaces.inside.new_session` calls the init of a sandbox.
_INIT = "sandbox-init"
_NAMES = {
    "docker": "a Docker container",
    "podman": "a Podman container",
    "kubernetes": "a Kubernetes pod",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What is in force around this process.

    *sysctls* are those that this Linux has. *container* is "docker", "podman", "kubernetes",
    another engine's own name, or "" for none; *filtered* tells of a system call filter on us,
    *profile* is our AppArmor label, *masks* are the mount points in /proc that hide a part of it.
    *in_sandbox*: this is one of our own sandboxes.
    """

    sysctls: Mapping[str, str]
    container: str = ""
    filtered: bool = False
    profile: str = ""
    masks: tuple[str, ...] = ()
    chrooted: bool = False
    in_sandbox: bool = False

    @classmethod
    def probe(cls) -> Surroundings:
        """Look around; costs a few ms, starts nothing."""
        mount_points = _mount_points()
        return cls(
            sysctls=dict(_sysctls(_SYSCTLS)),
            container=_container(),
            filtered=bool(re.search(r"^Seccomp:\s*2$", _text("/proc/self/status"), re.M)),
            profile=_text("/proc/self/attr/current").strip("\0\n "),
            masks=tuple(sorted(p for p in mount_points if _is_mask(p))),
            chrooted="/" not in mount_points,
            in_sandbox=is_in_sandbox(),
        )

    @property
    def place(self) -> str:
        """Where we are, for people; "" outside of a container."""
        other = f"a container ({self.container})" if self.container else ""
        return _NAMES.get(self.container, other)

    @property
    def is_confined(self) -> bool:
        """Whether an AppArmor profile is on us that forbids something."""
        return self.profile.endswith("(enforce)") or self.profile.endswith("(kill)")

    @property
    def is_held_by_apparmor(self) -> bool:
        """Whether Ubuntu's restriction holds for us: it spares programs that have a profile."""
        if self.sysctls.get(APPARMOR, "0") == "0":
            return False
        return self.profile in {"", "unconfined"} or self.profile.startswith("unprivileged_userns")


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _sysctls(names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name in names:
        if text := _text(f"/proc/sys/{name.replace('.', '/')}"):
            yield name, text.strip()


def _container() -> str:
    """The engine, by the marks that it leaves; a pod's runtime leaves its own marks too."""
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    if os.path.exists("/.dockerenv"):
        return "docker"
    if os.path.exists("/run/.containerenv"):
        return "podman"
    match = re.search(r"(?:^|\0)container=([^\0]+)", _text("/proc/1/environ"))
    if match:
        return match[1]
    match = re.search(r"kubepods|docker|libpod|containerd|lxc", _text("/proc/1/cgroup"))
    known = {"kubepods": "kubernetes", "libpod": "podman"}
    return known.get(match[0], match[0]) if match else ""


def _mount_points() -> frozenset[str]:
    lines = _text("/proc/self/mountinfo").splitlines()
    return frozenset(line.split()[4] for line in lines)


def _is_mask(path: str) -> bool:
    # systemd's automount there lies on a directory that is always empty: Linux lets it pass.
    return path.startswith("/proc/") and path != "/proc/sys/fs/binfmt_misc"


def is_in_sandbox() -> bool:
    """Whether an init of our own is above us: PID 1, or, without namespaces, some ancestor."""
    return _has_init_above(os.getpid())


@lru_cache(maxsize=1)
def _has_init_above(pid: int) -> bool:
    """Nobody gets into a sandbox who has begun outside of it, nor out: one look is enough."""
    while pid > 0:
        if _text(f"/proc/{pid}/cmdline").startswith(_INIT):
            return True
        _, _, fields = _text(f"/proc/{pid}/stat").rpartition(")")  # proc_pid_stat(5)
        pid = int(fields.split()[1]) if fields else 0
    return False


NESTED = Cause(
    "this is a sandbox already, in which there can be no other",
    "Use the plain kernel here, or run the command as it is: the sandbox around it holds it.",
)


def forbidding_setting(sysctls: Mapping[str, str], *, privileged: bool) -> Cause | None:
    """The sysctl that forbids user namespaces here altogether, None where there is none."""
    if sysctls.get(MOST_USER_NAMESPACES) == "0":
        name, allows = MOST_USER_NAMESPACES, 28633
    elif sysctls.get(UNPRIVILEGED) == "0" and not privileged:
        name, allows = UNPRIVILEGED, 1
    else:
        return None
    return Cause(f"the sysctl {name} is 0", setting(name, allows), is_command=True)


def current_obstacle(*, privileged: bool) -> Cause | None:
    """Why there are no namespaces here at all, by what a few files tell; None if nothing does."""
    if is_in_sandbox():
        return NESTED
    found = dict(_sysctls((MOST_USER_NAMESPACES, UNPRIVILEGED)))
    return forbidding_setting(found, privileged=privileged)


def cause_of(number: int, text: str, around: Surroundings, *, privileged: bool) -> Cause:
    """Why a step that makes namespaces was answered with the errno *number*, as *text* tells."""
    if around.in_sandbox:
        return NESTED
    forbidden = forbidding_setting(around.sysctls, privileged=privileged)
    if forbidden:
        return forbidden
    if number == errno.ENOSPC:
        return _limit_reached(around)
    if number == errno.EINVAL:
        found = "this Linux was built without user namespaces"
        return Cause(found, "Boot one with CONFIG_USER_NS=y.")
    at_making = text.startswith(("unshare(", "clone(")) and number in {errno.EPERM, errno.ENOSYS}
    if around.filtered and at_making:  # AppArmor answers EACCES there
        return _filter_cause(around)
    return _module_cause(around, privileged=privileged) or _other_cause(around)


def _limit_reached(around: Surroundings) -> Cause:
    limits = (name for name in _SYSCTLS if name.startswith("user.max_"))
    name = next((name for name in limits if around.sysctls.get(name) == "0"), "")
    if name:
        return Cause(f"the sysctl {name} is 0", setting(name, 28633), is_command=True)
    return Cause(
        "this user has as many namespaces as the sysctls user.max_…_namespaces allow, or they lie "
        "32 deep",
        setting(MOST_USER_NAMESPACES, 28633),
        is_command=True,
    )


def _module_cause(around: Surroundings, *, privileged: bool) -> Cause | None:
    """AppArmor: Ubuntu's restriction of all programs without a profile, or a profile on us."""
    if around.is_held_by_apparmor and not privileged:
        return Cause(
            f"AppArmor forbids user namespaces to programs that have no profile (the sysctl "
            f"{APPARMOR} is 1)",
            ALLOW_BY_PROFILE,
            is_command=True,
        )
    if not around.is_confined:
        return None
    name = around.profile.partition(" ")[0]
    if around.container:
        return Cause(
            f"the AppArmor profile {name} of {around.place} forbids it",
            container_setting(around.container, _PROFILE, _FILTER),
        )
    return Cause(
        f"the AppArmor profile {name} on this server forbids it",
        f"Allow userns, mount, umount, pivot_root and capability in the profile {name}, or: "
        f"sudo aa-disable {name}",
    )


def _other_cause(around: Surroundings) -> Cause:
    if around.filtered:
        return _filter_cause(around)
    if around.chrooted:
        return Cause(
            "this server runs in a chroot(2), where Linux allows no user namespaces",
            "Start it outside, or in a container that uses pivot_root(2).",
        )
    if around.container:
        return Cause(
            f"{around.place} forbids it",
            container_setting(around.container, _FILTER, _PROFILE),
        )
    return Cause(
        "no setting of this machine that is visible here forbids it",
        "Ask its administrator for a security module (SELinux, or another) that does, with: "
        "sudo journalctl -k -g denied",
    )


def _filter_cause(around: Surroundings) -> Cause:
    if around.container:
        return Cause(
            f"the system call filter (seccomp) of {around.place} forbids new namespaces",
            container_setting(around.container, _FILTER, _PROFILE, _PROC),
        )
    return Cause(
        "a system call filter (seccomp) is on this server, which forbids new namespaces",
        "Of a systemd service, set RestrictNamespaces=no and let SystemCallFilter= allow @mount "
        f"and unshare. If this is a container: {container_setting('', _FILTER, _PROFILE, _PROC)}",
    )


def masked_proc_cause(around: Surroundings) -> Cause:
    """fsmount(2) of proc answers EPERM where a part of every /proc that we see is hidden."""
    hidden = f" ({', '.join(around.masks[:4])})" if around.masks else ""
    remedy = container_setting(around.container, _PROC)
    if not around.container:
        remedy = (
            "Of a systemd service, set ProtectKernelTunables=no and ProtectKernelLogs=no. If this "
            f"is a container: {remedy}"
        )
    return Cause(
        f"a part of /proc is masked here{hidden}, so Linux allows nobody below to mount a new one",
        remedy,
    )


def mount_cause(around: Surroundings, *, privileged: bool) -> Cause | None:
    """Who may have forbidden a mount after the namespaces were had; None if nobody is seen."""
    found = _module_cause(around, privileged=privileged)
    if found or not (around.filtered and around.container):
        return found
    return Cause(
        f"the system call filter (seccomp) of {around.place} forbids mounts",
        container_setting(around.container, _FILTER, _PROFILE, _PROC),
    )


def container_setting(container: str, *which: int) -> str:
    """How to start *container* with what lifts it; for an unknown engine, how each calls that."""
    if container == "kubernetes":
        lines = ", ".join(_SETTINGS[container][number] for number in which)
        return f"In the pod, set hostUsers: false, and in the container's securityContext: {lines}"
    if container in _SETTINGS:
        words = " ".join(_SETTINGS[container][number] for number in which)
        return f"Start the container with: {container} run {words} …  (or with --privileged)"
    return (
        "; ".join(
            f"{engine.capitalize()}: {' '.join(words[number] for number in which)}"
            for engine, words in _SETTINGS.items()
        )
        + " with hostUsers: false"
    )
