"""loop.py - in who launches, with the machine's own root: mounts an image file, and leaves nothing.

loop(4) makes a block device of a file. Ours is read-only, and ends by itself with the last one who
has it (LO_FLAGS_AUTOCLEAR); what is on it is mounted in no mount namespace (fsmount(2)), and ends
with the last one who has that: the server while it starts a kernel, and the kernel's box. So nobody
has to unmount anything, whoever is killed.

Kernels with one image share the device of its file, and so what Linux knows of it, and has read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.root.facts.kinds import ImageKind
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.places import Place

_CONTROL = "/dev/loop-control"
# linux/loop.h: LOOP_GET_STATUS64, and struct loop_info64, of which we read device, inode, offset,
# sizelimit and flags.
_STATUS = 0x4C05
_INFO = struct.Struct("=2Q8x2Q12xI176x")
_TRIES = 64  # others take free ones too
_known: dict[tuple[int, int], int] = {}


def mount_of(place: Place, kind: ImageKind, attempt: str) -> int:
    """A mount of the file *place*, read-only and without devices or set-id programs, attached
    nowhere; HostError."""
    try:
        with _device_of(place) as number:
            options = {"source": f"/dev/loop{number}", "ro": None, **kind.options}
            attributes = kernel_calls.MOUNT_RDONLY | kernel_calls.MOUNT_NOSUID
            attributes |= kernel_calls.MOUNT_NODEV
            return kernel_calls.new_mount(kind.filesystem, options, attributes)
    except OSError as error:
        raise _not_mounted(kind, error, attempt) from None


@contextlib.contextmanager
def _device_of(place: Place) -> Iterator[int]:
    """The number of a loop device of the file *place*, which stays as long as somebody has it."""
    key = place.device, place.inode
    fd = _shared(key)
    if fd < 0:
        fd = _new(place, key)
    try:
        yield _known[key]
    finally:
        os.close(fd)


def _shared(key: tuple[int, int]) -> int:
    """The device that there is of that file, open, -1 if there is none."""
    numbers = [_known[key]] if key in _known else []
    for number in (*numbers, *_numbers_in_use()):
        fd = _opened(number)
        if fd < 0:
            continue
        if _is_of(fd, key):
            _known[key] = number
            return fd
        os.close(fd)
    return -1


def _numbers_in_use() -> Iterator[int]:
    for name in os.listdir("/sys/block"):
        if name.startswith("loop") and os.path.exists(f"/sys/block/{name}/loop"):
            yield int(name.removeprefix("loop"))


def _opened(number: int) -> int:
    try:
        return os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _is_of(fd: int, key: tuple[int, int]) -> bool:
    """Whether the device *fd* is the whole of that file, as ours are."""
    try:
        told = fcntl.ioctl(fd, _STATUS, bytes(_INFO.size))
    except OSError:
        return False  # it is nobody's now
    device, inode, offset, size, flags = _INFO.unpack(told)
    wanted = kernel_calls.LO_FLAGS_READ_ONLY | kernel_calls.LO_FLAGS_AUTOCLEAR
    same = (device, inode) == (_encoded(key[0]), key[1])
    return same and not offset and not size and flags & wanted == wanted


def _encoded(device: int) -> int:
    """As Linux writes a device number here (kdev_t.h, new_encode_dev)."""
    major, minor = os.major(device), os.minor(device)
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def _new(place: Place, key: tuple[int, int]) -> int:
    """A new device of it, open."""
    file = os.open(f"/proc/self/fd/{place.fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            number = _free_number()
            path = f"/dev/loop{number}"
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                kernel_calls.configure_loop_device(fd, file, path=path, readonly=True)
            except OSError as error:
                os.close(fd)
                if error.errno != errno.EBUSY:
                    raise
                continue
            _known[key] = number
            return fd
    finally:
        os.close(file)
    raise OSError(errno.EBUSY, "others have taken each free loop device")


def _free_number() -> int:
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        return kernel_calls.free_loop_device(control)
    finally:
        os.close(control)


def _not_mounted(kind: ImageKind, error: OSError, attempt: str) -> HostError:
    name, said = kind.filesystem, str(error)
    if error.errno == errno.ENODEV:
        answer, remedy = f"this Linux has no {name}", f"Load it: sudo modprobe {name}"
    elif error.errno == errno.ENOSPC or "LOOP_" in said or "loop" in str(error.filename):
        answer = f"there is no free loop device ({said})"
        remedy = "Look who has them: losetup. More of them: the parameter max_loop of Linux's loop."
    else:
        answer = f"Linux cannot read it ({said})"
        remedy = "It may be damaged: see dmesg, and copy or make it again."
    return HostError(attempt=attempt, answer=answer, remedy=remedy)
