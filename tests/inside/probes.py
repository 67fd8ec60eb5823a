"""probes.py - functions that run inside a sandbox, or that travel along with those that do."""

from __future__ import annotations

import os
from pathlib import Path

from sandbox_provisioner.facilities.rights.plan.syscall_numbers import NUMBERS

MACHINE = 0 if os.uname().machine == "x86_64" else 1


def number_of(name: str) -> int | None:
    """The number of the system call *name* on this machine; not for inside."""
    return NUMBERS[name][MACHINE]


def children_of(parent):
    """The children of *parent* by their pids here; not for inside."""
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            rest = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(rest[1]) == parent:
            yield int(name)


def system_call(number, *arguments):
    """What the Linux kernel answers to a call: a number, or the name of the error."""
    import ctypes
    import errno
    import os

    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    words = [w if isinstance(w, bytes | None) else ctypes.c_ulong(w) for w in arguments]
    result = libc.syscall(ctypes.c_long(number), *words)
    return errno.errorcode.get(ctypes.get_errno(), "?") if result < 0 else os.strerror(0)


def answer_of(attempt):
    """The name of the error that *attempt* raises, or its value as text."""
    import errno

    try:
        return str(attempt())
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))


def change_projects(place, number=469):
    """The answers to all calls that would, of files there; *number* is file_setattr(2)."""
    import ctypes
    import fcntl
    import os
    import struct

    file = os.open(f"{place}/own", os.O_RDWR | os.O_CREAT)
    folder = os.open(place, os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)

    def by_ioctl(fd):
        fcntl.ioctl(fd, 0x401C5820, struct.pack("=IIIII8x", 0, 0, 0, 0, 0))

    def by_call(fd):
        attributes = ctypes.create_string_buffer(24)
        if libc.syscall(number, fd, b"", attributes, 24, 0x1000) < 0:
            raise OSError(ctypes.get_errno(), "file_setattr")

    def by_attribute():
        os.setxattr(place, "trusted.sandbox_provisioner", b"")

    calls = [(call, fd) for call in (by_ioctl, by_call) for fd in (file, folder)]
    tried = [answer_of(lambda call=call, fd=fd: call(fd)) for call, fd in calls]
    return [*tried, answer_of(by_attribute)]


def attempt_to_open(path, flags):
    """ "opened", or the name of the error."""
    import errno
    import os

    try:
        os.close(os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return errno.errorcode.get(error.errno)
    return "opened"


# A program of its own, by the work directory and the runtime directory: what a start says.
START = """
import sys
from pathlib import Path
import boxes
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.launch import LocalLauncher
workdir, runtime = sys.argv[1:]
try:
    with boxes.Boxes(LocalLauncher(runtime_dir=runtime), Path(workdir))():
        print("it started")
except HostError as error:
    print(error)
"""
