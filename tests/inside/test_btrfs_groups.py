"""Why no quota group of btrfs holds a limit of the disk: the attempt that leads out of one."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
from pathlib import Path

import pytest
from probes import answer_of

from sandbox_provisioner.inside import kernel_calls

pytestmark = pytest.mark.requires("userns", "root", "loop", "btrfs")

MIB = 1 << 20
LIMIT = 8 * MIB
OWNER = 4711
# linux/btrfs.h: _IOWR(0x94, 40, struct btrfs_ioctl_quota_ctl_args), ..._ENABLE_SIMPLE_QUOTA.
QUOTA_CTL, ENABLE_SIMPLE = 0xC010_9428, 4


def btrfs(*words):
    subprocess.run(["btrfs", *map(str, words)], check=True, capture_output=True)


@pytest.fixture
def box_in_group(tmp_path):
    """A subvolume of OWNER's in a group with a limit, with simple quotas: what is made in it joins
    that group."""
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(256 * MIB)
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(disk)], check=True)
    try:
        fd = os.open(disk, os.O_RDONLY)
        fcntl.ioctl(fd, QUOTA_CTL, bytearray(struct.pack("QQ", ENABLE_SIMPLE, 0)))
        os.close(fd)
        btrfs("subvolume", "create", disk / "box")
        btrfs("qgroup", "create", "1/100", disk)
        btrfs("qgroup", "assign", "0/256", "1/100", disk)
        btrfs("qgroup", "limit", LIMIT, "1/100", disk)
        os.chown(disk / "box", OWNER, OWNER)
        yield disk / "box"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def make_subvolume(place, names_groups):
    """BTRFS_IOC_SUBVOL_CREATE_V2; with BTRFS_SUBVOL_QGROUP_INHERIT it names the groups: none."""
    import ctypes
    import fcntl
    import os
    import struct

    groups = ctypes.create_string_buffer(72)
    about = (1 << 2, 72, ctypes.addressof(groups)) if names_groups else (0, 0, 0)
    words = struct.pack("qQQQQQQ", 0, 0, *about, 0, 0) + b"below".ljust(4040, b"\0")
    fd = os.open(place, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, 0x5000_9418, bytearray(words))
    finally:
        os.close(fd)


def written_below(place):
    """How much a program without any right writes there, and what stops it."""
    written, data = 0, bytes(MIB)
    try:
        with open(f"{place}/below/file", "wb", buffering=0) as file:
            while written < 4 * LIMIT:
                written += file.write(data)
                os.fsync(file.fileno())
    except OSError as error:
        return written, error.errno
    return written, 0


@pytest.mark.parametrize("names_groups", [True, False])
def test_whoever_names_the_groups_of_a_new_subvolume_writes_past_the_limit(
    box_in_group: Path, names_groups: bool
):
    os.chdir(box_in_group)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.setresgid(OWNER, OWNER, OWNER)
        os.setresuid(OWNER, OWNER, OWNER)
        kernel_calls.unshare(kernel_calls.CLONE_NEWUSER)
        make_subvolume(".", names_groups)
        os.write(theirs, struct.pack("qq", *written_below(".")))
        os._exit(0)
    os.close(theirs)
    os.chdir("/")
    os.waitpid(child, 0)
    with open(ours, "rb") as file:
        written, stopped_by = struct.unpack("qq", file.read())
    if names_groups:
        assert (written, stopped_by) == (4 * LIMIT, 0)
    else:  # the control: the limit is one
        assert written <= LIMIT
        assert stopped_by == errno.EDQUOT


def try_subvolumes(place):
    return [answer_of(lambda named=named: make_subvolume(place, named)) for named in (True, False)]


def test_in_a_box_the_filter_alone_keeps_a_kernel_from_that(sandbox, box_in_group):
    with sandbox(workdir=str(box_in_group)) as box:
        using = (answer_of, make_subvolume)
        assert box.call(try_subvolumes, str(box_in_group), using=using) == ["EPERM", "EPERM"]
    assert os.listdir(box_in_group) == []
