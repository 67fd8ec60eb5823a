"""mounting.py - who launches, as root: mounts an image, attached nowhere.

Its loop device ends with the last mount, and the mount with the last who has it: the server while
it starts a kernel, and the kernel's box. So nobody has to unmount anything, whoever is killed.
"""

from __future__ import annotations

import contextlib
import errno
import os

from sandbox_provisioner.inside import kernel_calls

_CONTROL = "/dev/loop-control"
# Further on there are bitmaps of groups of blocks that nobody writes to for a long time.
_BEGINNING_BYTES = 1 << 30
_PIECE_BYTES = 1 << 20
# Others look for a free loop device at the same time.
_TRIES = 64
# ext4(5). Inode tables are holes of a new file, which nobody has to fill with zeros; what the disk
# below fails to take is an error and no damage.
_OPTIONS = {"noinit_itable": None, "errors": "remount-ro"}
# Nobody mounts it again when this machine has stopped: no order of writes to the disk is kept.
_OF_ONE_BOOT = {**_OPTIONS, "barrier": "0"}
_ATTRIBUTES = kernel_calls.MOUNT_NOSUID | kernel_calls.MOUNT_NODEV
# ext4's super.rst, "s_state", and what it tells.
_STATE_AT, _HAS_ERRORS = 1024 + 0x3A, 2


def mount_image(image: int, count: int, *, lasts: bool, is_new: bool = False) -> tuple[int, ...]:
    """So many mounts of the one file system in the file *image*, none of which is attached;
    *lasts* if it is to outlive a crash of this machine. OSError."""
    state = os.pread(image, 1, _STATE_AT)
    if not state:
        raise OSError(errno.EUCLEAN, "there is no file system in it")
    if state[0] & _HAS_ERRORS:
        raise OSError(errno.EUCLEAN, "Linux has found errors in its file system")
    device, path = _loop_device(image)
    try:
        if is_new:
            _keep_in_memory(image, device)
        options = {"source": path, **(_OPTIONS if lasts else _OF_ONE_BOOT)}
        with contextlib.ExitStack() as undo:
            mounts = []
            for _ in range(count):
                mounts.append(kernel_calls.new_mount("ext4", options, _ATTRIBUTES))
                undo.callback(os.close, mounts[-1])
            undo.pop_all()
        return tuple(mounts)
    finally:
        os.close(device)  # from here on it goes with the mounts, and the image's lock with it


def _keep_in_memory(image: int, device: int) -> None:
    """Let what is at the beginning of a new *image* be in memory as the *device*'s: each block that
    ext4 asks for while a box is built would wait for a thread of the Linux kernel, and that one for
    a CPU. In one that kernels have filled it would be all that they have written."""
    size, end = min(os.fstat(image).st_size, _BEGINNING_BYTES), 0
    while end < size:
        try:
            begin = os.lseek(image, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing but a hole
                raise
            return
        end = min(os.lseek(image, begin, os.SEEK_HOLE), begin + _PIECE_BYTES)
        os.pwrite(device, os.pread(image, end - begin, begin), begin)


def _loop_device(image: int) -> tuple[int, str]:
    """A device whose content is *image*, as long as anybody has it open; and its path."""
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            path = f"/dev/loop{_free_device(control)}"
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                kernel_calls.configure_loop_device(device, image, path=path)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise
            else:
                return device, path
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, f"other programs took {_TRIES} loop devices, one after another")


def _free_device(control: int) -> int:
    try:
        return kernel_calls.free_loop_device(control)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        text = f"all loop devices of this machine are in use: {error}"
        raise OSError(errno.ENOSPC, text) from None
