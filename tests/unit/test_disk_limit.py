"""What holds a limit of the disk, and for how many images there is room: by made-up hosts."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from types import SimpleNamespace

import pytest

from sandbox_provisioner import traces
from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.facilities.storage import facts, images, tell
from sandbox_provisioner.facilities.storage.facts import Storage
from sandbox_provisioner.facilities.storage.images import mounting
from sandbox_provisioner.facilities.storage.wish import DiskBackend
from sandbox_provisioner.inside.kernel_calls import CallFailed
from sandbox_provisioner.locks import Locked, is_free
from sandbox_provisioner.records import Record, RecordFolder
from sandbox_provisioner.spec import Limits

MIB, GIB = 1 << 20, 1 << 30
NAME = "a" * 12


@pytest.fixture
def able(monkeypatch):
    """A host that has what images need."""
    monkeypatch.setattr(facts, "formatter", lambda: "/usr/sbin/mkfs.ext4")
    monkeypatch.setattr(facts, "_is_device", lambda path: True)


def find(limits, *, privileged):
    return facts.find_storage(limits, privileged=privileged, kernel=(6, 1))


def test_without_a_limit_there_is_nothing_to_hold_it(able):
    assert find(Limits(inodes=1000), privileged=True) is None


def test_a_root_server_has_an_image_and_everybody_else_memory(able):
    limits = Limits(disk_bytes=10 * GIB)
    assert find(limits, privileged=True).backend is DiskBackend.IMAGE
    found = find(limits, privileged=False)
    assert found.backend is DiskBackend.TMPFS
    assert "root" in found.lacks[DiskBackend.IMAGE]


@pytest.mark.parametrize(
    ("name", "value", "lack"),
    [("formatter", lambda: "", "e2fsprogs"), ("_is_device", lambda path: False, "loop-control")],
)
def test_a_host_that_cannot_have_images_says_why_and_refuses_who_asks_for_one(
    able, monkeypatch, name, value, lack
):
    monkeypatch.setattr(facts, name, value)
    found = find(Limits(disk_bytes=GIB), privileged=True)
    assert found.backend is DiskBackend.TMPFS
    assert lack in tell.disk_words(found, Limits(disk_bytes=GIB))
    asked = Limits(disk_bytes=GIB, disk_backend=DiskBackend.IMAGE)
    with pytest.raises(HostError, match=lack):
        find(asked, privileged=True)


@pytest.mark.parametrize(
    ("size", "inodes", "made"),
    [(16 * MIB, 512, 512), (16 * MIB, 513, 512), (GIB, 1000, 896), (10 * GIB, 100_000, 99_840)],
)
def test_an_image_never_has_more_inodes_than_were_asked_for(able, size, inodes, made):
    limits = Limits(disk_bytes=size, inodes=inodes)
    assert find(limits, privileged=True).inodes == made


def test_fewer_inodes_than_a_file_system_has_are_refused_with_the_least(able):
    with pytest.raises(HostError, match="at least 1280"):
        find(Limits(disk_bytes=10 * GIB, inodes=1000), privileged=True)


@pytest.mark.parametrize("wish", [{"disk_bytes": MIB - 1}, {"inodes": 127}])
def test_what_no_kernel_could_start_in_is_refused(wish):
    with pytest.raises(SpecError, match="too small"):
        Limits(**wish)


def test_more_than_the_cap_on_memory_is_told_where_it_is_memory(able):
    limits = Limits(disk_bytes=4 * GIB, memory_bytes=GIB)
    assert "killed at mem_limit" in tell.in_memory(find(limits, privileged=False), limits)
    assert tell.in_memory(find(limits, privileged=True), limits) == ""


# -- room


@pytest.fixture
def disk(monkeypatch, tmp_path):
    """A disk of 100 GiB, of which 10 GiB are free, and a folder for images on it."""
    blocks = SimpleNamespace(f_blocks=100 << 18, f_bavail=10 << 18, f_frsize=4096)
    monkeypatch.setattr(images, "_formatted", lambda *_: ((0, b"a file system"),))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: blocks)
        folder = tmp_path / "storage"
        folder.mkdir(mode=0o700)
        tmp_path.chmod(0o700)
        yield folder


def image_of(size_bytes):
    return Storage(backend=DiskBackend.IMAGE, size_bytes=size_bytes)


A, B, C, D = (letter * 12 for letter in "abcd")


def test_images_are_made_as_long_as_all_of_them_could_become_full(disk):
    fds = [images.make_image(name, image_of(3 * GIB), disk) for name in (A, B, C)]
    with pytest.raises(HostError) as caught:
        images.make_image(D, image_of(3 * GIB), disk)
    told = " ".join(caught.value.for_people().split())
    for figure in ("3 GiB", "10 GiB free", "fill 9 GiB", "1 GiB is kept"):
        assert figure in told
    os.close(fds.pop())
    fds.append(images.make_image(D, image_of(3 * GIB), disk))  # whose room that was has ended
    assert sorted(os.listdir(disk)) == sorted([A, B, D, "lock"])
    for fd in fds:
        os.close(fd)


def test_room_that_one_layer_dir_has_is_none_for_another_on_the_same_disk(disk, tmp_path):
    fds = []
    for number in (1, 2, 1, 2):  # of the same folder more than once
        folder = tmp_path / f"layers-{number}/user/{len(fds)}/host"
        folder.mkdir(parents=True)
        there = {"layers": tmp_path / f"layers-{number}"}
        if len(fds) == 3:
            with pytest.raises(HostError, match="fill 9 GiB"):
                images.make_image(str(folder / "disk"), image_of(3 * GIB), disk, **there)
            break
        fds.append(images.make_image(str(folder / "disk"), image_of(3 * GIB), disk, **there))
    for fd in fds:
        os.close(fd)
    assert images.room_bytes(disk)[1] == pytest.approx(9 * GIB, rel=0.01)
    # What is not there now may be mounted again.
    shutil.rmtree(tmp_path / "layers-1")
    (tmp_path / "layers-3/user/0/host").mkdir(parents=True)
    path, there = tmp_path / "layers-3/user/0/host/disk", {"layers": tmp_path / "layers-3"}
    os.close(images.make_image(str(path), image_of(GIB), disk, **there))
    noted = (disk / "layer-dirs").read_bytes()
    assert noted == b"".join(b"%s\0" % os.fsencode(tmp_path / f"layers-{n}") for n in (1, 2, 3))


def test_an_image_stays_while_anybody_has_it_open_and_goes_with_the_next_sweep(disk):
    fd = images.make_image(A, image_of(GIB), disk)
    others = os.dup(fd)
    os.close(fd)
    images.sweep(disk)
    assert (disk / A).read_bytes()[:13] == b"a file system"
    os.close(others)
    images.sweep(disk)
    assert os.listdir(disk) == ["lock"]


def test_a_folder_that_others_can_write_to_is_refused(disk):
    disk.chmod(0o777)
    with pytest.raises(HostError, match="others than root"):
        images.make_image(A, image_of(GIB), disk)
    assert not (disk / A).exists()


def test_what_stands_there_already_is_nobodys_image(disk):
    (disk / A).symlink_to("/etc/passwd")
    with pytest.raises(HostError):
        images.make_image(A, image_of(GIB), disk)


def test_what_is_no_image_is_let_alone(disk):
    """A disk that is mounted there has lost+found; others may call a directory as a kernel is."""
    (disk / "lost+found").mkdir()
    (disk / "README").write_text("of the administrator's")
    (disk / A).mkdir()
    os.mkfifo(disk / B)
    fd = images.make_image(C, image_of(GIB), disk)
    assert images.room_bytes(disk)[1] > GIB - (1 << 20)
    os.close(fd)
    assert images.sweep(disk) == (C,)
    assert sorted(os.listdir(disk)) == sorted([A, B, "README", "lock", "lost+found"])


def test_the_room_is_promised_before_anybody_else_may_ask(disk, monkeypatch):
    promised = []
    monkeypatch.setattr(images, "_write", lambda *_: None)

    @contextlib.contextmanager
    def noted(directory):
        yield
        promised.append(images.room_bytes(directory)[1])

    monkeypatch.setattr(images, "locked", noted)
    os.close(images.make_image(A, image_of(GIB), disk))
    assert promised[-1] == GIB


def test_nobody_waits_while_an_image_is_formatted(disk, monkeypatch):
    def formatted(*_):
        assert images.sweep(disk) == ()
        assert is_free(disk / "lock")
        return ((0, b"a file system"),)

    monkeypatch.setattr(images, "_formatted", formatted)
    os.close(images.make_image(A, image_of(GIB), disk))
    assert (disk / A).exists()


def test_what_is_written_in_parts_is_written_whole(disk, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:5], offset))
    os.close(images.make_image(A, image_of(GIB), disk))
    assert (disk / A).read_bytes()[:14] == b"a file system\0"


def test_a_disk_that_becomes_full_is_told_and_leaves_no_image(disk, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(HostError, match="No space left"):
        images.make_image(A, image_of(GIB), disk)
    assert images.sweep(disk) == (A,)


def test_of_what_mkfs_writes_so_many_bytes_are_kept(monkeypatch):
    made = []

    def content(_, size, inodes, lasts):
        made.append(size)
        return ((0, bytes(size)),)

    monkeypatch.setattr(images, "_format", content)
    monkeypatch.setattr(images, "_kept", {})
    monkeypatch.setattr(images, "_MEMORY_BYTES", 10)
    for size in (4, 6, 4, 11, 6, 5, 6):
        assert images._formatted("mkfs", size, 0, False) == ((0, bytes(size)),)
    assert made == [4, 6, 11, 5, 6]


def test_who_ends_waits_for_its_image_and_a_lock_that_others_hold_leaves_no_folder(
    disk, runtime_dir, monkeypatch
):
    """Linux lets go of a mount and its loop device a moment after the last process."""
    fd = images.make_image(A, image_of(GIB), disk)
    swept = []

    def sweep():
        swept.append(images.is_held(A, disk))
        raise Locked(attempt="lock it", answer="another has it", remedy="Wait.")

    here = SimpleNamespace(is_held=lambda name: images.is_held(name, disk), sweep=sweep)
    monkeypatch.setattr(traces, "images", here)
    record = Record(sandbox_id=A, storage=DiskBackend.IMAGE)
    folder, record = RecordFolder.create(runtime_dir, record, ids=False)
    steps = traces.Traces(tree=None, kill=False, folder=folder, record=record).removing()
    assert 0 < next(steps) <= 1
    assert swept == []
    os.close(fd)
    assert [*steps] == []
    assert swept == [False]
    assert not folder.path.exists()


# -- loop devices


class Loops:
    """Devices, of which others take the first ones meanwhile."""

    def __init__(self, taken: int = 0, error: int = errno.EBUSY) -> None:
        self.taken, self.error, self.number = taken, error, 0

    def free_loop_device(self, control):
        if self.error == errno.ENOSPC:
            raise CallFailed("ioctl", errno.ENOSPC, request="LOOP_CTL_GET_FREE")
        self.number += 1
        return self.number

    def configure_loop_device(self, device, image, *, path):
        if self.number <= self.taken:
            raise CallFailed("ioctl", self.error, request="LOOP_CONFIGURE", device=path)


@pytest.fixture
def devices(monkeypatch):
    """Makes them the machine's."""
    monkeypatch.setattr(mounting.os, "open", lambda path, flags: 0)
    monkeypatch.setattr(mounting.os, "close", lambda fd: None)
    return lambda loops: [
        monkeypatch.setattr(mounting.kernel_calls, name, getattr(loops, name))
        for name in ("free_loop_device", "configure_loop_device")
    ]


