"""facilities/ids/inside.py - runs in the launcher: user namespaces, and the ids in them.

May import: errno, os, inside.kernel_calls, files.
May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

import errno
import os

from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside.files import write

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Callable

    from sandbox_provisioner.inside.box import Box


def make_user_namespace(box: Box, name: str, uid_map: str, gid_map: str, owner: str = "0") -> None:
    """Make a user namespace of *owner*, that lives as long as our descriptor of it.

    user_namespaces(7): the maps are written from outside of it, by one who has CAP_SETUID there. A
    child is made in it and waits, so that we stay who we are.
    """

    def write_maps(pid: int) -> None:
        write(f"/proc/{pid}/uid_map", uid_map)
        write(f"/proc/{pid}/gid_map", gid_map)

    kernel.become_keeping_capabilities(int(owner))
    try:
        box.mounts.user_namespaces[name] = _made_user_namespace(write_maps)
    finally:
        kernel.become_keeping_capabilities(0)


def _made_user_namespace(write_maps: Callable[[int], None]) -> int:
    """A descriptor of a new user namespace; *write_maps* gets the pid of a process in it."""
    done, finish = os.pipe()
    try:
        pid = kernel.fork_into(kernel.CLONE_NEWUSER)
        if pid == 0:
            os.close(finish)
            os.read(done, 1)
            os._exit(0)
    finally:
        os.close(done)
    try:
        write_maps(pid)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(finish)
        os.waitpid(pid, 0)


def enter_user_namespace(box: Box, name: str) -> None:
    """Become uid 0 of the namespace *name*, which is nobody outside."""
    join_user_namespace(box, name)
    become_root_inside(box)


def join_user_namespace(box: Box, name: str) -> None:
    """Have all rights in the namespace *name*, and none elsewhere, as whoever we are."""
    kernel.setns(box.mounts.user_namespaces[name], kernel.CLONE_NEWUSER)
    _forget_user_namespaces(box)


def _forget_user_namespaces(box: Box) -> None:
    for fd in box.mounts.user_namespaces.values():
        os.close(fd)
    box.mounts.user_namespaces.clear()


def stand_aside(box: Box, init_id: str, uid: str, gid: str) -> None:
    """Be *init_id*, with the rights that we have, and with *uid*'s and *gid*'s files later on: who
    has no other id than those of a namespace without it cannot signal us, nor look into us, and
    whom we look into is a namespace below."""
    os.setresgid(int(init_id), int(init_id), int(init_id))
    kernel.become_keeping_capabilities(int(init_id))
    kernel.set_dumpable(dumpable=False)
    box.files_as = int(uid), int(gid)
    box.lasting_rights = *box.lasting_rights, kernel.CAP_SYS_PTRACE


def become_root_inside(_box: Box) -> None:
    """Be uid 0 of our user namespace, and in no group."""
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def map_child(_box: Box, init_pid: str, pid: str, uid_map: str, gid_map: str) -> None:
    """Map the ids of *pid*, which has made its user namespace in that of *init_pid*; we have the
    rights for it there, and stay there."""
    fd = os.open(f"/proc/{init_pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    kernel.setns(fd, kernel.CLONE_NEWUSER)
    os.close(fd)
    write(f"/proc/{pid}/uid_map", uid_map)
    write(f"/proc/{pid}/gid_map", gid_map)


def unshare_user_namespace(box: Box, uid_map: str, gid_map: str) -> None:
    """A user namespace for a process without privileges."""
    kernel.unshare(kernel.CLONE_NEWUSER)
    map_own_ids(box, uid_map, gid_map)


def map_own_ids(_box: Box, uid_map: str, gid_map: str) -> None:
    """user_namespaces(7): without privileges one maps oneself, after giving up setgroups(2)."""
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", uid_map)
    write("/proc/self/gid_map", gid_map)


def map_user_namespace(
    _box: Box, uid_helper: str, gid_helper: str, uid_map: str, gid_map: str
) -> None:
    """newuidmap(1), newgidmap(1): set-uid helpers map more than oneself, as subuid(5) allows.

    They run outside of the namespace, where their rights count. We stay who we are inside of it, in
    the same groups: what we may open there is what we may open here.
    """

    def run_helpers(pid: int) -> None:
        _run_helper(uid_helper, str(pid), *uid_map.split())
        _run_helper(gid_helper, str(pid), *gid_map.split())

    fd = _made_user_namespace(run_helpers)
    kernel.setns(fd, kernel.CLONE_NEWUSER)
    os.close(fd)


def _run_helper(path: str, *words: str) -> None:
    """Run it with nothing of our environment; what it says becomes the error's text."""
    name = os.path.basename(path)
    said, theirs = os.pipe()
    outputs = [(os.POSIX_SPAWN_DUP2, theirs, number) for number in (1, 2)]
    try:
        pid = os.posix_spawn(path, [name, *words], {}, file_actions=outputs)
    finally:
        os.close(theirs)
    text = b""
    while chunk := os.read(said, 1 << 12):
        text += chunk
    os.close(said)
    if os.waitpid(pid, 0)[1]:
        told = os.fsdecode(text.strip())
        raise kernel.CallFailed(name, errno.EPERM, words=" ".join(words), said=told)


VERBS = (
    make_user_namespace,
    enter_user_namespace,
    join_user_namespace,
    stand_aside,
    become_root_inside,
    map_child,
    unshare_user_namespace,
    map_own_ids,
    map_user_namespace,
)
