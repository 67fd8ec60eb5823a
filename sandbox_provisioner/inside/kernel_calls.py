"""inside/kernel_calls.py - runs in the launcher: speaks to the C library, one function a call.

May import: ctypes, errno, os, struct.  May raise: CallFailed, whose text names every operand that
the kernel was told.  Constants are those of the Linux UAPI headers; the numbers of the calls that
the C library does not wrap are the same on every architecture since Linux 5.1.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from typing import NoReturn

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.setfsuid.argtypes = _libc.setfsgid.argtypes = [ctypes.c_uint]

# Those of a start's hundred mounts, as syscall(2) takes them.
_OPEN_TREE, _MOVE_MOUNT, _OPENAT2, _MOUNT_SETATTR, _OPEN_TREE_ATTR = map(
    ctypes.c_long, (428, 429, 437, 442, 467)
)
_NR_FSOPEN = 430
_NR_FSCONFIG = 431
_NR_FSMOUNT = 432
_NR_CLOSE_RANGE = 436
_NR_QUOTACTL_FD = 443
_NR_LANDLOCK_CREATE_RULESET = 444
_NR_LANDLOCK_ADD_RULE = 445
_NR_LANDLOCK_RESTRICT_SELF = 446
_BY_MACHINE = {
    # machine: (clone, pivot_root, keyctl, setgroups)
    "x86_64": (56, 155, 250, 116),
    "aarch64": (220, 41, 219, 159),
}
MACHINE = os.uname().machine
_NR_SECCOMP = {"x86_64": 317, "aarch64": 277}
_NR_BPF = {"x86_64": 321, "aarch64": 280}

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
_CLONE_PARENT = 0x00008000
_SIGCHLD = 17

AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_NO_AUTOMOUNT = 0x800
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_CLONE_WHOLE = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE
_MOVE_MOUNT_F_EMPTY_PATH = 0x04
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_MNT_DETACH = 2

MOUNT_RDONLY = 0x01
MOUNT_NOSUID = 0x02
MOUNT_NODEV = 0x04
MOUNT_NOEXEC = 0x08
MOUNT_IDMAP = 0x00100000
MS_PRIVATE = 1 << 18
MS_REC = 1 << 14
_MS_BIND = ctypes.c_ulong(1 << 12)

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

IN_CLOSE_WRITE = 0x8
IN_OPEN, IN_MOVED_FROM, IN_MOVED_TO = 0x20, 0x40, 0x80
IN_CREATE, IN_DELETE, IN_Q_OVERFLOW = 0x100, 0x200, 0x4000

_F_SETLEASE, _F_GETLEASE = 1024, 1025
_F_WRLCK, _F_UNLCK = 1, 2
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_CAPBSET_DROP = 24
_PR_SET_SECUREBITS = 28
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_SECCOMP_MODE_FILTER = 2
# linux/seccomp.h
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_NEW_LISTENER = 1, 8
_SECCOMP_IOCTL_NOTIF_RECV, _SECCOMP_IOCTL_NOTIF_SEND = 0xC0502100, 0xC0182101
_SECCOMP_IOCTL_NOTIF_ID_VALID = 0x40082102
_ASKED = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif, with its struct seccomp_data
_ANSWER = struct.Struct("=QqiI")  # struct seccomp_notif_resp
_CAPABILITY_VERSION_3 = 0x20080522
CAP_DAC_READ_SEARCH, CAP_FOWNER, CAP_SYS_PTRACE, CAP_SYS_ADMIN = 2, 3, 19, 21

# linux/landlock.h, LANDLOCK_ACCESS_FS_*, LANDLOCK_ACCESS_NET_* and LANDLOCK_SCOPE_*, by their bits.
_LANDLOCK_FILES = tuple(
    (name, 1 << number)
    for number, name in enumerate(
        (
            "EXECUTE", "WRITE_FILE", "READ_FILE", "READ_DIR", "REMOVE_DIR", "REMOVE_FILE",
            "MAKE_CHAR", "MAKE_DIR", "MAKE_REG", "MAKE_SOCK", "MAKE_FIFO", "MAKE_BLOCK",
            "MAKE_SYM", "REFER", "TRUNCATE", "IOCTL_DEV",
        )
    )
)  # fmt: skip
_LANDLOCK_NETWORK = (("BIND_TCP", 1), ("CONNECT_TCP", 2))
_LANDLOCK_SCOPES = (("ABSTRACT_UNIX_SOCKET", 1), ("SIGNAL", 2))
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1
_KEYCTL_JOIN_SESSION_KEYRING = 1
# linux/bpf.h
_BPF_PROG_LOAD, _BPF_PROG_ATTACH = 5, 8
_BPF_PROG_TYPE_CGROUP_DEVICE, _BPF_CGROUP_DEVICE = 15, 6
_BPF_F_ALLOW_MULTI = 2
_STATX_ATTR_MOUNT_ROOT = 0x2000
_SIOCSIFFLAGS = 0x8914
# linux/loop.h
_LOOP_CONFIGURE, _LOOP_CTL_GET_FREE = 0x4C0A, 0x4C82
LO_FLAGS_READ_ONLY, LO_FLAGS_AUTOCLEAR, _LO_FLAGS_DIRECT_IO = 1, 4, 16
_LOOP_SECTOR_BYTES, _LOOP_BLOCK_BYTES = 512, 4096
# linux/fs.h, linux/quota.h
_FS_IOC_FSGETXATTR, _FS_IOC_FSSETXATTR, _FS_XFLAG_PROJINHERIT = 0x801C581F, 0x401C5820, 0x200
_Q_GETQUOTA, _Q_SETQUOTA, _Q_GETNEXTQUOTA, _PRJQUOTA = 0x800007, 0x800008, 0x800009, 2
_QIF_BLIMITS, _QIF_ILIMITS, _QIF_BLOCK_BYTES = 1, 4, 1024
# linux/dqblk_xfs.h: struct fs_quota_statv, version 1, of which the flags are wanted.
_Q_XGETQSTATV, _FS_QSTATV_VERSION1, _FS_QUOTA_PDQ_ENFD = 0x5808, 1, 1 << 5
_FS_QUOTA_STATV = "=bBH156x"
_IF_DQBLK, _FSXATTR = "=8QII", "=IIIII8x"
_TIOCSCTTY = 0x540E
_FIONREAD = 0x541B
_SOL_SOCKET = 1
_SCM_RIGHTS = 1
_MSG_CMSG_CLOEXEC = 0x40000000
_EVENTS_BYTES = 1 << 16
MOST_DESCRIPTORS = 253  # unix(7): SCM_MAX_FD, in one message
_IFF_UP_RUNNING = 0x41
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_SOCK_SEQPACKET, _SOCK_CLOEXEC = 5, os.O_CLOEXEC
_SOCK_STREAM, _SOCK_DGRAM, _SOCK_RAW, _SOCK_NONBLOCK = 1, 2, 3, 0o4000
_SOL_IP, _SOL_IPV6 = 0, 41
_NLMSG_ERROR = 2
# ip(7), ipv6(7): answers come from the address that was asked; whom a connection was meant for is
# its own address; the family's own addresses and no other.
_IP_PKTINFO, _IP_TRANSPARENT = 8, 19
_IPV6_V6ONLY, _IPV6_RECVPKTINFO, _IPV6_TRANSPARENT = 26, 49, 75


class CallFailed(OSError):
    """A system call failed; the text is "call(operand=value) failed: ENAME (what it means)"."""

    def __init__(self, call: str, number: int, **operands: object) -> None:
        told = ", ".join(f"{name}={value!r}" for name, value in operands.items())
        name = errno.errorcode.get(number, str(number))
        self.text = f"{call}({told}) failed: {name} ({os.strerror(number)})"
        super().__init__(number, self.text)

    def __str__(self) -> str:
        return self.text


def _named(prefix: str, values: dict[str, object]) -> tuple[tuple[str, int], ...]:
    """The names in *values* that begin with *prefix*, and their bits; those of several bits first,
    since O_TMPFILE has O_DIRECTORY in it."""
    found = [
        (name.lstrip("_"), bits)
        for name, bits in values.items()
        if name.startswith((prefix, f"_{prefix}")) and isinstance(bits, int) and bits > 0
    ]
    return tuple(sorted(found, key=lambda pair: -pair[1].bit_count()))


_CLONES = _named("CLONE_", globals())
_MOUNT_ATTRIBUTES = _named("MOUNT_", globals())
_PROPAGATIONS = _named("MS_", globals())
_RESOLVES = _named("RESOLVE_", globals())
_OPENS = _named("O_", vars(os))


class _Flags:
    """*value* for the text of an error, by the names of its bits."""

    def __init__(self, value: int, names: tuple[tuple[str, int], ...]) -> None:
        self.value = value
        self.names = names

    def __repr__(self) -> str:
        found, rest = [], self.value
        for name, bits in self.names:
            if rest & bits == bits:
                found.append(name)
                rest &= ~bits
        if rest:
            found.append(hex(rest))
        return "|".join(found) or "0"


class _Place:
    """What a descriptor is open on, for the text of an error: its path, where that is to be had."""

    def __init__(self, fd: int, path: str = "") -> None:
        self.fd = fd
        self.path = path

    def __repr__(self) -> str:
        path = self.path or self._known()
        return repr(path) if path else f"descriptor {self.fd}"

    def _known(self) -> str:
        try:
            path = os.readlink(f"/proc/self/fd/{self.fd}")
        except OSError:
            return ""
        return "" if path == "/" else path  # so is the root of every mount that is attached nowhere


class _Attributes(ctypes.Structure):
    """struct mount_attr of mount_setattr(2)."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


