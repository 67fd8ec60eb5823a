"""served.py - an image file that a program reads for Linux: who starts that, and who tells its end.

Linux mounts no file for an ordinary user; squashfuse(1) reads one, and answers Linux over
/dev/fuse. The mount is made by a launcher of its own, in a user namespace, and attached nowhere;
the program gets both descriptors, and ends by itself when the mount does, whoever has it last. A
pidfd of it goes to the server, which ends it where it does not answer, and to PID 1 of the box.
"""

from __future__ import annotations

import os
import select

from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.watcher import Watcher

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandbox_provisioner.inside.box import Box
    from sandbox_provisioner.inside.watcher import Init

_DEVICE = "/dev/fuse"
_HAS_ENDED = (
    "What reads the root file system of this kernel, squashfuse, has ended: nothing can be\n"
    "read any more that is not in memory already. Save what you need, and restart the kernel."
)


class Served:
    """*fuse_fd* is where Linux asks."""

    def __init__(self) -> None:
        self.fuse_fd = -1

    def mount(self, box: Box, target: str, uid: str, gid: str) -> None:
        """A mount that whoever has the device answers for, and that nobody but this user uses."""
        self.fuse_fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        options: dict[str, str | None] = {
            "source": "image",
            "fd": str(self.fuse_fd),
            "rootmode": "40000",
            "user_id": uid,
            "group_id": gid,
        }
        attributes = kernel.MOUNT_RDONLY | kernel.MOUNT_NOSUID | kernel.MOUNT_NODEV
        box.mounts.taken[target] = kernel.new_mount("fuse", options, attributes)

    def serve(self, box: Box, place: str, program: str, *words: str) -> None:
        """Let *program* answer, a process of nobody's, with the file *place* that came with the
        plan."""
        file = box.mounts.places.pop(place)
        pid = os.fork()
        if pid == 0:
            kernel.close_on_exec_from(0)
            for fd in (file, self.fuse_fd):
                os.set_inheritable(fd, True)
            null = os.open("/dev/null", os.O_RDWR)
            for fd in range(3):
                os.dup2(null, fd)
            argv = [program, *words, f"/dev/fd/{file}", f"/dev/fd/{self.fuse_fd}"]
            try:
                os.execve(program, argv, {})
            finally:
                os._exit(127)
        box.named[wire.IMAGE_SERVER] = [os.pidfd_open(pid)]
        os.close(file)
        os.close(self.fuse_fd)


class ServersOfImages(Watcher):
    """PID 1's: tells the person at the notebook when that program has ended before the kernel."""

    def __init__(self, box: Box) -> None:
        self._fds = list(box.named.get(wire.IMAGE_SERVER, ()))

    def waits(self) -> Iterable[tuple[int, int]]:
        """A pidfd, until it has told."""
        return [(fd, select.POLLIN) for fd in self._fds]

    def serve(self, init: Init, ready: dict[int, int]) -> None:
        """Once. The kernel goes on: it may have in its memory what somebody needs."""
        for fd in self._fds:
            if fd in ready:
                init.say(_HAS_ENDED)
                self._fds.clear()
