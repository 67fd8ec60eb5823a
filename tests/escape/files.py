"""files.py - inside: files of the host, descriptors of the server, rights that a file can carry."""

from __future__ import annotations

import os

from frame import Kind, attempt
from tools import (
    SECRET,
    answer_of,
    call,
    contextlib,
    ctypes,
    fcntl,
    made,
    opened,
    read,
    struct,
    subprocess,
    write,
)

# -- what of the host there is to see

FOREIGN = "a path of the host"


@attempt(
    1, "read a file of the host that everybody may read", Kind.FILES, FOREIGN,
    expect="ENOENT", landlock="EACCES", control=SECRET,
)  # fmt: skip
def read_foreign(host):
    return read(host.secret)


@attempt(
    2, "list a directory beside the work directory", Kind.FILES, FOREIGN,
    expect="ENOENT", landlock="EACCES", control="secret",
)  # fmt: skip
def list_beside(host):
    return ",".join(os.listdir(host.other))


@attempt(
    3, "write to a file of the host that everybody may write to", Kind.FILES, FOREIGN,
    expect="as it was", control="written",
    after=lambda host: read(f"{host.open}/file"),
)  # fmt: skip
def write_foreign(host):
    return write(f"{host.open}/file", "written")


@attempt(
    4, "make a file in a directory of the host that is open to all", Kind.FILES, FOREIGN,
    expect="ENOENT", landlock="EACCES", control="made",
)  # fmt: skip
def make_foreign(host):
    return made(f"{host.open}/planted")


@attempt(
    5, "go up from the work directory", Kind.FILES, "path traversal",
    expect="ENOENT", landlock="EACCES", control=SECRET,
)  # fmt: skip
def go_up(host):
    os.chdir(host.workdir)
    return read("../other/secret")


@attempt(
    6, "go up past the root directory", Kind.FILES, "path traversal",
    expect="ENOENT", landlock="EACCES", control=SECRET,
)  # fmt: skip
def go_past_root(host):
    return read("/../../../../.." + host.secret)


@attempt(
    7, "read through a symbolic link in the work directory", Kind.FILES, "symlink traversal",
    expect="ENOENT", landlock="EACCES", control=SECRET,
)  # fmt: skip
def follow_link(host):
    os.symlink(host.secret, f"{host.workdir}/link-{os.getpid()}")
    return read(f"{host.workdir}/link-{os.getpid()}")


@attempt(
    8, "link a file of the host into the work directory", Kind.FILES, "hard link",
    expect="ENOENT", landlock="EXDEV", control=SECRET,
)  # fmt: skip
def hard_link(host):
    os.link(host.secret, f"{host.workdir}/hard-{os.getpid()}")
    return read(f"{host.workdir}/hard-{os.getpid()}")


@attempt(
    9, "move a directory of the host into the work directory", Kind.FILES, "rename",
    expect="ENOENT", landlock="EACCES|EXDEV", control="moved",
)  # fmt: skip
def move_in(host):
    os.rename(f"{host.open}/moves", f"{host.workdir}/moved-{os.getpid()}")
    return "moved"


# Of /var/lib there are names that programs need (system_files.py).
PLACES = (
    "/root", "/home", "/boot", "/srv", "/opt", "/mnt", "/media", "/var/lib/dpkg", "/var/lib/apt",
    "/var/log",
)  # fmt: skip


@attempt(
    10, "look into " + ", ".join(PLACES), Kind.FILES, FOREIGN, PLACES,
    expect="nothing", control="there",
)  # fmt: skip
def look_around(host, places):
    found = []
    for place in places:
        with contextlib.suppress(OSError):
            names = set(os.listdir(place)) - {
                "jovyan",
                *host.place.split("/"),
                *(name for module in (host.python, *host.modules) for name in module.split("/")),
            }
            found += [place] * bool(names)
    return "there" if found and not host.boxed else ",".join(found) or "nothing"


