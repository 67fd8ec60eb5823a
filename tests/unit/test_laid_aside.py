"""What a kernel has laid aside, made by hand: what is looked at and kept of it, and how."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from sandbox_provisioner import locks
from sandbox_provisioner.app.review import as_text, in_json
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.layers import changes, kept, review
from sandbox_provisioner.layers.changes import Change, Walk, What
from sandbox_provisioner.layers.folders import About, ReviewFolder
from sandbox_provisioner.layers.guard import Guard
from sandbox_provisioner.layers.keep import Keeping, Outcome
from sandbox_provisioner.layers.kept import KeptFolder
from sandbox_provisioner.spec import Covers

# Files that root makes for somebody else are made with no more than that user's rights.
OWNER = (65534, 65534) if os.geteuid() == 0 else (os.geteuid(), os.getegid())


class Sides:
    """What a kernel has written, and the real directory."""

    def __init__(self, place: Path) -> None:
        self.upper, self.real = place / "upper", place / "real"
        for path in (self.upper, self.real):
            path.mkdir(mode=0o755)
            os.chown(path, *OWNER)
        self.fds = [os.open(path, os.O_RDONLY) for path in (self.upper, self.real)]

    def changes(self) -> list[Change]:
        """Between the two."""
        return list(Walk(*self.fds, 0, Guard((), Covers())).changes())

    def keep(self) -> Outcome:
        """All of it."""
        return Keeping(*self.fds, OWNER, "word", 0).keep(self.changes(), lambda _: True)


@pytest.fixture
def sides(tmp_path: Path):
    sides = Sides(tmp_path)
    yield sides
    for fd in sides.fds:
        os.close(fd)


def test_a_directory_that_nobody_may_write_to_is_kept_with_what_is_in_it(sides: Sides):
    (sides.upper / "read/only").mkdir(parents=True)
    (sides.upper / "read/only/file").write_text("text")
    (sides.upper / "was").mkdir()
    (sides.upper / "was/new").write_text("text")
    (sides.real / "was").mkdir()
    os.chown(sides.real / "was", *OWNER)
    for name in ("read/only", "read", "was"):
        (sides.upper / name).chmod(0o555)
    assert sides.keep().left == []
    assert (sides.real / "read/only/file").read_text() == "text"
    assert (sides.real / "was/new").read_text() == "text"
    for name in ("read/only", "read", "was"):
        assert stat.S_IMODE((sides.real / name).stat().st_mode) == 0o555
        (sides.real / name).chmod(0o755)


def test_what_goes_and_what_nobody_may_look_at_stop_no_look(sides: Sides, monkeypatch):
    for name in ("gone", "secret", "there"):
        (sides.upper / name).write_text("text")
    answers = {"gone": errno.ENOENT, "secret": errno.EACCES}
    real = changes._look

    def look(directory: int, name: str) -> os.stat_result:
        if name in answers:
            raise OSError(answers[name], os.strerror(answers[name]))
        return real(directory, name)

    monkeypatch.setattr(changes, "_look", look)
    assert [(one.path, one.refusal) for one in sides.changes()] == [
        ("secret", "what is in it is not looked at: Permission denied"),
        ("there", ""),
    ]


def test_a_file_system_without_attributes_takes_the_file(sides: Sides, monkeypatch):
    (sides.upper / "file").write_text("text")
    os.setxattr(sides.upper / "file", "user.mine", b"value")

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "setxattr", unsupported)
    assert sides.keep().left == []
    assert (sides.real / "file").read_text() == "text"


def test_a_layer_is_counted_up_to_a_bound_and_through_no_link(tmp_path: Path, monkeypatch):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").touch()
    (tmp_path / "layer/box/folder").mkdir(parents=True)
    (tmp_path / "layer/box/folder/in").touch()
    (tmp_path / "layer/box/link").symlink_to(tmp_path / "outside")
    folder = KeptFolder(tmp_path / "layer")
    assert folder.size()[1] == 3
    for number in range(10):
        (tmp_path / "layer/box" / str(number)).touch()
    monkeypatch.setattr(kept, "_MOST_COUNTED", 4)
    assert folder.size()[1] == 4


def test_a_layer_is_found_again_where_its_device_has_another_number():
    one, other = kept.layer_name("/srv/root", (1, 7)), kept.layer_name("/srv/root", (2, 7))
    assert one == other != kept.layer_name("/srv/root", (1, 8))


@pytest.fixture
def laid_aside(tmp_path: Path) -> ReviewFolder:
    """The folder of a kernel that was started for somebody else, and has changed nothing."""
    folder, work = ReviewFolder(tmp_path / "folder"), tmp_path / "work"
    (folder.path / "box/upper").mkdir(parents=True)
    work.mkdir()
    found = work.stat()
    about = About(
        sandbox_id="0" * 12, workdir=str(work), device=found.st_dev, inode=found.st_ino,
        uid=os.geteuid() + 1, covers={},
    )  # fmt: skip
    (folder.path / "about.json").write_text(json.dumps(asdict(about)))
    (folder.path / "lock").touch()
    return folder


def test_who_only_looks_keeps_nobody_from_taking_a_folder(laid_aside: ReviewFolder, monkeypatch):
    path = laid_aside.path / "lock"
    if laid_aside.lock_fd >= 0:
        laid_aside.forget()
    for folder in (laid_aside, KeptFolder(laid_aside.path)):
        looks = [locks.lock(path, fcntl.LOCK_SH)]
        monkeypatch.setattr(locks.time, "sleep", lambda _, looks=looks: locks.unlock(looks.pop()))
        assert locks.is_free(path)
        assert folder.take()
        assert not locks.is_free(path)
        assert not type(folder)(laid_aside.path).take()
        folder.forget()


def test_whose_directory_does_not_answer_keeps_what_was_laid_aside(laid_aside: ReviewFolder):
    def nobody_answers(*_: object) -> bool:
        raise HostError(attempt="look", answer="it takes more than 2 s", remedy="Look there.")

    review.settle(str(laid_aside.path), nobody_answers)
    assert laid_aside.upper.exists()
    review.settle(str(laid_aside.path), lambda look, *what: look(*what))
    assert not laid_aside.path.exists()


def test_nobody_looks_into_another_users_directory_with_rights_of_our_own(
    laid_aside: ReviewFolder, monkeypatch
):
    def seen(*_: object) -> int:
        raise AssertionError("it was looked at")

    monkeypatch.setattr(review, "open_again", seen)
    (laid_aside.upper / "new").touch()
    review.settle(str(laid_aside.path))
    assert laid_aside.upper.exists()
    (laid_aside.upper / "new").unlink()
    review.settle(str(laid_aside.path))
    assert not laid_aside.path.exists()


def test_nothing_leads_out_where_no_call_promises_it(tmp_path: Path, monkeypatch):
    """As in the box of a hub's server, whose filter has no openat2(2)."""

    def missing(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSYS, "no such call")

    monkeypatch.setattr(changes.kernel, "openat2", missing)
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/link").symlink_to(tmp_path)
    (tmp_path / "out").touch()
    directory = os.open(tmp_path / "in", os.O_RDONLY)
    for path in ("", "deep"):
        found = changes.open_below(directory, path, os.O_RDONLY | os.O_DIRECTORY)
        assert os.path.samestat(os.fstat(found), (tmp_path / "in" / path).stat())
        os.close(found)
    for path in ("../out", "deep/../../out", "link", "link/out", "deep/.."):
        with pytest.raises(OSError, match=r"cross-device|symbolic links|Not a directory"):
            changes.open_below(directory, path, os.O_RDONLY)
    os.close(directory)
    proc = os.open("/", os.O_RDONLY)
    with pytest.raises(OSError, match="cross-device"):
        changes.open_below(proc, "proc/self", os.O_PATH)  # another mount
    os.close(proc)


