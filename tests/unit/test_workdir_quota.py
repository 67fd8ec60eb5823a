"""The limit of a work directory, on a file system whose projects a test makes up."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from made_up_projects import CALLS, Projects

from sandbox_provisioner import ledger
from sandbox_provisioner.app.quota import QuotaApp
from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.facilities.storage import facts, projects, quotas, tell
from sandbox_provisioner.facilities.storage.facts import WorkdirQuota
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.mounts import Mount, _mount
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.places import Place
from sandbox_provisioner.spec import Limits, SandboxSpec, WorkdirMode

GIB = 1 << 30
OURS = projects.OF_WORKDIRS[0]


@dataclass
class Files(Projects):
    """And what they have of attributes."""

    marks: dict[int, bytes] = field(default_factory=dict)

    def getxattr(self, file, name):
        if os.stat(file).st_ino not in self.marks:
            raise OSError(errno.ENODATA, "none")
        return self.marks[os.stat(file).st_ino]

    def setxattr(self, fd, name, value):
        self.marks[os.fstat(fd).st_ino] = value

    def removexattr(self, fd, name):
        if not self.marks.pop(os.fstat(fd).st_ino, b""):
            raise OSError(errno.ENODATA, "none")


@pytest.fixture
def files(monkeypatch, tmp_path):
    made = Files()
    for name in CALLS:
        monkeypatch.setattr(kernel_calls, name, getattr(made, name))
    for name in ("getxattr", "setxattr", "removexattr"):
        monkeypatch.setattr(os, name, getattr(made, name))
    (tmp_path / "state").mkdir()
    monkeypatch.setattr(quotas, "make_directory", lambda: tmp_path / "state")
    monkeypatch.setattr(projects, "_OF_ADMINISTRATOR", (str(tmp_path / "projid"),))
    return made


@pytest.fixture
def top(tmp_path):
    folder = tmp_path / "top"
    (folder / "deep/er").mkdir(parents=True)
    (folder / "deep/er/file").write_text("1")
    (folder / "file").write_text("2")
    return folder


def hold(path, size=GIB, inodes=None, **more):
    fd = os.open(path, os.O_PATH)
    try:
        quota = WorkdirQuota(path=str(path), filesystem="xfs", size_bytes=size, inodes=inodes)
        quotas.hold(fd, quota, **more)
    finally:
        os.close(fd)


def quota_of(*words):
    """What the command does."""
    command = QuotaApp()
    command.initialize(list(words))
    command.start()


def look(path):
    fd = os.open(path, os.O_PATH)
    try:
        return quotas.look(fd, str(path))
    finally:
        os.close(fd)


def release(path):
    fd = os.open(path, os.O_PATH)
    try:
        quotas.release(fd, str(path))
    finally:
        os.close(fd)


def test_a_limit_that_linux_would_not_hold_is_refused(files, top):
    files.enforced = False
    with pytest.raises(HostError, match="switched off") as caught:
        hold(top)
    assert "quotaon -P" in caught.value.for_people()
    assert files.of(top) == (0, False)


def test_all_that_is_in_it_is_counted_and_what_is_made_will_be(files, top):
    hold(top, inodes=1000)
    project, inherits = files.of(top)
    assert project in projects.OF_WORKDIRS
    assert inherits
    for path in (top / "deep", top / "deep/er"):
        assert files.of(path) == (project, True)
    for path in (top / "file", top / "deep/er/file"):
        assert files.of(path) == (project, False)
    assert files.limits == {project: (GIB, 1000)}
    held = look(top)
    assert (held.size_bytes, held.inodes, held.is_own) == (GIB, 1000, True)


def test_it_is_counted_once_and_the_last_start_says_how_much(files, top):
    hold(top, inodes=1000)
    hold(top, 2 * GIB, seconds=-1)  # in no time
    assert [*files.limits.values()] == [(2 * GIB, 1000)]


def test_what_was_interrupted_is_counted_by_the_next_start(files, top):
    with pytest.raises(HostError, match="more files than can be counted") as caught:
        hold(top, seconds=-1)
    assert "jupyter sandbox quota" in caught.value.for_people()
    assert [*files.limits.values()] == [(GIB, 0)]  # it holds for what is new
    assert files.of(top / "deep/er/file") == (0, False)
    hold(top)
    assert files.of(top / "deep/er/file")[0] == files.of(top)[0]
    assert len(files.limits) == 1


def test_of_two_first_starts_at_once_both_have_one_project(files, top, monkeypatch):
    """The second one comes where the first one has found none, and has no lock yet."""
    locked = quotas.locked

    def after_another(directory):
        monkeypatch.setattr(quotas, "locked", locked)
        hold(top)
        return locked(directory)

    monkeypatch.setattr(quotas, "locked", after_another)
    hold(top, inodes=1000)
    assert files.limits == {files.of(top)[0]: (GIB, 1000)}
    assert look(top).is_own


@pytest.mark.parametrize("fails", [False, True])
def test_who_counts_takes_no_thread_from_others_and_one_counts_a_directory(top, monkeypatch, fails):
    counting, goes_on = [], threading.Event()

    def hold(fd, quota, *, since):
        counting.append(os.fstat(fd).st_ino)
        assert goes_on.wait(60)
        if fails:
            raise quotas.cannot("/srv", "it is so", "Nothing.")

    async def start():
        fd = os.open(top, os.O_PATH)
        place = SimpleNamespace(fd=fd, device=1, inode=2)
        quota = WorkdirQuota(path=str(top), filesystem="xfs", size_bytes=GIB, inodes=None)
        site = SimpleNamespace(workdir=SimpleNamespace(place=place, quota=quota))
        starts = [asyncio.ensure_future(ledger.limit_workdir(site)) for _ in range(8)]
        while not counting:
            await asyncio.sleep(0)
        await off_loop(os.getpid)  # somebody else's
        assert counting == [top.stat().st_ino]
        goes_on.set()
        told = await asyncio.gather(*starts, return_exceptions=True)
        os.close(fd)
        return told

    monkeypatch.setattr(quotas, "hold", hold)
    told = asyncio.run(start())
    assert len(counting) == 8
    assert [isinstance(one, HostError) for one in told] == [fails] * 8


def test_nothing_is_followed_out_of_it(files, top, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("")
    (top / "link").symlink_to(outside)
    (top / "deep/link").symlink_to(outside / "file")
    os.mkfifo(top / "pipe")
    hold(top)
    assert files.of(outside) == files.of(outside / "file") == (0, False)
    assert files.of(top / "pipe") == (0, False)


def test_what_becomes_a_link_after_it_was_listed_is_not_followed(files, top, tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.mkdir()
    opened = kernel_calls.openat2

    def swapped(directory, path, flags, resolve):
        if path == "deep" and not (tmp_path / "away").exists():
            (top / "deep").rename(tmp_path / "away")
            (top / "deep").symlink_to(outside)
        return opened(directory, path, flags, resolve)

    monkeypatch.setattr(kernel_calls, "openat2", swapped)
    hold(top)
    assert files.of(outside) == (0, False)
    assert files.of(top / "file")[0] in projects.OF_WORKDIRS


def test_a_project_that_somebody_has_is_not_taken(files, top, tmp_path):
    first = projects.OF_WORKDIRS[os.stat(top).st_ino % len(projects.OF_WORKDIRS)]
    files.limits[first] = (1, 1)
    files.projects[-1] = first + 1, False
    (tmp_path / "projid").write_text(f"course:{first + 2}\n{first + 3}:/srv\n")
    hold(top)
    assert files.of(top)[0] == first + 4


@pytest.mark.parametrize("name", [".", "deep/er/file", "deep/er"])
def test_what_the_administrator_counts_otherwise_is_left_and_refused(files, top, name):
    files.projects[os.stat(top / name).st_ino] = 42, True
    with pytest.raises(HostError, match="project 42"):
        hold(top)
    assert files.of(top / name) == (42, True)


def test_a_directory_in_one_with_a_limit_has_that_one(files, top):
    hold(top, GIB)
    hold(top / "deep", GIB)
    hold(top / "deep", 2 * GIB)
    assert [*files.limits.values()] == [(GIB, 0)]
    with pytest.raises(HostError, match="lies in a directory with a limit"):
        hold(top / "deep", GIB // 2)
    with pytest.raises(HostError, match="workdir_inode_limit is none"):
        hold(top / "deep", GIB, inodes=1000)
    assert not look(top / "deep").is_own
    with pytest.raises(HostError, match="Name that directory"):
        release(top / "deep")


def test_a_directory_around_one_with_a_limit_takes_it_over(files, top):
    hold(top / "deep", GIB // 2)
    hold(top, GIB)
    project, _ = files.of(top)
    assert files.of(top / "deep") == (project, True)
    assert files.of(top / "deep/er/file") == (project, False)
    assert not look(top / "deep").is_own


def test_hard_links_of_the_owners_are_counted_and_of_others_only_where_none_is_outside(
    files, top, tmp_path, monkeypatch
):
    os.link(top / "file", tmp_path / "own")
    os.link(top / "deep/er/file", top / "deep/again")
    theirs = os.stat(top / "deep/er/file").st_ino
    fstat = os.fstat

    class Theirs:
        def __init__(self, status):
            self.status = status

        def __getattr__(self, name):
            return 4711 if name == "st_uid" else getattr(self.status, name)

    def told(fd):
        status = fstat(fd)
        return Theirs(status) if status.st_ino == theirs else status

    monkeypatch.setattr(os, "fstat", told)
    hold(top)
    assert files.of(top / "file") == files.of(top / "deep/again")
    release(top)
    os.link(top / "deep/again", tmp_path / "outside")
    with pytest.raises(HostError, match=r"deep/.* belongs to somebody else"):
        hold(top)
    assert files.of(tmp_path / "outside") == (0, False)


def test_a_copy_with_all_attributes_is_not_taken_for_the_original(files, top, tmp_path):
    hold(top)
    for copy in (tmp_path / "copy", top / "copy"):
        copy.mkdir()
        files.marks[os.stat(copy).st_ino] = files.marks[os.stat(top).st_ino]
    files.projects[os.stat(top / "copy").st_ino] = files.of(top)
    hold(tmp_path / "copy")
    assert files.of(tmp_path / "copy")[0] not in {0, files.of(top)[0]}
    hold(top / "copy", 2 * GIB)
    assert look(top).size_bytes == GIB


def test_a_limit_that_is_cleared_leaves_nothing(files, top):
    hold(top)
    release(top)
    assert {*files.projects.values()} == {(0, False)}
    assert {*files.limits.values()} == {(0, 0)}
    assert files.marks == {}
    assert look(top) is None
    release(top)


def test_what_cannot_be_named_is_refused(files, top):
    folder = os.open(top, os.O_RDONLY)
    for _ in range(17):
        os.mkdir("d" * 250, dir_fd=folder)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    with pytest.raises(HostError, match="than a path can name"):
        hold(top)


# -- who may have one, and what doctor tells


def place(filesystem="xfs", path="/srv", limits_projects=True):
    mount = Mount(1, 0, path, filesystem, device="/dev/sdb1", limits_projects=limits_projects)
    changed = Place.nowhere()
    values = {name: getattr(changed, name) for name in changed.__slots__}
    return Place(**{**values, "path": "/srv/alice", "source": "/srv/alice", "mount": mount})


def find(where, *, privileged=True, kernel=(6, 1), **wish):
    limits = Limits(**(wish or {"workdir_bytes": GIB}))
    return facts.find_workdir_quota(limits, where, kernel, privileged=privileged)


def test_root_can_limit_what_lies_on_a_file_system_with_project_quotas():
    for filesystem in ("xfs", "ext4"):
        found = find(place(filesystem), workdir_bytes=GIB, workdir_inodes=1000)
        assert (found.size_bytes, found.inodes, found.path) == (GIB, 1000, "/srv/alice")
    assert find(place(), disk_bytes=GIB) is None
    assert find(Place.nowhere()) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"privileged": False}, 'launcher = "broker"'),
        ({"where": place("btrfs")}, "btrfs, keeps no limit"),
        ({"where": place(limits_projects=False)}, "xfs at /srv is mounted without prjquota"),
        ({"kernel": (5, 13)}, "Linux 5.14"),
    ],
)
def test_who_cannot_limit_it_is_refused_with_what_helps(changes, told):
    with pytest.raises(HostError, match=told):
        find(**{"where": place(), **changes})


def test_what_is_laid_aside_is_refused_a_limit_of_the_work_directory():
    with pytest.raises(SpecError, match='workdir_mode to "direct"'):
        SandboxSpec(
            workdir="/srv", workdir_mode=WorkdirMode.REVIEW, limits=Limits(workdir_bytes=GIB)
        )


@pytest.mark.parametrize("wish", [{"workdir_bytes": 1 << 19}, {"workdir_inodes": 127}])
def test_what_no_kernel_could_work_in_is_refused(wish):
    with pytest.raises(SpecError, match="too small"):
        Limits(**wish)


@pytest.mark.parametrize(
    ("options", "limits"),
    [("rw,prjquota", True), ("rw,attr2,pquota", True), ("rw,pqnoenforce", False), ("rw", False)],
)
def test_whether_a_file_system_limits_projects_is_read_of_its_mount(options, limits):
    found = _mount(b"32 31 8:2 / /srv rw - xfs /dev/b\\040c %s" % options.encode())
    assert (found.limits_projects, found.device) == (limits, "/dev/b c")


@pytest.mark.parametrize(
    ("mount", "commands"),
    [
        (("ext4", "/srv"), ("umount /srv", "tune2fs -O project,quota -Q prjquota /dev/sdb1")),
        (("xfs", "/my disk"), ("umount '/my disk'", "mount -o prjquota /dev/sdb1 '/my disk'")),
        (("xfs", "/"), ("rootflags=prjquota",)),
        (("ext4", "/"), ("rootflags=prjquota", "tune2fs -O project,quota -Q prjquota /dev/sdb1")),
        (("btrfs", "/srv"), ("btrfs quota enable /srv",)),
    ],
)
def test_an_administrator_reads_the_commands_for_the_very_file_system(mount, commands):
    filesystem, path = mount
    found = place(filesystem, path, limits_projects=False).mount
    steps = "\n".join(tell._remedy(found))
    for command in commands:
        assert command in steps


@pytest.mark.requires("root")
def test_no_link_of_a_directorys_owner_says_what_is_limited(files, tmp_path, monkeypatch, capsys):
    """Root types a user's path, and that user's link leads to another one's directory."""
    theirs, other = tmp_path / "theirs", tmp_path / "other"
    for path in (theirs, other):
        path.mkdir()
        os.chown(path, 4711, 4711)
    (theirs / "work").symlink_to(other)
    monkeypatch.chdir(theirs)
    for path in (str(theirs / "work"), "work", "work/../work"):
        with pytest.raises(SpecError, match="is a symbolic link to"):
            quota_of(path, "--limit", "1G")
    assert files.limits == {}
    for path in (str(other), "../other"):
        quota_of(path)
        assert capsys.readouterr().out == f"{other} has no limit of ours.\n"
