"""facilities/devices/tell.py - pure: what holds kernels here to the devices that they are given."""

from __future__ import annotations

from sandbox_provisioner.checks import Check, Findings, State

_FACILITY = "devices"


def devices(found: Findings) -> Check:
    """/dev is a list for everybody; for root also what Linux lets a group open."""
    host = found.host
    if not host.privileged:
        text = (
            "/dev has what was asked for; no list of what can be opened, which only root may make"
        )
        return Check(facility=_FACILITY, state=State.OK, found=text)
    if host.cgroups.version == 2 or "devices" in host.cgroups.bases:
        how = "a BPF program" if host.cgroups.version == 2 else "the hierarchy of devices"
        text = f"/dev has what was asked for, and {how} lets nothing else be opened"
        return Check(facility=_FACILITY, state=State.OK, found=text)
    return Check(
        facility=_FACILITY,
        state=State.NOTE,
        found="/dev has what was asked for; no hierarchy of devices is mounted",
        effect="A node that came into a sandbox by another way could be opened.",
        remedy="mount -t cgroup -o devices none /sys/fs/cgroup/devices",
    )
