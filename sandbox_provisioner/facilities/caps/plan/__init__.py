"""plan - pure: the steps that put a sandbox under its caps.

A process joins its groups before it does anything else, so that all of it is charged. What tells
PID 1 of the group's memory is opened while the host's groups can be reached.
"""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.errors import COLUMNS, in_lines
from sandbox_provisioner.facilities.caps.inside.memory import FILES
from sandbox_provisioner.facilities.caps.plan.bounds import (
    SYSCTLS,
    counted_limits,
    kernels_limits,
    makers_limits,
    programs_limits,
)
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.inside import wire
from sandbox_provisioner.plan import Start, Step
from sandbox_provisioner.spec import Limits, Network
from sandbox_provisioner.units import format_bytes

# How many descriptors ``open-memory`` opens, by the version of cgroups.
MEMORY_FILES = {version: len(names) for version, names in FILES.items()}
_JOINED = "memory, CPU and processes are charged from here on"


def join(start: Start) -> Iterator[Step]:
    """Whoever has the server's rights finds the groups by their names."""
    if start.site.join_files:
        yield Step("join-cgroup", start.site.join_files, _JOINED)


def join_opened(_start: Start) -> Iterator[Step]:
    """The same for who has no right to them: the server has opened their files."""
    yield Step("join-cgroup", (), _JOINED)


def open_memory(start: Start) -> Iterator[Step]:
    """For `watch_memory`."""
    if start.request.spec.limits.memory_bytes is None or start.site.memory_group is None:
        return
    version, group = start.site.memory_group
    yield Step("open-memory", (str(version), group), "while the host's groups can be reached")


def watch_memory(start: Start) -> Iterator[Step]:
    """Whose kill was whose, and the interrupt before it. A command that is no Jupyter kernel has no
    cell to interrupt: it would end."""
    site, limits, is_kernel = start.site, start.request.spec.limits, start.request.connection_file
    cap = limits.memory_bytes
    if cap is None or site.memory_group is None:
        return
    share = (interrupt_share(limits, site.facts) or 0) if is_kernel else 0
    shared = _shared_bytes(start)
    killed = _child_killed(cap, shared) if is_kernel else ""
    sentence = in_lines(_interrupted(cap, shared), COLUMNS - len("1023 MiB"))
    if shared:
        cap = min(cap, shared)
    version = str(site.memory_group[0])
    words = (version, str(round(cap * share)), str(cap), str(site.uid), str(site.gid))
    why = "init learns which process Linux ends at the cap"
    if share:
        why = f"at {share:g} of the cap init interrupts the kernel, before Linux would end it"
    remedy = "Set mem_interrupt = 0 to do without."
    yield Step("watch-memory", (*words, sentence, in_lines(killed)), why, remedy)


def words_of_cap(cap: int) -> tuple[str, str, str]:
    """The rest of `wire.CAP`, for a kernel that has the cap *cap* from now on."""
    sentence = in_lines(_interrupted(cap, 0), COLUMNS - len("1023 MiB"))
    said, killed = map(wire.in_hexadecimal, (sentence, in_lines(_child_killed(cap, 0))))
    return str(cap), said, killed


def _shared_bytes(start: Start) -> int:
    """The least that a group above allows to all in it, there already or made for the start; 0: no
    limit."""
    above = start.site.memory_above
    found = [limits.memory_bytes for limits in start.request.sums.values()]
    found.append(above.limit_bytes if above else None)
    return min((limit for limit in found if limit), default=0)


def _interrupted(cap: int, shared: int) -> str:
    """What the person at the notebook reads then, with "{}" for what the kernel uses. It is said
    before it is known whether the interrupt comes in time."""
    limit, remedy = f"its memory limit of {format_bytes(cap)}", "raise mem_limit"
    if 0 < shared < cap:
        limit = f"the {format_bytes(shared)} that it shares with other programs"
        remedy = "ask who runs this machine for more"
    return (
        f"The kernel is interrupted: it uses {{}} of {limit}. If this comes in time, your "
        f"variables stay; delete what you do not need, or {remedy}. If not, the kernel is killed, "
        "and says so."
    )


