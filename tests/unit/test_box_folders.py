"""Folders of boxes with a project quota, on a file system whose projects a test makes up."""

from __future__ import annotations

import errno
import os
import threading
from types import SimpleNamespace

import pytest
from made_up_projects import CALLS, Projects

from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.facilities.storage import facts, folders, images, projects, tell
from sandbox_provisioner.facilities.storage.facts import Storage, find_storage
from sandbox_provisioner.facilities.storage.wish import DiskBackend
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.mounts import Mount
from sandbox_provisioner.spec import Layer, Limits, SandboxSpec

GIB = 1 << 30
A, B, C = (letter * 12 for letter in "abc")
LINUX = (6, 1)
WITH_QUOTAS = Mount(1, 0, "/", "xfs", limits_projects=True)


@pytest.fixture
def disk(monkeypatch, tmp_path):
    """A disk of 100 GiB, of which 10 GiB are free, and a folder for storage on it."""
    made = Projects()
    for name in CALLS:
        monkeypatch.setattr(kernel_calls, name, getattr(made, name))
    # A mount, by a descriptor of its own.
    monkeypatch.setattr(kernel_calls, "open_tree", lambda _, dir_fd: os.dup(dir_fd))
    monkeypatch.setattr(projects, "_OF_ADMINISTRATOR", ())
    blocks = SimpleNamespace(
        f_blocks=100 << 18, f_bavail=10 << 18, f_frsize=4096, f_files=100_000, f_favail=90_000
    )
    tmp_path.chmod(0o700)
    monkeypatch.setattr(folders.removal, "ALWAYS", 8)
    made.path = tmp_path / "storage"
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: blocks)
        yield made


def make(disk, name, size=GIB, inodes=1000):
    storage = Storage(backend=DiskBackend.PROJECT, size_bytes=size, inodes=inodes)
    return folders.make_folder(name, storage, os.geteuid(), disk.path)


def names(disk):
    return sorted(os.listdir(disk.path / "folders"))


def limited(disk):
    return {project for project, limit in disk.limits.items() if any(limit)}


# -- which back end it is


def on(monkeypatch, mount):
    monkeypatch.setattr(facts, "mounts_around", lambda fd, path: (mount, ()))
    monkeypatch.setattr(kernel_calls, "enforces_projects", lambda fd: True)


def test_where_no_image_can_be_made_a_project_quota_comes_before_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(facts, "formatter", lambda: "")
    on(monkeypatch, WITH_QUOTAS)
    blocks = SimpleNamespace(f_blocks=100 << 18, f_frsize=4096, f_files=100 << 20)
    monkeypatch.setattr(os, "statvfs", lambda path: blocks)
    wish = Limits(disk_bytes=GIB + 1)
    found = find_storage(wish, privileged=True, kernel=LINUX, storage=tmp_path)
    assert found.backend is DiskBackend.PROJECT
    assert found.size_bytes == GIB
    # All that it does not limit would be told, and counted, as the whole disk's.
    assert found.inodes == GIB // 8192
    told = tell.disk_words(found, wish)
    assert "(project)" in told
    assert "e2fsprogs" in told


@pytest.mark.parametrize(
    ("mount", "privileged", "kernel", "why"),
    [
        (WITH_QUOTAS, False, LINUX, "only the machine's root"),
        (Mount(1, 0, "/", "xfs"), True, LINUX, "mounted without prjquota"),
        (Mount(1, 0, "/", "btrfs"), True, LINUX, "btrfs, keeps no limit"),
        (WITH_QUOTAS, True, (5, 13), "5.14"),
    ],
)
def test_who_forces_it_where_it_cannot_be_had_is_told_why(
    monkeypatch, tmp_path, mount, privileged, kernel, why
):
    on(monkeypatch, mount)
    wish = Limits(disk_bytes=GIB, disk_backend=DiskBackend.PROJECT)
    with pytest.raises(HostError, match=why):
        find_storage(wish, privileged=privileged, kernel=kernel, storage=tmp_path)


def enforces_none(fd):
    return False


def may_not_ask(fd):
    raise OSError(errno.ENOSYS, "Function not implemented")


@pytest.mark.parametrize(
    ("answer", "why"), [(enforces_none, "switched off"), (may_not_ask, "not implemented")]
)
def test_auto_takes_no_project_quota_that_linux_would_not_hold(monkeypatch, tmp_path, answer, why):
    monkeypatch.setattr(facts, "formatter", lambda: "")
    on(monkeypatch, WITH_QUOTAS)
    monkeypatch.setattr(kernel_calls, "enforces_projects", answer)
    found = find_storage(Limits(disk_bytes=GIB), privileged=True, kernel=LINUX, storage=tmp_path)
    assert found.backend is DiskBackend.TMPFS
    assert why in found.lacks[DiskBackend.PROJECT]