_ATTRIBUTES_BYTES = ctypes.c_size_t(ctypes.sizeof(_Attributes))


class _OpenHow(ctypes.Structure):
    """struct open_how of openat2(2)."""

    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


_HOW_BYTES = ctypes.c_size_t(ctypes.sizeof(_OpenHow))


class _Ruleset(ctypes.Structure):
    """struct landlock_ruleset_attr of landlock_create_ruleset(2)."""

    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr of landlock_add_rule(2)."""

    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class _Vector(ctypes.Structure):
    """struct iovec of readv(2)."""

    _fields_ = (("base", ctypes.c_char_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """struct msghdr of sendmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.POINTER(_Vector)),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _FilterProgram(ctypes.Structure):
    """struct sock_fprog of seccomp(2)."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _check(result: int, call: str, **operands: object) -> int:
    if result < 0:
        raise CallFailed(call, ctypes.get_errno(), **operands)
    return result


def _failed(call: str, **operands: object) -> NoReturn:
    """Where a call is made so often that its operands are put together only for an error."""
    raise CallFailed(call, ctypes.get_errno(), **operands)


def _syscall(number: int, *args: object) -> int:
    return int(_libc.syscall(ctypes.c_long(number), *args))


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(flags), "unshare", flags=_Flags(flags, _CLONES))


def setns(fd: int, kind: int) -> None:
    """setns(2)."""
    _check(_libc.setns(fd, kind), "setns", fd=fd, kind=_Flags(kind, _CLONES))


def fork_into(namespaces: int) -> int:
    """clone(2): like fork, but the child is in new *namespaces*.

    Only for a process with one thread: none of Python's after-fork hooks run, and none is needed.
    """
    number = _BY_MACHINE[MACHINE][0]
    flags = ctypes.c_ulong(_SIGCHLD | namespaces)
    pid = _syscall(number, flags, None, None, None, None)
    return _check(pid, "clone", flags=_Flags(namespaces, _CLONES))


def fork_as_sibling(namespaces: int = 0) -> int:
    """The same with CLONE_PARENT: the child is a child of *our* parent. So the server is the parent
    of PID 1, and this process may end."""
    return fork_into(_CLONE_PARENT | namespaces)


def open_tree(path: str, *, dir_fd: int = AT_FDCWD) -> int:
    """open_tree(2): a detached recursive clone of the mounts at *path* ("" is *dir_fd* itself)."""
    flags = _CLONE_WHOLE if path else _CLONE_WHOLE | _AT_EMPTY_PATH
    result = int(_libc.syscall(_OPEN_TREE, dir_fd, os.fsencode(path), flags))
    return result if result >= 0 else _failed("open_tree", path=_Place(dir_fd, path))


def open_tree_with(path: str, add: int) -> int:
    """open_tree_attr(2) (Linux 6.15): the same clone, private, with the attributes *add*; in two
    calls where there is none."""
    told = ctypes.byref(_Attributes(add, 0, MS_PRIVATE, 0)), _ATTRIBUTES_BYTES
    result = int(_libc.syscall(_OPEN_TREE_ATTR, AT_FDCWD, os.fsencode(path), _CLONE_WHOLE, *told))
    if result < 0:
        result = open_tree(path)
        mount_setattr(result, add=add, propagation=MS_PRIVATE)
    return result


def bind(source: str, target: str) -> None:
    """mount(2) with MS_BIND: the mount at *source* on *target*, by paths that are followed: for
    places where nobody but Linux makes names."""
    result = _libc.mount(os.fsencode(source), os.fsencode(target), None, _MS_BIND, None)
    if result < 0:
        _failed("mount", source=source, target=target, flags="MS_BIND")


def move_mount(
    mount_fd: int, target_fd: int, name: str = "", *, source: str = "", target: str = ""
) -> None:
    """move_mount(2), both sides by descriptor: no path is resolved a second time. With *name* the
    target is that entry of *target_fd*, and a link is none that is followed. *source* and *target*
    are what the caller knows them as."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH | (0 if name else _MOVE_MOUNT_T_EMPTY_PATH)
    if _libc.syscall(_MOVE_MOUNT, mount_fd, b"", target_fd, os.fsencode(name), flags) < 0:
        known = _Place(mount_fd, source), _Place(target_fd, target or name)
        _failed("move_mount", source=known[0], target=known[1])


