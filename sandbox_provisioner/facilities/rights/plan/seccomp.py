"""seccomp.py - pure: says which system calls a kernel may make, as a BPF program.

It runs in the server, before a launch, and imports only the standard library and the numbers
beside it.  The launcher hands the bytes to seccomp(2) unread.

The policy is the tables ALLOWED, REFUSED, ABSENT and CHECKED.  The kernel reads a filter in one of
two ways: a call whose verdict is ALLOW whatever its arguments is found once, at load, and from
then on costs nothing (Linux 5.11, SECCOMP_ARCH_NATIVE bitmaps); any other call runs the program,
so the program is a binary search over ranges of numbers with equal verdicts.

Three facts hold the policy together:

* A filter sees registers, not memory.  A call that hides flags behind a pointer (clone3, openat2)
  cannot be judged and does not exist here; libcs then use the older call, which can.
* Every argument judged here is one the kernel itself cuts to 32 bits (`int`, `unsigned int`,
  `umode_t`, or clone's flags), so its upper half is not looked at: it is no way round, and
  sign-extended flags are no false alarm. Of a pointer that must be null both halves are judged.
* A filter knows a call by its number *and* its ABI.  Numbers of i386 or arm32 mean other calls.
"""

from __future__ import annotations

import errno
import functools
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from .syscall_numbers import AARCH64, NUMBERS, X86_64

__all__ = ["KERNEL", "NETWORKED", "NURSERY", "SHARED", "compile_filter", "describe"]

# ---- verdicts: linux/seccomp.h, SECCOMP_RET_* ----------------------------------------------------

ALLOW = 0x7FFF_0000
KILL = 0x8000_0000  # the whole process, by SIGSYS


def fail(number: int) -> int:
    """The verdict under which a call does nothing and returns this errno."""
    return 0x0005_0000 | number


NOTHING = fail(0)
"""The call does nothing, and says that it was done: for advice and wishes alone."""

ASK = 0x7FC0_0000
"""SECCOMP_RET_USER_NOTIF: whoever has the filter's listener answers (`rights/inside/modes.py`)."""

UNKNOWN = fail(errno.ENOSYS)
"""For every number no table names, so that libcs fall back as on an older kernel.

x32 calls (bit 0x40000000) are such numbers: a kernel without x32 answers the same.
"""

FOREIGN = KILL
"""For a call through another ABI (`int 0x80`; a 32-bit program).

ENOSYS would say nothing: such a program can then neither write a message nor exit, so it spins or
ends in a bogus SIGSEGV.  SIGSYS names the cause, and no 64-bit program gets there by accident.
"""


# ---- the shape of a rule on arguments ------------------------------------------------------------

WHOLE = 0xFFFF_FFFF


class Word(NamedTuple):
    """True where the low (or the upper) 32 bits of an argument (0-5), cut by `mask`, are among
    these values."""

    argument: int
    among: tuple[int, ...]
    mask: int = WHOLE
    upper: bool = False


class Case(NamedTuple):
    """A verdict, and the words that must all be true for it."""

    when: tuple[Word, ...]
    verdict: int


class Rule(NamedTuple):
    """The first case that fits decides, else `otherwise`; `tells` is a line for `describe`."""

    tells: str
    cases: tuple[Case, ...]
    otherwise: int


def no_bits(argument: int, bits: int) -> Word:
    """True where an argument has none of these bits."""
    return Word(argument, (0,), bits)


def only_bits(argument: int, bits: int) -> Word:
    """True where an argument has no other bits than these."""
    return no_bits(argument, WHOLE ^ bits)


# ---- policy: calls without conditions ------------------------------------------------------------

ALLOWED: dict[str, str] = {
    "files by name": """
        access chdir chown faccessat faccessat2 fchdir fchownat futimesat getcwd getdents
        getdents64 lchown link linkat lstat mkdir mkdirat newfstatat readlink readlinkat rename
        renameat renameat2 rmdir stat statfs statx symlink symlinkat truncate umask unlink unlinkat
        utime utimensat utimes""",
    "files by descriptor": """
        close close_range copy_file_range dup dup2 dup3 fallocate fchown fdatasync flock fstat
        fstatfs fsync ftruncate lseek pread64 preadv pwrite64 pwritev read readahead readv sendfile
        sync_file_range write writev""",
    "extended attributes": """
        fgetxattr flistxattr fremovexattr fsetxattr getxattr getxattrat lgetxattr listxattr
        listxattrat llistxattr lremovexattr lsetxattr removexattr removexattrat setxattr
        setxattrat""",
    "waiting": """
        epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2
        inotify_init inotify_init1 inotify_rm_watch pipe pipe2 poll ppoll pselect6 select
        signalfd signalfd4 timerfd_create timerfd_gettime timerfd_settime""",
    "connected sockets": """
        accept accept4 bind connect getpeername getsockname getsockopt listen recvfrom recvmmsg
        recvmsg sendmmsg sendmsg sendto shutdown""",
    "memory": """
        brk get_mempolicy map_shadow_stack mbind mlock mlock2 mlockall mprotect mremap mseal msync
        munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect set_mempolicy
        set_mempolicy_home_node""",
    "processes": """
        execve execveat exit exit_group fork getpgid getpgrp getpid getppid getpriority getrlimit
        getrusage getsid gettid ioprio_get pidfd_open pidfd_send_signal setpgid setrlimit setsid
        vfork wait4 waitid""",
    "threads": """
        arch_prctl futex futex_requeue futex_wait futex_waitv futex_wake get_robust_list getcpu
        rseq sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr
        sched_getparam sched_getscheduler sched_rr_get_interval sched_yield set_robust_list
        set_tid_address""",
    # uprobe and uretprobe are planted by an administrator's tracer, and refusing them kills the
    # traced program; called by hand they end in SIGILL.
    "signals": """
        kill pause restart_syscall rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo
        rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sigaltstack tgkill tkill
        uprobe uretprobe""",
    "clocks": """
        alarm clock_getres clock_gettime clock_nanosleep getitimer gettimeofday nanosleep
        setitimer time timer_create timer_delete timer_getoverrun timer_gettime timer_settime
        times""",
    # A kernel holds no capability and cannot gain one (no_new_privs), so these move it only among
    # the ids it has; a refusal would break programs that drop privileges they do not have.
    "identity": """
        capget capset getegid geteuid getgid getgroups getresgid getresuid getuid setfsgid setfsuid
        setgid setgroups setregid setresgid setresuid setreuid setuid""",
    "the machine": "getrandom sysinfo uname",
    # Their names and queues belong to an ipc namespace of the sandbox's own.
    "ipc": """
        mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink msgctl msgget msgrcv
        msgsnd semctl semget semop semtimedop shmat shmctl shmdt""",
    "locking oneself further in": """
        landlock_add_rule landlock_create_ruleset landlock_restrict_self""",
}


