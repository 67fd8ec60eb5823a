"""doctor.py - pure: from what was found on this machine to the list of checks that a person reads.

`app/doctor.py` finds out (`Findings`), `examine` judges, `describe` prints. Each check tells what
was found, what follows from it, and what mends it; those of a facility stand in its `tell`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence

from sandbox_provisioner.checks import NO_SANDBOX, Check, Findings, Kernel, State, lines
from sandbox_provisioner.errors import COLUMNS, COMMAND, SandboxError, in_lines
from sandbox_provisioner.facilities.caps import tell as caps
from sandbox_provisioner.facilities.devices import tell as devices
from sandbox_provisioner.facilities.ids import tell as ids
from sandbox_provisioner.facilities.landlock import tell as landlock
from sandbox_provisioner.facilities.namespaces import tell as namespaces
from sandbox_provisioner.facilities.network.tell import checks as network
from sandbox_provisioner.facilities.rights import tell as rights
from sandbox_provisioner.facilities.root import tell as root
from sandbox_provisioner.facilities.storage import tell as storage
from sandbox_provisioner.facilities.workdir import tell as workdir
from sandbox_provisioner.host import MACHINES, OLDEST_KERNEL, HostFacts

# What of /proc/sys the checks ask for.
SYSCTLS = (rights.ACTIONS, caps.CORE_PATTERN, workdir.WATCHERS)
_INDENT = " " * 4


def examine(found: Findings) -> list[Check]:
    """Every check, in the order in which a start needs them; the trial of a start comes last."""
    return [
        _linux(found.host),
        _machine(found.host),
        namespaces.allowed(found),
        ids.user_ids(found),
        rights.system_call_filter(found),
        landlock.version(found),
        workdir.filesystem(found),
        *storage.workdir_size(found),
        root.images(found),
        _runtime(found),
        *caps.caps(found),
        *caps.joining(found),
        devices.devices(found),
        storage.disk(found),
        _entry_point(found),
        *_kernels(found.kernels),
        *_broker(found),
        network.gateway(found),
        network.card(found),
        *workdir.watchers(found),
        caps.core_dumps(found),
        *_images(found.image_tools),
        _leftovers(found),
        _trial(found),
        *_uncapped_trial(found),
    ]


def _linux(host: HostFacts) -> Check:
    kernel = host.machine.kernel
    version, oldest = (".".join(map(str, number)) for number in (kernel, OLDEST_KERNEL))
    if kernel >= OLDEST_KERNEL:
        return Check(facility="Linux", state=State.OK, found=f"{version} ({oldest} or newer)")
    return Check(
        facility="Linux",
        state=State.MISSING,
        found=f"{version} is too old",
        effect="No sandbox starts: mounts cannot be changed one by one.",
        remedy=f"Boot Linux {oldest} or newer.",
    )


def _machine(host: HostFacts) -> Check:
    if host.machine.architecture in MACHINES:
        return Check(facility="machine", state=State.OK, found=host.machine.architecture)
    return Check(
        facility="machine",
        state=State.MISSING,
        found=host.machine.architecture,
        effect="No sandbox starts: there is no system call filter for this machine.",
        remedy=f"Use one of: {', '.join(MACHINES)}.",
    )


def _runtime(found: Findings) -> Check:
    facility = "runtime directory"
    if isinstance(found.runtime, SandboxError):
        return Check(
            facility=facility,
            state=State.MISSING,
            found=f"{found.runtime.attempt}: {found.runtime.answer}",
            effect=NO_SANDBOX,
            remedy=lines(found.runtime.steps),
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


def _broker(found: Findings) -> Iterator[Check]:
    """Most machines need none."""
    if isinstance(found.broker, SandboxError):
        yield Check(
            facility="broker",
            state=State.MISSING,
            found=f"{found.broker.attempt}: {found.broker.answer}",
            effect='Kernels with launcher = "broker" do not start.',
            remedy=lines(found.broker.steps),
        )
    elif found.broker:
        yield Check(facility="broker", state=State.OK, found=f"answers at {found.broker}")


# What each program that makes images is for, and the package that it comes in.
IMAGE_TOOLS = {
    "sqfstar": ("building and importing images", "squashfs-tools"),
    "mmdebstrap": ("building images", "mmdebstrap"),
}


def _images(tools: Mapping[str, bool]) -> Iterator[Check]:
    """Whoever has no image of his own needs none of them."""
    missing = [name for name, is_here in tools.items() if not is_here]
    if tools and not missing:
        yield Check(facility="images", state=State.OK, found=f"{', '.join(tools)} are here")
    elif missing:
        yield Check(
            facility="images",
            state=State.NOTE,
            found=f"there is no {' and no '.join(missing)}",
            effect=f"jupyter sandbox image lacks it for {IMAGE_TOOLS[missing[0]][0]}.",
            remedy=f"{COMMAND}apt install {' '.join(IMAGE_TOOLS[name][1] for name in missing)}",
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
        remedy=lines(trial.steps),
    )


def _uncapped_trial(found: Findings) -> Iterator[Check]:
    facility, trial = "one without caps", found.uncapped_trial
    if isinstance(trial, SandboxError):
        yield Check(
            facility=facility,
            state=State.MISSING,
            found=f"could not {trial.attempt}: {trial.answer}",
            effect=NO_SANDBOX,
            remedy=lines(trial.steps),
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
            below.append(f'What helps stands at "{told[check.remedy]}".')
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
