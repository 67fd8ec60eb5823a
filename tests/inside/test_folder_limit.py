"""How much a kernel can write to a folder with a project quota, on XFS and ext4."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time

import disks
import pytest
import roots
from boxes import request_for
from limited import INODES, MIB, MOST, SIZE, files_when_stopped, opened, sweep_folders
from probes import answer_of, change_projects
from writing import WAYS, in_attributes, map_more_than_there_is, write_all

from sandbox_provisioner.app.leftovers import remove_left_folders
from sandbox_provisioner.app.running import look
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.ids.facts import FOREIGN_ID
from sandbox_provisioner.facilities.storage import facts, folders, projects
from sandbox_provisioner.facilities.storage.facts import STORAGE, Storage
from sandbox_provisioner.facilities.storage.wish import DiskBackend
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.spec import KernelUser, Limits
from sandbox_provisioner.told import EndKind

pytestmark = pytest.mark.requires("userns", "root", "project-quotas")

COUNTED_SECONDS = 60
FOLDERS = STORAGE / projects.FOLDERS


@pytest.fixture(scope="module", params=disks.KINDS)
def disk(request):
    """It is where root's storage is, meanwhile."""
    STORAGE.mkdir(parents=True, exist_ok=True, mode=0o700)
    with disks.disk_with_quotas(request.param) as path:
        path.chmod(0o700)
        subprocess.run(["mount", "--bind", str(path), str(STORAGE)], check=True)
        try:
            yield path
        finally:
            subprocess.run(["umount", str(STORAGE)], check=True)


@pytest.fixture(autouse=True)
def nothing_is_left(disk):
    yield
    sweep_folders()
    assert not FOLDERS.exists() or os.listdir(FOLDERS) == []
    # XFS takes an inode from its count a moment after it has gone, and tells nobody.
    until = time.monotonic() + COUNTED_SECONDS
    while projects_of(disk) and time.monotonic() < until:
        time.sleep(0.01)
    assert projects_of(disk) == []


def projects_of(disk):
    """Those of boxes that have a limit or a file there."""
    found, number = [], projects.OF_BOXES[0] - 1
    with opened(disk) as fd:
        while (number := kernel_calls.next_project(fd, number + 1)) in projects.OF_BOXES:
            if any(kernel_calls.project_quota(fd, number)):
                found.append(number)
    return found


def limits(size=SIZE, **more):
    return Limits(disk_bytes=size, disk_backend=DiskBackend.PROJECT, **more)


def held(box):
    """What the folder of *box* may have of bytes and inodes, and what it has."""
    top = projects.opened_box(FOLDERS / box.handle.record.sandbox_id)
    try:
        return kernel_calls.project_quota(top, kernel_calls.project_of(top)[0])
    finally:
        os.close(top)


