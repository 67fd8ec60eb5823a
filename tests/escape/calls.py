"""calls.py - inside: calls of the Linux kernel that a kernel has no business with.

A control may be another error than the answer in a box: then Linux has looked at the arguments,
which are such that nothing happens to this machine.
"""

from __future__ import annotations

import ctypes
import os
import struct

from frame import Kind, attempt
from tools import call, contextlib, done, fcntl, mmap, opened, stat, write

RACES = "runc CVE-2025-31133, 52565, 52881: mounts onto what was swapped"
MODULES = "code for the Linux kernel"
RINGS = "a source of bugs in Linux"
PAGES = "Dirty Pipe, CVE-2022-0847: pages of files that are only read"
CLOCKS = "the machine's clock"
KEYS = "a keyring of the user's, CVE-2016-0728"
OTHERS = "pages of other programs"
HERE = -100
MAP = struct.pack("IIII", 2, 4, 4, 1)  # union bpf_attr: an array of one word
EVENT = struct.pack("II", 1, 112) + bytes(104)  # struct perf_event_attr: a software event

for number, kind, stands_for, name, words, expect, control in (
    (140, Kind.MOUNTS, RACES, "mount", (b"none", b"/mnt", b"tmpfs", 0, None), "EPERM", "done"),
    (141, Kind.MOUNTS, RACES, "umount2", (b"/nothing-is-here", 2), "EPERM", "ENOENT"),
    (142, Kind.MOUNTS, RACES, "pivot_root", (b"/nothing", b"/nothing"), "EPERM", "ENOENT"),
    (143, Kind.MOUNTS, "CVE-2022-0185", "fsopen", (b"tmpfs", 0), "EPERM", "done"),
    (144, Kind.MOUNTS, "CVE-2022-0185", "fsconfig", (-1, 6, None, None, 0), "EPERM", "EINVAL"),
    (145, Kind.MOUNTS, RACES, "fspick", (HERE, b"/", 0), "EPERM", "done"),
    (146, Kind.MOUNTS, RACES, "fsmount", (-1, 0, 0), "EPERM", "EBADF"),
    (147, Kind.MOUNTS, RACES, "open_tree", (HERE, b"/", 1), "EPERM", "done"),
    (148, Kind.MOUNTS, RACES, "move_mount", (-1, b"", -1, b"", 0x44), "EPERM", "EBADF"),
    (149, Kind.MOUNTS, RACES, "mount_setattr", (-1, b"", 0x1000, bytes(32), 32), "EPERM", "done"),
    (150, Kind.CALLS, MODULES, "init_module", (None, 0, b""), "EPERM", "ENOEXEC"),
    (151, Kind.CALLS, MODULES, "finit_module", (-1, b"", 0), "EPERM", "EBADF"),
    (152, Kind.CALLS, MODULES, "delete_module", (b"there-is-none", 0x800), "EPERM", "ENOENT"),
    (153, Kind.CALLS, MODULES, "kexec_load", (0, 99999, None, 0), "EPERM", "EINVAL"),
    (154, Kind.CALLS, MODULES, "kexec_file_load", (-1, -1, 0, b"", 0), "EPERM", "EBADF"),
    (155, Kind.CALLS, MODULES, "bpf", (0, MAP, 16), "EPERM", "done"),
    (156, Kind.CALLS, RINGS, "io_uring_setup", (4, bytes(120)), "EPERM", "done"),
    (157, Kind.CALLS, RINGS, "userfaultfd", (0,), "EPERM", "done"),
    (158, Kind.CALLS, RINGS, "perf_event_open", (EVENT, 0, -1, -1, 0), "EPERM", "done"),
    (159, Kind.CALLS, RINGS, "fanotify_init", (0, 0), "EPERM", "done"),
    (160, Kind.CALLS, RINGS, "io_setup", (1, bytes(8)), "ENOSYS", "done"),
    (161, Kind.CALLS, RINGS, "memfd_secret", (0,), "ENOSYS", "done"),
    (162, Kind.CALLS, RINGS, "modify_ldt", (0, bytes(64), 64), "ENOSYS", "done"),
    (163, Kind.CALLS, RINGS, "ioperm", (0x80, 1, 0), "EPERM", "done"),
    (164, Kind.CALLS, RINGS, "iopl", (0,), "EPERM", "done"),
    (165, Kind.CALLS, OTHERS, "cachestat", (-1, bytes(16), bytes(40), 0), "ENOSYS", "EBADF"),
    (166, Kind.CALLS, OTHERS, "move_pages", (0, 0, None, None, None, 0), "EPERM", "done"),
    (167, Kind.CALLS, OTHERS, "migrate_pages", (0, 0, None, None), "EPERM", "EINVAL"),
    (168, Kind.MACHINE, CLOCKS, "adjtimex", (bytes(256),), "EPERM", "done"),
    (169, Kind.MACHINE, CLOCKS, "clock_adjtime", (0, bytes(256)), "EPERM", "done"),
    (170, Kind.MACHINE, CLOCKS, "clock_settime", (0, b"\xff" * 16), "EPERM", "EINVAL"),
    (171, Kind.MACHINE, CLOCKS, "settimeofday", (b"\xff" * 16, None), "EPERM", "EINVAL"),
    (172, Kind.MACHINE, "all processes", "reboot", (1, 2, 3, None), "EPERM", "EINVAL"),
    (173, Kind.MACHINE, "memory", "swapon", (b"/nothing-is-here", 0), "EPERM", "ENOENT"),
    (174, Kind.MACHINE, "memory", "swapoff", (b"/nothing-is-here",), "EPERM", "ENOENT"),
    (175, Kind.MACHINE, "the name", "sethostname", (b"mine", 4), "EPERM", "done"),
    (176, Kind.MACHINE, "the name", "setdomainname", (b"mine", 4), "EPERM", "done"),
    (177, Kind.MACHINE, "its log", "syslog", (10, None, 0), "EPERM", "done"),
    (178, Kind.MACHINE, "who ran what", "acct", (b"/nothing-is-here",), "EPERM", "ENOENT"),
    (179, Kind.MACHINE, "quotas", "quotactl", (0x80000700, b"/none", 0, None), "EPERM", "ENOENT"),
    (180, Kind.CALLS, KEYS, "keyctl", (0, -3, 0), "EPERM", "done"),
    (181, Kind.CALLS, KEYS, "add_key", (b"user", b"sbx", b"x", 1, -1), "EPERM", "done"),
    (182, Kind.CALLS, KEYS, "request_key", (b"user", b"sbx-none", None, -1), "EPERM", "ENOKEY"),
    (183, Kind.CALLS, "CVE-2017-5123 and its kind", "personality", (0x0400000,), "EPERM", "done"),
    (184, Kind.CALLS, "covert channels", "madvise", (0, 0, 12), "EINVAL", "done"),
):  # fmt: skip

    @attempt(
        number, f"{name}(2)", kind, stands_for, name, words, expect=expect,
        control=control if expect == "ENOSYS" else f"{control}|ENOSYS",
    )  # fmt: skip
    def ask(host, name, words):
        return done(name, *words)


