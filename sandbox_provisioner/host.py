"""host.py - reads only: what this Linux and this user may do, and what the host's tree looks like.

`HostFacts.probe()` is called once a start by the launcher, and by `doctor`. Whatever decides on
what is found here stands in `plan.py`.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sandbox_provisioner.cgroup import CgroupFacts, survey
from sandbox_provisioner.covers import bad_workdir, find_covered
from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.inside.kernel_calls import landlock_version
from sandbox_provisioner.spec import Covers, Volume, relative
from sandbox_provisioner.surroundings import current_obstacle

# The new mount API with mount_setattr(2) came with this release.
OLDEST_KERNEL = (5, 12)
MACHINES = ("x86_64", "aarch64")

_SYSTEM_DIRECTORIES = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "nix/store")
# Of the host's /etc, what programs need to work and what is the same for every user. No shadow, no
# host keys, no passwords of services: those parts are left out, and passwd and group are our own.
_ETC_ENTRIES = (
    "alternatives", "bash.bashrc", "ca-certificates", "crypto-policies", "debian_version", "fonts",
    "gai.conf", "inputrc", "java-11-openjdk", "java-17-openjdk", "java-21-openjdk", "ld.so.cache",
    "ld.so.conf", "ld.so.conf.d", "locale.alias", "locale.conf", "localtime", "ldap/ldap.conf",
    "magic", "mime.types", "networks", "os-release", "pki/ca-trust", "pki/tls/certs",
    "pki/tls/cert.pem", "protocols", "python3", "python3.11", "python3.12", "python3.13", "R",
    "rpc", "services", "ssl/certs", "ssl/cert.pem", "ssl/openssl.cnf", "terminfo", "timezone",
    "vulkan", "OpenCL", "glvnd",
)  # fmt: skip
# File systems whose mounts can be id-mapped, and since which Linux (mount_setattr(2)).
_IDMAPPED_SINCE = {
    "ext2": (5, 12), "ext3": (5, 12), "ext4": (5, 12), "vfat": (5, 12), "xfs": (5, 12),
    "btrfs": (5, 15), "ntfs3": (5, 15), "f2fs": (5, 18), "erofs": (5, 19), "squashfs": (6, 2),
    "tmpfs": (6, 3), "ceph": (6, 7), "zfs": (5, 15), "bcachefs": (6, 10),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What is true here. *obstacle* is why there are no namespaces here, as a HostError, or None.
    *landlock* is the version of Landlock's ABI, 0 without it.

    *privileged* is the machine's own root; a root that a container limits is not.
    *homes* are the home directories that this machine knows of, *own_folders* those that variables
    of the environment name as the settings, data and sockets of this server.
    """

    uid: int
    gid: int
    home: str
    privileged: bool
    kernel: tuple[int, int]
    machine: str
    obstacle: HostError | None
    cgroups: CgroupFacts
    root_links: Mapping[str, str]
    system_directories: tuple[str, ...]
    etc_entries: tuple[str, ...]
    homes: frozenset[str]
    own_folders: frozenset[str]
    cwd: str
    landlock: int = 0

    @classmethod
    def probe(cls) -> HostFacts:
        """Look at this machine as the user that we are. Costs a few ms, starts nothing."""
        uid = os.geteuid()
        kernel = _kernel_release()
        links, directories = _system_tree()
        privileged = uid == 0 and _has_capability(21) and _maps_all_ids()
        return cls(
            uid=uid,
            gid=os.getegid(),
            home=_home(uid),
            privileged=privileged,
            kernel=kernel,
            machine=os.uname().machine,
            obstacle=_obstacle(kernel, privileged=privileged),
            cgroups=survey(),
            root_links=links,
            system_directories=directories,
            etc_entries=tuple(e for e in _ETC_ENTRIES if os.path.exists(f"/etc/{e}")),
            homes=_homes(),
            own_folders=_own_folders(),
            cwd=_cwd(),
            landlock=landlock_version(),
        )


