"""nodes.py - whoever launches; reads only: a device node of the host, looked up and judged once.

What is given away is a pair of numbers, by which Linux knows a device whatever it is called. So the
node is opened once, past no link that the first look has not resolved, and judged by its numbers;
who makes the box makes a node of these numbers, or compares them again.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from sandbox_provisioner.errors import COMMAND, SpecError
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.trust import is_led_to_by_root

# Documentation/admin-guide/devices.txt, by major numbers; whoever has one of these has more than a
# device: the machine's memory, its disks, what others type, its power.
_NEVER = {
    4: "it is a console or a serial line of the machine",
    7: "it shows what stands on the machine's consoles",
    9: "it is a tape drive of the machine",
    13: "it tells what people type and point at",
    21: "it reaches the machine's disks",
    86: "it is a changer of the machine's tapes",
    89: "it reaches chips on the machine's boards (i2c)",
    90: "it is flash memory of the machine",
    153: "it reaches chips on the machine's boards (spi)",
    162: "it reaches the machine's disks",
    202: "it changes registers of the machine's processors",
    204: "it is a serial line of the machine",
    229: "it is a console of the machine",
}
_MEMORY = {1, 2, 4, 11, 12}  # of major 1: mem, kmem, port, kmsg, oldmem
_TERMINALS = {0, 2}  # of major 5: whoever opens tty or ptmx has their own
_MISC_MAJOR = 10
# linux/miscdevice.h, of that major
_MISC = {
    1: "psaux", 130: "watchdog", 134: "apm", 144: "nvram", 220: "mptctl", 221: "mpt2ctl",
    222: "mpt3ctl", 223: "uinput", 227: "mcelog", 231: "snapshot", 234: "btrfs-control",
    235: "autofs", 236: "mapper/control", 237: "loop-control", 239: "uhid", 240: "userio",
    242: "rfkill",
}  # fmt: skip
# Of the same major those that get a number when their driver is loaded.
_MISC_NAMES = {
    *_MISC.values(), "cachefiles", "cpu_dma_latency", "dlm-control", "dlm-monitor", "dlm_plock",
    "ecryptfs", "isst_interface", "megaraid_sas_ioctl_node", "memory_bandwidth", "mshv",
    "network_latency", "network_throughput", "nvme-fabrics", "sev", "sgx_provision", "ubi_ctrl",
    "userfaultfd", "vga_arbiter", "vhci", "xen/gntalloc", "xen/gntdev", "xen/hypercall",
    "xen/privcmd", "xen/xenbus", "xen/xenbus_backend", "zfs",
}  # fmt: skip
# By /sys/dev/char/MAJOR:MINOR/subsystem, for those without fixed numbers.
_SUBSYSTEMS = {
    "nvme", "nvme-generic", "nvme-subsystem", "nvme-fabrics", "bsg", "scsi_generic", "mtd", "ubi",
    "watchdog", "input", "vc", "vtconsole", "hidraw", "tpm", "tpmrm", "ipmi", "msr", "rtc", "gpio",
    "dax", "uio", "mei",
}  # fmt: skip
_SYS = "/sys/dev/char"
# NVIDIA's driver tells sysfs nothing; its majors are its own, by the names of /proc/devices.
_UNTOLD = "nvidia"
_DRIVERS = "/proc/devices"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The character device *major*:*minor*, at *source* on the host, for *path* inside, to be read,
    written, or both, as *access* says: "r", "w", "rw"."""

    path: str
    source: str
    major: int
    minor: int
    access: str = "rw"


def find_node(path: str, source: str, access: str, *, privileged: bool, attempt: str) -> Node:
    """What *source* is, for *path* inside; SpecError where that may not be given, or, to who is not
    *privileged*, where the user may not have it."""
    try:
        found = os.path.realpath(source, strict=True)
        status = _status(found)
    except OSError as error:
        remedy = "Load its driver, or name another one."
        raise _refused(attempt, f"{source}: {error.strerror}", remedy) from None
    if why := _why_not(status):
        raise _refused(attempt, f"{source}: {why}", "Name another device. No box is given that.")
    if privileged and not is_led_to_by_root(source):
        answer = f"{source}: others than root may change what its path leads to"
        raise _refused(attempt, answer, "Name the node itself, in a directory of root's.")
    if not privileged and not os.access(found, _modes(access)):
        steps = (
            "Kernels have no more of it than their user. See its group, and let the administrator "
            "add you to it:",
            f"{COMMAND}stat -c '%U:%G %a' {found}",
        )
        raise _refused(attempt, f"{found} is not yours to use", steps)
    return Node(
        path=path,
        source=found,
        major=os.major(status.st_rdev),
        minor=os.minor(status.st_rdev),
        access=access,
    )


def _modes(access: str) -> int:
    return (os.R_OK if "r" in access else 0) | (os.W_OK if "w" in access else 0)


def _status(path: str) -> os.stat_result:
    no_links = kernel_calls.RESOLVE_NO_SYMLINKS | kernel_calls.RESOLVE_NO_MAGICLINKS
    fd = kernel_calls.openat2(kernel_calls.AT_FDCWD, path, os.O_PATH, no_links)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _why_not(status: os.stat_result) -> str:
    """Why nobody is given it, "" if one may be."""
    if not stat.S_ISCHR(status.st_mode):
        return "it is a disk" if stat.S_ISBLK(status.st_mode) else "it is no device"
    major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
    if major == 1 and minor in _MEMORY:
        return "it is the machine's memory, or its log"
    if major == 5 and minor not in _TERMINALS:
        return "it is a console of the machine"
    if major == _MISC_MAJOR and minor in _MISC:
        return f"it is {_MISC[minor]}, which acts on the whole machine"
    return _NEVER.get(major, "") or _why_not_its_driver(major, minor)


def _why_not_its_driver(major: int, minor: int) -> str:
    """The same by what Linux tells of its driver."""
    place = f"{_SYS}/{major}:{minor}"
    if not os.path.exists(place):
        is_known = _driver(major).startswith(_UNTOLD)
        return "" if is_known else f"no driver tells in {_SYS} what {major}:{minor} is"
    subsystem, name = os.path.basename(os.path.realpath(f"{place}/subsystem")), _name(place)
    if major == _MISC_MAJOR and name in _MISC_NAMES:
        return f"it is {name}, which acts on the whole machine"
    if subsystem in _SUBSYSTEMS:
        return f"it is one of {subsystem}, which act on the whole machine"
    if os.path.basename(name).startswith("noiommu-"):  # vfio.rst
        return "it reaches all of the machine's memory, since no IOMMU is in front of it"
    return ""


def _name(place: str) -> str:
    """What its driver calls it, whatever a node of it is called."""
    lines = Path(place, "uevent").read_text(errors="replace").splitlines()
    return next((line[8:] for line in lines if line.startswith("DEVNAME=")), "")


def _driver(major: int) -> str:
    """proc_devices(5): first the character devices, then, behind an empty line, the others."""
    try:
        listed = Path(_DRIVERS).read_text(errors="replace").partition("\n\n")[0]
    except OSError:
        return ""
    fields = (line.split(None, 1) for line in listed.splitlines())
    return next((each[-1] for each in fields if each[:1] == [str(major)]), "")


def _refused(attempt: str, answer: str, remedy: str | tuple[str, ...]) -> SpecError:
    return SpecError(attempt=attempt, answer=answer, remedy=remedy)