def mount_setattr(
    mount_fd: int,
    path: str = "",
    *,
    add: int = 0,
    propagation: int = 0,
    userns_fd: int = 0,
    recursive: bool = True,
) -> None:
    """mount_setattr(2): add attributes, set propagation, or map ids by a user namespace."""
    flags = (_AT_RECURSIVE if recursive else 0) | (0 if path else _AT_EMPTY_PATH)
    told = ctypes.byref(_Attributes(add, 0, propagation, userns_fd))
    if (
        _libc.syscall(_MOUNT_SETATTR, mount_fd, os.fsencode(path), flags, told, _ATTRIBUTES_BYTES)
        < 0
    ):
        added, spread = _Flags(add, _MOUNT_ATTRIBUTES), _Flags(propagation, _PROPAGATIONS)
        _failed("mount_setattr", path=_Place(mount_fd, path), add=added, propagation=spread)


def new_mount(filesystem: str, options: dict[str, str | None], attributes: int) -> int:
    """fsopen(2), fsconfig(2), fsmount(2): a detached mount; an option of None is a flag."""
    context = _syscall(_NR_FSOPEN, filesystem.encode(), ctypes.c_uint(1))
    _check(context, "fsopen", name=filesystem)
    try:
        for key, value in options.items():
            _fsconfig(context, filesystem, key, value)
        result = _syscall(_NR_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        _check(result, "fsconfig", name=filesystem, command="create")
        result = _syscall(_NR_FSMOUNT, context, ctypes.c_uint(1), ctypes.c_uint(attributes))
        if result < 0:
            _failed("fsmount", name=filesystem, attributes=_Flags(attributes, _MOUNT_ATTRIBUTES))
        return result
    finally:
        os.close(context)


def _fsconfig(context: int, filesystem: str, key: str, value: str | None) -> None:
    command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
    text = None if value is None else value.encode()
    result = _syscall(_NR_FSCONFIG, context, command, key.encode(), text, 0)
    _check(result, "fsconfig", name=filesystem, key=key, value=value)


RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


def rename(old_dir: int, old: str, new_dir: int, new: str, flags: int) -> None:
    """renameat2(2): single names below two descriptors."""
    result = _libc.renameat2(
        old_dir, os.fsencode(old), new_dir, os.fsencode(new), ctypes.c_uint(flags)
    )
    told = {"old": _Place(old_dir, old), "new": _Place(new_dir, new)}
    _check(result, "renameat2", **told, flags=flags)


def openat2(dir_fd: int, path: str, flags: int, resolve: int, mode: int = 0) -> int:
    """openat2(2): open *path* below *dir_fd* under the RESOLVE_* restrictions."""
    result = _openat2(dir_fd, path, flags, resolve, mode)
    return result if result >= 0 else _not_opened(path, flags, resolve)


def openat2_if_there(dir_fd: int, path: str, flags: int, resolve: int, mode: int = 0) -> int:
    """The same; -1 where there is nothing: while a root is built that is so a hundred times, and
    the text of an error takes longer than the call."""
    result = _openat2(dir_fd, path, flags, resolve, mode)
    if result >= 0 or ctypes.get_errno() == errno.ENOENT:
        return result
    return _not_opened(path, flags, resolve)


def _openat2(dir_fd: int, path: str, flags: int, resolve: int, mode: int) -> int:
    how = ctypes.byref(_OpenHow(flags | os.O_CLOEXEC, mode, resolve))
    return int(_libc.syscall(_OPENAT2, dir_fd, os.fsencode(path), how, _HOW_BYTES))


def _not_opened(path: str, flags: int, resolve: int) -> int:
    told = {"flags": _Flags(flags, _OPENS), "resolve": _Flags(resolve, _RESOLVES)}
    return _check(-1, "openat2", path=path, **told)


def is_mount_point(dir_fd: int, name: str) -> bool:
    """statx(2), STATX_ATTR_MOUNT_ROOT (Linux 5.8): whether *name* is the root of a mount."""
    answer = ctypes.create_string_buffer(256)
    flags = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT
    result = _libc.statx(dir_fd, os.fsencode(name), flags, 0, answer)
    _check(result, "statx", name=name, below=_Place(dir_fd))
    # struct statx: the attributes are its second 8 bytes.
    (attributes,) = struct.unpack_from("Q", answer, 8)
    return bool(attributes & _STATX_ATTR_MOUNT_ROOT)


def signal_all(number: int) -> None:
    """kill(2) with -1: every process of our PID namespace but ourselves, who are its first."""
    if _libc.kill(-1, number) < 0 and ctypes.get_errno() != errno.ESRCH:
        raise CallFailed("kill", ctypes.get_errno(), pid=-1, signal=number)


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    number = _BY_MACHINE[MACHINE][1]
    _check(_syscall(number, os.fsencode(new), os.fsencode(old)), "pivot_root", new=new, old=old)


def detach(path: str) -> None:
    """umount2(2) with MNT_DETACH."""
    _check(_libc.umount2(os.fsencode(path), _MNT_DETACH), "umount2", path=path, flags="MNT_DETACH")


def make_mounts_private() -> None:
    """mount(2) with MS_REC|MS_PRIVATE on "/": nothing that follows reaches another namespace."""
    result = _libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
    _check(result, "mount", target="/", flags="MS_REC|MS_PRIVATE")


def free_loop_device(control_fd: int) -> int:
    """ioctl(2), LOOP_CTL_GET_FREE on /dev/loop-control: the number of a loop device that nobody has
    at this moment; it is made where there is none."""
    result = _libc.ioctl(control_fd, ctypes.c_ulong(_LOOP_CTL_GET_FREE))
    return _check(result, "ioctl", request="LOOP_CTL_GET_FREE")


def configure_loop_device(
    device_fd: int, file_fd: int, *, path: str, readonly: bool = False
) -> None:
    """ioctl(2), LOOP_CONFIGURE (Linux 5.8): let the loop device *path* have the content of
    *file_fd* until nobody has it open any more. One that may be written has no second copy of it
    in memory, where the file system can do that; one that is *readonly* may be any file, of
    whatever length."""
    # struct loop_config: two words, struct loop_info64, whose flags are at 52 of 232 bytes, and 64
    # bytes for later.
    flags = LO_FLAGS_AUTOCLEAR | (LO_FLAGS_READ_ONLY if readonly else _LO_FLAGS_DIRECT_IO)
    info = struct.pack("=52xI176x", flags)
    block = _LOOP_SECTOR_BYTES if readonly else _LOOP_BLOCK_BYTES
    config = struct.pack("=II232s64x", file_fd, block, info)
    result = _libc.ioctl(device_fd, ctypes.c_ulong(_LOOP_CONFIGURE), config)
    _check(result, "ioctl", request="LOOP_CONFIGURE", device=path)


def project_of(fd: int) -> tuple[int, bool]:
    """ioctl(2), FS_IOC_FSGETXATTR: the project of the file or directory *fd*, and whether what is
    made in it begins with that one."""
    flags, _, _, project, _ = _extended_attributes(fd)
    return project, bool(flags & _FS_XFLAG_PROJINHERIT)


def set_project(fd: int, project: int, *, inherit: bool) -> None:
    """ioctl(2), FS_IOC_FSSETXATTR: let *fd* be of *project*; what is made in it, too, with
    *inherit*. Linux lets nobody do so who is in another user namespace than the first."""
    flags, hint, extents, _, copy_hint = _extended_attributes(fd)
    flags = flags | _FS_XFLAG_PROJINHERIT if inherit else flags & ~_FS_XFLAG_PROJINHERIT
    told = struct.pack(_FSXATTR, flags, hint, extents, project, copy_hint)
    result = _libc.ioctl(fd, ctypes.c_ulong(_FS_IOC_FSSETXATTR), told)
    _check(result, "ioctl", request="FS_IOC_FSSETXATTR", file=_Place(fd), project=project)


def _extended_attributes(fd: int) -> tuple[int, int, int, int, int]:
    """Those of struct fsxattr: flags, extent size, count of extents, project, extent size of
    copies."""
    answer = ctypes.create_string_buffer(struct.calcsize(_FSXATTR))
    result = _libc.ioctl(fd, ctypes.c_ulong(_FS_IOC_FSGETXATTR), answer)
    _check(result, "ioctl", request="FS_IOC_FSGETXATTR", file=_Place(fd))
    flags, hint, extents, project, copy_hint = struct.unpack(_FSXATTR, answer.raw)
    return flags, hint, extents, project, copy_hint


def project_quota(fd: int, project: int) -> tuple[int, int, int, int]:
    """quotactl_fd(2), Q_GETQUOTA: how many bytes and inodes the *project* may have on the file
    system of *fd*, 0 for no limit, and how many it has."""
    told = bytes(struct.calcsize(_IF_DQBLK))
    found = struct.unpack(_IF_DQBLK, _quotactl(_Q_GETQUOTA, "Q_GETQUOTA", fd, project, told))
    return found[0] * _QIF_BLOCK_BYTES, found[3], found[2], found[5]


def limit_project(fd: int, project: int, size_bytes: int | None, inodes: int | None) -> None:
    """quotactl_fd(2), Q_SETQUOTA: what it may have from now on, 0 for no limit; None leaves that
    limit as it is."""
    valid = (0 if size_bytes is None else _QIF_BLIMITS) | (0 if inodes is None else _QIF_ILIMITS)
    blocks = (size_bytes or 0) // _QIF_BLOCK_BYTES
    told = struct.pack(_IF_DQBLK, blocks, 0, 0, inodes or 0, 0, 0, 0, 0, valid, 0)
    _quotactl(_Q_SETQUOTA, "Q_SETQUOTA", fd, project, told)


def next_project(fd: int, project: int) -> int:
    """quotactl_fd(2), Q_GETNEXTQUOTA: the first project from that number on which has a limit on
    the file system of *fd*, or has anything; -1 where there is none."""
    told = bytes(struct.calcsize(_IF_DQBLK))
    try:
        found = _quotactl(_Q_GETNEXTQUOTA, "Q_GETNEXTQUOTA", fd, project, told)
    except CallFailed as error:
        if error.errno == errno.ENOENT:
            return -1
        raise
    return int(struct.unpack(_IF_DQBLK, found)[9])


def enforces_projects(fd: int) -> bool:
    """quotactl_fd(2), Q_XGETQSTATV, which ext4 answers as well: whether Linux holds the limits of
    projects on the file system of *fd*. It goes on to count, and lets limits be set, where
    quotaoff(8) has switched that off."""
    told = struct.pack(_FS_QUOTA_STATV, _FS_QSTATV_VERSION1, 0, 0)
    found = struct.unpack(_FS_QUOTA_STATV, _quotactl(_Q_XGETQSTATV, "Q_XGETQSTATV", fd, 0, told))
    return bool(found[2] & _FS_QUOTA_PDQ_ENFD)


def _quotactl(command: int, name: str, fd: int, project: int, told: bytes) -> bytes:
    """quotactl_fd(2) (Linux 5.14), with a structure that is *told* and answered: struct if_dqblk,
    or if_nextdqblk, whose last word is the number. Unlike quotactl(2) it asks for no path of a
    device."""
    block = ctypes.create_string_buffer(told, len(told))
    words = ctypes.c_uint(command << 8 | _PRJQUOTA), ctypes.c_uint(project), block
    result = _syscall(_NR_QUOTACTL_FD, fd, *words)
    _check(result, "quotactl_fd", command=name, file=_Place(fd), project=project)
    return block.raw


def set_hostname(name: str) -> None:
    """sethostname(2)."""
    text = name.encode()
    _check(_libc.sethostname(text, ctypes.c_size_t(len(text))), "sethostname", name=name)


def loopback_up() -> None:
    """netdevice(7), SIOCSIFFLAGS on lo: the only interface of a new network namespace is down."""
    fd = new_socket(_AF_INET, _SOCK_DGRAM)
    try:
        # struct ifreq: 16 bytes of name, then a short with the flags, 40 bytes in all.
        request = ctypes.create_string_buffer(b"lo".ljust(16, b"\0"), 40)
        ctypes.c_short.from_buffer(request, 16).value = _IFF_UP_RUNNING
        result = _libc.ioctl(fd, ctypes.c_ulong(_SIOCSIFFLAGS), request)
        _check(result, "ioctl", request="SIOCSIFFLAGS", interface="lo")
    finally:
        os.close(fd)


def new_socket(family: int, kind: int, protocol: int = 0) -> int:
    """socket(2)."""
    result = _libc.socket(family, kind | os.O_CLOEXEC, protocol)
    return _check(result, "socket", family=family, kind=kind, protocol=protocol)


def _set_option(fd: int, level: int, option: int) -> None:
    value = ctypes.c_int(1)
    result = _libc.setsockopt(fd, level, option, ctypes.byref(value), ctypes.sizeof(value))
    _check(result, "setsockopt", fd=fd, level=level, option=option, value=1)


def tell_netlink(protocol: int, messages: bytes, names: tuple[str, ...]) -> None:
    """netlink(7): write *messages*, numbered from 1, each of which Linux acknowledges while we do;
    CallFailed with that one of *names* whose message it refuses. It may refuse a batch as such."""
    fd = new_socket(_AF_NETLINK, _SOCK_RAW | _SOCK_NONBLOCK, protocol)
    try:
        os.write(fd, messages)
        left = len(names)
        while left:
            for number, code in _answers(os.read(fd, 1 << 16)):
                if code:
                    name = names[number - 1] if 0 < number <= len(names) else "(all of them)"
                    raise CallFailed("netlink", code, protocol=protocol, message=name)
                left -= 1
    finally:
        os.close(fd)


def _answers(text: bytes) -> list[tuple[int, int]]:
    """The number of each message that is answered, and the error, 0 for none."""
    found, position = [], 0
    while position < len(text):
        length, kind, _, number, _ = struct.unpack_from("=IHHII", text, position)
        if kind == _NLMSG_ERROR:
            found.append((number, -struct.unpack_from("=i", text, position + 16)[0]))
        position += (length + 3) & ~3
    return found


def new_listener(kind: str, port: int, backlog: int) -> int:
    """ip(7), ipv6(7): a socket of *kind* ("tcp4", "tcp6", "udp4" or "udp6") at *port* of every
    address, whoever has it: transparent, so that it may answer as that one."""
    is_ipv6, is_stream = kind.endswith("6"), kind.startswith("tcp")
    family, level = (_AF_INET6, _SOL_IPV6) if is_ipv6 else (_AF_INET, _SOL_IP)
    options = [_IPV6_TRANSPARENT if is_ipv6 else _IP_TRANSPARENT]
    if not is_stream:
        options.append(_IPV6_RECVPKTINFO if is_ipv6 else _IP_PKTINFO)
    if is_ipv6:
        options.append(_IPV6_V6ONLY)
    fd = new_socket(family, _SOCK_STREAM if is_stream else _SOCK_DGRAM)
    for option in options:
        _set_option(fd, level, option)
    # struct sockaddr_in, sockaddr_in6: the family, the port, and zeros for any address.
    size = 28 if is_ipv6 else 16
    address = (struct.pack("=H", family) + struct.pack("!H", port)).ljust(size, b"\0")
    _check(_libc.bind(fd, address, size), "bind", kind=kind, port=port)
    if is_stream:
        _check(_libc.listen(fd, backlog), "listen", kind=kind, port=port, backlog=backlog)
    return fd


def take_terminal(fd: int) -> None:
    """ioctl_tty(2), TIOCSCTTY: the session's first process gets the terminal that it has open."""
    result = _libc.ioctl(fd, ctypes.c_ulong(_TIOCSCTTY), ctypes.c_ulong(0))
    _check(result, "ioctl", request="TIOCSCTTY", fd=fd)


def join_new_session_keyring() -> None:
    """keyctl(2), KEYCTL_JOIN_SESSION_KEYRING: a keyring of our own, in place of the server's.

    A kernel that was built without keyrings answers ENOSYS: then there is none to share.
    """
    number = _BY_MACHINE[MACHINE][2]
    if _syscall(number, ctypes.c_int(_KEYCTL_JOIN_SESSION_KEYRING), None) < 0:
        code = ctypes.get_errno()
        if code != errno.ENOSYS:
            raise CallFailed("keyctl", code, command="KEYCTL_JOIN_SESSION_KEYRING")


def set_filesystem_ids(uid: int, gid: int) -> None:
    """setfsgid(2), setfsuid(2): whose files we make. They answer nothing; a second call asks."""
    for call, identity in ((_libc.setfsgid, gid), (_libc.setfsuid, uid)):
        call(identity)
        if call(ctypes.c_uint(-1).value) != identity:
            raise CallFailed("setfsuid/setfsgid", errno.EPERM, id=identity)


def set_own_groups(groups: tuple[int, ...]) -> None:
    """setgroups(2) of the calling thread alone: the C library's has all threads of the process
    follow, by signals (nptl(7))."""
    number = _BY_MACHINE[MACHINE][3]
    numbers = (ctypes.c_uint32 * len(groups))(*groups)
    _check(_syscall(number, len(groups), numbers), "setgroups", groups=groups)


def drop_bounding_set(*kept: int) -> None:
    """prctl(2), PR_CAPBSET_DROP for every capability that this kernel knows (EINVAL ends it), but
    for those *kept*."""
    for capability in range(64):
        if capability in kept:
            continue
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            code = ctypes.get_errno()
            if code == errno.EINVAL and capability:
                return
            raise CallFailed("prctl", code, option="PR_CAPBSET_DROP", capability=capability)


def set_capabilities(*kept: int) -> None:
    """capset(2): permitted and effective become *kept*; inheritable (and so ambient) empty."""
    low = high = 0
    for capability in kept:
        low |= (1 << capability) & 0xFFFFFFFF
        high |= (1 << capability) >> 32
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    _check(_libc.capset(header, sets), "capset", kept=kept)


def set_dumpable(*, dumpable: bool) -> None:
    """prctl(2), PR_SET_DUMPABLE: whether processes of the same user may ptrace us or read /proc."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, int(dumpable), 0, 0, 0), "prctl", option="PR_SET_DUMPABLE")


def become_keeping_capabilities(uid: int) -> None:
    """setresuid(2) under SECBIT_NO_SETUID_FIXUP of capabilities(7): another user, no right less."""
    fixup = _SECBIT_NO_SETUID_FIXUP
    _check(_libc.prctl(_PR_SET_SECUREBITS, fixup, 0, 0, 0), "prctl", option="PR_SET_SECUREBITS")
    os.setresuid(uid, uid, uid)
    _check(_libc.prctl(_PR_SET_SECUREBITS, 0, 0, 0, 0), "prctl", option="PR_SET_SECUREBITS")
    set_dumpable(dumpable=True)  # credentials(7): the change has reset it, and /proc/PID is root's


def show_arguments(words: tuple[str, ...]) -> None:
    """proc_pid_stat(5): the command line that /proc/PID/cmdline shows lies in our own memory."""
    with open("/proc/self/stat", "rb", buffering=0) as file:
        fields = file.readall().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end are fields 48 and 49
    if not start:
        return  # it tells the place only to who may trace us
    text = b"".join(os.fsencode(word) + b"\0" for word in words)[: end - start - 1]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))


def set_no_new_privileges() -> None:
    """prctl(2), PR_SET_NO_NEW_PRIVS: no exec gives more rights from here on."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl", option="PR_SET_NO_NEW_PRIVS")


