"""When a folder in memory is told to be full: with file systems that a test makes up."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from sandbox_provisioner.facilities.root.inside import folders
from sandbox_provisioner.facilities.root.inside.folders import Folders
from sandbox_provisioner.inside.wire import SHM_FULL, TMP_FULL

BLOCKS = 1 << 14  # 64 MiB


class Machine:
    """A clock, and how many blocks are free in each folder."""

    def __init__(self) -> None:
        self.now = 100.0
        self.free = {"/dev/shm": BLOCKS, "/tmp": BLOCKS}

    def statvfs(self, path: str) -> SimpleNamespace:
        free = self.free[path]
        return SimpleNamespace(f_bavail=free, f_bfree=free, f_blocks=BLOCKS, f_frsize=4096)


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.setattr(os, "statvfs", made.statvfs)
    monkeypatch.setattr(folders.time, "monotonic", lambda: made.now)
    return made


def test_a_folder_is_told_of_once_when_it_is_full_and_again_when_it_had_room(machine):
    watched = Folders()
    assert watched.look() == []
    for _ in range(2):
        machine.now += 10
        machine.free["/dev/shm"] = 0
        (told,) = watched.look()
        assert told.startswith("/dev/shm is full; it holds 64 MiB.")
        assert "shm_limit" in told
        assert all(len(line) <= 80 for line in told.split("\n"))
        machine.now += 10
        machine.free["/dev/shm"] = 1  # a page
        assert watched.look() == []
        machine.now += 10
        machine.free["/dev/shm"] = BLOCKS
        assert watched.look() == []


def test_it_looks_seldom_and_more_often_while_shared_memory_is_used(machine):
    watched = Folders()
    watched.look()
    assert watched.patience() == 5000
    machine.free["/tmp"] = 0
    machine.now += 1
    assert watched.look() == []  # not yet
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


@pytest.mark.parametrize("is_volume", [True, False])
def test_a_volume_at_tmp_is_not_looked_at(monkeypatch, is_volume):
    devices = {"/tmp": 1, "/run": 2 if is_volume else 1}
    monkeypatch.setattr(os, "stat", lambda path: SimpleNamespace(st_dev=devices[path]))
    seen = []
    monkeypatch.setattr(os, "statvfs", lambda path: seen.append(path) or Machine().statvfs(path))
    folders.own_folders().look()
    assert ("/tmp" in seen) is not is_volume
    assert "/dev/shm" in seen
