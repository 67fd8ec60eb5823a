"""When a folder in memory is told to be full: with file systems that a test makes up."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from sandbox_provisioner.facilities.root.inside import folders
from sandbox_provisioner.facilities.root.inside.folders import Folders
from sandbox_provisioner.inside.wire import DISK_FULL, FULL, SHM_FULL, TMP_FULL, WORKDIR_FULL

BLOCKS = 1 << 14  # 64 MiB
INODES = 1000


class Machine:
    """A clock, and how many blocks are free in each folder."""

    def __init__(self) -> None:
        self.now = 100.0
        self.free = {"/dev/shm": BLOCKS, "/tmp": BLOCKS}
        self.free_inodes = INODES

    def statvfs(self, path: str) -> SimpleNamespace:
        if path not in self.free:
            raise FileNotFoundError(path)
        free, inodes = self.free[path], self.free_inodes
        return SimpleNamespace(
            f_bavail=free, f_bfree=free, f_blocks=BLOCKS, f_frsize=4096,
            f_favail=inodes, f_ffree=inodes, f_files=INODES,
        )  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.setattr(os, "statvfs", made.statvfs)
    monkeypatch.setattr(folders.time, "monotonic", lambda: made.now)
    return made


def test_a_folder_is_told_of_once_when_it_is_full_and_again_when_it_had_room(machine):
    watched = Folders()
    assert not watched.look()
    for _ in range(2):
        machine.now += 10
        machine.free["/dev/shm"] = 0
        (told,) = watched.look()
        assert told.startswith("/dev/shm is full; it holds 64 MiB.")
        assert "shm_limit" in told
        assert all(len(line) <= 80 for line in told.split("\n"))
        machine.now += 10
        machine.free["/dev/shm"] = 1  # a page
        assert not watched.look()
        machine.now += 10
        machine.free["/dev/shm"] = BLOCKS
        assert not watched.look()


def test_it_looks_seldom_and_more_often_while_shared_memory_is_used(machine):
    watched = Folders()
    watched.look()
    assert watched.patience() == 5000
    machine.free["/tmp"] = 0
    machine.now += 1
    assert not watched.look()  # not yet
    machine.now += 4
    machine.free["/dev/shm"] -= 1
    (told,) = watched.look()
    assert told.startswith("/tmp is full")
    assert "tmp_limit" in told
    assert watched.patience() == 500


def test_the_word_for_an_end_names_what_is_full_or_was_a_moment_ago(machine):
    watched = Folders()
    assert watched.why(-signal.SIGBUS) == ""
    machine.free["/tmp"] = 0
    assert watched.why(-signal.SIGBUS) == f"{TMP_FULL} 67108864"
    machine.free = {"/dev/shm": 0, "/tmp": BLOCKS}
    watched.look()
    machine.free["/dev/shm"] = BLOCKS  # its last user has ended
    assert watched.why(-signal.SIGBUS) == f"{SHM_FULL} 67108864"
    assert watched.why(-signal.SIGKILL) == ""  # that comes from somebody else
    machine.now += 2
    assert watched.why(-signal.SIGBUS) == ""


def test_where_a_limit_of_the_disk_holds_that_one_is_named_with_what_is_used(machine):
    watched = Folders()
    watched.limited_by("disk_limit")
    machine.free["/tmp"], machine.free_inodes = 0, 400
    (told,) = watched.look()
    assert told.startswith("/tmp is full; it holds 64 MiB.\nIn 600 files")
    assert "raise disk_limit" in told
    assert watched.why(-signal.SIGBUS) == f"{DISK_FULL} 67108864"


def test_a_disk_is_full_when_no_more_is_left_than_its_file_system_keeps(machine):
    watched = Folders()
    watched.limited_by("disk_limit")
    machine.free["/tmp"] = BLOCKS // 64
    assert len(watched.look()) == 1
    assert watched.why(-signal.SIGBUS).startswith(DISK_FULL)


def test_what_has_room_for_no_more_files_is_told_of_once_with_their_number(machine):
    watched = Folders()
    machine.free_inodes = 0
    (told,) = watched.look()
    assert told.startswith("/tmp can hold no more files")
    assert "there are 1000" in told
    assert "raise inode_limit" in told
    machine.now += 10
    assert not watched.look()
    machine.free_inodes = INODES
    machine.now += 10
    assert not watched.look()
    machine.free_inodes = 0
    machine.now += 10
    assert len(watched.look()) == 1
    assert all(len(line) <= 80 for line in told.split("\n"))


def test_it_looks_more_often_while_somebody_writes(machine):
    watched = Folders()
    for free, patience in ((BLOCKS, 5000), (BLOCKS - 1, 500), (BLOCKS - 1, 5000)):
        machine.free["/tmp"] = free
        watched.look()
        assert watched.patience() == patience
        machine.now += 10


def test_a_work_directory_with_a_limit_is_told_of_by_its_whole_path(machine):
    watched, told, said = Folders(), [], []
    watched.also("/srv/my work", "workdir_limit")
    machine.free["/srv/my work"] = 0
    init = SimpleNamespace(tell=lambda *words: told.append(words), say=said.append)
    watched.serve(init, {})
    assert told == [(FULL, "workdir_limit", "/srv/my work")]
    assert said[0].startswith("/srv/my work is full; it holds 64 MiB.\nWhat needs")
    assert "raise workdir_limit" in said[0]
    assert watched.why(-signal.SIGBUS) == f"{WORKDIR_FULL} 67108864"


def test_a_work_directory_that_is_not_there_any_more_is_not_told_of(machine):
    watched = Folders()
    watched.also("/gone", "workdir_limit")
    machine.free["/tmp"] = 0
    assert [sentence[:4] for sentence in watched.look()] == ["/tmp"]
    assert watched.why(-signal.SIGBUS).startswith(TMP_FULL)


@pytest.mark.parametrize(
    ("device", "blocks", "is_volume"),
    [(2, 100, True), (1, 1000, True), (1, 100, False)],
    ids=["another disk", "the disk of a limited folder", "none"],
)
def test_a_volume_at_tmp_is_not_looked_at(monkeypatch, device, blocks, is_volume):
    devices, sizes = {"/tmp": device, "/run": 1}, {"/tmp": blocks, "/run": 100}
    monkeypatch.setattr(os, "stat", lambda path: SimpleNamespace(st_dev=devices[path]))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_blocks=sizes[path]))
    watched, seen = Folders().own(), []
    monkeypatch.setattr(os, "statvfs", lambda path: seen.append(path) or Machine().statvfs(path))
    watched.look()
    assert ("/tmp" in seen) is not is_volume
    assert "/dev/shm" in seen
