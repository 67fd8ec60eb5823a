"""facilities/rights/tell.py - pure: whether a system call filter can be had."""

from __future__ import annotations

from sandbox_provisioner.checks import NO_SANDBOX, Check, Findings, State

ACTIONS = "kernel.seccomp.actions_avail"


def system_call_filter(found: Findings) -> Check:
    """Whether Linux has one that answers with an error."""
    if "errno" in found.sysctls.get(ACTIONS, "").split():
        return Check(facility="system call filter", state=State.OK, found="seccomp")
    return Check(
        facility="system call filter",
        state=State.MISSING,
        found="this Linux has no seccomp",
        effect=NO_SANDBOX,
        remedy="Boot a Linux with CONFIG_SECCOMP_FILTER=y.",
    )
