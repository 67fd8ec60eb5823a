"""facilities/landlock/inside.py - runs in launcher, init and kernel: the steps of "landlock" alone.

May import: os, stat, inside.kernel_calls.
May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

import os
import stat

from sandbox_provisioner.inside import kernel_calls as kernel

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from sandbox_provisioner.inside.box import Box

# linux/landlock.h, LANDLOCK_ACCESS_FS_*: how many bits versions 1 to 5 of the ABI know.
_RIGHTS = (13, 14, 15, 15, 16)
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << n for n in range(6))
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_TCP = 0b11  # bind and connect
_SCOPES = 0b11  # abstract unix sockets, signals
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_CHANGE = (1 << 16) - 1 & ~(_MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV)
_KINDS = {
    "read": _READ_FILE | _READ_DIR,
    "run": _READ_FILE | _READ_DIR | _EXECUTE,
    "change": _CHANGE,
    "write": _CHANGE & ~_EXECUTE,
    "use": _READ_FILE | _WRITE_FILE | _IOCTL_DEV,
    "bind": _READ_FILE | _WRITE_FILE | _READ_DIR | _MAKE_SOCK | _REMOVE_FILE,
}


class Landlock:
    """The set of rules that is being made, and what it can forbid; paths that init keeps open, and
    those of them that are in the kernel's own /proc."""

    def __init__(self) -> None:
        self.fd = -1
        self.known = 0
        self.kept: list[int] = []
        self.kept_of_kernel: list[str] = []

    def keep_of_kernel(self, pid: int) -> None:
        """See `keep_paths`; nothing if the kernel, *pid*, has ended already."""
        for name in self.kept_of_kernel:
            try:
                self.kept.append(os.open(f"/proc/{pid}/{name}", os.O_PATH | os.O_CLOEXEC))
            except OSError:
                return


def share_namespaces(box: Box) -> None:
    """The rest of the plan happens among the host's processes and files; init looks after what a
    namespace would have: that everything ends with it."""
    box.namespaces = False


def private_folder(_box: Box, *paths: str) -> None:
    """Directories of our own, each in one that is there."""
    for path in paths:
        os.mkdir(path, 0o700)


def own_file(_box: Box, path: str, text: str) -> None:
    """A file of the kernel's own, where there is no root of our own to put it into."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.write(fd, os.fsencode(text))
    os.close(fd)


def end_with_init(box: Box) -> None:
    """SIGKILL when init ends. If it has ended already, nobody is going to tell us."""
    kernel.die_with_parent()
    if os.getppid() != box.init_pid:
        os._exit(1)


def renounce(_box: Box) -> None:
    """An ordinary user's part of `become`: no capability that a service manager may have given, and
    no way to gain one (which also makes the bounding set mean nothing)."""
    kernel.set_capabilities()
    kernel.set_no_new_privileges()


def keep_paths(box: Box, *paths: str) -> None:
    """Let init hold open what the rules will name.

    A rule belongs to an inode in memory. Where the Linux kernel forgets one, as it does with /proc
    and some overlays when memory is short, the next look at the path makes another without a rule.
    """
    own = box.part(Landlock)
    for path in paths:
        if path.startswith("/proc/self/"):
            own.kept_of_kernel.append(path.removeprefix("/proc/self/"))
        else:
            own.kept.append(_opened(box, path))


def landlock_rules(box: Box, version: str) -> None:
    """Begin a set of rules: all that *version* of Landlock's ABI can forbid is forbidden."""
    own = box.part(Landlock)
    known = int(version)
    own.known = (1 << _RIGHTS[min(known, len(_RIGHTS)) - 1]) - 1
    network = _TCP if known >= 4 else 0
    scoped = _SCOPES if known >= 6 else 0
    own.fd = kernel.landlock_create_ruleset(own.known, network, scoped)


def landlock_allow(box: Box, kind: str, *paths: str) -> None:
    """What may be done with each of *paths*, and with what lies beneath it."""
    own = box.part(Landlock)
    for path in paths:
        fd = _opened(box, path)
        try:
            access = _KINDS[kind] & own.known
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                access &= _OF_FILES
            kernel.landlock_allow(own.fd, path, fd, access)
        finally:
            os.close(fd)


def chdir_place(box: Box, target: str, path: str) -> None:
    """The directory in which the kernel starts: *path* below a place that came with the plan. There
    is no root of its own in which any other path would lead nowhere."""
    fd = os.dup(box.mounts.places[target])
    if path:
        os.close(fd)
        stays = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_MAGICLINKS
        fd = kernel.openat2(box.mounts.places[target], path, os.O_PATH | os.O_DIRECTORY, stays)
    os.fchdir(fd)
    os.close(fd)


def _opened(box: Box, path: str) -> int:
    """A descriptor of *path*: of the place that came with the plan, if that is one."""
    if path in box.mounts.places:
        return os.dup(box.mounts.places[path])
    return os.open(path, os.O_PATH | os.O_CLOEXEC)


def landlock_restrict(box: Box) -> None:
    """From here on the rules hold."""
    own = box.part(Landlock)
    kernel.landlock_restrict_self(own.fd)


VERBS = (
    share_namespaces,
    private_folder,
    own_file,
    end_with_init,
    renounce,
    keep_paths,
    chdir_place,
    landlock_rules,
    landlock_allow,
    landlock_restrict,
)
