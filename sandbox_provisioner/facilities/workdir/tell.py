"""facilities/workdir/tell.py - pure: the work directory, and what happened to what is covered."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.checks import Check, Findings, State, lines
from sandbox_provisioner.errors import COMMAND, SandboxError
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.told import EndCause, EndKind, Subject, setting

# What Linux gives a user by default; other programs take some.
_USUAL_WATCHERS = 128
WATCHERS = "fs.inotify.max_user_instances"
_MOST_OF_PATH = 200  # in a sentence

ENDS = (
    EndCause(
        EndKind.COVER_LOST,
        "{name} was ended: a program outside has replaced {lost_path} in its work "
        "directory. A kernel must not reach that file, and this one may have got hold of the new "
        "one before it could be stopped. Look at that file, then start the kernel again.",
        wire.COVER_LOST,
    ),
)


def _covered(path: str, of: Subject) -> str:
    return (
        f"A program outside has replaced {one_line(path)} in the work directory of "
        f"{of.whom}, which must not reach it; it is covered again."
    )


NOTICES = {wire.COVERED: _covered}


def moved(workdir: str) -> str:
    """The kernel's *workdir* is not where it was."""
    return (
        f"The work directory of this kernel, {one_line(workdir)[:_MOST_OF_PATH]}, was moved, "
        "removed or replaced since the kernel started. The kernel goes on in the old one: what it "
        "writes is not where you look for it. Restart the kernel to work in the new one."
    )


def new_repository(path: str, workdir: str, of: Subject) -> str:
    """There is one at *path* that the kernel may have made."""
    return (
        f"While {of.whom} ran, the repository {one_line(path)} was made in "
        f"{one_line(workdir)}. git runs programs that its configuration and hooks name: "
        "look at them before you use git there outside of a sandbox."
    )


def repositories_unknown(why: str, workdir: str, of: Subject) -> str:
    """Nobody could look for them."""
    return f"Whether {of.whom} made repositories in {one_line(workdir)} was not found out: {why}."


# Which words of a step are places, where these are relative to the work directory.
PLACES = {
    "cover": slice(1, None),
    "place": slice(0, None, 2),
    "make-folders": slice(None),
    "protect": slice(None),
}


def filesystem(found: Findings) -> Check:
    """Whether kernels can work in the directory that doctor was started in."""
    facility, workdir = "work directory", found.workdir
    if isinstance(workdir, SandboxError):
        return Check(
            facility=facility,
            state=State.NOTE,
            found=workdir.answer,
            effect="Kernels do not start in the directory that you are in now.",
            remedy=lines(workdir.steps),
        )
    where = f"{workdir.path} on {workdir.place.filesystem}"
    if not found.host.privileged:
        return Check(facility=facility, state=State.OK, found=f"{where}; kernels have your uid")
    if workdir.idmappable:
        return Check(facility=facility, state=State.OK, found=f"{where}: mounts can be id-mapped")
    loses_all = workdir.place.owner_uid == 0
    return Check(
        facility=facility,
        state=State.MISSING if loses_all else State.NOTE,
        found=f"{where}: its mounts cannot be id-mapped",
        effect="Kernels do not start in directories of root there."
        if loses_all
        else "Kernels run as the owner of the directory there, and not as a user of their own.",
        remedy="Work on ext4, xfs or btrfs, or with a newer Linux; or give the directory to an "
        "ordinary user (chown).",
    )


def watchers(found: Findings) -> Iterator[Check]:
    """Each kernel whose work directory has something to cover takes one for as long as it runs."""
    facility, limit = "inotify instances", found.sysctls.get(WATCHERS, "")
    if not limit.isdecimal():
        return
    if found.host.privileged:
        text = f"{limit} for each kernel, which is a user of its own"
        yield Check(facility=facility, state=State.OK, found=text)
    elif int(limit) >= _USUAL_WATCHERS:
        text = f"{limit} for your programs and kernels; a kernel in a home or repository takes one"
        yield Check(facility=facility, state=State.OK, found=text)
    else:
        yield Check(
            facility=facility,
            state=State.NOTE,
            found=f"{limit} for all of your programs and kernels",
            effect="Of kernels in a home or in a repository no more than that start.",
            remedy=f"{COMMAND}{setting(WATCHERS, _USUAL_WATCHERS)}",
        )