def test_no_box_is_given_a_folder_whose_limit_was_switched_off_meanwhile(disk):
    disk.enforced = False
    with pytest.raises(HostError, match="switched off"):
        make(disk, A)


def test_a_quota_group_of_btrfs_is_refused_with_the_reason(tmp_path):
    wish = Limits(disk_bytes=GIB, disk_backend=DiskBackend.BTRFS)
    with pytest.raises(HostError, match="makes a subvolume") as caught:
        find_storage(wish, privileged=True, kernel=LINUX, storage=tmp_path)
    assert 'disk_backend = "auto"' in caught.value.for_people()


def test_what_is_to_outlive_a_box_is_not_limited_by_its_folder():
    with pytest.raises(SpecError, match="image alone"):
        SandboxSpec(
            workdir="/srv/work",
            layer=Layer.KERNEL,
            limits=Limits(disk_bytes=GIB, disk_backend=DiskBackend.PROJECT),
        )


# -- what is made, and what is left of it


def test_a_folder_has_a_project_of_its_own_with_both_limits(disk):
    made = [make(disk, name) for name in (A, B)]
    found = [disk.of(disk.path / "folders" / name / "box") for name in (A, B)]
    (first, inherits), (second, _) = found
    assert inherits
    assert first != second
    assert {first, second} <= {*projects.OF_BOXES}
    assert disk.limits[first] == (GIB, 1000)
    assert disk.path.joinpath("folders", A).stat().st_mode & 0o777 == 0o700
    for one in made:
        one.forget()


def test_no_work_directory_and_no_box_have_the_same_project():
    assert not {*projects.OF_BOXES} & {*projects.OF_WORKDIRS}


def test_folders_are_made_as_long_as_all_of_them_could_become_full(disk):
    disk.used_bytes = 0
    made = [make(disk, name, 4 * GIB) for name in (A, B)]
    assert images.room_bytes(disk.path)[1] == 8 * GIB
    with pytest.raises(HostError) as caught:
        make(disk, C, 4 * GIB)
    told = " ".join(caught.value.for_people().split())
    for figure in ("4 GiB", "10 GiB free", "fill 8 GiB", "1 GiB is kept"):
        assert figure in told
    made.pop().forget()
    made.append(make(disk, C, 4 * GIB))  # whose room that was has ended
    assert names(disk) == [A, C]
    for one in made:
        one.forget()


def test_folders_are_made_as_long_as_all_of_them_could_take_their_inodes(disk):
    made = [make(disk, A, inodes=60_001)]  # the made up quota counts one as used
    with pytest.raises(HostError) as caught:
        make(disk, B, inodes=25_001)
    told = " ".join(caught.value.for_people().split())
    for figure in ("25001 inodes", "90000 free", "take 60000", "5000 are kept", "inode_limit"):
        assert figure in told
    made.append(make(disk, B, inodes=25_000))
    for one in made:
        one.forget()


def test_what_has_no_limit_of_inodes_gets_no_more_than_the_share_of_its_size(disk, monkeypatch):
    on(monkeypatch, WITH_QUOTAS)
    wish = Limits(disk_bytes=10 * GIB, disk_backend=DiskBackend.PROJECT)
    found = find_storage(wish, privileged=True, kernel=LINUX, storage=disk.path)
    assert found.inodes == 10_000


def test_what_a_box_has_stays_and_goes_with_its_limit_when_it_has_ended(disk):
    made = make(disk, A)
    (disk.path / "folders" / A / "box" / "file").write_text("a kernel's")
    pid1 = os.dup(made.lock)
    made.forget()
    assert folders.sweep(disk.path) == ()
    assert folders.is_held(A, disk.path)
    os.close(pid1)
    assert folders.sweep(disk.path) == (A,)
    assert names(disk) == []
    assert limited(disk) == set()


@pytest.mark.parametrize("call", ["set_project", "limit_project", "open_tree"])
def test_a_start_that_fails_or_is_killed_half_way_leaves_nothing(disk, monkeypatch, call):
    def fail(*_words, **_more):
        raise OSError(errno.EIO, "no more")

    with monkeypatch.context() as patch:
        patch.setattr(kernel_calls, call, fail)
        with pytest.raises(HostError, match="no more"):
            make(disk, A)
    folders.sweep(disk.path)
    assert names(disk) == []
    assert limited(disk) == set()