def _kernel_release() -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _home(uid: int) -> str:
    try:
        return os.environ.get("HOME") or pwd.getpwuid(uid).pw_dir
    except KeyError:
        return "/"


def _homes() -> frozenset[str]:
    """The home directories of everybody whom the password database names, and of this server."""
    homes = {entry.pw_dir for entry in pwd.getpwall()} | {_home(os.geteuid())}
    too_short = {"/", "/bin", "/usr", "/dev", "/nonexistent", "/run", "/var", "/proc", "/tmp"}
    return frozenset(home.rstrip("/") for home in homes if home.startswith("/")) - too_short - {""}


def _own_folders() -> frozenset[str]:
    names = (
        "JUPYTER_CONFIG_DIR", "JUPYTER_CONFIG_PATH", "JUPYTER_DATA_DIR", "JUPYTER_PATH",
        "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME",
        "XDG_RUNTIME_DIR",
    )  # fmt: skip
    paths = (path for name in names for path in os.environ.get(name, "").split(":"))
    return frozenset(path.rstrip("/") for path in paths if path.startswith("/"))


def _cwd() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"


def _has_capability(number: int) -> bool:
    match = re.search(r"CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text())
    return bool(match and int(match[1], 16) >> number & 1)


def _maps_all_ids() -> bool:
    """Whether this root is the machine's: a container's user namespace maps fewer ids."""
    first = Path("/proc/self/uid_map").read_text().split()
    return first[:2] == ["0", "0"] and int(first[2]) >= 1 << 31


def _system_tree() -> tuple[dict[str, str], tuple[str, ...]]:
    links, directories = {}, []
    for name in _SYSTEM_DIRECTORIES:
        path = f"/{name}"
        if os.path.islink(path):
            links[path] = os.readlink(path)
        elif os.path.isdir(path):
            directories.append(path)
    return links, tuple(directories)


def _obstacle(kernel: tuple[int, int], *, privileged: bool) -> HostError | None:
    """Why user namespaces, and with them every sandbox, cannot be had here; None where they can."""
    attempt = "use namespaces on this machine"
    machine = os.uname().machine
    if kernel < OLDEST_KERNEL:
        return HostError(
            attempt=attempt,
            answer=f"this is Linux {kernel[0]}.{kernel[1]}",
            remedy=f"Linux {OLDEST_KERNEL[0]}.{OLDEST_KERNEL[1]} or newer is needed.",
        )
    if machine not in MACHINES:
        return HostError(
            attempt=attempt,
            answer=f"there is no system call filter for {machine}",
            remedy=f"The machines that have one are: {', '.join(MACHINES)}.",
        )
    cause = current_obstacle(privileged=privileged)
    if cause is None:
        return None
    return HostError(attempt=attempt, answer=cause.found, remedy=cause.sentence)


def count_tasks(uid: int) -> int:
    """How many processes and threads *uid* has: what RLIMIT_NPROC counts (getrlimit(2))."""
    count = 0
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}/task").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue  # it has ended
    return count


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkdirFacts:
    """What is true of a work directory. *source* is the real path of *path*, "" if there is none.

    *directories*, *files*, *server_files* and *frozen* are what `Covers` means here, as paths
    relative to it, with what symbolic links at these places lead to.
    """

    path: str
    source: str
    owner_uid: int
    owner_gid: int
    filesystem: str
    idmappable: bool
    directories: tuple[str, ...]
    files: tuple[str, ...]
    server_files: tuple[str, ...]
    frozen: tuple[str, ...]

    @classmethod
    def nowhere(cls) -> WorkdirFacts:
        """For a box that has none."""
        return cls(
            path="", source="", owner_uid=0, owner_gid=0, filesystem="", idmappable=True,
            directories=(), files=(), server_files=(), frozen=(),
        )  # fmt: skip

    @classmethod
    def probe(cls, path: str, facts: HostFacts, covers: Covers) -> WorkdirFacts:
        """Look at *path*; SpecError where it cannot be anybody's work directory."""
        source = os.path.realpath(path)
        for candidate in (path, source):
            _refuse_system_path(candidate)
        try:
            status = os.stat(source)
            if not os.path.isdir(source):
                raise NotADirectoryError(20, "it is not a directory")
        except OSError as error:
            raise bad_workdir(path, error.strerror or str(error)) from None
        filesystem = filesystem_of(source)
        covered = find_covered(
            source,
            covers,
            home=facts.home,
            homes=facts.homes,
            own_folders=facts.own_folders,
            cwd=facts.cwd,
        )
        return cls(
            path=path.rstrip("/"),
            source=source,
            owner_uid=status.st_uid,
            owner_gid=status.st_gid,
            filesystem=filesystem,
            idmappable=_is_idmappable(filesystem, facts),
            directories=covered.directories,
            files=covered.files,
            server_files=covered.server_files,
            frozen=covered.frozen,
        )


