"""bounds.py - pure: the limits of a box that nobody asks for and everybody needs, in numbers.

What is not set is inherited: then it has no bound, and one box takes what all need, or the one that
the server happened to be started with. May import: nothing of ours.
"""

from __future__ import annotations

UNLIMITED = "unlimited"
_PROGRAMS_BYTES = str(1 << 30)

# setrlimit(2): soft and hard. Hard limits stay below these where the server's were lower, and the
# server is not root.
_RESOURCES = {
    "as": (UNLIMITED, UNLIMITED),
    # core(5): a limit of 1 is too small for a file, and turns a pipe handler off where 0 does not.
    "core": ("1", "1"),
    "cpu": (UNLIMITED, UNLIMITED),
    "data": (UNLIMITED, UNLIMITED),
    "fsize": (UNLIMITED, UNLIMITED),
    "locks": (UNLIMITED, UNLIMITED),
    "memlock": ("8388608", "8388608"),
    "msgqueue": ("262144", "262144"),
    "nice": ("0", "0"),
    # As systemd has it: select(2) knows no more than 1024, who uses poll(2) raises the soft one.
    "nofile": ("1024", "524288"),
    "nproc": (UNLIMITED, UNLIMITED),
    "rss": (UNLIMITED, UNLIMITED),
    "rtprio": ("0", "0"),
    "rttime": (UNLIMITED, UNLIMITED),
    "sigpending": ("1024", "1024"),
    "stack": ("8388608", UNLIMITED),
}
# Counted for each user of each user namespace, and for its owner in the namespace above, where the
# limit is what its maker had when it was made (Linux 5.14, kernel/ucount.c). So the maker's has to
# be wide: other boxes count there as well.
_COUNTED = ("memlock", "msgqueue", "nproc", "sigpending")

# namespaces(7), inotify(7): limits of a user namespace of its own, below those of the machine.
_OF_USER_NAMESPACE = {
    "max_inotify_instances": 16,
    "max_inotify_watches": 16384,
    **dict.fromkeys(("max_fanotify_groups", "max_fanotify_marks"), 0),
    # Those that the box consists of have been made. Not "mnt": each detached mount counts there.
    **{
        f"max_{kind}_namespaces": 0
        for kind in ("cgroup", "ipc", "net", "pid", "time", "user", "uts")
    },
}
# tcp(7): the smallest, the usual and the largest buffer. Not all of them count as memory of the
# box (on cgroup v1), and the machine has one sum for all network namespaces (tcp_mem).
_OF_NETWORK_NAMESPACE = {
    "tcp_rmem": "4096 131072 1048576",
    "tcp_wmem": "4096 16384 1048576",
}

SYSCTLS = (
    *(f"user/{name}={value}" for name, value in _OF_USER_NAMESPACE.items()),
    *(f"net/ipv4/{name}={value}" for name, value in _OF_NETWORK_NAMESPACE.items()),
)
"""PATH=VALUE below /proc/sys, for who has all rights in the box's own namespaces."""


def makers_limits() -> tuple[str, ...]:
    """The words of ``resource-limits`` for who makes the box: root alone can raise a hard one."""
    wide = dict.fromkeys(_COUNTED, (UNLIMITED, UNLIMITED))
    return _words(_RESOURCES | wide)


def kernels_limits(processes: int | None = None) -> tuple[str, ...]:
    """The words of ``resource-limits`` for the kernel: every limit that there is. *processes* is
    how many it may have where no cgroup caps them."""
    return _words(_kernels(processes))


def programs_limits() -> tuple[str, ...]:
    """The same for a program of the system's that works for a box, perhaps in no group of its."""
    return _words(_RESOURCES | {"data": (_PROGRAMS_BYTES, _PROGRAMS_BYTES)})


def counted_limits(processes: int | None = None) -> tuple[str, ...]:
    """Those of them that are counted for each user."""
    return _words({name: _kernels(processes)[name] for name in _COUNTED})


def _kernels(processes: int | None) -> dict[str, tuple[str, str]]:
    own = {"nproc": (str(processes), str(processes))} if processes is not None else {}
    return _RESOURCES | own


def _words(resources: dict[str, tuple[str, str]]) -> tuple[str, ...]:
    return tuple(f"{name}={soft}:{hard}" for name, (soft, hard) in sorted(resources.items()))
