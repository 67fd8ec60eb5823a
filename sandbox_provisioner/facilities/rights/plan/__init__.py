"""plan - pure: the kernel gives up every right that it does not need."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.facilities.rights.plan.seccomp import (
    GATEWAY,
    KERNEL,
    NETWORKED,
    NURSERY,
    compile_filter,
    describe,
)
from sandbox_provisioner.plan import Start, Step
from sandbox_provisioner.spec import Network


def become(start: Start) -> Iterator[Step]:
    """capabilities(7), no_new_privs."""
    why = "no capability, no way to gain one, an ordinary user"
    yield Step("become", (str(start.site.uid), str(start.site.gid)), why)


def filter_kernel(start: Start) -> Iterator[Step]:
    """seccomp(2), as the last step but one."""
    is_gateway = start.request.spec.network.mode is Network.HOST
    profile = GATEWAY if is_gateway else KERNEL
    yield filter_step(start, profile, "an allow-list of what the kernel may ask Linux")


def filter_nursery(start: Start) -> Iterator[Step]:
    """The same with the calls that make namespaces: its kernels have their own filter."""
    profile = NETWORKED if start.request.spec.network.mode is Network.GATEWAY else NURSERY
    yield filter_step(start, profile, "an allow-list of what the kernel may ask Linux")


def filter_step(start: Start, profile: str, why: str) -> Step:
    """The filter of *profile* as a step."""
    program = compile_filter(start.site.facts.machine.architecture, profile)
    shown = (f"({len(program) // 8} statements)",)
    detail = tuple(describe(profile).split("\n"))
    return Step("system-call-filter", (program, profile), why, shown=shown, detail=detail)