for number, path, landlocked in (
    (11, "/etc/shadow", "EACCES"),
    (12, "/etc/ssh", "ENOENT|EACCES"),
    (13, "/etc/machine-id", "EACCES"),
    (14, "/sys/kernel", "EACCES"),
    (16, "/sys/class/net", "EACCES"),
    (17, "/dev/kmsg", "EACCES"),
    (18, "/dev/kvm", "EACCES|ENOENT"),
    (19, "/dev/fuse", "EACCES"),
    (20, "/dev/net/tun", "EACCES"),
    (21, "/dev/vda", "EACCES"),
    (22, "/dev/userfaultfd", "EACCES"),
    (23, "/dev/loop-control", "EACCES"),
    (24, "/dev/vsock", "EACCES"),
    (25, "/dev/tty0", "EACCES"),
):

    @attempt(
        number, f"open {path}", Kind.FILES, "what a container would have to mask", path,
        expect="ENOENT", landlock=landlocked,
        control="opened",
        present=answer_of(opened, path) == "opened",
    )  # fmt: skip
    def open_path(host, path):
        return opened(path)


@attempt(
    15, "find the host's control groups", Kind.FILES, "/sys/fs/cgroup",
    expect="nothing", landlock="PermissionError", control="there",
)  # fmt: skip
def find_groups(host):
    try:
        names = set(os.listdir("/sys/fs/cgroup"))
    except FileNotFoundError:
        names = set()
    except PermissionError:
        return "PermissionError"
    # Two plain files of the box's own tell its caps.
    return "there" if names - {"cpu.max", "memory.max"} else "nothing"


@attempt(
    26, "learn who has an account on the host", Kind.FILES, "/etc/passwd",
    expect="jovyan,nobody,root", landlock="PermissionError", control="all of them",
)  # fmt: skip
def learn_accounts(host):
    try:
        names = sorted(line.split(":")[0] for line in open("/etc/passwd"))
    except PermissionError as error:
        return type(error).__name__
    return "all of them" if "daemon" in names else ",".join(names)


@attempt(
    27, "read the records and sockets of other kernels", Kind.FILES, "the runtime directory",
    expect="ENOENT", landlock="EACCES", control="listed",
)  # fmt: skip
def list_runtime(host):
    return (os.listdir(host.runtime) and "listed") or "listed"


@attempt(
    28, "find a secret of the server's environment", Kind.FILES, "environment variables",
    expect="not there", control="there",
)  # fmt: skip
def read_environment(host):
    return "there" if SECRET in "\n".join([*os.environ.values(), *os.environ]) else "not there"


# -- what belongs to the system

for number, path in (
    (30, "/sbx-planted"),
    (31, "/etc/sbx-planted"),
    (32, "/usr/local/bin/sbx-planted"),
    (33, "/usr/lib/sbx-planted"),
):

    @attempt(
        number, f"make a file in {os.path.dirname(path)}", Kind.FILES,
        "what all programs run or read", path,
        expect="EROFS", landlock="EACCES", control="made",
    )  # fmt: skip
    def make_in_system(host, path):
        return made(f"{path}-{os.getpid()}")


@attempt(
    34, "open the interpreter's program for writing", Kind.FILES, "CVE-2019-5736",
    expect="EACCES", landlock="EACCES", control="ETXTBSY",
)  # fmt: skip
def overwrite_program(host):
    """ETXTBSY comes after all checks of rights, from a program that runs."""
    return opened(host.python, os.O_WRONLY)


@attempt(
    35, "open /proc/self/exe for writing", Kind.FILES, "CVE-2019-5736",
    expect="EACCES", landlock="EACCES", control="ETXTBSY",
)  # fmt: skip
def overwrite_own_program(host):
    return opened("/proc/self/exe", os.O_WRONLY)


@attempt(
    36, "open a module of the standard library for writing", Kind.FILES, "what the host imports",
    expect="EACCES", landlock="EACCES", control="opened",
)  # fmt: skip
def overwrite_library(host):
    return opened(os.__file__, os.O_WRONLY)


@attempt(
    37, "change the time of a program", Kind.FILES, "what the host runs",
    expect="EROFS", landlock="EPERM", control="done",
)  # fmt: skip
def touch_program(host):
    now = os.stat(host.python)
    return os.utime(host.python, ns=(now.st_atime_ns, now.st_mtime_ns))


@attempt(
    38, "change the time of a file of one's own user", Kind.FILES, "utimensat(2)",
    expect="ENOENT", landlock="done", control="done",
)  # fmt: skip
def touch_foreign(host):
    """Landlock does not judge it: SECURITY.md says so."""
    return os.utime(f"{host.open}/file")


# -- descriptors