class Refusal(NamedTuple):
    """Calls that exist but are refused, with the errno that programs take best."""

    error: int
    calls: str
    why: str


REFUSED: tuple[Refusal, ...] = (
    Refusal(
        # sync(2) cannot fail, and promises its caller no file in particular; fsync(2) does.
        0,
        "sync",
        "writes out every file system of the machine, for everybody on it",
    ),
    Refusal(
        errno.EPERM,
        "syncfs",
        "writes out a whole file system, of which the sandbox has a part; fsync is allowed",
    ),
    Refusal(
        errno.EPERM,
        """chroot fsconfig fsmount fsopen fspick mount mount_setattr move_mount open_tree
        open_tree_attr pivot_root quotactl quotactl_fd setns umount2 unshare""",
        "the sandbox's view of files, networks and processes is built before the kernel starts",
    ),
    Refusal(
        errno.EPERM,
        """kcmp lookup_dcookie migrate_pages move_pages perf_event_open pidfd_getfd
        process_vm_readv process_vm_writev ptrace""",
        "reads or changes other processes",
    ),
    Refusal(
        errno.EPERM,
        """bpf io_uring_enter io_uring_register io_uring_setup userfaultfd vmsplice""",
        "long a source of bugs in Linux, and programs do without",
    ),
    Refusal(
        # EINVAL is what splice(2) says of a file that cannot be spliced.  Callers copy by hand
        # then; Go's network library takes ENOSYS and EPERM for a broken connection.
        errno.EINVAL,
        "splice tee",
        "puts cached pages of read-only files into pipes, where kernel bugs have written to them",
    ),
    Refusal(
        errno.EPERM,
        "add_key keyctl request_key",
        "keyrings belong to a user and not to a sandbox",
    ),
    Refusal(
        errno.EPERM,
        "fanotify_init fanotify_mark name_to_handle_at open_by_handle_at",
        "names files past the root directory",
    ),
    Refusal(
        errno.EPERM,
        """acct adjtimex clock_adjtime clock_settime delete_module finit_module init_module ioperm
        iopl kexec_file_load kexec_load reboot setdomainname sethostname settimeofday swapoff
        swapon syslog vhangup""",
        "acts on the whole machine",
    ),
)

ABSENT: dict[str, str] = {
    "clone3": "its flags, which make namespaces, are behind a pointer",
    "openat2": "its mode, which may hold set-id bits, is behind a pointer",
    "modify_ldt": "serves 16-bit programs, and bugs",
    "io_setup": "takes from a number of events that the whole machine shares (fs.aio-max-nr)",
    "file_setattr": "changes a file's project, and with it the disk quota it counts to",
    "cachestat": "tells which pages of shared files others have read",
    "mincore": "tells the same, of files that belong to the kernel's user",
    "memfd_secret": "pins memory that nobody can move or look at",
}
"""Calls one might miss above: they answer ENOSYS like any unknown number, for these reasons."""

# ---- policy: calls judged by their arguments -----------------------------------------------------

# socket(2); linux/socket.h, linux/in.h, linux/netlink.h.  Values are the same on both machines.
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
SOCK_STREAM, SOCK_DGRAM, SOCK_RAW, SOCK_PACKET = 1, 2, 3, 10
SOCK_TYPE_MASK = 0xF  # above it: SOCK_CLOEXEC, SOCK_NONBLOCK
IPPROTO_ANY, IPPROTO_ICMP, IPPROTO_TCP, IPPROTO_UDP, IPPROTO_ICMPV6 = 0, 1, 6, 17, 58
NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
TCP_ULP = 31


def making_socket(tells: str, *netlink: int, has_unix: bool = True) -> Rule:
    """For socket(2), with these protocols of netlink(7)."""
    unix = (Case((Word(0, (AF_UNIX,)),), ALLOW),) if has_unix else ()
    return Rule(
        f"families {'unix, ' * has_unix}inet and inet6 (tcp, udp, ping) and netlink ({tells})",
        (
            *unix,
            Case(
                (
                    Word(0, (AF_INET, AF_INET6)),
                    Word(1, (SOCK_STREAM, SOCK_DGRAM), SOCK_TYPE_MASK),
                    Word(2, (IPPROTO_ANY, IPPROTO_ICMP, IPPROTO_TCP, IPPROTO_UDP, IPPROTO_ICMPV6)),
                ),
                ALLOW,
            ),
            # Of family inet, SOCK_PACKET is an old name for a packet socket: see packet(7).
            Case(
                (
                    Word(0, (AF_INET, AF_INET6)),
                    Word(1, (SOCK_RAW, SOCK_PACKET), SOCK_TYPE_MASK),
                ),
                fail(errno.EPERM),
            ),
            # Other protocols (sctp, mptcp, l2tp, smc ...) load kernel modules when first asked for.
            Case((Word(0, (AF_INET, AF_INET6)),), fail(errno.EPROTONOSUPPORT)),
            Case((Word(0, (AF_NETLINK,)), Word(2, netlink)), ALLOW),
            Case((Word(0, (AF_NETLINK,)),), fail(errno.EPROTONOSUPPORT)),
        ),
        fail(errno.EAFNOSUPPORT),
    )