@attempt(
    185, "move a page of a file into a pipe by splice(2)", Kind.CALLS, PAGES,
    expect="EINVAL", control="spliced",
)  # fmt: skip
def splice(host):
    _, into = os.pipe()
    source = os.open(os.__file__, os.O_RDONLY)
    call("splice", source, None, into, None, 1, 0)
    return "spliced"


@attempt(
    186, "share a pipe's pages by tee(2)", Kind.CALLS, PAGES, expect="EINVAL", control="shared"
)
def tee(host):
    out, into = os.pipe()
    _, other = os.pipe()
    os.write(into, b"x")
    call("tee", out, other, 1, 0)
    return "shared"


@attempt(
    187, "give pages of memory to a pipe by vmsplice(2)", Kind.CALLS, PAGES,
    expect="EPERM", control="given",
)  # fmt: skip
def vmsplice(host):
    _, into = os.pipe()
    text = ctypes.create_string_buffer(b"x")
    vector = ctypes.addressof(text).to_bytes(8, "little") + (1).to_bytes(8, "little")
    call("vmsplice", into, vector, 1, 0)
    return "given"


@attempt(
    188, "make a 32-bit call (int 0x80)", Kind.CALLS, "a filter for another ABI",
    expect="SIGSYS", control="a pid",
)  # fmt: skip
def call_32_bit(host):
    """mov eax, 20 (getpid); int 0x80; ret"""
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("b814000000cd80c3"))
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    return ctypes.CFUNCTYPE(ctypes.c_int)(address)() > 0 and "a pid"


