"""doctor.py - pure: from what was found on this machine to the list of checks that a person reads.

`app/doctor.py` finds out (`Findings`), `examine` judges, `describe` prints. Each check tells what
was found, what follows from it, and what mends it.
"""

from __future__ import annotations

import errno
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sandbox_provisioner.errors import COLUMNS, COMMAND, HostError, SandboxError, in_lines
from sandbox_provisioner.facilities.caps.wish import CAPS, Cap
from sandbox_provisioner.facilities.ids.facts import IDS, IdRange
from sandbox_provisioner.facilities.landlock.tell import obstacle
from sandbox_provisioner.facilities.namespaces.facts import (
    APPARMOR,
    NESTED,
    Surroundings,
    cause_of,
    forbidding_setting,
    setting,
)
from sandbox_provisioner.host import MACHINES, OLDEST_KERNEL, HostFacts, WorkdirFacts


class State(StrEnum):
    """MISSING may keep sandboxes from starting; NOTE is for the reader to judge."""

    OK = "ok"
    MISSING = "missing"
    NOTE = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the table. *effect* and *remedy* are for `errors.in_lines`: what follows from it,
    and what mends it; "" where all is well."""

    facility: str
    state: State
    found: str
    effect: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """An installed kernel. *guarded* means that its argv refuses to run outside of a sandbox."""

    name: str
    sandboxed: bool
    guarded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found out. *sysctls* are those that this Linux has.

    *id_range* is what an ordinary user's kernels can have; *runtime* is a directory or the error
    instead, *trial* the milliseconds that a sandbox took or the error instead, and *uncapped_trial*
    the same without the caps that are missing here, where the first one failed; *server* the
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


_NO_SANDBOX = "No sandbox starts."
_INDENT = " " * 4


def _lines(steps: Sequence[str]) -> str:
    return "\n".join(steps)


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
        *(_cap(cap, found.host) for cap in CAPS),
        _entry_point(found),
        *_kernels(found.kernels),
        *_watchers(found),
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
        state=State.MISSING,
        found=f"{version} is too old",
        effect="No sandbox starts: mounts cannot be changed one by one.",
        remedy=f"Boot Linux {oldest} or newer.",
    )


def _machine(host: HostFacts) -> Check:
    if host.machine in MACHINES:
        return Check(facility="machine", state=State.OK, found=host.machine)
    return Check(
        facility="machine",
        state=State.MISSING,
        found=host.machine,
        effect="No sandbox starts: there is no system call filter for this machine.",
        remedy=f"Use one of: {', '.join(MACHINES)}.",
    )


def _user_namespaces(found: Findings) -> Check:
    facility, around, host = "user namespaces", found.surroundings, found.host
    forbidden = forbidding_setting(around.sysctls, privileged=host.privileged)
    if around.in_sandbox:
        forbidden = NESTED
    starts = not all(isinstance(t, HostError | None) for t in (found.trial, found.uncapped_trial))
    if not (forbidden or starts):
        return _suspect(found)
    if forbidden:
        return Check(
            facility=facility,
            state=State.MISSING,
            found=forbidden.found,
            effect=_NO_SANDBOX,
            remedy=_lines(forbidden.steps),
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
    steps = cause.steps
    if is_held:
        steps = (*steps, "Or, for all programs:", f"{COMMAND}{setting(APPARMOR, 0)}")
    return Check(
        facility=facility,
        state=State.MISSING if is_held else State.NOTE,
        found=cause.found,
        effect=_NO_SANDBOX if is_held else "No sandbox starts, if the last row says so.",
        remedy=_lines(steps),
    )


def _user_ids(found: Findings) -> Check:
    facility, host, ids = "user ids of kernels", found.host, found.id_range
    if host.privileged:
        return Check(facility=facility, state=State.OK, found=f"a range of {IDS} for each kernel")
    if host.uid == 0:
        return Check(
            facility=facility,
            state=State.NOTE,
            found="that of this container's root, without its rights; 1000 inside",
            effect="The server and all kernels are one user for the rest of the machine.",
            remedy="Run the server as an ordinary user, and the container in a user namespace "
            "(Docker: userns-remap, Podman: rootless, Kubernetes: hostUsers: false).",
        )
    if isinstance(ids, SandboxError):
        return Check(
            facility=facility,
            state=State.NOTE,
            found=f"your own; no range, since {ids.answer}",
            effect='Kernels with user_ids = "range" do not start.',
            remedy=_lines(ids.steps),
        )
    text = f'your own; with user_ids = "range" also {IDS} from {ids.first_uid} on'
    return Check(facility=facility, state=State.OK, found=text)


def _filter(found: Findings) -> Check:
    if "errno" in found.sysctls.get("kernel.seccomp.actions_avail", "").split():
        return Check(facility="system call filter", state=State.OK, found="seccomp")
    return Check(
        facility="system call filter",
        state=State.MISSING,
        found="this Linux has no seccomp",
        effect=_NO_SANDBOX,
        remedy="Boot a Linux with CONFIG_SECCOMP_FILTER=y.",
    )


def _landlock(host: HostFacts) -> Check:
    facility, problem = "landlock", obstacle(host)
    if host.landlock < 1 and problem:
        return Check(
            facility=facility,
            state=State.NOTE,
            found=problem.answer,
            effect='Kernels with confinement = "landlock" do not start. (It is for places without '
            "namespaces, and weaker.)",
            remedy=_lines(problem.steps),
        )
    lost = "" if host.landlock >= 6 else "; signals are kept back since ABI 6 only"
    refused = f"; this server cannot use it: {problem.answer}" if problem else ""
    found = f"ABI {host.landlock}{lost}{refused}"
    return Check(facility=facility, state=State.OK, found=found)


def _work_directory(found: Findings) -> Check:
    facility, workdir = "work directory", found.workdir
    if isinstance(workdir, SandboxError):
        return Check(
            facility=facility,
            state=State.NOTE,
            found=workdir.answer,
            effect="Kernels do not start in the directory that you are in now.",
            remedy=_lines(workdir.steps),
        )
    where = f"{workdir.path} on {workdir.place.filesystem}"
    if not found.host.privileged:
        return Check(facility=facility, state=State.OK, found=f"{where}; kernels have your uid")
    if workdir.idmappable:
        return Check(facility=facility, state=State.OK, found=f"{where}: mounts can be id-mapped")
    loses_all = workdir.place.owner_uid == 0
    return Check(
        facility=facility,
        state=State.MISSING if loses_all else State.NOTE,
        found=f"{where}: its mounts cannot be id-mapped",
        effect="Kernels do not start in directories of root there."
        if loses_all
        else "Kernels run as the owner of the directory there, and not as a user of their own.",
        remedy="Work on ext4, xfs or btrfs, or with a newer Linux; or give the directory to an "
        "ordinary user (chown).",
    )


def _runtime(found: Findings) -> Check:
    facility = "runtime directory"
    if isinstance(found.runtime, SandboxError):
        return Check(
            facility=facility,
            state=State.MISSING,
            found=f"{found.runtime.attempt}: {found.runtime.answer}",
            effect=_NO_SANDBOX,
            remedy=_lines(found.runtime.steps),
        )
    if found.runtime_free_bytes >= 1 << 20:
        return Check(facility=facility, state=State.OK, found=found.runtime)
    return Check(
        facility=facility,
        state=State.MISSING,
        found=f"{found.runtime} has no free space",
        effect="No sandbox starts: its record and connection file do not fit.",
        remedy=f"Make room there, or set runtime_dir:\n{COMMAND}df {shlex.quote(found.runtime)}",
    )


def _cap(cap: Cap, host: HostFacts) -> Check:
    facility = cap.facility
    reason = host.cgroups.missing.get(facility)
    name = f"{facility} cap"
    if reason is None:
        base = host.cgroups.bases.get(cap.controller, "")
        found = f"cgroup v{host.cgroups.version} in {base}"
        if host.cgroups.manager:
            found += f", scopes by systemd's {host.cgroups.manager} manager"
        return Check(facility=name, state=State.OK, found=found)
    return Check(
        facility=name,
        state=State.MISSING,
        found=reason,
        effect=f"Kernels that set {' or '.join(cap.options)} do not start{cap.otherwise}. "
        f'With on_missing = {{"{facility}": "warn"}} all start.',
        remedy=_lines(host.cgroups.remedy(facility)),
    )


def _entry_point(found: Findings) -> Check:
    facility = "known to Jupyter"
    if not found.entry_point:
        return Check(
            facility=facility,
            state=State.MISSING,
            found="no entry point 'sandbox-provisioner' in jupyter_client.kernel_provisioners",
            effect="Jupyter does not know the provisioner: no sandbox starts.",
            remedy=f"{COMMAND}pip install --force-reinstall --no-deps sandbox-provisioner",
        )
    if found.server:
        return Check(
            facility=facility,
            state=State.NOTE,
            found=f"here, but `jupyter` on your PATH is {found.server}",
            effect="Servers of that other environment have no sandboxed kernels.",
            remedy="Install it there too, with that environment's python:\n"
            f"{COMMAND}python -m pip install sandbox-provisioner",
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
            effect="Front ends offer no sandboxed kernel.",
            remedy=f"{COMMAND}{install}",
        )
    if bare:
        yield Check(
            facility="unguarded kernels",
            state=State.NOTE,
            found=f"{', '.join(bare)}: their argv starts the kernel also without a sandbox",
            effect="A front end that starts a kernel.json's argv by itself uses no sandbox.",
            remedy=f"{COMMAND}{install} --kernel NAME --replace",
        )
    if plain:
        yield Check(
            facility="plain kernels",
            state=State.NOTE,
            found=", ".join(plain),
            effect="They run without a sandbox. That is well where whoever chooses them may do all "
            "that your user can.",
            remedy="To have none, replace each by its sandboxed twin:\n"
            f"{COMMAND}{install} --kernel {plain[0]} --name {plain[0]} --replace\n"
            "or hide them, in jupyter_server_config.py:\n"
            f'{COMMAND}c.KernelSpecManager.allowed_kernelspecs = {{"python3-sandbox"}}\n'
            f"{COMMAND}c.KernelSpecManager.ensure_native_kernel = False",
        )


# What Linux gives a user by default; other programs take some.
_USUAL_WATCHERS = 128
WATCHERS = "fs.inotify.max_user_instances"


def _watchers(found: Findings) -> Iterator[Check]:
    """Each kernel whose work directory has something to cover takes one for as long as it runs."""
    facility, limit = "inotify instances", found.sysctls.get(WATCHERS, "")
    if not limit.isdecimal():
        return
    if found.host.privileged:
        text = f"{limit} for each kernel, which is a user of its own"
        yield Check(facility=facility, state=State.OK, found=text)
    elif int(limit) >= _USUAL_WATCHERS:
        text = f"{limit} for your programs and kernels; a kernel in a home or repository takes one"
        yield Check(facility=facility, state=State.OK, found=text)
    else:
        yield Check(
            facility=facility,
            state=State.NOTE,
            found=f"{limit} for all of your programs and kernels",
            effect="Of kernels in a home or in a repository no more than that start.",
            remedy=f"{COMMAND}{setting(WATCHERS, _USUAL_WATCHERS)}",
        )


def _core_pattern(sysctls: Mapping[str, str]) -> Check:
    pattern = sysctls.get("kernel.core_pattern", "")
    if not pattern.startswith("|"):
        return Check(facility="core dumps", state=State.OK, found=f"core_pattern is {pattern!r}")
    return Check(
        facility="core dumps",
        state=State.NOTE,
        found=f"a program of the host receives them: {pattern[1:].split()[0]}",
        effect="Not from sandboxes: they switch core dumps off (RLIMIT_CORE = 1).",
    )


def _leftovers(found: Findings) -> Check:
    left = [*found.left_sandboxes, *found.left_groups]
    if not left:
        return Check(facility="leftovers", state=State.OK, found="none")
    return Check(
        facility="leftovers",
        state=State.NOTE,
        found=f"of killed servers: {', '.join(left)}",
        effect="The next start of a sandbox removes those that have a record.",
        remedy=f"{COMMAND}jupyter sandbox gc",
    )


def _trial(found: Findings) -> Check:
    facility, trial = "a sandbox starts", found.trial
    if not isinstance(trial, SandboxError):
        text = f"Python started and ended in one, in {trial:.0f} ms"
        return Check(facility=facility, state=State.OK, found=text)
    return Check(
        facility=facility,
        state=State.MISSING,
        found=f"could not {trial.attempt}: {trial.answer}",
        effect="No sandbox starts with the options that are set here.",
        remedy=_lines(trial.steps),
    )


def _uncapped_trial(found: Findings) -> Iterator[Check]:
    facility, trial = "one without caps", found.uncapped_trial
    if isinstance(trial, SandboxError):
        yield Check(
            facility=facility,
            state=State.MISSING,
            found=f"could not {trial.attempt}: {trial.answer}",
            effect=_NO_SANDBOX,
            remedy=_lines(trial.steps),
        )
    elif trial is not None:
        waived = dict.fromkeys(found.host.cgroups.missing, "warn")
        yield Check(
            facility=facility,
            state=State.OK,
            found=f"Python started and ended in one, in {trial:.0f} ms",
            effect="If that is good enough, write into jupyter_server_config.py:\n"
            f"{COMMAND}c.SandboxProvisioner.on_missing = {waived}",
        )


def describe(checks: Sequence[Check]) -> str:
    """The table for people: below a check stands what follows from it and what mends it, which for
    several checks may be the same."""
    width = max(len(check.facility) for check in checks)
    lines: list[str] = []
    told: dict[str, str] = {}
    for check in checks:
        lines += _row(check, width)
        below = [check.effect] if check.effect else []
        if check.remedy in told:
            below.append(f"What helps stands at the {told[check.remedy]}.")
        elif check.remedy:
            below.append(check.remedy)
            told[check.remedy] = check.facility
        lines += [f"{_INDENT}{line}" for part in below for line in _wrapped(part, len(_INDENT))]
    return "\n".join(lines)


def _row(check: Check, width: int) -> Iterator[str]:
    """What was found goes on below itself."""
    head = f"{check.state.value:7}  {check.facility:{width}}  "
    for line in _wrapped(check.found, len(head)):
        yield head + line
        head = " " * len(head)


def _wrapped(text: str, indent: int) -> list[str]:
    return in_lines(text, COLUMNS - indent).split("\n")
