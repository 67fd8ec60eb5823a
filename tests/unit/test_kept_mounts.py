"""What a start has of images that stay mounted, when the machine is short of something."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.root.facts import kept

_LONG_SECONDS = 3600.0


class _Files:
    """Images as they are opened for starts, and mounts of them that are none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.mounts_left = 1000

    def open(self, name: str) -> Any:
        fd = os.open(self._folder / name, os.O_CREAT | os.O_RDONLY)
        status = os.fstat(fd)
        return SimpleNamespace(fd=fd, device=status.st_dev, inode=status.st_ino)

    def mount_of(self, *_: object) -> int:
        if not self.mounts_left:
            raise HostError(attempt="mount it", answer="too many open files", remedy="None.")
        self.mounts_left -= 1
        return os.open("/", os.O_PATH)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Files:
    found = _Files(tmp_path)
    monkeypatch.setattr(kept, "mount_of", found.mount_of)
    return found


@pytest.fixture
def images() -> Iterator[Any]:
    found = kept._KeptImages()
    yield found
    found.drop_all()


def _start(images: Any, place: Any) -> None:
    os.close(images.mount(place, None, "start", _LONG_SECONDS))
    os.close(place.fd)


def _open_count() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_start_has_its_mount_where_nothing_is_left_for_one_that_is_kept(
    files: _Files, images: Any
) -> None:
    before = _open_count()
    for _ in range(3):
        files.mounts_left = 1
        _start(images, files.open("image"))
    assert _open_count() == before
    files.mounts_left = 2
    _start(images, files.open("image"))
    assert _open_count() == before + 2


def test_a_start_waits_for_no_file_server_of_another_image(
    files: _Files, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, other, third = map(files.open, ("dead", "other", "third"))
    before, answers, asked, real = dead.inode, threading.Event(), threading.Event(), os.fstat

    def fstat(fd: int) -> os.stat_result:
        status = real(fd)
        if status.st_ino == before and threading.current_thread() is not threading.main_thread():
            asked.set()
            answers.wait()
        return status

    monkeypatch.setattr(kept.os, "fstat", fstat)
    try:
        _start(images, dead)
        assert asked.wait(60)  # who looks whether it is still the same
        for place in (other, third):
            start = threading.Thread(target=_start, args=(images, place), daemon=True)
            start.start()
            start.join(20)
            assert not start.is_alive()
    finally:
        answers.set()


def test_of_an_image_that_was_changed_its_own_start_gets_a_new_mount(
    files: _Files, images: Any, tmp_path: Path
) -> None:
    _start(images, files.open("image"))
    files.mounts_left = 2
    _start(images, files.open("image"))
    assert files.mounts_left == 1
    files.mounts_left = 2
    (tmp_path / "image").write_text("changed")
    _start(images, files.open("image"))
    assert files.mounts_left == 0