@attempt(
    40, "go up from a descriptor that was inherited", Kind.DESCRIPTORS, "CVE-2024-21626",
    expect="none leads there", control=SECRET,
)  # fmt: skip
def use_inherited(host):
    for fd in range(256):
        with contextlib.suppress(OSError):
            path = "." + "/.." * 8 + host.secret
            return os.read(os.open(path, os.O_RDONLY, dir_fd=fd), 99).decode()
    return "none leads there"


@attempt(
    41, "see where the descriptors of PID 1 lead", Kind.DESCRIPTORS, "CVE-2024-21626",
    expect="EACCES", control="listed",
)  # fmt: skip
def list_descriptors_of_init(host):
    return os.listdir("/proc/1/fd") and "listed"


for number, name in ((42, "root"), (43, "cwd")):

    @attempt(
        number, f"go through /proc/1/{name}", Kind.DESCRIPTORS, "CVE-2024-21626", name,
        expect="EACCES", control=SECRET,
    )  # fmt: skip
    def go_through_init(host, name):
        return read(f"/proc/{1 if host.boxed else host.pid}/{name}/../../../../../..{host.secret}")


@attempt(
    44, "leave the root directory by chroot(2)", Kind.DESCRIPTORS, "the classic chroot escape",
    expect="EPERM", control=SECRET,
)  # fmt: skip
def leave_by_chroot(host):
    os.chdir(host.workdir)
    below = f"below-{os.getpid()}"
    os.mkdir(below)
    os.chroot(below)
    os.chdir("../../../../../../..")
    os.chroot(".")
    return read(host.secret)


@attempt(
    45, "open a file by its handle", Kind.DESCRIPTORS, "Shocker, CVE-2014-3519 and its kind",
    expect="EPERM", control="opened",
)  # fmt: skip
def open_by_handle(host):
    handle = ctypes.create_string_buffer((120).to_bytes(4, "little") + bytes(124), 128)
    mount = ctypes.c_int()
    call("name_to_handle_at", -100, host.workdir.encode(), handle, ctypes.byref(mount), 0)
    fd = os.open(host.workdir, os.O_RDONLY)
    os.close(call("open_by_handle_at", fd, handle, os.O_RDONLY))
    return "opened"


# -- rights that a file carries


@attempt(
    50, "make a file set-user-ID by chmod(2)", Kind.PRIVILEGES, "a set-user-ID file for the host",
    expect="EPERM", control="0o4755",
)  # fmt: skip
def set_user_id(host):
    path = f"{host.workdir}/set-id-{os.getpid()}"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.chmod(path, 0o4755)
    return oct(os.stat(path).st_mode & 0o7777)


@attempt(
    51, "make a file set-group-ID by fchmod(2)", Kind.PRIVILEGES, "a set-group-ID file",
    expect="EPERM", control="0o2755",
)  # fmt: skip
def set_group_id(host):
    fd = os.open(f"{host.workdir}/set-gid-{os.getpid()}", os.O_CREAT | os.O_WRONLY)
    os.fchmod(fd, 0o2755)
    return oct(os.fstat(fd).st_mode & 0o7777)


@attempt(
    52, "make a set-user-ID file by open(2)", Kind.PRIVILEGES, "a set-user-ID file for the host",
    expect="EPERM", control="0o4755",
)  # fmt: skip
def open_set_user_id(host):
    os.umask(0)
    fd = os.open(f"{host.workdir}/made-{os.getpid()}", os.O_CREAT | os.O_WRONLY, 0o4755)
    return oct(os.fstat(fd).st_mode & 0o7777)


@attempt(
    53, "make a set-user-ID file by openat2(2), whose mode is behind a pointer", Kind.PRIVILEGES,
    "what a filter cannot see", expect="ENOSYS", control="0o4755",
)  # fmt: skip
def openat2_set_user_id(host):
    os.umask(0)
    how = struct.pack("QQQ", os.O_CREAT | os.O_WRONLY, 0o4755, 0)
    path = f"{host.workdir}/made2-{os.getpid()}".encode()
    fd = call(437, -100, path, how, len(how))
    return oct(os.fstat(fd).st_mode & 0o7777)


@attempt(
    54, "make a set-group-ID directory", Kind.PRIVILEGES, "a group that files inherit",
    expect="EPERM", control="0o2755",
)  # fmt: skip
def set_group_id_of_directory(host):
    path = f"{host.workdir}/directory-{os.getpid()}"
    os.umask(0)
    os.mkdir(path)
    os.chmod(path, 0o2755)
    return oct(os.stat(path).st_mode & 0o7777)


