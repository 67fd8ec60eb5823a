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