SOCKET = making_socket("route", NETLINK_ROUTE)

# An upper-layer protocol (tls, espintcp, smc) is a kernel module that handles cached pages.
# Programs meet kernels without it and do its work themselves.
SETSOCKOPT = Rule(
    "no TCP_ULP (kernel tls)",
    (Case((Word(1, (IPPROTO_TCP,)), Word(2, (TCP_ULP,))), fail(errno.ENOPROTOOPT)),),
    ALLOW,
)

# clone(2), linux/sched.h: cgroup, uts, ipc, user, pid, net and mnt.  CLONE_NEWTIME (0x80) is not
# among them, as clone reads those bits as the exit signal.
CLONE_NEW = 0x0200_0000 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000
CLONE_NEWNS = 0x0002_0000

# With id-mapped mounts a file made here may belong to the user outside: see inode(7). mkdir(2) does
# without these bits by itself: a directory has that of the group where its parent has it.
SET_ID_BITS = 0o6000
S_IFMT, S_IFREG, S_IFIFO, S_IFSOCK = 0o170000, 0o100000, 0o010000, 0o140000
O_CREAT, O_TMPFILE = 0o100, 0o20000000


def unset_id(mode: int) -> Rule:
    """For calls that give a file the mode in this argument."""
    return Rule(
        "no set-user-ID or set-group-ID bit",
        (Case((no_bits(mode, SET_ID_BITS),), ALLOW),),
        fail(errno.EPERM),
    )


def opening(flags: int) -> Rule:
    """For open(2), which reads a mode from the argument after the flags only if it makes a file."""
    return Rule(
        "makes no file with a set-user-ID or set-group-ID bit",
        (
            Case((no_bits(flags, O_CREAT | O_TMPFILE),), ALLOW),
            Case((no_bits(flags + 1, SET_ID_BITS),), ALLOW),
        ),
        fail(errno.EPERM),
    )


def making_node(mode: int) -> Rule:
    """For mknod(2): files, pipes and sockets, but no devices (nor overlayfs's whiteouts)."""
    plain = Word(mode, (0, S_IFREG, S_IFIFO, S_IFSOCK), S_IFMT | SET_ID_BITS)
    return Rule("no device, no set-id bit", (Case((plain,), ALLOW),), fail(errno.EPERM))


# ioctl(2). A filter does not see of which kind of file a descriptor is, and most devices have
# commands of their own: only those of the files, sockets and terminals that a sandbox has exist.
ALLOWED_IOCTLS: dict[str, tuple[int, ...]] = {
    # asm-generic/ioctls.h: modes, windows, process groups, pairs of terminals
    "terminals": (
        *range(0x5401, 0x540C), 0x540E, 0x540F, 0x5410, 0x5411, 0x5413, 0x5414, 0x5420, 0x5422,
        0x5424, 0x5425, 0x5427, 0x5428, 0x5429, 0x802C_542A, 0x402C_542B, 0x402C_542C, 0x402C_542D,
        0x8004_5430, 0x4004_5431, 0x4004_5436, 0x8004_5438, 0x8004_5439, 0x8004_5440, 0x5441,
    ),
    # FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, FIOASYNC, FIOQSIZE
    "all descriptors": (0x541B, 0x5421, 0x5450, 0x5451, 0x5452, 0x5460),
    # linux/fs.h: FIGETBSZ, FIEMAP, GETFLAGS, GETVERSION, FSGETXATTR, GETFSLABEL, GETFSUUID,
    # FICLONE, FICLONERANGE, FIDEDUPERANGE
    "files": (
        2, 0xC020_660B, 0x8008_6601, 0x8008_7601, 0x801C_581F, 0x8100_9431, 0x8011_1500,
        0x4004_9409, 0x4020_940D, 0xC018_9436,
    ),
    # linux/sockios.h: who gets SIGURG, marks, stamps; then questions about interfaces, no changes
    "sockets": (
        *range(0x8901, 0x8908), 0x8010_8906, 0x8010_8907, 0x894B, 0x8910, 0x8912, 0x8913, 0x8915,
        0x8917, 0x8919, 0x891B, 0x891D, 0x891F, 0x8921, 0x8927, 0x8933, 0x8935, 0x8938, 0x8942,
        0x8946, 0x8970,
    ),
    "random numbers": (0x8004_5200,),  # RNDGETENTCNT
}  # fmt: skip
FORBIDDEN_IOCTLS: dict[int, str] = {
    0x5412: "TIOCSTI types into the terminal the server was started from",
    0x541C: "TIOCLINUX pastes into a console",
    0x541D: "TIOCCONS takes the machine's console output",
    0x5423: "TIOCSETD loads a line discipline's module",
    0x4008_6602: "FS_IOC_SETFLAGS may end the inheritance of a disk quota's project",
    0x401C_5820: "FS_IOC_FSSETXATTR changes the project a disk quota counts",
}
IOCTL_TYPE_MASK = 0xFF00
# linux/Documentation/userspace-api/ioctl/ioctl-number.rst: what files, file systems, terminals,
# sockets, network interfaces and descriptors of Linux itself have more of than stands above. Not 0:
# the commands of nvidia-uvm are bare numbers, without which there is no CUDA (uvm_ioctl.h).
OWN_IOCTL_TYPES = (
    0x1200, 0x1500, 0x2400, 0x5400, 0x5800, 0x6600, 0x6E00, 0x6F00, 0x7200, 0x7600, 0x8900, 0x8A00,
    0x8B00, 0x9300, 0x9400, 0x9700, 0xAA00, 0xBC00, 0xCF00, 0xF500,
)  # fmt: skip
FORBIDDEN_IOCTL_TYPES: dict[int, str] = {
    0x8900: "sockets: changes the network, or opens its namespace",
    0x9400: "btrfs: a new subvolume is outside its parent's quota",
    0xB700: "nsfs: opens and names namespaces around this one",
    0xFF00: "pidfd: opens a process's namespaces",
}