def test_what_is_noted_down_of_changes_is_all_of_them(sides):
    (sides.real / "was").write_text("was")
    (sides.upper / "was").write_text("is\n")
    (sides.upper / os.fsdecode(b"no \xff text")).symlink_to("somewhere")
    (sides.upper / "folder").mkdir()
    found = sides.changes()
    with changes.set_down(found) as again:
        for _ in "twice":
            noted = list(again())
    assert noted == found
    assert [one.new.st_mtime_ns for one in noted] == [one.new.st_mtime_ns for one in found]


def counted_again(all_of_them):
    with changes.set_down(all_of_them) as again:
        assert sum(1 for _ in again()) == 20_000


FOLDER = SimpleNamespace(is_running=True, told="/upper")
ABOUT = About(sandbox_id="0123456789ab", covers={})
WAYS = {
    "text": lambda all_of_them: as_text(FOLDER, ABOUT, all_of_them),
    "json": lambda all_of_them: sum(map(len, in_json(FOLDER, ABOUT, all_of_them))),
    "keep": counted_again,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_great_many_long_names_take_no_memory_of_whoever_looks(monkeypatch, way):
    monkeypatch.setattr(changes, "_MOST_IN_MEMORY_BYTES", 1 << 20)
    status = os.stat("/")
    paths = (f"{number}{'x' * 1000}" for number in range(20_000))
    many = (Change(path=path, what=What.ADDED, kind="file", new=status) for path in paths)
    tracemalloc.start()
    try:
        WAYS[way](many)
        used = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # All of them are 25 MB and more.
    assert used < 8 << 20


def test_paths_that_come_to_too_much_are_told(tmp_path, monkeypatch):
    for name in ("upper", "real"):
        (tmp_path / name).mkdir()
    for number in range(20):
        (tmp_path / "upper" / f"{number:02d}{'x' * 100}").mkdir()
    monkeypatch.setattr(changes, "MOST_PATH_BYTES", 1 << 10)
    upper, real = (os.open(tmp_path / name, os.O_RDONLY) for name in ("upper", "real"))
    try:
        with pytest.raises(HostError, match="whose paths come to more than"):
            list(changes.Walk(upper, real, 0, Guard((), Covers())).changes())
    finally:
        os.close(upper)
        os.close(real)