@attempt(
    189, "make a call of the x32 ABI", Kind.CALLS, "a filter for another ABI",
    expect="ENOSYS", no_control="this Linux is built without x32, and answers the same",
)  # fmt: skip
def call_x32(host):
    return done(0x40000000 | 39)


@attempt(
    190, "make calls by numbers that no table names", Kind.CALLS, "calls of the Linux to come",
    expect="ENOSYS", no_control="there are none yet",
)  # fmt: skip
def call_unknown(host):
    return done(999)


# -- terminals


@attempt(
    191, "type into the terminal that the server was started from", Kind.TERMINALS,
    "TIOCSTI, CVE-2017-5226", expect="EPERM", control="typed",
)  # fmt: skip
def type_into(host):
    terminal = os.open("/dev/null", os.O_RDWR) if host.boxed else os.openpty()[1]
    os.setsid()
    if not host.boxed:
        fcntl.ioctl(terminal, 0x540E, 0)  # TIOCSCTTY
    fcntl.ioctl(terminal, 0x5412, b"x")
    return "typed"


for number, name, command in (
    (192, "TIOCLINUX pastes into a console", 0x541C),
    (193, "TIOCCONS takes the console's output", 0x541D),
    (194, "TIOCSETD loads a line discipline: CVE-2017-2636", 0x5423),
):

    @attempt(
        number, name, Kind.TERMINALS, "ioctl_tty(2)", command, expect="EPERM", control="ENOTTY"
    )
    def ask_terminal(host, command):
        return fcntl.ioctl(os.open("/dev/null", os.O_RDWR), command, bytes(8))


# -- what turns the machine over to a program

WRITABLE = (
    (200, "a program that root runs", "/proc/sys/kernel/core_pattern", "masked"),
    (201, "a program that root runs", "/proc/sys/kernel/modprobe", "EACCES"),
    (202, "the magic keys", "/proc/sysrq-trigger", "masked"),
    (203, "all files' caches", "/proc/sys/vm/drop_caches", "EACCES"),
    (204, "all processes' addresses", "/proc/sys/kernel/randomize_va_space", "EACCES"),
    (205, "the network's settings", "/proc/sys/net/ipv4/ip_forward", "EACCES"),
    (206, "limits of users", "/proc/sys/fs/inotify/max_user_instances", "EACCES"),
    (207, "who may trace whom", "/proc/sys/kernel/yama/ptrace_scope", "EACCES"),
)
for number, stands_for, path, expect in WRITABLE:

    @attempt(
        number, f"open {path} for writing", Kind.MACHINE, stands_for, path,
        expect=f"{expect}|ENOENT", landlock="EACCES|ENOENT", control="opened",
        present=os.path.exists(path),
    )  # fmt: skip
    def open_setting(host, path):
        """ "masked" where /dev/null lies on it."""
        fd = os.open(path, os.O_WRONLY)
        return "masked" if stat.S_ISCHR(os.fstat(fd).st_mode) else "opened"


for number, name, text in ((208, "uid_map", "0 0 1"), (209, "setgroups", "deny")):

    @attempt(
        number, f"write /proc/self/{name}", Kind.NAMESPACES, "user_namespaces(7)", name, text,
        expect="EACCES" if name == "setgroups" else "EPERM", landlock="EACCES",
        control="written",
    )  # fmt: skip
    def write_own_map(host, name, text):
        """The control does it in a user namespace of its own."""
        with contextlib.suppress(OSError):
            done("unshare", 0x10000000)
        return write(f"/proc/self/{name}", text)


@attempt(
    210, "open the release_agent of cgroup v1", Kind.MACHINE, "CVE-2022-0492",
    expect="ENOENT", landlock="EACCES|ENOENT",
    control="opened", present=os.path.isdir("/sys/fs/cgroup/memory"),
)  # fmt: skip
def open_release_agent(host):
    return opened(host.release_agent, os.O_WRONLY)


@attempt(
    211, "register a format of programs", Kind.MACHINE, "binfmt_misc",
    expect="ENOENT", landlock="EACCES|ENOENT", no_control="it is not mounted on this machine",
)  # fmt: skip
def register_format(host):
    return opened("/proc/sys/fs/binfmt_misc/register", os.O_WRONLY)