def device_commands(*more: int) -> Rule:
    """For ioctl(2): the table above, and a few *more*."""
    known = tuple(number for numbers in ALLOWED_IOCTLS.values() for number in numbers)
    return Rule(
        f"commands of {', '.join(ALLOWED_IOCTLS)}",
        (
            Case((Word(1, known + more),), ALLOW),
            Case((Word(1, tuple(FORBIDDEN_IOCTLS)),), fail(errno.EPERM)),
            Case((Word(1, tuple(FORBIDDEN_IOCTL_TYPES), IOCTL_TYPE_MASK),), fail(errno.EPERM)),
        ),
        fail(errno.ENOTTY),  # as from a file that knows no such command
    )


def any_device_commands(*more: int) -> Rule:
    """The same for a box that is given devices, each of whose drivers has commands of its own."""
    strict = device_commands(*more)
    own = Case((Word(1, OWN_IOCTL_TYPES, IOCTL_TYPE_MASK),), strict.otherwise)
    return Rule(f"{strict.tells}, and drivers' own", (*strict.cases, own), ALLOW)


# fcntl(2), linux/fcntl.h. Not among them: F_SETLEASE (1024), which holds up whoever opens the file
# for 45 s; F_NOTIFY (1026), which tells who reads in a directory; F_GETOWNER_UIDS.
ALLOWED_FCNTLS = (
    *range(12),  # copies, flags, locks of a process, the receiver of SIGIO
    15, 16,  # F_SETOWN_EX, F_GETOWN_EX
    36, 37, 38,  # F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW
    1025,  # F_GETLEASE
    1027, 1028,  # F_DUPFD_QUERY, F_CREATED_QUERY
    *range(1030, 1039),  # F_DUPFD_CLOEXEC, sizes of pipes, seals, hints
)  # fmt: skip

# What happens to a file because somebody reads it or runs it: a process may watch whatever it may
# read, and of the trees that all share this would tell what the host and other sandboxes do.
IN_ACCESS, IN_CLOSE_NOWRITE, IN_OPEN = 0x1, 0x10, 0x20

# preadv2(2), linux/fs.h. Not among them: RWF_NOWAIT, which tells whether somebody has read this
# part of a file of late; EOPNOTSUPP is what a file system says that cannot do it.
RWF_HIPRI, RWF_DSYNC, RWF_SYNC, RWF_APPEND, RWF_NOAPPEND = 0x1, 0x2, 0x4, 0x10, 0x20
FLAGS_OF_A_TRANSFER = Rule(
    "no RWF_NOWAIT",
    (Case((only_bits(5, RWF_HIPRI | RWF_DSYNC | RWF_SYNC | RWF_APPEND | RWF_NOAPPEND),), ALLOW),),
    fail(errno.EOPNOTSUPP),
)
POSIX_FADV_DONTNEED = 4

# Huge pages are a pool of the machine's, which no memory cap counts.
MAP_HUGETLB, MFD_HUGETLB, SHM_HUGETLB = 0x4_0000, 0x4, 0o4000

# The first process of the sandbox is its init, and that of an ordinary user's kernel has the same
# user. Starved of CPU time it would watch the mounts, the sockets and the memory too late.
INIT = 1
PRIO_PROCESS, PRIO_PGRP = 0, 1
IOPRIO_WHO_PROCESS, IOPRIO_WHO_PGRP = 1, 2


def other_than_init(*words: Word, pid: int = 0) -> Rule:
    """For calls that change how the process in this argument is served."""
    return Rule(
        "not of the sandbox's init",
        (Case((Word(pid, (INIT,)),), fail(errno.EPERM)), Case(words, ALLOW)),
        fail(errno.EPERM),
    )


# membarrier(2), linux/membarrier.h. Not among them: the expedited barrier of all processes
# (MEMBARRIER_CMD_GLOBAL_EXPEDITED and its registration), which interrupts CPUs that others run on.
MEMBARRIERS = (0, 1, 8, 16, 32, 64, 128, 256, 512)

# personality(2): PER_LINUX, the question "which is it?", and no address randomisation for oneself,
# with which SBCL and sanitizers restart.  All others loosen memory or serve 32-bit programs.
PERSONALITIES = (0, 0xFFFF_FFFF, 0x0004_0000)

