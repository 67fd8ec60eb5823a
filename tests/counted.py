"""counted.py - what Linux counts for a user: inside, to take all; outside, to see whose it is."""

from __future__ import annotations

import bisect
import ctypes
import os
import resource


def open_queues() -> tuple[int, str]:
    """Inside: as many as there can be, and why no more; they stay."""
    import ctypes
    import os

    libc, count = ctypes.CDLL(None, use_errno=True), 0
    while libc.mq_open(b"/q%d" % count, os.O_CREAT | os.O_RDWR, 0o600, None) >= 0:
        count += 1
    return count, os.strerror(ctypes.get_errno())


def queue_signals() -> str:
    """Inside: "WAITING/MOST", as many as may wait."""
    import os
    import signal

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN + 9])
    for _ in range(5000):
        os.kill(os.getpid(), signal.SIGRTMIN + 9)
    with open("/proc/self/status") as file:
        return next(line.split()[1] for line in file if line.startswith("SigQ:"))


def queue_bytes() -> int:
    """Of the message queues that count for our user: the limit under which there is no other one.

    mq_overview(7); one that holds a message of a byte takes next to nothing."""
    libc, soft_and_hard = ctypes.CDLL(None), resource.getrlimit(resource.RLIMIT_MSGQUEUE)
    name, smallest = b"/sbx-%d" % os.getpid(), (ctypes.c_long * 8)(0, 1, 1)
    most = soft_and_hard[1] if soft_and_hard[1] != resource.RLIM_INFINITY else 1 << 31

    def fits(limit: int) -> bool:
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (limit, soft_and_hard[1]))
        fd = libc.mq_open(name, os.O_CREAT | os.O_RDWR, 0o600, smallest)
        if fd >= 0:
            os.close(fd)
            libc.mq_unlink(name)
        return bool(fd >= 0)

    try:
        return bisect.bisect_left(range(most), True, key=fits)
    finally:
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, soft_and_hard)


def waiting_signals() -> int:
    """Those that count for our user."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1].partition("/")[0]) for line in file if "SigQ:" in line)