def _child_killed(cap: int, shared: int) -> str:
    """The same when a process that the kernel had started is no more. Inside nobody sees whether
    the limit was its own."""
    reached = f"together they reached the memory limit of {format_bytes(cap)}"
    if shared:
        reached += f", or with other programs the {format_bytes(shared)} that they share"
    return (
        f"A child process of this kernel was killed: {reached}. What waits for it may wait for "
        "ever: if so, interrupt the cell. Start fewer processes, give them less, or raise "
        "mem_limit."
    )


def oom_score(start: Start) -> Iterator[Step]:
    """proc(5), oom_score_adj. A server in a box has what kernels have elsewhere, and is to outlive
    its own where the memory of both is full, however much it has."""
    score = "1000" if start.request.box else "300"
    yield Step("oom-score", (score,), "if the machine runs out, kernels go before their server")


def limit_maker(_start: Start) -> Iterator[Step]:
    """What is counted for the owner of a namespace is limited by what its maker had."""
    yield Step("resource-limits", makers_limits(), "only root can raise what the server has")


def limit_ids(start: Start) -> Iterator[Step]:
    """For who makes a namespace for a kernel that is root, and may be any of its ids: what is
    counted for each is limited for all of them together (kernel/ucount.c)."""
    if start.request.spec.is_root:
        words = counted_limits(_processes(start))
        yield Step("resource-limits", words, "for all ids of the kernel's together")


def limit_settings(start: Start) -> Iterator[Step]:
    """Settings of namespaces that are the box's own."""
    settings = SYSCTLS
    if start.request.spec.network.mode is Network.HOST:
        settings = tuple(word for word in settings if not word.startswith("net/"))
    yield Step("own-limits", settings, "what the machine has for everybody: a small share of it")


def limit_all(_start: Start) -> Iterator[Step]:
    """Every limit that Linux has for a process."""
    yield _limits(None)


def limit_program() -> Iterator[Step]:
    """For one that works for a box outside of it."""
    why = "what it works for is anybody's, and it may be in no group with a cap"
    yield Step("resource-limits", programs_limits(), why)


def limit_kernel(start: Start) -> Iterator[Step]:
    """The same, with how many processes a kernel may have where no cgroup caps them."""
    yield _limits(_processes(start))


def _limits(processes: int | None) -> Step:
    why = "all that there are, so that none is the server's by chance"
    return Step("resource-limits", kernels_limits(processes), why)


def _processes(start: Start) -> int | None:
    """How many the kernel may have where no cgroup caps them; getrlimit(2) counts those of its user
    in its user namespace, before Linux 5.14 those of the whole machine. None where one does."""
    most = start.request.spec.limits.pids
    if most is None or "pids" not in start.site.facts.cgroups.missing:
        return None
    return most + start.site.user_tasks


def beyond_memory(limits: Limits, facts: HostFacts) -> list[str]:
    """What a kernel has beyond its cap on memory here, as nouns."""
    had = (cap for cap in limits.asked if cap.facility not in facts.cgroups.missing)
    return [cap.noun for cap in had if cap.eases_memory(limits)]


def interrupt_share(limits: Limits, facts: HostFacts) -> float | None:
    """At which share of its cap a kernel is interrupted here; None: it is not. By default it is not
    where it goes on beyond the cap."""
    is_eased = limits.interrupt_by_default and beyond_memory(limits, facts)
    return None if is_eased else limits.interrupt_share


def enforced(limits: Limits, facts: HostFacts) -> Limits:
    """*limits* without a cap on memory that is only a default, where it cannot be had; nor is there
    one on swap then, which would come on top of it."""
    given_up = "memory" in limits.by_default and "memory" in facts.cgroups.missing
    return limits.without({"memory", "swap"}) if given_up else limits
