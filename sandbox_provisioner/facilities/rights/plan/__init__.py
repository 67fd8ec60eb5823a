"""plan - pure: the kernel gives up every right that it does not need."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.facilities.rights.plan.seccomp import (
    GATEWAY,
    KERNEL,
    NETWORKED,
    NURSERY,
    ROOT,
    WITH_DEVICES,
    compile_filter,
    describe,
)
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.plan import Start, Step
from sandbox_provisioner.spec import Network

# capabilities(7): what package managers need over the files of the box, and to run programs as the
# users that they add. They count in the kernel's own user namespace, which owns nothing but ids.
ROOTS_CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
}


def become(start: Start) -> Iterator[Step]:
    """capabilities(7), no_new_privs."""
    if start.request.spec.is_root:
        words = (str(start.site.uid), str(start.site.gid))
        numbers = (str(number) for number in ROOTS_CAPABILITIES.values())
        why = "root of its own ids, with rights over files and users, and no way to gain more"
        yield Step("become", (*words, *numbers), why, shown=(*words, *ROOTS_CAPABILITIES))
        return
    why = "no capability, no way to gain one, an ordinary user"
    yield Step("become", (str(start.site.uid), str(start.site.gid)), why)


def answer_modes(start: Start) -> Iterator[Step]:
    """Before there is a kernel."""
    if start.request.spec.is_root:
        why = "what has a set-id bit in a package is installed without it"
        yield Step("answer-modes", (), why)


def filter_kernel(start: Start) -> Iterator[Step]:
    """seccomp(2), as the last step but one."""
    is_gateway = start.request.spec.network.mode is Network.HOST
    profile = GATEWAY if is_gateway else KERNEL
    profile = ROOT if start.request.spec.is_root else profile
    yield filter_step(start, profile, "an allow-list of what the kernel may ask Linux")


def filter_nursery(start: Start) -> Iterator[Step]:
    """The same with the calls that make namespaces: its kernels have their own filter."""
    profile = NETWORKED if start.request.spec.network.mode is Network.GATEWAY else NURSERY
    yield filter_step(start, profile, "an allow-list of what the kernel may ask Linux")


def filter_program(facts: HostFacts) -> Step:
    """The filter of a kernel, for a program that is none."""
    return _filter_step(facts, KERNEL, "")


def filter_step(start: Start, profile: str, why: str) -> Step:
    """The filter of *profile* as a step; a box that is given devices has one of its own."""
    profile += WITH_DEVICES if start.request.spec.devices else ""
    return _filter_step(start.site.facts, profile, why)


def _filter_step(facts: HostFacts, profile: str, why: str) -> Step:
    program = compile_filter(facts.machine.architecture, profile)
    shown = (f"({len(program) // 8} statements)",)
    detail = tuple(describe(profile).split("\n"))
    return Step("system-call-filter", (program, profile), why, shown=shown, detail=detail)