# prctl(2), linux/prctl.h: those that change or tell of the calling process alone.
ALLOWED_PRCTLS = (
    1, 2, 3, 4,  # signal at the parent's death, dumpable
    7, 8, 23, 24, 27, 28, 47,  # keeping and dropping capabilities
    15, 16,  # name
    21, 22, 38, 39,  # seccomp, no_new_privs
    25, 26,  # time stamp counter
    29, 30,  # slack of timers
    33, 34,  # memory errors
    36, 37, 40,  # child subreaper, address of the thread id
    41, 42,  # transparent huge pages
    50, 51, 54, 55, 56, 60, 61, 63, 64,  # aarch64: vectors, pointer authentication, tagged pointers
    52, 53,  # speculation
    59,  # system calls that the process answers itself
    65, 66, 74, 75, 76,  # no memory both writable and executable, shadow stacks
    0x4155_5856, 0x5356_4D41, 0x5961_6D61,  # auxiliary vector, names of memory, who may trace
)  # fmt: skip
FORBIDDEN_PRCTLS: dict[int, str] = {
    35: "PR_SET_MM forges what /proc tells of a process",
    62: "PR_SCHED_CORE idles sibling cores that others pay for",
    67: "PR_SET_MEMORY_MERGE shares equal pages across sandboxes: a covert channel",
}

SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 3
MADV_MERGEABLE = 12  # as PR_SET_MEMORY_MERGE; EINVAL is madvise(2) on a kernel without it

CHECKED: dict[str, Rule] = {
    "socket": SOCKET,
    "socketpair": Rule(
        "family unix", (Case((Word(0, (AF_UNIX,)),), ALLOW),), fail(errno.EAFNOSUPPORT)
    ),
    "setsockopt": SETSOCKOPT,
    "clone": Rule(
        "no new namespace",
        (Case((no_bits(0, CLONE_NEW | CLONE_NEWNS),), ALLOW),),
        fail(errno.EPERM),
    ),
    "open": opening(1),
    "openat": opening(2),
    "creat": unset_id(1),
    "chmod": unset_id(1),
    "fchmod": unset_id(1),
    "fchmodat": unset_id(2),
    "fchmodat2": unset_id(2),
    "mknod": making_node(1),
    "mknodat": making_node(2),
    "ioctl": device_commands(),
    "fcntl": Rule(
        "no lease, no notice of who reads a directory",
        (Case((Word(1, ALLOWED_FCNTLS),), ALLOW),),
        fail(errno.EINVAL),
    ),
    "inotify_add_watch": Rule(
        "changes, not who opens or reads",
        (Case((no_bits(2, IN_ACCESS | IN_OPEN | IN_CLOSE_NOWRITE),), ALLOW),),
        fail(errno.EPERM),
    ),
    "preadv2": FLAGS_OF_A_TRANSFER,
    "pwritev2": FLAGS_OF_A_TRANSFER,
    "fadvise64": Rule(
        "POSIX_FADV_DONTNEED does nothing: it would empty a cache that all share",
        (Case((Word(3, (POSIX_FADV_DONTNEED,)),), NOTHING),),
        ALLOW,
    ),
    "mmap": Rule("no MAP_HUGETLB", (Case((no_bits(3, MAP_HUGETLB),), ALLOW),), fail(errno.ENOMEM)),
    "memfd_create": Rule(
        "no MFD_HUGETLB", (Case((no_bits(1, MFD_HUGETLB),), ALLOW),), fail(errno.EINVAL)
    ),
    "shmget": Rule(
        "no SHM_HUGETLB", (Case((no_bits(2, SHM_HUGETLB),), ALLOW),), fail(errno.ENOMEM)
    ),
    "prlimit64": Rule(
        "of the calling process; of others it only reads",
        (
            Case((Word(0, (0,)),), ALLOW),
            Case((Word(2, (0,)), Word(2, (0,), upper=True)), ALLOW),
        ),
        fail(errno.EPERM),
    ),
    "sched_setaffinity": other_than_init(),
    "sched_setattr": other_than_init(),
    "sched_setparam": other_than_init(),
    "sched_setscheduler": other_than_init(),
    "setpriority": other_than_init(Word(0, (PRIO_PROCESS, PRIO_PGRP)), pid=1),
    "ioprio_set": other_than_init(Word(0, (IOPRIO_WHO_PROCESS, IOPRIO_WHO_PGRP)), pid=1),
    "membarrier": Rule(
        "no expedited barrier of all processes",
        (Case((Word(0, MEMBARRIERS),), ALLOW),),
        fail(errno.EINVAL),
    ),
    "personality": Rule(
        "64-bit Linux, with or without address randomisation",
        (Case((Word(0, PERSONALITIES),), ALLOW),),
        fail(errno.EPERM),
    ),
    "prctl": Rule(
        "of the calling process alone; no PR_SET_MM, PR_SCHED_CORE, PR_SET_MEMORY_MERGE",
        (
            Case((Word(0, ALLOWED_PRCTLS),), ALLOW),
            Case((Word(0, tuple(FORBIDDEN_PRCTLS)),), fail(errno.EPERM)),
        ),
        fail(errno.EINVAL),
    ),
    # More filters only lock further in; a listener would answer calls in the kernel's place.
    "seccomp": Rule(
        "filters of one's own, but no listener",
        (Case((no_bits(1, SECCOMP_FILTER_FLAG_NEW_LISTENER),), ALLOW),),
        fail(errno.EPERM),
    ),
    "madvise": Rule(
        "no MADV_MERGEABLE",
        (Case((Word(2, (MADV_MERGEABLE,)),), fail(errno.EINVAL)),),
        ALLOW,
    ),
}

# ---- policy: what more is refused to a kernel that shares the host's namespaces ------------------

