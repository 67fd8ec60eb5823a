"""doctor.py - pure: from what was found on this machine to the list of checks that a person reads.

`app/doctor.py` finds out (`Findings`), `examine` judges, `describe` prints. Each check tells what
one loses and the command that mends it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sandbox_provisioner.errors import HostError, SandboxError
from sandbox_provisioner.host import MACHINES, OLDEST_KERNEL, HostFacts, WorkdirFacts
from sandbox_provisioner.id_range import IDS, IdRange
from sandbox_provisioner.landlock import obstacle
from sandbox_provisioner.spec import WAIVABLE_FACILITIES
from sandbox_provisioner.surroundings import (
    APPARMOR,
    Surroundings,
    cause_of,
    forbidding_setting,
    setting,
)


class State(StrEnum):
    """LACK may keep sandboxes from starting; NOTE is for the reader to judge."""

    OK = "ok"
    LACK = "lack"
    NOTE = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the table: *loss* and *remedy* are "" where there is nothing to lose."""

    facility: str
    state: State
    found: str
    loss: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """An installed kernel. *guarded* means that its argv refuses to run outside of a sandbox."""

    name: str
    sandboxed: bool
    guarded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found out. *sysctls* lack what this Linux does not have.

    *id_range* is what an ordinary user's kernels can have; *runtime* is a directory or the error
    instead, *trial* the milliseconds that a sandbox took or the error instead, and *uncapped_trial*
    the same without the caps that lack here, where the first one failed and caps lack; *server* the
    program `jupyter` on the PATH if it is of another environment, *default_provisioner* who starts
    kernels that do not say it.
    """

    host: HostFacts
    workdir: WorkdirFacts | SandboxError
    sysctls: Mapping[str, str]
    surroundings: Surroundings
    id_range: IdRange | SandboxError
    runtime: str | SandboxError
    runtime_free_bytes: int
    entry_point: str
    server: str
    kernels: Sequence[Kernel]
    left_sandboxes: Sequence[str]
    left_groups: Sequence[str]
    trial: float | SandboxError
    uncapped_trial: float | SandboxError | None = None


def examine(found: Findings) -> list[Check]:
    """Every check, in the order in which a start needs them; the trial of a start comes last."""
    return [
        _linux(found.host),
        _machine(found.host),
        _user_namespaces(found),
        _user_ids(found),
        _filter(found),
        _landlock(found.host),
        _work_directory(found),
        _runtime(found),
        *(_cap(facility, found.host) for facility in WAIVABLE_FACILITIES),
        _entry_point(found),
        *_kernels(found.kernels),
        _core_pattern(found.sysctls),
        _leftovers(found),
        _trial(found),
        *_uncapped_trial(found),
    ]


def _linux(host: HostFacts) -> Check:
    version, oldest = (".".join(map(str, number)) for number in (host.kernel, OLDEST_KERNEL))
    if host.kernel >= OLDEST_KERNEL:
        return Check(facility="Linux", state=State.OK, found=f"{version} ({oldest} or newer)")
    return Check(
        facility="Linux",
        state=State.LACK,
        found=f"{version} is too old",
        loss="every sandbox: mounts cannot be changed one by one",
        remedy=f"boot Linux {oldest} or newer",
    )


def _machine(host: HostFacts) -> Check:
    if host.machine in MACHINES:
        return Check(facility="machine", state=State.OK, found=host.machine)
    return Check(
        facility="machine",
        state=State.LACK,
        found=host.machine,
        loss="every sandbox: there is no system call filter for it",
        remedy=f"use one of: {', '.join(MACHINES)}",
    )


def _user_namespaces(found: Findings) -> Check:
    facility, around, host = "user namespaces", found.surroundings, found.host
    forbidden = forbidding_setting(around.sysctls, privileged=host.privileged)
    starts = not all(isinstance(t, HostError | None) for t in (found.trial, found.uncapped_trial))
    if not (forbidden or starts):
        return _suspect(found)
    if forbidden:
        return Check(
            facility=facility,
            state=State.LACK,
            found=forbidden.found,
            loss="every sandbox",
            remedy=forbidden.remedy,
        )
    who = "the machine's root" if host.privileged else f"uid {host.uid}"
    where = f" in {around.place}" if around.place else ""
    return Check(facility=facility, state=State.OK, found=f"allowed for {who}{where}")


def _suspect(found: Findings) -> Check:
    """No setting forbids them, but no sandbox starts here: who may have forbidden it."""
    around, privileged = found.surroundings, found.host.privileged
    is_held = around.is_held_by_apparmor and not privileged
    facility, user = "user namespaces", f"uid {found.host.uid}"
    if not (is_held or around.is_confined or around.filtered or around.chrooted):
        return Check(facility=facility, state=State.OK, found=f"no setting forbids them to {user}")
    cause = cause_of(errno.EPERM, "", around, privileged=privileged)
    remedy = cause.remedy
    if is_held:
        remedy += f"   # or, for all programs: {setting(APPARMOR, 0)}"
    return Check(
        facility=facility,
        state=State.LACK if is_held else State.NOTE,
        found=cause.found,
        loss="every sandbox" if is_held else "every sandbox, if that is why the last line says no",
        remedy=remedy,
    )


def _user_ids(found: Findings) -> Check:
    facility, host, ids = "user ids of kernels", found.host, found.id_range
    if host.privileged:
        return Check(facility=facility, state=State.OK, found=f"a range of {IDS} for each kernel")
    if host.uid == 0:
        return Check(
            facility=facility,
            state=State.NOTE,
            found="they run as this container's root, without its rights, as uid 1000 inside",
            loss="a user of their own: two kernels, and the server, are the same user outside",
            remedy="run the server as an ordinary user, and the container in a user namespace "
            "(Docker: userns-remap, Podman: rootless, Kubernetes: hostUsers: false)",
        )
    if isinstance(ids, SandboxError):
        return Check(
            facility=facility,
            state=State.NOTE,
            found=f"your own; no range, since {ids.answer}",
            loss='user_ids = "range": kernels that set it are refused',
            remedy=ids.remedy.rstrip("."),
        )
    text = f'your own; with user_ids = "range" also {IDS} from {ids.first_uid} on'
    return Check(facility=facility, state=State.OK, found=text)


def _filter(found: Findings) -> Check:
    if "errno" in found.sysctls.get("kernel.seccomp.actions_avail", "").split():
        return Check(facility="system call filter", state=State.OK, found="seccomp")
    return Check(
        facility="system call filter",
        state=State.LACK,
        found="this Linux has no seccomp",
        loss="every sandbox",
        remedy="boot a Linux with CONFIG_SECCOMP_FILTER=y",
    )


def _landlock(host: HostFacts) -> Check:
    facility, problem = "landlock", obstacle(host)
    weaker = 'confinement = "landlock", which is weaker than namespaces'
    if host.landlock < 1 and problem:
        return Check(
            facility=facility,
            state=State.NOTE,
            found=problem.answer,
            loss=f"{weaker}, for places without them",
            remedy=problem.remedy.rstrip("."),
        )
    lost = "" if host.landlock >= 6 else "; before 6 it does not keep back signals"
    refused = f"; not for this server: {problem.answer}" if problem else ""
    found = f"ABI {host.landlock}{lost}{refused}"
    return Check(facility=facility, state=State.OK, found=found)


def _work_directory(found: Findings) -> Check:
    facility, workdir = "work directory", found.workdir
    if isinstance(workdir, SandboxError):
        return Check(
            facility=facility,
            state=State.NOTE,
            found=workdir.answer,
            loss="kernels that start in the directory you are in now",
            remedy=workdir.remedy,
        )
    where = f"{workdir.path} on {workdir.place.filesystem}"
    if not found.host.privileged:
        return Check(facility=facility, state=State.OK, found=f"{where}; kernels have your uid")
    if workdir.idmappable:
        return Check(facility=facility, state=State.OK, found=f"{where}: mounts can be id-mapped")
    loses_all = workdir.place.owner_uid == 0
    return Check(
        facility=facility,
        state=State.LACK if loses_all else State.NOTE,
        found=f"{where}: its mounts cannot be id-mapped",
        loss="kernels in directories that belong to root"
        if loses_all
        else "a user id of its own for each kernel: they run as the directory's owner",
        remedy="work on ext4, xfs or btrfs, or a newer Linux; or: chown the directory to a user",
    )


def _runtime(found: Findings) -> Check:
    facility = "runtime directory"
    if isinstance(found.runtime, SandboxError):
        return Check(
            facility=facility,
            state=State.LACK,
            found=f"{found.runtime.attempt}: {found.runtime.answer}",
            loss="every sandbox",
            remedy=found.runtime.remedy,
        )
    if found.runtime_free_bytes >= 1 << 20:
        return Check(facility=facility, state=State.OK, found=found.runtime)
    return Check(
        facility=facility,
        state=State.LACK,
        found=f"{found.runtime} has no free space",
        loss="every sandbox: the records and connection files do not fit",
        remedy=f"df {found.runtime}   # make room there, or set runtime_dir",
    )


_CAP_LOSS = {
    "memory": "mem_limit: kernels that set it are refused, others have no cap",
    "cpu": "cpu_limit and cpu_guarantee: kernels that set them are refused",
    "cpuset": "cpuset: kernels that set it are refused",
    "io": "io_limit: kernels that set it are refused",
    "pids": "pids_limit: kernels that set it are refused, others have RLIMIT_NPROC",
}


def _cap(facility: str, host: HostFacts) -> Check:
    reason = host.cgroups.missing.get(facility)
    name = f"{facility} cap"
    if reason is None:
        base = host.cgroups.bases.get(facility, "")
        found = f"cgroup v{host.cgroups.version} in {base}"
        if host.cgroups.manager:
            found += f", scopes by systemd's {host.cgroups.manager} manager"
        return Check(facility=name, state=State.OK, found=found)
    return Check(
        facility=name,
        state=State.LACK,
        found=reason,
        loss=f'{_CAP_LOSS[facility]} (or start without, with on_missing: {{"{facility}": "warn"}})',
        remedy=host.cgroups.remedy(facility).rstrip("."),
    )


def _entry_point(found: Findings) -> Check:
    facility = "known to Jupyter"
    if not found.entry_point:
        return Check(
            facility=facility,
            state=State.LACK,
            found="no entry point 'sandbox-provisioner' in jupyter_client.kernel_provisioners",
            loss="every sandboxed kernel: Jupyter does not list them",
            remedy="pip install --force-reinstall --no-deps sandbox-provisioner",
        )
    if found.server:
        return Check(
            facility=facility,
            state=State.NOTE,
            found=f"here, but `jupyter` on your PATH is {found.server}",
            loss="sandboxed kernels in servers of that other environment",
            remedy="install sandbox-provisioner there too: that environment's "
            "python -m pip install sandbox-provisioner",
        )
    return Check(facility=facility, state=State.OK, found=found.entry_point)


def _kernels(kernels: Sequence[Kernel]) -> Iterator[Check]:
    boxed = [kernel.name for kernel in kernels if kernel.sandboxed]
    plain = [kernel.name for kernel in kernels if not kernel.sandboxed]
    bare = [kernel.name for kernel in kernels if kernel.sandboxed and not kernel.guarded]
    install = "jupyter sandbox install"
    if boxed:
        yield Check(facility="sandboxed kernels", state=State.OK, found=", ".join(boxed))
    else:
        yield Check(
            facility="sandboxed kernels",
            state=State.NOTE,
            found="none is installed",
            loss="sandboxes in front ends",
            remedy=install,
        )
    if bare:
        yield Check(
            facility="unguarded kernels",
            state=State.NOTE,
            found=f"{', '.join(bare)}: argv is the plain kernel's",
            loss="the sandbox, in front ends that start a kernel.json's argv by themselves",
            remedy=f"{install} --kernel NAME --replace",
        )
    if plain:
        yield Check(
            facility="plain kernels",
            state=State.NOTE,
            found=", ".join(plain),
            loss="nothing, if whoever may choose them may also do what your user can",
            remedy=f"{install} --kernel {plain[0]} --name {plain[0]} --replace   "
            '# or: c.KernelSpecManager.allowed_kernelspecs = {"python3-sandbox"} and '
            "ensure_native_kernel = False",
        )


def _core_pattern(sysctls: Mapping[str, str]) -> Check:
    pattern = sysctls.get("kernel.core_pattern", "")
    if not pattern.startswith("|"):
        return Check(facility="core dumps", state=State.OK, found=f"core_pattern is {pattern!r}")
    return Check(
        facility="core dumps",
        state=State.NOTE,
        found=f"a program of the host receives them: {pattern[1:].split()[0]}",
        loss="nothing: sandboxes switch theirs off (RLIMIT_CORE = 1)",
    )


def _leftovers(found: Findings) -> Check:
    left = [*found.left_sandboxes, *found.left_groups]
    if not left:
        return Check(facility="leftovers", state=State.OK, found="none")
    return Check(
        facility="leftovers",
        state=State.NOTE,
        found=f"of killed servers: {', '.join(left)}",
        loss="what they still hold; the next start of a sandbox removes those with a record",
        remedy="jupyter sandbox gc",
    )


def _trial(found: Findings) -> Check:
    facility, trial = "a sandbox starts", found.trial
    if not isinstance(trial, SandboxError):
        text = f"Python started and ended in one, in {trial:.0f} ms"
        return Check(facility=facility, state=State.OK, found=text)
    return Check(
        facility=facility,
        state=State.LACK,
        found=f"could not {trial.attempt}: {trial.answer}",
        loss="every sandbox with default options",
        remedy=trial.remedy.rstrip("."),
    )


def _uncapped_trial(found: Findings) -> Iterator[Check]:
    facility, trial = "... without caps", found.uncapped_trial
    if isinstance(trial, SandboxError):
        yield Check(
            facility=facility,
            state=State.LACK,
            found=f"could not {trial.attempt}: {trial.answer}",
            loss="every sandbox",
            remedy=trial.remedy.rstrip("."),
        )
    elif trial is not None:
        waived = dict.fromkeys(found.host.cgroups.missing, "warn")
        yield Check(
            facility=facility,
            state=State.OK,
            found=f"one starts in {trial:.0f} ms; if that is enough for you, in a configuration "
            f"file: c.SandboxProvisioner.on_missing = {waived}",
        )


def describe(checks: Sequence[Check]) -> str:
    """The table for people: what a check lacks stands below it, its command on a line to copy."""
    width = max(len(check.facility) for check in checks)
    lines = []
    for check in checks:
        state = check.state.value.upper() if check.state is State.LACK else check.state.value
        lines.append(f"{state:4}  {check.facility:{width}}  {check.found}")
        indent = " " * (width + 8)
        if check.loss:
            lines.append(f"{indent}you lose: {check.loss}")
        if check.remedy:
            lines.append(f"{indent}mend it:  {check.remedy}")
    return "\n".join(lines)