def test_no_way_leads_past_the_limits(sandbox, disk):
    for way in WAYS:
        inodes = None if way is in_attributes else INODES  # these would be met first
        with sandbox(limits=limits(inodes=inodes)) as box:
            files = files_when_stopped(box, way, "/tmp")
            size, most, has, has_files = held(box)
            assert (size, most) == (SIZE, inodes or SIZE // 8192)
            assert has <= MOST, way
            assert max(files, has_files) <= most, way
            # The control: it is most of the limit that has been met.
            assert has > SIZE * 0.8 or has_files > most * 0.9, way


def test_no_kernel_changes_the_project_of_what_it_writes(sandbox, disk):
    with sandbox(limits=limits()) as box:
        found = box.call(change_projects, "/tmp", using=(answer_of,))
        assert set(found) <= {"EPERM", "ENOSYS"}, found


@pytest.mark.parametrize("inside", [0, 1000])
def test_linux_refuses_that_to_the_owner_who_is_in_another_user_namespace(disk, inside):
    """The second wall: also where no filter stands before it, and for root inside."""
    storage = Storage(backend=DiskBackend.PROJECT, size_bytes=SIZE, inodes=INODES)
    folder = folders.make_folder("f" * 12, storage, FOREIGN_ID)
    top = projects.opened_box(FOLDERS / ("f" * 12))
    project, _ = kernel_calls.project_of(top)
    assert as_owner(top, project, inside) == errno.EINVAL
    assert kernel_calls.project_of(top) == (project, True)
    # The control: outside of any, its owner may.
    assert as_owner(top, project, None) == 0
    kernel_calls.set_project(top, project, inherit=True)
    os.close(top)
    folder.forget()


def as_owner(top, project, inside):
    """What Linux answers to the owner of *top*, who gives it to no project; with the id *inside* in
    a user namespace, unless that is None."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    try:
        os.setresgid(FOREIGN_ID, FOREIGN_ID, FOREIGN_ID)
        os.setresuid(FOREIGN_ID, FOREIGN_ID, FOREIGN_ID)
        if inside is not None:
            # Else its files of /proc are root's, since it has changed its ids: proc(5).
            kernel_calls.set_dumpable(dumpable=True)
            kernel_calls.unshare(kernel_calls.CLONE_NEWUSER)
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{inside} {FOREIGN_ID} 1"),
                ("gid_map", f"{inside} {FOREIGN_ID} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        kernel_calls.set_project(top, 0, inherit=False)
    except OSError as error:
        os._exit(error.errno)
    os._exit(0)


def bring_in(place):
    import os

    open(f"{place}/file", "w").close()
    found = [
        answer_of(lambda: os.rename(f"{place}/file", "/tmp/file")),
        answer_of(lambda: os.link(f"{place}/file", "/tmp/file")),
    ]
    open("/tmp/mine", "w").close()
    return [*found, answer_of(lambda: os.rename("/tmp/mine", f"{place}/mine"))]


def test_nothing_comes_in_or_goes_out_by_a_name(sandbox, disk, request):
    """Though the work directory is on the same disk."""
    workdir = disk / "work"
    workdir.mkdir()
    os.chown(workdir, 4711, 4711)
    with sandbox(workdir=str(workdir), limits=limits()) as box:
        assert box.call(bring_in, str(workdir), using=(answer_of,)) == ["EXDEV"] * 3
    subprocess.run(["rm", "-r", str(workdir)], check=True)


def of_tmp():
    import os

    found = os.statvfs("/tmp")
    same = [os.stat(path).st_dev for path in ("/tmp", "/run", "/var/tmp", os.path.expanduser("~"))]
    return found.f_blocks * found.f_frsize, found.f_files, len(set(same))


def test_a_box_sees_its_limit_as_the_size_of_its_disk_and_lists_tell_what_it_has(
    sandbox, disk, runtime_dir
):
    with sandbox(limits=limits(inodes=INODES)) as box:
        assert box.call(of_tmp) == [SIZE, INODES, 1]
        box.call(write_all, "/tmp/file")
        (found,) = (one.disk for one in look(runtime_dir) if one.record.storage == "project")
        assert 0.9 * SIZE < found.used_bytes <= MOST
        assert found.size_bytes == SIZE
        folder = FOLDERS / box.handle.record.sandbox_id
        assert folder.stat().st_mode & 0o777 == 0o700
        # On the disk it is of nobody's ids: no person's own quota pays.
        owners = {path.lstat().st_uid for path in (folder / "box").rglob("*")}
        assert owners <= {*range(FOREIGN_ID, FOREIGN_ID + 65536)}
        # It is this box's as long as it lives, whoever looks.
        assert remove_left_folders() == ()
        assert folder.exists()
    assert not folder.exists()


def test_what_is_written_over_another_root_counts_with_the_rest(sandbox, disk):
    root = {"rootfs": str(roots.directory()), "kernel_user": KernelUser.ROOT}
    with sandbox(limits=limits(), **root) as box:
        first = box.call(write_all, "/usr/file")
        assert SIZE // 2 < first <= SIZE
        assert box.call(write_all, "/tmp/other") < MIB


def test_a_kernel_that_is_restarted_has_an_empty_folder_again(sandbox, disk):
    with sandbox(limits=limits(), sandbox_id="f" * 12) as box:
        assert box.call(write_all, "/tmp/file") > SIZE // 2
    with sandbox(limits=limits(), sandbox_id="f" * 12) as box:
        assert box.call(write_all, "/tmp/file") > SIZE // 2


def test_a_mapping_that_finds_no_room_names_the_limit_of_the_disk(sandbox, disk):
    with sandbox(limits=limits()) as box:
        box.send(map_more_than_there_is, "/tmp")
        story = box.wait()
        assert (story.kind, story.signal) == (EndKind.DISK_FULL, signal.SIGBUS)
        assert "disk_limit" in story.reason
        assert 0.9 * SIZE < story.full_bytes <= SIZE


def test_more_than_the_disk_has_is_refused_with_the_figures(sandbox, disk):
    with sandbox(limits=limits(size=256 * MIB)):
        with pytest.raises(HostError) as caught, sandbox(limits=limits(size=256 * MIB)):
            pass
    told = " ".join(caught.value.for_people().split())
    assert "256 MiB" in told
    assert "other kernels may fill" in told


def test_without_loop_devices_it_is_what_auto_takes(sandbox, disk, launcher, workdir, monkeypatch):
    monkeypatch.setattr(facts, "_is_device", lambda path: False)
    asked = Limits(disk_bytes=SIZE)
    plan = launcher.explain(request_for(workdir, ["/bin/true"], limits=asked))
    assert "by a project quota" in plan.describe()
    with sandbox(limits=asked) as box:
        assert box.handle.record.storage == "project"
        assert SIZE / 2 < box.call(write_all, "/tmp/file") <= SIZE


def test_where_limits_were_switched_off_there_are_no_folders(disk):
    linux, (off, on) = (6, 1), (0x800003, 0x800002)  # linux/quota.h: Q_QUOTAOFF, Q_QUOTAON
    assert facts.project_obstacle(STORAGE, linux, privileged=True) == ""
    with opened(disk) as fd:
        kernel_calls._quotactl(off, "Q_QUOTAOFF", fd, 0, b"")
        try:
            assert "switched off" in facts.not_enforced(fd)
            assert facts.project_obstacle(STORAGE, linux, privileged=True)
        finally:
            kernel_calls._quotactl(on, "Q_QUOTAON", fd, 0, b"")
        assert facts.not_enforced(fd) == ""


def make_many(place):
    import os

    made = 0
    try:
        while True:
            os.makedirs(f"{place}/{made}/deeper")
            made += 1
    except OSError:
        return made


def test_what_a_full_folder_has_left_goes_with_its_limit_though_it_may_hold_no_more(
    sandbox, disk, monkeypatch
):
    """Directories in directories, which are moved up for that."""
    monkeypatch.setattr(folders, "remove_on", lambda directory=STORAGE: None)
    monkeypatch.setattr(folders, "end", lambda *_: False)
    with sandbox(limits=limits(inodes=1 << 14)) as box:
        assert box.call(make_many, "/tmp") > 1000
        folder = FOLDERS / box.handle.record.sandbox_id
    monkeypatch.undo()
    assert folder.exists()
    folders.end(folder.name, -1.0)
    (left,) = os.listdir(FOLDERS)
    with opened(disk) as fd:
        (number,) = projects_of(disk)
        assert kernel_calls.project_quota(fd, number)[:2] == (4096, 1)
    folders.sweep()
    assert not (FOLDERS / left).exists()