# Landlock judges by path who opens, makes and removes files; it does not judge who connects to a
# socket file, changes a mode, watches a directory, or lowers a process's limits (landlock(7)).
SHARED_REFUSED: tuple[Refusal, ...] = (
    Refusal(
        errno.EACCES,
        "connect",
        "its address is behind a pointer: it could be the user's D-Bus, agent or other kernel",
    ),
    Refusal(
        errno.ENOSYS,
        """mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink msgctl msgget
        msgrcv msgsnd semctl semget semop semtimedop shmat shmctl shmdt shmget""",
        "their names and queues are the host's",
    ),
    Refusal(
        errno.ENOSYS,
        "inotify_add_watch inotify_init inotify_init1",
        "tells the names of files in directories that may not be listed",
    ),
    Refusal(
        errno.EPERM,
        """chmod chown fchmodat fchmodat2 fchownat lchown lremovexattr lsetxattr removexattr
        removexattrat setxattr setxattrat truncate""",
        "changes the user's files anywhere, by name; on an open file it is allowed",
    ),
)

_OWN = "of the calling process only"
_ONLY_ME = Rule(_OWN, (Case((Word(0, (0,)),), ALLOW),), fail(errno.EPERM))
CONNECTED_TYPES = (SOCK_STREAM, 5)  # SOCK_SEQPACKET; a datagram could be sent to any address
_UNIX_ONLY = Rule(
    "family unix, connected types",
    (
        Case((Word(0, (AF_UNIX,)), Word(1, CONNECTED_TYPES, SOCK_TYPE_MASK)), ALLOW),
        # ZeroMQ, which asks for interfaces, takes this for "there are none", and aborts on others.
        Case((Word(0, (AF_NETLINK,)),), fail(errno.EOPNOTSUPP)),
    ),
    fail(errno.EAFNOSUPPORT),
)
O_ACCMODE, O_TRUNC = 3, 0o1000


def opening_whole(flags: int) -> Rule:
    """As `opening`; and nobody empties a file that is not opened to be written, which Landlock
    judges only since its version 3."""
    emptied = Word(flags, (O_TRUNC, O_TRUNC | O_ACCMODE), O_TRUNC | O_ACCMODE)
    rule = opening(flags)
    tells = f"{rule.tells}, empties none that is only read"
    return Rule(tells, (Case((emptied,), fail(errno.EPERM)), *rule.cases), rule.otherwise)


SHARED_CHECKED: dict[str, Rule] = {
    "socket": _UNIX_ONLY,
    "socketpair": _UNIX_ONLY,
    "open": opening_whole(1),
    "openat": opening_whole(2),
    "fchmod": Rule(
        "no set-id bit, not writable for others",
        (Case((no_bits(1, SET_ID_BITS | 0o022),), ALLOW),),
        fail(errno.EPERM),
    ),
    "prlimit64": _ONLY_ME,
    "sched_setaffinity": _ONLY_ME,
    "sched_setattr": _ONLY_ME,
    "sched_setparam": _ONLY_ME,
    # ZeroMQ's threads name themselves by their ids, ask for what they have, and abort on an error.
    "sched_setscheduler": Rule(
        "of the calling process, or to the usual policy",
        (Case((Word(0, (0,)),), ALLOW), Case((Word(1, (0,)),), ALLOW)),
        fail(errno.EPERM),
    ),
    "setpriority": Rule(_OWN, (Case((Word(0, (0,)), Word(1, (0,))), ALLOW),), fail(errno.EPERM)),
    "ioprio_set": Rule(_OWN, (Case((Word(0, (1,)), Word(1, (0,))), ALLOW),), fail(errno.EPERM)),
}

# ---- policy: what a nursery may do besides, which makes the boxes of its kernels -----------------

# It has no capability, so all of this works in user namespaces that its children make for
# themselves and nowhere else. Each child loads the usual filter on top before it is a kernel.
NURSERY_ALLOWED = """
    clone fsconfig fsmount fsopen inotify_add_watch keyctl mount mount_setattr move_mount open_tree
    openat2 pivot_root sethostname setns umount2 unshare"""
SIOCSIFFLAGS = 0x8914  # the loopback of a kernel's network namespace is brought up
F_SETLEASE = 1024  # PID 1 of a kernel waits by it for who reads its figures
NURSERY_CHECKED: dict[str, Rule] = {
    "ioctl": device_commands(SIOCSIFFLAGS),
    "fcntl": Rule(
        "no notice of who reads a directory",
        (Case((Word(1, (*ALLOWED_FCNTLS, F_SETLEASE)),), ALLOW),),
        fail(errno.EINVAL),
    ),
}
# Where its kernels have a gateway, its children set up the tables of their networks; nf_tables is
# much code of Linux's, and no other nursery needs it.
NETWORKED_CHECKED: dict[str, Rule] = {
    "socket": making_socket("route, netfilter", NETLINK_ROUTE, NETLINK_NETFILTER)
}

# ---- policy: what the network gateway may do, and what not ---------------------------------------

# It moves bytes from socket to socket by pipes of its own. Of files it sees its interpreter and the
# system, read-only, and it is a user of its own; kernels go on without.
GATEWAY_ALLOWED = "splice"

# It reads what strangers send, and has the machine's network: abstract names of the family unix are
# there, behind which daemons of the machine listen, and ports at which it could be taken for them.
GATEWAY_REFUSED: tuple[Refusal, ...] = (
    Refusal(errno.EPERM, "listen", "the sockets at which it accepts are handed to it"),
    Refusal(errno.EAFNOSUPPORT, "socketpair", "a datagram of one goes to any abstract name"),
)
GATEWAY_CHECKED: dict[str, Rule] = {"socket": making_socket("route", NETLINK_ROUTE, has_unix=False)}

