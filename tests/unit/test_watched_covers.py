"""What PID 1 expects at each place of a work directory (`watch.py`), without a mount."""

from __future__ import annotations

import errno
import os
import select
from pathlib import Path

import pytest

from sandbox_provisioner.facilities.workdir.inside import watch as room
from sandbox_provisioner.facilities.workdir.inside.covers import DIRECTORY, FILE, Covers
from sandbox_provisioner.facilities.workdir.inside.watch import CoverLost, Watch
from sandbox_provisioner.inside.kernel_calls import CallFailed


@pytest.fixture
def covers(tmp_path):
    root = os.open("/", os.O_PATH)
    made: list[tuple[str, str]] = []
    covers = Covers(root, str(tmp_path), os.getuid(), os.getgid(), lambda *what: made.append(what))
    yield covers
    os.close(covers.events)
    os.close(root)


def test_a_place_that_could_not_be_covered_again_is_still_bare_when_its_entry_has_gone(
    covers: Covers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rmdir(2) outside takes a mount away first; none can be made there then, and the entry goes
    some moments later."""

    def hide(found: int) -> tuple[int, int]:
        os.close(found)
        return 1, 2

    def refuse(found: int) -> tuple[int, int]:
        os.close(found)
        raise CallFailed("move_mount", errno.ENOENT)

    (tmp_path / ".cache").mkdir()
    monkeypatch.setattr(covers, "_hide", hide)
    covers.cover(DIRECTORY, ".cache")
    monkeypatch.setattr(covers, "_hide", refuse)
    with pytest.raises(CallFailed):
        covers.cover(DIRECTORY, ".cache")
    (tmp_path / ".cache").rmdir()
    assert covers.bare() == [".cache"]


def test_a_kernel_that_makes_many_files_does_not_wake_who_watches_for_each(
    covers: Covers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 10.0
    monkeypatch.setattr(room.time, "monotonic", lambda: now)
    covers.kinds[".bashrc"], covers._expected[".bashrc"] = FILE, None
    watch = Watch(covers, begun=-1)
    try:
        (tmp_path / "one").touch()
        assert not watch.heard()
        assert (watch.mask, watch.patience()) == (select.POLLIN, None)
        now += 0.0005
        (tmp_path / "two").touch()
        assert not watch.heard()
        assert watch.mask == 0
        assert watch.patience() in {1, 2}
        now += 0.002
        assert (watch.mask, watch.patience()) == (select.POLLIN, None)
        (tmp_path / "three").touch()
        (tmp_path / ".bashrc").touch()
        assert watch.heard()
        assert watch.mask == select.POLLIN
    finally:
        os.close(watch.mounts)


@pytest.mark.parametrize("runs", [True, False], ids=["runs", "does not run yet"])
def test_a_kernel_may_have_used_what_was_bare_before_anybody_watched_if_it_ran_then(
    covers: Covers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, runs: bool
) -> None:
    monkeypatch.setattr(room.kernel, "signal_all", lambda _: None)
    monkeypatch.setattr(room, "_await_stopped", lambda: None)
    monkeypatch.setattr(covers, "held", lambda _: [])
    monkeypatch.setattr(covers, "mend", lambda paths: [covers.kinds.pop(path) for path in paths])
    covers.kinds[".bashrc"] = FILE
    covers._expected[".bashrc"] = 1, 2
    (tmp_path / ".bashrc").touch()
    begun, running = os.pipe()
    if runs:
        os.write(running, b"!")
    watch = Watch(covers, begun)
    try:
        assert watch.began_late
        if runs:
            with pytest.raises(CoverLost, match="bashrc"):
                watch.mended()
        else:
            assert watch.mended() == [".bashrc"]
    finally:
        for fd in (begun, running, watch.mounts):
            os.close(fd)


def test_who_cannot_be_stopped_ends_the_sandbox_and_the_file_is_named(
    covers: Covers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.kernel, "signal_all", lambda _: None)
    monkeypatch.setattr(room, "_has_stopped", lambda process: False)
    monkeypatch.setattr(room, "_STOPPED_SECONDS", 0)
    covers.kinds[".bashrc"], covers._expected[".bashrc"] = FILE, (1, 2)
    (tmp_path / ".bashrc").touch()
    watch = Watch(covers, begun=-1)
    try:
        with pytest.raises(CoverLost, match=r"^\.bashrc$"):
            watch.mended()
    finally:
        os.close(watch.mounts)