def socket_pair() -> tuple[int, int]:
    """socketpair(2): two ends of which each hears the other's messages whole."""
    ends = (ctypes.c_int * 2)()
    kind = _SOCK_SEQPACKET | _SOCK_CLOEXEC
    _check(_libc.socketpair(_AF_UNIX, kind, 0, ends), "socketpair", type="SOCK_SEQPACKET")
    return ends[0], ends[1]


def send_descriptors(socket_fd: int, text: bytes, fds: list[int]) -> None:
    """sendmsg(2) with SCM_RIGHTS (unix(7)): one message, at most `MOST_DESCRIPTORS`."""
    rights = struct.pack(f"Qii{len(fds)}i", 16 + 4 * len(fds), _SOL_SOCKET, _SCM_RIGHTS, *fds)
    control = ctypes.create_string_buffer(rights, (len(rights) + 7) & ~7)
    vector = _Vector(text, len(text))
    message = _Message(
        None, 0, ctypes.pointer(vector), 1, ctypes.cast(control, ctypes.c_void_p), len(control), 0
    )
    result = _libc.sendmsg(socket_fd, ctypes.byref(message), 0)
    _check(result, "sendmsg", fd=socket_fd, descriptors=len(fds))


def receive_descriptors(socket_fd: int, text_bytes: int = 4096) -> tuple[bytes, list[int]]:
    """recvmsg(2): what `send_descriptors` sent, close-on-exec; b"" and nothing at the end, also
    where the other side has closed its own without having read what we had told it."""
    text = ctypes.create_string_buffer(text_bytes)
    control = ctypes.create_string_buffer(16 + 4 * MOST_DESCRIPTORS + 4)
    vector = _Vector(ctypes.cast(text, ctypes.c_char_p), text_bytes)
    message = _Message(
        None, 0, ctypes.pointer(vector), 1, ctypes.cast(control, ctypes.c_void_p), len(control), 0
    )
    result = _libc.recvmsg(socket_fd, ctypes.byref(message), _MSG_CMSG_CLOEXEC)
    if result < 0 and ctypes.get_errno() == errno.ECONNRESET:
        return b"", []
    length = _check(result, "recvmsg", fd=socket_fd)
    if message.control_length < 16:
        return text.raw[:length], []
    size = struct.unpack_from("Q", control)[0]
    return text.raw[:length], list(struct.unpack_from(f"{(size - 16) // 4}i", control, 16))