# ---- policy: what a kernel that is root in its box may do besides --------------------------------


# Packages have files with set-id bits, and their scripts give some. No process gains anything by
# them, so that PID 1 gives the file all other bits, and says that it was done.
def asking(mode: int) -> Rule:
    """For calls that give a file the mode in this argument, where PID 1 does without some bits."""
    rule = unset_id(mode)
    return Rule("set-user-ID and set-group-ID bits are left out by PID 1", rule.cases, ASK)


ROOT_CHECKED: dict[str, Rule] = {
    "chmod": asking(1),
    "fchmod": asking(1),
    "fchmodat": asking(2),
    "fchmodat2": asking(2),
}

# ---- from policy to ranges of numbers ------------------------------------------------------------

Verdict = int | Rule
T = TypeVar("T")

AUDIT_ARCH = {X86_64: 0xC000_003E, AARCH64: 0xC000_00B7}  # linux/audit.h


WITH_DEVICES = " with devices"  # behind the name of a profile
KERNEL, SHARED, NURSERY, NETWORKED = "kernel", "shared", "nursery", "networked nursery"
GATEWAY, ROOT = "gateway", "root"
"""For whom a filter is: a kernel in its own namespaces, one that shares the host's, a nursery, one
whose kernels have a gateway, the gateway, and a kernel that is root in its box."""


def verdicts(profile: str = KERNEL) -> Iterator[tuple[str, Verdict]]:
    """Every call the tables name, each once, with what becomes of it under *profile*."""
    if profile.endswith(WITH_DEVICES):
        profile = profile.removesuffix(WITH_DEVICES)
        more = (SIOCSIFFLAGS,) if profile in {NURSERY, NETWORKED} else ()
        yield from (dict(verdicts(profile)) | {"ioctl": any_device_commands(*more)}).items()
        return
    if profile != KERNEL:
        yield from (dict(verdicts()) | dict(_verdicts_besides(profile))).items()
        return
    for calls in ALLOWED.values():
        yield from ((name, ALLOW) for name in calls.split())
    for refusal in REFUSED:
        yield from ((name, fail(refusal.error)) for name in refusal.calls.split())
    yield from ((name, UNKNOWN) for name in ABSENT)
    yield from CHECKED.items()


def _verdicts_besides(profile: str) -> Iterator[tuple[str, Verdict]]:
    if profile == SHARED:
        return _shared_verdicts()
    if profile == GATEWAY:
        return _gateway_verdicts()
    if profile == ROOT:
        return iter(ROOT_CHECKED.items())
    return _nursery_verdicts(profile)


def _shared_verdicts() -> Iterator[tuple[str, Verdict]]:
    for refusal in SHARED_REFUSED:
        yield from ((name, fail(refusal.error)) for name in refusal.calls.split())
    yield from SHARED_CHECKED.items()


def _gateway_verdicts() -> Iterator[tuple[str, Verdict]]:
    yield from ((name, ALLOW) for name in GATEWAY_ALLOWED.split())
    for refusal in GATEWAY_REFUSED:
        yield from ((name, fail(refusal.error)) for name in refusal.calls.split())
    yield from GATEWAY_CHECKED.items()


def _nursery_verdicts(profile: str) -> Iterator[tuple[str, Verdict]]:
    yield from ((name, ALLOW) for name in NURSERY_ALLOWED.split())
    yield from NURSERY_CHECKED.items()
    if profile == NETWORKED:
        yield from NETWORKED_CHECKED.items()


def by_number(machine: str, profile: str = KERNEL) -> dict[int, Verdict]:
    """The tables as numbers; calls this machine never had (open on aarch64) are left out."""
    column = int(machine == AARCH64)
    numbered = ((NUMBERS[name][column], verdict) for name, verdict in verdicts(profile))
    return {number: verdict for number, verdict in numbered if number is not None}


def ranges(table: dict[int, Verdict]) -> list[tuple[int, Verdict]]:
    """The table as (first number, verdict), ascending from 0, no two neighbours the same."""
    return without_repeats([(n, table.get(n, UNKNOWN)) for n in range(max(table) + 2)])


def without_repeats(parts: Iterable[tuple[int, T]]) -> list[tuple[int, T]]:
    """Those of (first number, what follows) that differ from the one before."""
    found: list[tuple[int, T]] = []
    for first, what in parts:
        if not found or found[-1][1] != what:
            found.append((first, what))
    return found


# ---- from ranges to BPF: linux/filter.h, linux/bpf_common.h, struct seccomp_data -----------------

LOAD, AND, GO, RETURN = 0x20, 0x54, 0x05, 0x06
IF_EQUAL, IF_AT_LEAST = 0x15, 0x35
NUMBER_OFFSET, ARCH_OFFSET, ARGUMENTS_OFFSET = 0, 4, 16
FEW = 4  # values that are compared in turn
NEAR = 254  # jumps hold 8 bits; one less leaves room for a stop between a branch and its target