def test_what_is_left_can_hold_nothing_more_and_its_limit_goes_last(disk, monkeypatch):
    make(disk, A).forget()
    for number in range(50):
        (disk.path / "folders" / A / "box" / str(number)).touch()
    (project,) = limited(disk)
    folders.end(A, -1.0, disk.path)
    assert disk.limits[project] == (4096, 1)
    (left,) = names(disk)
    # Killed with nothing left but what tells of the limit.
    with monkeypatch.context() as patch:
        patch.setattr(kernel_calls, "limit_project", lambda *words: words[2] or os.kill)
        folders.removal.empty(disk.path / "folders" / left, keep="lock")
    assert os.listdir(disk.path / "folders" / left) == ["lock"]
    assert limited(disk) == {project}
    folders.sweep(disk.path)
    assert names(disk) == []
    assert limited(disk) == set()


def leave(disk, name, files=50):
    """A kernel's files, of which its end removes a part."""
    make(disk, name).forget()
    for number in range(files):
        (disk.path / "folders" / name / "box" / str(number)).touch()
    folders.end(name, -1.0, disk.path)
    assert names(disk)


def wait_for_the_thread():
    for thread in threading.enumerate():
        if thread.name == "sandbox-left":
            thread.join(60)


def test_whatever_ended_kernels_left_is_removed_after_the_next_start(disk, monkeypatch):
    monkeypatch.setattr(folders, "AT_A_START_SECONDS", -1.0)
    monkeypatch.setattr(folders, "_TURN_SECONDS", 0.001)
    leave(disk, A)
    make(disk, B).forget()
    wait_for_the_thread()
    assert names(disk) == [B]
    assert len(limited(disk)) == 1


def test_no_room_while_something_is_left_is_waited_for_and_then_told_with_the_command(
    disk, monkeypatch
):
    leave(disk, A)
    blocks = os.statvfs(disk.path)
    (left,) = names(disk)
    monkeypatch.setattr(folders, "_ROOM_SECONDS", -1.0)
    monkeypatch.setattr(folders, "AT_A_START_SECONDS", -1.0)
    blocks.f_bavail = 0
    with pytest.raises(HostError, match="jupyter sandbox gc"):
        make(disk, B)
    assert names(disk) == [left]
    monkeypatch.setattr(folders, "_ROOM_SECONDS", 60.0)

    def emptied(aside, seconds):
        gone = finish(aside, seconds)
        blocks.f_bavail = 10 << 18 if gone else 0
        return gone

    finish = folders._finish
    monkeypatch.setattr(folders, "_finish", emptied)
    make(disk, B).forget()


def test_what_cannot_be_removed_refuses_no_start_and_is_told_with_its_path(disk, monkeypatch):
    leave(disk, A)
    (left,) = names(disk)
    (disk.path / "folders" / "of-others.trash").touch()
    make(disk, C).forget()
    empty = folders.removal.empty

    def fail(aside, *words, **more):
        if aside.name == left:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return empty(aside, *words, **more)

    wait_for_the_thread()
    leave(disk, A)
    (left,) = (name for name in names(disk) if name.startswith(A))
    monkeypatch.setattr(folders.removal, "empty", fail)
    make(disk, B).forget()
    wait_for_the_thread()
    with pytest.raises(OSError, match=left):
        folders.sweep(disk.path)
    assert names(disk) == sorted((left, "of-others.trash"))


def test_a_sweep_takes_the_lock_of_all_starts_for_no_box_that_lives(disk, monkeypatch):
    made = make(disk, A)
    monkeypatch.setattr(folders, "locked", lambda _: pytest.fail("locked"))
    assert folders.sweep(disk.path) == ()
    made.forget()


def test_where_quotas_were_switched_off_meanwhile_folders_go_as_well(disk, monkeypatch):
    def fail(*_):
        raise OSError(errno.ESRCH, "quotas are off")

    make(disk, A).forget()
    monkeypatch.setattr(kernel_calls, "limit_project", fail)
    assert folders.sweep(disk.path) == (A,)
    assert names(disk) == []


def test_a_kernel_that_is_restarted_begins_with_an_empty_folder(disk):
    make(disk, A).forget()
    (disk.path / "folders" / A / "box" / "file").write_text("the last box's")
    again = make(disk, A)
    assert os.listdir(disk.path / "folders" / A / "box") == []
    assert len(limited(disk)) == 1
    again.forget()


def test_a_restart_waits_for_the_end_of_the_last_box(disk, monkeypatch):
    last = make(disk, A)
    monkeypatch.setattr(folders.time, "sleep", lambda _: last.forget())
    again = make(disk, A)
    assert len(limited(disk)) == 1
    again.forget()


def test_what_is_no_folder_of_a_box_is_let_alone(disk):
    make(disk, A).forget()
    (disk.path / "folders" / "lost+found").mkdir()
    folders.sweep(disk.path)
    assert names(disk) == ["lost+found"]
