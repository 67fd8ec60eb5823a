"""reaching.py - inside: calls that a kernel may make, with a command that reaches somebody else."""

from __future__ import annotations

import os

from frame import Kind, attempt
from tools import call, done, fcntl, mmap

SPY = "who reads what, and when"
POOL = "a pool of the machine's that no cap counts"


@attempt(
    270, "hold up whoever opens a notebook, by a lease", Kind.REACHING, "F_SETLEASE",
    expect="EINVAL", control="0",
)  # fmt: skip
def take_lease(host):
    fd = os.open(f"{host.workdir}/leased-{os.getpid()}", os.O_CREAT | os.O_RDONLY)
    return fcntl.fcntl(fd, 1024, fcntl.F_WRLCK)


@attempt(
    271, "be told of what is read in a directory of programs", Kind.REACHING, f"F_NOTIFY: {SPY}",
    expect="EINVAL", control="0",
)  # fmt: skip
def notify(host):
    return fcntl.fcntl(os.open("/usr/lib", os.O_RDONLY), 1026, 1)


@attempt(
    272, "be told of programs that the host runs", Kind.REACHING, f"IN_OPEN of inotify: {SPY}",
    expect="EPERM", landlock="ENOSYS", control="done",
)  # fmt: skip
def watch_programs(host):
    fd = call("inotify_init1", 0)
    call("inotify_add_watch", fd, b"/usr/lib", 0x20)
    return "done"


@attempt(
    273, "learn which pages of a file others have read", Kind.REACHING, f"mincore(2): {SPY}",
    expect="ENOSYS", control="done",
)  # fmt: skip
def see_pages(host):
    return done("mincore", 0, 0, None)


@attempt(
    274, "read a page only if others have read it", Kind.REACHING, f"RWF_NOWAIT: {SPY}",
    expect="ENOTSUP", control="read",
)  # fmt: skip
def read_without_wait(host):
    fd = os.open(os.__file__, os.O_RDONLY)
    os.read(fd, 8)
    return os.preadv(fd, [bytearray(8)], 0, 8) and "read"


@attempt(
    275, "have every file system of the machine written out", Kind.REACHING, "syncfs(2)",
    expect="EPERM", control="done",
)  # fmt: skip
def sync_all(host):
    return done("syncfs", os.open(host.workdir, os.O_RDONLY))


def has_huge_pages():
    with open("/proc/meminfo") as file:
        return any(
            line.split()[:2] != ["HugePages_Total:", "0"] for line in file if "_Total:" in line
        )


for number, name, expect, present in (
    (276, "mmap", "ENOMEM", has_huge_pages()),
    (277, "memfd_create", "EINVAL", True),
    (278, "shmget", "ENOMEM", has_huge_pages()),
):

    @attempt(
        number, f"take huge pages by {name}(2)", Kind.REACHING, POOL, name,
        expect=expect, landlock="ENOSYS" if name == "shmget" else expect,
        control="done", present=present,
    )  # fmt: skip
    def take_huge_pages(host, name):
        if name == "mmap":
            mmap.mmap(-1, 2 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)
            return "done"
        words = (b"x", 4) if name == "memfd_create" else (0, 2 << 20, 0o4000 | 0o1000)
        return done(name, *words)


@attempt(
    279, "see the rights of a lock's owner", Kind.REACHING, "F_GETOWNER_UIDS",
    expect="EINVAL", control="0",
)  # fmt: skip
def ask_owner(host):
    out, _ = os.pipe()
    return fcntl.fcntl(out, 17, bytes(8)) and 0
