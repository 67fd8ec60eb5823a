"""How much a work directory may hold, by project quotas of XFS and ext4, whatever a kernel does."""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import signal
import subprocess
import time
import uuid

import disks
import pytest
from limited import (
    INODES,
    MIB,
    MOST,
    SIZE,
    files_when_stopped,
    held,
    opened,
    project_of,
)
from probes import answer_of, change_projects
from writing import WAYS, close_all, in_every_place, map_more_than_there_is, write_all

from sandbox_provisioner.app.quota import QuotaApp
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.storage import quotas
from sandbox_provisioner.facilities.storage.facts import WorkdirQuota
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.spec import Limits
from sandbox_provisioner.told import EndKind

pytestmark = pytest.mark.requires("userns", "root", "project-quotas")


@pytest.fixture(scope="module", params=disks.KINDS)
def disk(request):
    with disks.disk_with_quotas(request.param) as path:
        yield path


@pytest.fixture
def workdir(disk):
    """A directory of a person's."""
    folder = disk / uuid.uuid4().hex[:8]
    folder.mkdir()
    os.chown(folder, 4711, 4711)
    yield folder
    shutil.rmtree(folder)


def limits(size=SIZE, inodes=None):
    return Limits(workdir_bytes=size, workdir_inodes=inodes)


def hold(folder, size=SIZE):
    with opened(folder, os.O_PATH) as fd:
        quotas.hold(fd, WorkdirQuota(path=str(folder), filesystem="", size_bytes=size))


def empty(folder):
    for path in folder.iterdir():
        is_folder = not path.is_symlink() and path.is_dir()
        shutil.rmtree(path) if is_folder else path.unlink()
    wait_for_room(folder)


def wait_for_room(folder):
    """XFS gives back what was removed a moment later, by a thread of the Linux kernel's, and no
    event tells."""
    end = time.monotonic() + 10
    while held(folder).used_bytes > MIB // 2 and time.monotonic() < end:
        select.poll().poll(10)


def test_no_way_leads_past_the_limits_and_what_was_removed_is_room_again(sandbox, workdir):
    with sandbox(limits=limits(inodes=INODES)) as box:
        for way in WAYS:
            if way is in_every_place:
                continue
            assert files_when_stopped(box, way, str(workdir)) <= INODES, way
            found = held(workdir)
            assert found.used_bytes <= MOST, way
            assert found.used_inodes <= INODES, way
            box.call(close_all)
            empty(workdir)
        # The control: what stopped it was the limit.
        assert box.call(write_all, f"{workdir}/file") > SIZE * 0.9
    assert held(workdir).size_bytes == SIZE  # it stays


def test_no_kernel_changes_the_project_of_what_it_writes(sandbox, workdir):
    with sandbox(limits=limits()) as box:
        found = box.call(change_projects, str(workdir), using=(answer_of,))
        assert set(found) <= {"EPERM", "ENOSYS"}, found
        assert project_of(workdir / "own") == held(workdir).project


def test_linux_lets_nobody_in_another_user_namespace_change_a_project(workdir):
    """The second wall: also where no filter stands before it."""
    hold(workdir)
    fd = os.open(workdir, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        kernel_calls.unshare(kernel_calls.CLONE_NEWUSER)
        try:
            kernel_calls.set_project(fd, 0, inherit=False)
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    os.close(fd)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in {errno.EINVAL, errno.EPERM}
    assert held(workdir).is_own


def test_nothing_comes_in_by_a_name_that_is_not_counted(workdir, disk):
    hold(workdir)
    outside = disk / uuid.uuid4().hex
    outside.write_bytes(bytes(MIB))
    for bring in (os.rename, os.link):
        with pytest.raises(OSError, match="cross-device"):
            bring(outside, workdir / "file")
    unnamed = os.open(disk, os.O_RDWR | os.O_TMPFILE)
    with pytest.raises(OSError, match="cross-device"):
        os.link(f"/proc/self/fd/{unnamed}", workdir / "file", follow_symlinks=True)
    os.close(unnamed)
    outside.unlink()
    assert held(workdir).used_bytes < MIB


def test_what_was_there_is_counted_with_the_rest(sandbox, workdir, disk):
    outside = disk / uuid.uuid4().hex
    outside.write_bytes(b"")
    (workdir / "deep/er").mkdir(parents=True)
    for path in ("one", "deep/two", "deep/er/three"):
        (workdir / path).write_bytes(bytes(4 * MIB))
    (workdir / "link").symlink_to(outside)
    for path in (workdir, *workdir.rglob("*")):
        os.chown(path, 4711, 4711, follow_symlinks=False)
    with sandbox(limits=limits()) as box:
        assert 12 * MIB <= held(workdir).used_bytes <= 13 * MIB
        assert 2 * MIB < box.call(write_all, f"{workdir}/deep/er/more") <= 4 * MIB
    assert project_of(outside) == 0
    outside.unlink()


def test_less_than_what_is_there_lets_a_kernel_remove_and_not_write(sandbox, workdir):
    (workdir / "file").write_bytes(bytes(4 * MIB))
    for path in (workdir, workdir / "file"):
        os.chown(path, 4711, 4711)
    with sandbox(limits=limits(MIB)) as box:
        assert box.call(write_all, f"{workdir}/more") == 0
        box.call(os_unlink, f"{workdir}/file")
        wait_for_room(workdir)
        assert box.call(write_all, f"{workdir}/more") > MIB // 2


def os_unlink(path):
    import os

    os.unlink(path)


def test_a_mapping_that_finds_no_room_names_the_limit_of_the_work_directory(sandbox, workdir):
    with sandbox(limits=limits()) as box:
        box.send(map_more_than_there_is, str(workdir))
        story = box.wait()
        assert (story.kind, story.signal) == (EndKind.WORKDIR_FULL, signal.SIGBUS)
        assert "workdir_limit" in story.reason
        assert story.full_bytes == SIZE


def test_a_directory_in_one_with_a_limit_starts_only_with_that_or_more(sandbox, workdir):
    (workdir / "course").mkdir()
    os.chown(workdir / "course", 4711, 4711)
    hold(workdir)
    with sandbox(workdir=workdir / "course", limits=limits()) as box:
        assert box.call(write_all, f"{workdir}/course/file") <= SIZE
    less = limits(SIZE // 2)
    with (
        pytest.raises(HostError, match="lies in a directory with a limit"),
        sandbox(workdir=workdir / "course", limits=less),
    ):
        pass


def test_without_quotas_the_start_is_refused_with_what_doctor_tells(sandbox, new_folder):
    with pytest.raises(HostError) as caught, sandbox(workdir=new_folder(), limits=limits()):
        pass
    assert "doctor" in caught.value.for_people()


def test_a_command_shows_sets_and_clears_it(workdir, capsys):
    def told(*words):
        QuotaApp.launch_instance([str(workdir), "--json", *words])
        QuotaApp.clear_instance()
        return json.loads(capsys.readouterr().out)

    assert told()["project"] is None
    assert told("--limit", "16M", "--inodes", "600")["limit_bytes"] == SIZE
    assert told("--limit", "17M")["limit_inodes"] == 600
    assert held(workdir).size_bytes == 17 * MIB
    # As the tools of the file system's own tell it.
    shown = subprocess.run(
        ["repquota", "-P", "-v", str(workdir.parent)], capture_output=True, text=True, check=False
    )
    assert str(17 << 10) in shown.stdout or not shutil.which("repquota")
    assert told("--clear")["project"] is None
    assert project_of(workdir) == 0