def test_a_loop_device_that_somebody_else_takes_first_is_left_to_them(devices):
    devices(Loops(taken=3))
    assert mounting._loop_device(7)[1] == "/dev/loop4"


@pytest.mark.parametrize(
    ("loops", "text"),
    [
        (Loops(error=errno.ENOSPC), "all loop devices of this machine are in use"),
        (Loops(taken=1, error=errno.EPERM), "LOOP_CONFIGURE"),
        (Loops(taken=1000), "one after another"),
    ],
)
def test_what_keeps_an_image_from_its_device_is_told(devices, loops, text):
    devices(loops)
    with pytest.raises(OSError, match=text):
        mounting._loop_device(7)


def test_what_a_new_image_has_is_kept_in_memory_a_piece_at_a_time(tmp_path, monkeypatch):
    image, device = (os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in "ab")
    content = os.urandom(3 << 20) + b"end"
    os.pwrite(image, content, 1 << 20)
    sizes = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: (sizes.append(n), pread(fd, n, at))[1])
    mounting._keep_in_memory(image, device)
    assert max(sizes) <= 1 << 20
    assert os.pread(device, 8 << 20, 1 << 20) == content
    os.close(image)
    os.close(device)


def test_an_image_without_a_byte_is_one_that_cannot_be_mounted(tmp_path):
    """Who made it was killed before it had its size."""
    (tmp_path / NAME).touch()
    assert images.used_of(NAME, tmp_path) == (0, 0)
    image = images.open_image(NAME, tmp_path)
    assert image is not None
    try:
        assert images.inodes_of(image, GIB) == 0
        with pytest.raises(OSError, match="no file system in it"):
            mounting.mount_image(image, 1, lasts=True)
    finally:
        os.close(image)
