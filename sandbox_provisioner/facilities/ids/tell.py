"""facilities/ids/tell.py - pure: whose ids kernels have here."""

from __future__ import annotations

from sandbox_provisioner.checks import Check, Findings, State, lines
from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.facilities.ids.facts import IDS
from sandbox_provisioner.told import Cause


def user_ids(found: Findings) -> Check:
    """Whose ids kernels have."""
    facility, host, ids = "user ids of kernels", found.host, found.id_range
    if host.privileged:
        return Check(facility=facility, state=State.OK, found=f"a range of {IDS} for each kernel")
    if host.caller.uid == 0:
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
            remedy=lines(ids.steps),
        )
    text = f'your own; with user_ids = "range" also {IDS} from {ids.first_uid} on'
    return Check(facility=facility, state=State.OK, found=text)


def forbidden_by(verb: str, text: str) -> Cause | None:
    """Why newuidmap or newgidmap refused; None if it was neither."""
    if verb != "map-user-namespace" or not text.startswith("new"):
        return None
    return Cause(
        "its rules are those of subuid(5)",
        "See that /etc/subuid and /etc/subgid give this user ids that exist here (compare "
        '/proc/self/uid_map), or set user_ids to "single".',
    )