_REFUSED_TREES = ("/etc", "/usr", "/boot", "/proc", "/sys", "/dev", "/bin", "/sbin", "/lib")
_REFUSED = ("/", "/home", "/tmp", "/var", "/var/tmp", "/run", "/opt", "/mnt", "/media")


def _refuse_system_path(path: str) -> None:
    if (path.rstrip("/") or "/") in _REFUSED:
        raise bad_workdir(path, "it would show the sandbox more than one person's files")
    for tree in _REFUSED_TREES:
        if relative(path, tree) is not None:
            raise bad_workdir(path, f"it lies in {tree}, which belongs to the system")


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeFacts:
    """What is true of a volume's source: its real path, its owner, and whether its ids can be
    mapped, so that what belongs to the owner outside belongs to the kernel's user inside."""

    volume: Volume
    source: str
    owner_uid: int
    owner_gid: int
    idmappable: bool

    @classmethod
    def probe(cls, volume: Volume, facts: HostFacts) -> VolumeFacts:
        """Look at *volume*; SpecError if it is not there, or shows what nobody may be given."""
        source = os.path.realpath(volume.source)
        if not os.path.exists(source):
            raise SpecError(
                attempt=f"use the volume {volume.source}",
                answer="there is no such path",
                remedy="Create it, or correct the option volumes.",
            )
        status = os.stat(source)
        return cls(
            volume=volume,
            source=source,
            owner_uid=status.st_uid,
            owner_gid=status.st_gid,
            idmappable=_is_idmappable(filesystem_of(source), facts),
        )


def _is_idmappable(filesystem: str, facts: HostFacts) -> bool:
    return facts.kernel >= _IDMAPPED_SINCE.get(filesystem, (1 << 16, 0))


def disk_of(path: str) -> str:
    """The disk that *path* lies on, as the "MAJOR:MINOR" that cgroups know it by; "" where it lies
    on no disk of its own (overlay, btrfs, tmpfs, a file server). They know no partitions."""
    try:
        device = os.stat(path).st_dev
        name = f"{os.major(device)}:{os.minor(device)}"
        place = os.path.realpath(f"/sys/dev/block/{name}", strict=True)
        if os.path.exists(f"{place}/partition"):
            place = os.path.dirname(place)
        return Path(f"{place}/dev").read_text().strip()
    except OSError:
        return ""


def filesystem_of(path: str) -> str:
    """The type of the file system that *path* lies on, from proc_pid_mountinfo(5)."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    best, name = -1, "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        words = left.split()
        mount_point = words[4].encode().decode("unicode_escape")
        # btrfs gives each subvolume a device number of its own: then the longest path decides.
        inside = relative(path, mount_point) is not None
        score = len(mount_point) + (1 << 16) * (words[2] == wanted)
        if inside and score > best:
            best, name = score, right.split()[0]
    return name
