"""checks.py - pure: which networks kernels can have here."""

from __future__ import annotations

from sandbox_provisioner.checks import Check, Findings, State, lines
from sandbox_provisioner.errors import COMMAND, SandboxError

MODULES = "nf_tables nft_tproxy nft_reject_inet"
CARD_MODULES = (
    "nf_tables nft_ct nft_limit nft_connlimit nft_quota nft_masq nft_reject_inet veth sch_tbf"
)


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


def card(found: Findings) -> Check:
    """Whether kernels can have a network card: nf_tables, veth, TBF, forwarding, and the pool."""
    facility, why = 'network = "card"', found.card
    if not found.host.privileged:
        return Check(facility=facility, state=State.OK, found="is for kernels of a root server")
    if not why:
        text = "nf_tables, veth, TBF and forwarding are there, and the pool is free"
        return Check(facility=facility, state=State.OK, found=text)
    found_out, remedy = str(why), f"{COMMAND}sudo modprobe -a {CARD_MODULES}"
    if isinstance(why, SandboxError):
        found_out, remedy = why.answer, lines(why.steps)
    return Check(
        facility=facility,
        state=State.NOTE,
        found=found_out,
        effect='Kernels can have network = "gateway", and no card.',
        remedy=remedy,
    )