def accept(socket_fd: int) -> int:
    """accept4(2): the descriptor of a new connection."""
    result = _libc.accept4(socket_fd, None, None, os.O_CLOEXEC)
    return _check(result, "accept4", fd=socket_fd)


def die_with_parent() -> None:
    """prctl(2), PR_SET_PDEATHSIG: SIGKILL when the process that forked us ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0), "prctl", option="PR_SET_PDEATHSIG")


def adopt_orphans() -> None:
    """prctl(2), PR_SET_CHILD_SUBREAPER: descendants whose parent ends become our children."""
    result = _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _check(result, "prctl", option="PR_SET_CHILD_SUBREAPER")


def landlock_version() -> int:
    """landlock_create_ruleset(2): the version of the ABI, 0 where there is no Landlock."""
    flags = ctypes.c_uint(_LANDLOCK_CREATE_RULESET_VERSION)
    return max(0, _syscall(_NR_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), flags))


def landlock_create_ruleset(files: int, network: int, scoped: int) -> int:
    """landlock_create_ruleset(2): a descriptor of the rules for what it shall handle.

    An older kernel knows a shorter structure, and takes a longer one if the rest is zero.
    """
    wanted = _Ruleset(files, network, scoped)
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    result = _syscall(_NR_LANDLOCK_CREATE_RULESET, ctypes.byref(wanted), size, ctypes.c_uint(0))
    told = {
        "files": _Flags(files, _LANDLOCK_FILES),
        "network": _Flags(network, _LANDLOCK_NETWORK),
        "scoped": _Flags(scoped, _LANDLOCK_SCOPES),
    }
    return _check(result, "landlock_create_ruleset", **told)


def landlock_allow(ruleset_fd: int, path: str, path_fd: int, access: int) -> None:
    """landlock_add_rule(2): allow *access* to what *path_fd* is, and to what lies beneath it."""
    rule = _PathBeneath(access, path_fd)
    kind = ctypes.c_int(_LANDLOCK_RULE_PATH_BENEATH)
    number = _NR_LANDLOCK_ADD_RULE
    result = _syscall(number, ruleset_fd, kind, ctypes.byref(rule), ctypes.c_uint(0))
    _check(result, "landlock_add_rule", path=path, access=_Flags(access, _LANDLOCK_FILES))


def landlock_restrict_self(ruleset_fd: int) -> None:
    """landlock_restrict_self(2): from here on, for us and all that we start."""
    result = _syscall(_NR_LANDLOCK_RESTRICT_SELF, ruleset_fd, ctypes.c_uint(0))
    _check(result, "landlock_restrict_self", ruleset_fd=ruleset_fd)


def load_filter(program: bytes) -> None:
    """prctl(2), PR_SET_SECCOMP: install the packed classic BPF *program* (8 bytes a statement)."""
    description = _FilterProgram(len(program) // 8, program)
    result = _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(description), 0, 0)
    _check(result, "prctl", option="PR_SET_SECCOMP", statements=len(program) // 8)


def load_asking_filter(program: bytes) -> int:
    """seccomp(2), the same; a descriptor by which `asked` has the calls that it does not judge."""
    description = _FilterProgram(len(program) // 8, program)
    flags = ctypes.c_uint(_SECCOMP_FILTER_FLAG_NEW_LISTENER)
    number = _NR_SECCOMP[MACHINE]
    result = _syscall(number, _SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(description))
    return _check(result, "seccomp", flags="NEW_LISTENER", statements=len(program) // 8)


def asked(listener: int) -> tuple[int, int, int, tuple[int, ...]]:
    """seccomp_unotify(2): a call that waits for its answer: its id, the thread that makes it, its
    number, and its arguments. ENOENT: that thread has ended meanwhile."""
    told = ctypes.create_string_buffer(_ASKED.size)
    result = _libc.ioctl(listener, ctypes.c_ulong(_SECCOMP_IOCTL_NOTIF_RECV), told)
    _check(result, "ioctl", fd=listener, command="SECCOMP_IOCTL_NOTIF_RECV")
    mark, pid, _, number, _, _, *arguments = _ASKED.unpack(told.raw)
    return mark, pid, number, tuple(arguments)


def still_asks(listener: int, mark: int) -> bool:
    """seccomp_unotify(2): whether the call *mark* still waits, so that its thread is that one."""
    command, found = ctypes.c_ulong(_SECCOMP_IOCTL_NOTIF_ID_VALID), ctypes.c_uint64(mark)
    return bool(_libc.ioctl(listener, command, ctypes.byref(found)) == 0)


def answer(listener: int, mark: int, code: int) -> None:
    """seccomp_unotify(2): the call *mark* ends with the error *code*, or well with 0."""
    told = ctypes.create_string_buffer(_ANSWER.pack(mark, 0, -code, 0))
    result = _libc.ioctl(listener, ctypes.c_ulong(_SECCOMP_IOCTL_NOTIF_SEND), told)
    _check(result, "ioctl", fd=listener, command="SECCOMP_IOCTL_NOTIF_SEND", code=code)


def limit_devices(group: str, program: bytes) -> None:
    """bpf(2): let *program*, of BPF_PROG_TYPE_CGROUP_DEVICE, judge what processes of *group* open,
    besides what groups above have; it goes with the group."""
    code, terms = ctypes.create_string_buffer(program, len(program)), ctypes.c_char_p(b"GPL")
    # union bpf_attr: type, count of instructions, they, the license; no log, any version, no flags.
    attributes = struct.pack(
        "=IIQQIIQII",
        _BPF_PROG_TYPE_CGROUP_DEVICE,
        len(program) // 8,
        ctypes.addressof(code),
        ctypes.cast(terms, ctypes.c_void_p).value,
        *(0,) * 5,
    )
    fd = _bpf(_BPF_PROG_LOAD, attributes, instructions=len(program) // 8)
    group_fd = os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        told = struct.pack("=IIII", group_fd, fd, _BPF_CGROUP_DEVICE, _BPF_F_ALLOW_MULTI)
        _bpf(_BPF_PROG_ATTACH, told, group=group)
    finally:
        os.close(fd)
        os.close(group_fd)


def _bpf(command: int, attributes: bytes, **operands: object) -> int:
    told = ctypes.create_string_buffer(attributes, len(attributes))
    result = _syscall(_NR_BPF[MACHINE], command, told, ctypes.c_uint(len(attributes)))
    return _check(result, "bpf", command=command, **operands)


def close_on_exec_from(first: int) -> None:
    """close_range(2) with CLOSE_RANGE_CLOEXEC: no descriptor from *first* on outlives the exec."""
    result = _syscall(
        _NR_CLOSE_RANGE, ctypes.c_uint(first), ctypes.c_uint(0xFFFFFFFF), ctypes.c_uint(4)
    )
    _check(result, "close_range", first=first, flags="CLOEXEC")


def signal_fd(numbers: tuple[int, ...]) -> int:
    """signalfd(2) for *numbers*, which the caller has blocked; each read is 128 bytes."""
    mask = ctypes.c_uint64(sum(1 << (number - 1) for number in numbers))
    # The C library's sigset_t is larger than the kernel's 64 bits; the rest stays zero.
    padded = ctypes.create_string_buffer(bytes(mask), 128)
    return _check(_libc.signalfd(-1, padded, os.O_CLOEXEC), "signalfd", numbers=numbers)


def watch_changes(folders: list[str]) -> int:
    """inotify(7): a descriptor that tells when an entry of one of *folders* is made, written, moved
    or removed."""
    modify, moved, create, delete, delete_self = 0x2, 0xC0, 0x100, 0x200, 0x400
    mask = ctypes.c_uint32(modify | moved | create | delete | delete_self)
    fd = _check(_libc.inotify_init1(os.O_CLOEXEC), "inotify_init1")
    for path in folders:
        result = _libc.inotify_add_watch(fd, os.fsencode(path), mask)
        _check(result, "inotify_add_watch", path=path)
    return fd


def take_lease(fd: int) -> bool:
    """fcntl(2), F_SETLEASE: whoever opens the file waits for us from now on, and SIGIO says so.
    False where somebody has it open already, or Linux has no leases there."""
    return int(_libc.fcntl(fd, _F_SETLEASE, _F_WRLCK)) == 0


def has_lease(fd: int) -> bool:
    """fcntl(2), F_GETLEASE: whether we have one that nobody wants us to leave."""
    return int(_libc.fcntl(fd, _F_GETLEASE)) == _F_WRLCK


def leave_lease(fd: int) -> None:
    """The same: whoever waits goes on. Linux may have taken it away already."""
    _libc.fcntl(fd, _F_SETLEASE, _F_UNLCK)


def new_inotify() -> int:
    """inotify_init1(2)."""
    return _check(_libc.inotify_init1(os.O_CLOEXEC), "inotify_init1")


def watch_entries(fd: int, path: str) -> int:
    """inotify_add_watch(2): let *fd* tell when an entry of the directory *path* is made, opened,
    moved or removed; the number that `read_changes` tells of it by, the same for the same one."""
    only_directory, no_links = 0x01000000, 0x02000000
    events = IN_CLOSE_WRITE | IN_OPEN | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE
    mask = ctypes.c_uint32(events | only_directory | no_links)
    result = _libc.inotify_add_watch(fd, os.fsencode(path), mask)
    return _check(result, "inotify_add_watch", path=path)


def waiting_bytes(fd: int) -> int:
    """ioctl(2), FIONREAD: how many bytes can be read of *fd* now; of inotify(7) whole events."""
    answer = ctypes.c_int(0)
    result = _libc.ioctl(fd, ctypes.c_ulong(_FIONREAD), ctypes.byref(answer))
    _check(result, "ioctl", request="FIONREAD", fd=fd)
    return answer.value


def read_changes(fd: int) -> tuple[list[tuple[int, int, int, str]], int]:
    """read(2) on an inotify descriptor: of each event the watch, the mask, what the two events of a
    rename have in common, and the entry's name; and how many bytes these were."""
    events, found, position = os.read(fd, _EVENTS_BYTES), [], 0
    while position < len(events):
        watch, mask, cookie, length = struct.unpack_from("iIII", events, position)
        position += 16 + length
        name = events[position - length : position].rstrip(b"\0")
        found.append((watch, mask, cookie, os.fsdecode(name)))
    return found, len(events)


def names_of_changes(events: bytes) -> list[str]:
    """The names in what was read of `watch_changes`; "" for a folder itself."""
    return [name for _, name in changes(events)]


def changes(events: bytes) -> list[tuple[int, str]]:
    """(mask, name) of each struct inotify_event in what was read of an inotify instance."""
    found, position = [], 0
    while position < len(events):
        mask, _, length = struct.unpack_from("III", events, position + 4)
        position += 16 + length
        name = events[position - length : position].rstrip(b"\0")
        found.append((mask, os.fsdecode(name)))
    return found


def watch_directory(dir_fd: int) -> int:
    """inotify(7): a descriptor that tells when an entry of the directory is made or opened; reading
    it does not wait."""
    mask = ctypes.c_uint32(IN_CREATE | IN_MOVED_TO | IN_OPEN)
    fd = _check(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK), "inotify_init1")
    path = f"/proc/self/fd/{dir_fd}"
    result = _libc.inotify_add_watch(fd, path.encode(), mask)
    _check(result, "inotify_add_watch", path=path)
    return fd