@attempt(
    55, "make a device file", Kind.PRIVILEGES, "mknod(2)",
    expect="EPERM", landlock="EPERM", control="made",
)  # fmt: skip
def make_device(host):
    path = f"{host.workdir}/device-{os.getpid()}"
    os.mknod(path, 0o020600, os.makedev(1, 3))
    os.unlink(path)
    return "made"


@attempt(
    56, "make a whiteout of overlayfs", Kind.PRIVILEGES, "CVE-2023-0386 and its kind",
    expect="EPERM", control="made",
)  # fmt: skip
def make_whiteout(host):
    path = f"{host.workdir}/whiteout-{os.getpid()}"
    os.mknod(path, 0o020000, 0)
    os.unlink(path)
    return "made"


for number, name, value in (
    (57, "security.capability", bytes.fromhex("0100000200200000000000000000000000000000")),
    (58, "trusted.overlay.opaque", b"y"),
):

    @attempt(
        number, f"give a file the attribute {name}", Kind.PRIVILEGES, "file capabilities",
        name, list(value), expect="EPERM", control="done",
    )  # fmt: skip
    def set_attribute(host, name, value):
        fd = os.open(f"{host.workdir}/attribute-{os.getpid()}", os.O_CREAT | os.O_WRONLY)
        return os.setxattr(fd, name, bytes(value))


@attempt(
    59, "run a set-user-ID program of root that lies in the work directory", Kind.PRIVILEGES,
    "a set-user-ID file", expect="EACCES", root="not root", user=None, landlock=None, control="0",
)  # fmt: skip
def run_set_user_id(host):
    with contextlib.suppress(OSError):
        os.setresuid(65534, 65534, 65534)
    answer = subprocess.run([host.set_id, "-u"], capture_output=True, text=True).stdout.strip()
    return answer if answer == "0" or not host.boxed else "not root"


@attempt(
    60, "open a device file that lies in the work directory", Kind.PRIVILEGES, "nodev",
    expect="EACCES", user=None, landlock=None, control="opened",
)  # fmt: skip
def open_device(host):
    return opened(host.device)


@attempt(61, "change the owner of a file to root", Kind.PRIVILEGES, "chown(2)",
    expect="EOVERFLOW", user="EINVAL", landlock="EPERM", control="done",
)  # fmt: skip
def give_to_root(host):
    fd = os.open(f"{host.workdir}/owned-{os.getpid()}", os.O_CREAT | os.O_WRONLY)
    return os.fchown(fd, 0, 0)


for number, name, command, size in (
    (62, "FS_IOC_SETFLAGS", 0x40086602, 8),
    (63, "FS_IOC_FSSETXATTR", 0x401C5820, 28),
):

    @attempt(
        number, f"change a file's flags or project by {name}", Kind.PRIVILEGES, "disk quotas",
        command, size, expect="EPERM", control="0",
    )  # fmt: skip
    def change_project(host, command, size):
        fd = os.open(f"{host.workdir}/flags-{os.getpid()}", os.O_CREAT | os.O_WRONLY)
        fcntl.ioctl(fd, command, bytes(size))
        return 0


# -- the kernel's own sockets


@attempt(
    65, "replace a socket by a link to somebody else's", Kind.DESCRIPTORS, "the socket directory",
    expect="EROFS", landlock="EACCES", control="replaced",
)  # fmt: skip
def replace_socket(host):
    if not os.path.lexists(f"{host.sockets}/s-9"):
        os.symlink(host.socket, f"{host.sockets}/s-9")
    os.rename(f"{host.sockets}/s-9", f"{host.sockets}/s-1")
    return "replaced"


@attempt(
    66, "put something else beside the sockets", Kind.CLEANING, "what the server has to remove",
    expect="EROFS", landlock="EACCES", control="made",
)  # fmt: skip
def make_beside_sockets(host):
    return made(f"{host.sockets}/planted")


@attempt(
    67, "make a directory beside the sockets", Kind.CLEANING, "what the server has to remove",
    expect="EROFS", landlock="EACCES", control="made",
)  # fmt: skip
def make_directory_beside_sockets(host):
    os.mkdir(f"{host.sockets}/planted-directory")
    return "made"