class Program:
    """BPF written from its last instruction to its first.

    All jumps of BPF go forward, so written backwards every target is known when it is named.
    A place is counted from the end: the last instruction is at 1.
    """

    def __init__(self) -> None:
        self.backwards: list[bytes] = []
        self.returns: dict[int, int] = {}
        self.rules: dict[Rule, int] = {}

    def add(self, code: int, value: int, yes: int = 0, no: int = 0) -> int:
        """Put an instruction (struct sock_filter) before all others; its place."""
        self.backwards.append(struct.pack("<HBBI", code, yes, no, value))
        return len(self.backwards)

    def skip(self, target: int) -> int:
        """How many instructions the next one added must jump over to be at target."""
        return len(self.backwards) - target

    def near(self, target: int) -> int:
        """A place in reach of a branch that leads to target."""
        return target if self.skip(target) <= NEAR else self.add(GO, self.skip(target))

    def branch(self, test: int, value: int, yes: int, no: int) -> int:
        """Compare the accumulator with value."""
        yes, no = self.near(yes), self.near(no)
        return self.add(test, value, self.skip(yes), self.skip(no))

    def step(self, code: int, value: int, then: int) -> int:
        """An instruction that changes the accumulator and goes on to a place."""
        if self.skip(then):
            self.add(GO, self.skip(then))
        return self.add(code, value)

    def finish(self, verdict: int) -> int:
        """The place that returns a verdict; written again where the last one is out of reach."""
        place = self.returns.get(verdict)
        if place is None or self.skip(place) > NEAR:
            place = self.returns[verdict] = self.add(RETURN, verdict)
        return place

    def word(self, word: Word, yes: int, no: int) -> int:
        """Judge one argument."""
        place = self.among(word.among, yes, no)
        if word.mask != WHOLE:
            place = self.step(AND, word.mask, place)
        return self.step(LOAD, ARGUMENTS_OFFSET + 8 * word.argument + 4 * word.upper, place)

    def among(self, values: tuple[int, ...], yes: int, no: int) -> int:
        """Whether the accumulator is one of these values: a few in turn, many by halves."""
        if len(values) > FEW:
            edges = sorted({0, *values, *(value + 1 for value in values)})
            parts = without_repeats((edge, yes if edge in values else no) for edge in edges)
            return self.halves(parts, lambda place: place)
        place = no
        for value in reversed(values):
            place = self.branch(IF_EQUAL, value, yes, place)
        return place

    def case(self, case: Case, otherwise: int) -> int:
        """Judge a case: all its words, or the place of the next case."""
        place = self.finish(case.verdict)
        for word in reversed(case.when):
            place = self.word(word, place, otherwise)
        return place

    def rule(self, rule: Rule) -> int:
        """Judge a call's arguments; calls with equal rules share the block."""
        if rule not in self.rules:
            place = self.finish(rule.otherwise)
            for case in reversed(rule.cases):
                place = self.case(case, place)
            self.rules[rule] = place
        return self.rules[rule]

    def search(self, parts: list[tuple[int, Verdict]]) -> int:
        """Find the range that holds the accumulator, a call's number."""
        return self.halves(parts, self.verdict)

    def verdict(self, verdict: Verdict) -> int:
        """The place that answers a call."""
        return self.rule(verdict) if isinstance(verdict, Rule) else self.finish(verdict)

    def halves(self, parts: list[tuple[int, T]], place_of: Callable[[T], int]) -> int:
        """Find the range that holds the accumulator, and go to its place."""
        if len(parts) == 1:
            return place_of(parts[0][1])
        middle = len(parts) // 2
        upper = self.halves(parts[middle:], place_of)
        lower = self.halves(parts[:middle], place_of)
        return self.branch(IF_AT_LEAST, parts[middle][0], upper, lower)


@functools.cache
def compile_filter(machine: str, profile: str = KERNEL) -> bytes:
    """The filter for a machine as uname(2) names it: an array of struct sock_filter, 8 bytes each.

    *profile* is for whom it is: KERNEL, SHARED, NURSERY, NETWORKED, each also
    `WITH_DEVICES`. Raises ValueError for a machine whose system calls are not in the tables.
    """
    if machine not in AUDIT_ARCH:
        known = " and ".join(sorted(AUDIT_ARCH))
        raise ValueError(f"no system call filter for machine {machine!r}, only for {known}")
    program = Program()
    for _, verdict in verdicts(profile):
        if isinstance(verdict, Rule):
            program.rule(verdict)
    parts = ranges(by_number(machine, profile))
    native = program.step(LOAD, NUMBER_OFFSET, program.search(parts))
    foreign = program.finish(FOREIGN)
    program.step(LOAD, ARCH_OFFSET, program.branch(IF_EQUAL, AUDIT_ARCH[machine], native, foreign))
    return b"".join(reversed(program.backwards))


# ---- the policy in words -------------------------------------------------------------------------


@functools.cache
def describe(profile: str = KERNEL) -> str:
    """The policy for a reader of `jupyter sandbox explain`: a few lines, no trailing newline."""
    table = dict(verdicts(profile))
    checked = {name: rule for name, rule in table.items() if isinstance(rule, Rule)}
    refused = (*REFUSED, *SHARED_REFUSED) if profile == SHARED else REFUSED
    allowed = list(table.values()).count(ALLOW)
    lines = [
        f"{allowed} system calls are allowed, {len(checked)} more by their arguments:",
        *(f"  {', '.join(names)}: {tells}" for tells, names in _rules_in_words(checked).items()),
        "refused:",
        *(
            f"  {', '.join(names)}: {_answer_in_words(refusal.error)}, {refusal.why}"
            for refusal in refused
            if (names := [n for n in refusal.calls.split() if table[n] == fail(refusal.error)])
        ),
        "no such call (ENOSYS): all others, among them",
        *(f"  {name}: {why}" for name, why in ABSENT.items() if table[name] == UNKNOWN),
        "32-bit programs: killed by SIGSYS",
    ]
    return "\n".join(lines)


def _answer_in_words(error: int) -> str:
    return errno.errorcode[error] if error else "done, without an effect"


def _rules_in_words(checked: dict[str, Rule]) -> dict[str, list[str]]:
    told: dict[str, list[str]] = {}
    for name, rule in checked.items():
        told.setdefault(rule.tells, []).append(name)
    return told
