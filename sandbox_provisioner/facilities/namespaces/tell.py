"""facilities/namespaces/tell.py - pure: who forbids namespaces, and mounts in them."""

from __future__ import annotations

import errno
from collections.abc import Callable

from sandbox_provisioner.checks import NO_SANDBOX, Check, Findings, State, lines
from sandbox_provisioner.errors import COMMAND, HostError
from sandbox_provisioner.facilities.namespaces.facts import (
    APPARMOR,
    NESTED,
    Surroundings,
    cause_of,
    forbidding_setting,
    masked_proc_cause,
    mount_cause,
)
from sandbox_provisioner.told import Cause, setting

_VERBS = (
    "make-user-namespace", "unshare-user-namespace", "map-user-namespace", "unshare", "fork-init",
)  # fmt: skip
_NEW_PROC = "fsmount(name='proc'"
_TAKE_VERBS = ("take", "take-all", "take-place")
_MOUNT_VERBS = (
    *_TAKE_VERBS, "new-root", "attach", "mount", "scratch", "mask", "show-only", "freeze-paths",
    "pivot",
)  # fmt: skip


def allowed(found: Findings) -> Check:
    """Whether this user may make namespaces here."""
    facility, around, host = "user namespaces", found.surroundings, found.host
    forbidden = forbidding_setting(around.sysctls, privileged=host.privileged)
    if around.in_sandbox:
        forbidden = NESTED
    starts = not all(isinstance(t, HostError | None) for t in (found.trial, found.uncapped_trial))
    if not (forbidden or starts or _were_made(found)):
        return _suspect(found)
    if forbidden:
        return Check(
            facility=facility,
            state=State.MISSING,
            found=forbidden.found,
            effect=NO_SANDBOX,
            remedy=lines(forbidden.steps),
        )
    who = "the machine's root" if host.privileged else f"uid {host.caller.uid}"
    where = f" in {around.place}" if around.place else ""
    return Check(facility=facility, state=State.OK, found=f"allowed for {who}{where}")


def _were_made(found: Findings) -> bool:
    """Whether the start got as far as to the new /proc, which comes after them."""
    return isinstance(found.trial, HostError) and _NEW_PROC in found.trial.answer


def _suspect(found: Findings) -> Check:
    """No setting forbids them, but no sandbox starts here: who may have forbidden it."""
    around, privileged = found.surroundings, found.host.privileged
    is_held = around.is_held_by_apparmor and not privileged
    facility, user = "user namespaces", f"uid {found.host.caller.uid}"
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
        effect=NO_SANDBOX if is_held else "No sandbox starts, if the last row says so.",
        remedy=lines(steps),
    )


def forbidden_by(
    verb: str, number: int, text: str, *, look: Callable[[], Surroundings], privileged: bool
) -> Cause | None:
    """Who of this machine forbade the step *verb*, None if it was not of those that somebody
    forbids; *look* looks around."""
    made = verb != "fork-init" and text.startswith(("unshare(", "clone("))
    if number == errno.EINVAL and not made:
        return None
    if verb in _VERBS:
        return cause_of(number, text, look(), privileged=privileged)
    # What is taken is the server's to read: EACCES means a closed path there.
    forbids = {errno.EPERM} if verb in _TAKE_VERBS else {errno.EPERM, errno.EACCES}
    if verb not in _MOUNT_VERBS or number not in forbids:
        return None
    if text.startswith(_NEW_PROC):
        return masked_proc_cause(look())
    return mount_cause(look(), privileged=privileged)
