"""checks.py - pure: which networks kernels can have here."""

from __future__ import annotations

from sandbox_provisioner.checks import Check, Findings, State
from sandbox_provisioner.errors import COMMAND

MODULES = "nf_tables nft_tproxy nft_reject_inet"


def gateway(found: Findings) -> Check:
    """Whether all that a kernel sends reaches its gateway, or what comes to some ports alone."""
    facility, why = 'network = "gateway"', found.catch_obstacle
    families = "IPv4 and IPv6" if found.host.machine.ipv6 else "IPv4"
    if not why:
        text = f"TCP to any port, and names, over {families}"
        return Check(facility=facility, state=State.OK, found=text)
    return Check(
        facility=facility,
        state=State.NOTE,
        found=f"{families}; no one listener for all ports can be had: {why}",
        effect="Kernels reach the ports that network_allow names, and 80 and 443 where a rule "
        "names none; programs inside cannot listen at these.",
        remedy=f"{COMMAND}sudo modprobe -a {MODULES}",
    )
