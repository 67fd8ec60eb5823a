"""A work directory whose changes somebody looks at: what they are, and what becomes of them."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from boxes import Boxes, close_nurseries

from sandbox_provisioner.app.review import as_text, keep
from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.layers import changes as walking
from sandbox_provisioner.layers import folders, review
from sandbox_provisioner.layers import keep as keeping
from sandbox_provisioner.layers.changes import Change
from sandbox_provisioner.layers.folders import About, ReviewFolder, collect, folders_of
from sandbox_provisioner.layers.keep import Outcome
from sandbox_provisioner.layers.review import reviewed
from sandbox_provisioner.spec import WorkdirMode

pytestmark = pytest.mark.requires("userns")

REVIEW = WorkdirMode.REVIEW
SECRET = "of somebody else"
LONG_AGO = time.time() - 30 * 86400


@pytest.fixture
def layers(new_folder: Callable[[], Path]) -> Path:
    return new_folder()


@pytest.fixture
def reviewing(runtime_dir: Path, layers: Path, workdir: Path) -> Iterator[Boxes]:
    yield Boxes(LocalLauncher(runtime_dir=str(runtime_dir), layer_dir=str(layers)), workdir)
    close_nurseries()


@pytest.fixture
def outside(new_folder: Callable[[], Path]) -> Path:
    """What no change may reach."""
    folder = new_folder()
    (folder / "secret").write_text(SECRET)
    return folder


def after(reviewing: Boxes, function, *arguments, using=(), **options):
    """What *function* has left behind that ran inside."""
    with reviewing(workdir_mode=REVIEW, **options) as box:
        box.call(function, *arguments, using=using)
    return the_folder(reviewing)


def the_folder(reviewing: Boxes) -> tuple[ReviewFolder, About]:
    [found] = folders_of(Path(reviewing.launcher.layer_dir))
    return found


def changes(found: tuple[ReviewFolder, About]) -> list[Change]:
    with reviewed(*found) as review:
        return list(review.walk.changes())


def told(found: tuple[ReviewFolder, About]) -> list[tuple[str, str]]:
    return [(change.what.value, change.path) for change in changes(found)]


def kept(found: tuple[ReviewFolder, About], *paths: str, overwrite: bool = False) -> Outcome:
    folder, about = found
    assert folder.take()
    try:
        return keep(folder, about, paths, overwrite=overwrite)
    finally:
        folder.forget()


def why_not(outcome: Outcome) -> dict[str, str]:
    return {change.path: why for change, why in outcome.left}


def fill(workdir: Path) -> None:
    for name in ("same", "changed", "gone", "moved", "mode", "linked", "becomes-folder"):
        (workdir / name).write_text(name)
    for name in ("tree/a/b", "gone-tree/a", "replaced/old"):
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / name).write_text(name)
    (workdir / "link").symlink_to("same")


def work():
    import os
    import shutil

    open("changed", "a").write("!")
    os.unlink("gone")
    os.rename("moved", "moved-away")
    os.chmod("mode", 0o750)
    os.link("linked", "linked-too")
    open("linked", "a").write("!")
    shutil.move("tree", "tree-moved")  # a rename of the directory is refused: EXDEV
    shutil.rmtree("gone-tree")
    shutil.rmtree("replaced")
    os.mkdir("replaced")
    open("replaced/new", "w").write("new")
    os.unlink("link")
    os.symlink("changed", "link")
    os.unlink("becomes-folder")
    os.makedirs("becomes-folder/in")
    with open("sparse", "wb") as file:
        file.truncate(1 << 30)
        file.seek(1 << 29)
        file.write(b"data")
    os.setxattr("changed", "user.mine", b"value")
    os.utime("sparse", ns=(10**18, 10**18))


def snapshot(workdir: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(workdir.rglob("*")):
        status, name = path.lstat(), str(path.relative_to(workdir))
        if stat.S_ISLNK(status.st_mode):
            found[name] = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            text = path.read_text() if status.st_size < 1 << 20 else status.st_size
            found[name] = (text, stat.S_IMODE(status.st_mode))
        else:
            found[name] = stat.S_IMODE(status.st_mode)
    return found


def test_what_a_kernel_changes_is_laid_aside_until_it_is_kept(reviewing, workdir, layers):
    fill(workdir)
    before = snapshot(workdir)
    found = after(reviewing, work)
    assert snapshot(workdir) == before
    assert set(told(found)) == {
        ("changed", "changed"), ("removed", "gone"), ("removed", "moved"), ("added", "moved-away"),
        ("mode", "mode"), ("changed", "linked"), ("added", "linked-too"),
        ("removed", "tree"), ("added", "tree-moved"), ("added", "tree-moved/a"),
        ("added", "tree-moved/a/b"), ("removed", "gone-tree"), ("removed", "replaced/old"),
        ("added", "replaced/new"), ("changed", "link"), ("removed", "becomes-folder"),
        ("added", "becomes-folder"), ("added", "becomes-folder/in"), ("added", "sparse"),
    }  # fmt: skip
    assert kept(found).left == []
    now = snapshot(workdir)
    assert now["same"] == before["same"]
    assert now["changed"] == ("changed!", before["changed"][1])
    assert now["moved-away"] == before["moved"]
    assert now["mode"] == ("mode", 0o750)
    assert now["link"] == "changed"
    assert now["tree-moved/a/b"] == before["tree/a/b"]
    assert sorted(now) == [
        "becomes-folder", "becomes-folder/in", "changed", "link", "linked", "linked-too", "mode",
        "moved-away", "replaced", "replaced/new", "same", "sparse", "tree-moved", "tree-moved/a",
        "tree-moved/a/b",
    ]  # fmt: skip
    assert (workdir / "linked").samefile(workdir / "linked-too")
    sparse = (workdir / "sparse").stat()
    assert (sparse.st_size, sparse.st_mtime) == (1 << 30, 10**9)
    assert sparse.st_blocks < 1 << 12
    assert os.listxattr(workdir / "changed") == ["user.mine"]
    assert {path.lstat().st_uid for path in workdir.rglob("*")} == {workdir.stat().st_uid}
    assert list(folders_of(layers)) == []


def test_what_is_thrown_away_or_was_never_changed_leaves_nothing(reviewing, workdir, layers):
    fill(workdir)
    before = snapshot(workdir)
    with reviewing(workdir_mode=REVIEW) as box:
        box.call(touch_nothing)
    assert list(folders_of(layers)) == []
    folder, _ = after(reviewing, work)
    folder.remove()
    assert snapshot(workdir) == before
    assert list((layers / "review").iterdir()) == []


def touch_nothing():
    import os

    open("changed", "r+").close()  # copied up, and the same
    os.chmod("mode", os.stat("mode").st_mode)


def write_one(name, text):
    open(name, "w").write(text)


def test_some_of_it_can_be_kept_and_the_rest_waits(reviewing, workdir):
    found = after(reviewing, write_some)
    assert kept(found, "a/b").left == []
    assert sorted(snapshot(workdir)) == ["a", "a/b", "a/b/c"]
    assert told(found) == [("added", "d")]


def write_some():
    import os

    os.makedirs("a/b/c")
    open("d", "w").close()


def test_what_somebody_else_changes_meanwhile_is_told_and_left_alone(reviewing, workdir):
    fill(workdir)
    with reviewing(workdir_mode=REVIEW) as box:
        box.call(work)
        (workdir / "changed").write_text("by hand")
        (workdir / "gone-tree/a").write_text("by hand")
        (workdir / "sparse").write_text("made meanwhile")
    found = the_folder(reviewing)
    assert {c.path for c in changes(found) if c.conflict} == {"changed", "gone-tree", "sparse"}
    assert why_not(kept(found)).keys() == {"changed", "gone-tree", "sparse"}
    assert (workdir / "changed").read_text() == "by hand"
    assert (workdir / "gone-tree/a").read_text() == "by hand"
    assert (workdir / "moved-away").exists()
    assert kept(found, overwrite=True).left == []
    assert (workdir / "changed").read_text() == "changed!"
    assert not (workdir / "gone-tree").exists()


def test_what_changes_between_the_look_and_the_keeping_is_put_back(reviewing, workdir, monkeypatch):
    """Somebody saves the file at the very last moment, when it is being swapped."""
    fill(workdir)
    found = after(reviewing, rewrite)
    real = keeping._swap

    def saved_meanwhile(folder: int, one: str, other: str) -> bool:
        monkeypatch.setattr(keeping, "_swap", real)
        (workdir / "changed").write_text("by hand")
        return real(folder, one, other)

    monkeypatch.setattr(keeping, "_swap", saved_meanwhile)
    assert why_not(kept(found)) == {"changed": "somebody else has changed it"}
    assert (workdir / "changed").read_text() == "by hand"
    assert not [name for name in os.listdir(workdir) if name.startswith(".sandbox-keep")]


def rewrite():
    open("changed", "w").write("by the kernel")


def test_a_keep_that_was_stopped_in_the_middle_is_run_again(reviewing, workdir, monkeypatch):
    fill(workdir)
    found = after(reviewing, work)
    wanted = {path for _, path in told(found)}
    stops, real, done = range(1, 40), keeping.Keeping._throw_away, 0
    for stop in stops:
        count = 0

        def throw_away(self, folder, name, stop=stop):
            nonlocal count
            count += 1
            if count > stop % 4:
                raise KeyboardInterrupt
            real(self, folder, name)

        monkeypatch.setattr(keeping.Keeping, "_throw_away", throw_away)
        try:
            outcome = kept(found)
        except KeyboardInterrupt:
            done += 1
            continue
        break
    assert done
    assert {path for path in why_not(outcome)} <= {"becomes-folder"} & wanted
    monkeypatch.undo()
    assert not list(folders_of(found[0].path.parents[1])) or kept(found, overwrite=True).left == []
    now = snapshot(workdir)
    assert now["changed"][0] == "changed!"
    assert now["becomes-folder/in"]
    assert not [name for name in now if ".sandbox-keep" in name]


def test_a_restart_goes_on_with_what_was_written(reviewing, workdir):
    (workdir / "old").write_text("1")
    name = "0123456789ab"
    with reviewing(workdir_mode=REVIEW, sandbox_id=name) as box:
        box.call(write_one, "old", "2")
        folder, _ = the_folder(reviewing)
        assert folder.is_running
        assert not folder.take()
    assert not folder.is_running
    with reviewing(workdir_mode=REVIEW, sandbox_id=name) as box:
        assert box.call(read_one, "old") == "2"
        box.call(write_one, "new", "3")
    assert told(the_folder(reviewing)) == [("added", "new"), ("changed", "old")]
    assert (workdir / "old").read_text() == "1"


def read_one(name):
    return open(name).read()


def test_changes_of_a_kernel_go_when_nobody_decides(reviewing, layers):
    folder, _ = after(reviewing, write_one, "new", "1")
    assert collect(layers, 1.0) == []
    os.utime(folder.path / "lock", (LONG_AGO, LONG_AGO))
    assert collect(layers, 1.0) == [folder.path.name]
    assert list((layers / "review").iterdir()) == []


@pytest.mark.parametrize(
    "when", [0, time.time() + 10 * 86400], ids=["before 1971", "in the future"]
)
def test_a_clock_that_was_wrong_removes_nothing_and_keeps_nothing_for_ever(reviewing, layers, when):
    """A machine without a battery begins in 1970, until a server has told it the time."""
    folder, _ = after(reviewing, write_one, "new", "1")
    os.utime(folder.path / "lock", (when, when))
    assert collect(layers, 14) == []
    assert abs(folder.ended - time.time()) < 3600
    os.utime(folder.path / "lock", (LONG_AGO, LONG_AGO))
    assert collect(layers, 14) == [folder.path.name]


@pytest.mark.parametrize("ahead_ns", [-(10**12), 10**12])
def test_on_a_file_server_the_servers_clock_tells_what_somebody_has_changed_since(
    reviewing, workdir, monkeypatch, ahead_ns
):
    """Ours is some minutes from it. (Here the same file system plays the server.)"""
    fill(workdir)
    now = folders.time.clock_gettime_ns
    monkeypatch.setattr(folders.time, "clock_gettime_ns", lambda clock: now(clock) + ahead_ns)
    fd = os.open(workdir, os.O_PATH)
    kind = folders.mounts_around(fd, str(workdir))[0].filesystem
    os.close(fd)
    monkeypatch.setattr(folders, "_CLOCKS_OF_OTHERS", {kind})
    with reviewing(workdir_mode=REVIEW) as box:
        box.call(write_one, "changed", "the kernel's")
        box.call(write_one, "same", "the kernel's")
        assert not [name for name in os.listdir(workdir) if name.startswith(".sandbox")]
        (workdir / "same").write_text("somebody's")
    assert why_not(kept(the_folder(reviewing))) == {"same": "somebody else has changed it"}
    assert (workdir / "changed").read_text() == "the kernel's"


@pytest.mark.requires("root", "mksquashfs", "squashfuse")
def test_of_a_file_system_that_a_program_serves_nothing_is_kept_that_nobody_can_tell_of(
    reviewing, workdir, new_folder
):
    """It answers for all times, and this one lets nobody make a file to ask for them."""
    image, source = new_folder() / "image", new_folder()
    (source / "was").write_text("was")
    owner = ["-force-uid", "1234", "-force-gid", "1234"]
    quiet = ["-quiet", "-no-progress"]
    subprocess.run(["mksquashfs", source, image, *quiet, *owner], check=True, capture_output=True)
    subprocess.run(["squashfuse", "-o", "allow_other", image, workdir], check=True)
    try:
        found = after(reviewing, write_one, "was", "the kernel's")
        unknown = "whether somebody else has changed it cannot be told"
        assert why_not(kept(found)) == {"was": unknown}
        assert (workdir / "was").read_text() == "was"
        found[0].remove()
    finally:
        subprocess.run(["umount", workdir], check=True)


def test_the_days_of_a_kernel_whose_end_nobody_saw_begin_when_it_is_found(reviewing, layers):
    with reviewing(workdir_mode=REVIEW) as box:
        box.call(write_one, "new", "1")
        folder, _ = the_folder(reviewing)
        assert folder.has_begun
    assert not folder.has_begun
    folder.begin()  # as where its server and the machine went down
    os.utime(folder.path / "lock", (LONG_AGO, LONG_AGO))
    assert collect(layers, 1.0) == []
    assert collect(layers, 1.0) == []
    os.utime(folder.path / "lock", (LONG_AGO, LONG_AGO))
    assert collect(layers, 1.0) == [folder.path.name]


def test_what_is_kept_is_forgotten_and_later_edits_of_it_stay(reviewing, workdir):
    fill(workdir)
    with reviewing(workdir_mode=REVIEW) as box:
        box.call(work)
        (workdir / "sparse").write_text("made meanwhile")
    found = the_folder(reviewing)
    assert why_not(kept(found)).keys() == {"sparse"}
    edited = ["changed", "moved-away", "tree-moved/a/b", "mode", "linked"]
    for name in edited:
        (workdir / name).write_text("by hand")
    (workdir / "gone").write_text("by hand")
    assert told(found) == [("changed", "sparse")]
    assert kept(found, overwrite=True).left == []
    assert {(workdir / name).read_text() for name in (*edited, "gone")} == {"by hand"}


def test_what_is_kept_of_a_replaced_directory_stays(reviewing, workdir):
    fill(workdir)
    found = after(reviewing, replace_and_more)
    assert kept(found, "replaced").left == []
    assert told(found) == [("added", "more")]
    assert kept(found).left == []
    assert sorted(os.listdir(workdir / "replaced")) == ["folder", "new"]
    assert os.listdir(workdir / "replaced/folder") == ["deep"]


def replace_and_more():
    import os
    import shutil

    shutil.rmtree("replaced")
    os.makedirs("replaced/folder")
    for name in ("replaced/new", "replaced/folder/deep", "more"):
        open(name, "w").write("new")


def test_only_what_is_needed_for_a_path_is_kept_with_it(reviewing, workdir):
    fill(workdir)
    (workdir / "closed").mkdir(mode=0o755)
    found = after(reviewing, close_and_replace)
    assert kept(found, "closed/x", "becomes-folder/in").left == []
    assert stat.S_IMODE((workdir / "closed").stat().st_mode) == 0o755
    assert (workdir / "closed/x").exists()
    assert (workdir / "becomes-folder/in").is_dir()
    assert told(found) == [("mode", "closed"), ("removed", "gone-tree")]
    for path in ("gone-tree/a", "nowhere"):
        with pytest.raises(SpecError, match="the kernel has changed nothing there"):
            kept(found, path)
    assert (workdir / "gone-tree/a").exists()


def close_and_replace():
    import os
    import shutil

    open("closed/x", "w").close()
    os.chmod("closed", 0o700)
    shutil.rmtree("gone-tree")
    os.unlink("becomes-folder")
    os.makedirs("becomes-folder/in")


def test_a_removed_directory_is_looked_at_once_more_before_it_goes(reviewing, workdir, monkeypatch):
    fill(workdir)
    found = after(reviewing, remove_tree)
    real = keeping._move

    def saved_meanwhile(folder: int, old: str, new: str) -> None:
        monkeypatch.setattr(keeping, "_move", real)
        (workdir / "gone-tree/mine").write_text("by hand")
        real(folder, old, new)

    monkeypatch.setattr(keeping, "_move", saved_meanwhile)
    assert why_not(kept(found)) == {"gone-tree": "somebody else has changed gone-tree/mine"}
    assert (workdir / "gone-tree/mine").read_text() == "by hand"
    assert kept(found, overwrite=True).left == []
    assert not (workdir / "gone-tree").exists()


def remove_tree():
    import shutil

    shutil.rmtree("gone-tree")


def test_what_cannot_be_removed_is_told_and_keep_goes_on(reviewing, workdir, monkeypatch):
    fill(workdir)
    found = after(reviewing, remove_tree_and_write)

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(keeping.removal, "empty", refused)
        [why] = why_not(kept(found, "gone-tree")).values()
        assert why.startswith("it is removed, and some of it is left beside it as .sandbox-keep-")
        [left] = why_not(kept(found))
        assert left.startswith(".sandbox-keep-")
        assert (workdir / "new").exists()
    assert kept(found).left == []
    assert not [name for name in os.listdir(workdir) if name.startswith(".sandbox-keep")]


def remove_tree_and_write():
    import shutil

    shutil.rmtree("gone-tree")
    open("new", "w").close()


def test_an_end_waits_for_no_long_look(reviewing, workdir, layers, monkeypatch):
    fill(workdir)
    monkeypatch.setattr(review, "_LOOK_SECONDS", -1.0)
    found = after(reviewing, touch_nothing)
    assert told(found) == []


def test_the_files_of_a_large_directory_do_not_count(reviewing, workdir, monkeypatch):
    fill(workdir)
    found = after(reviewing, write_one, "new", "1")
    monkeypatch.setattr(walking, "MOST_ENTRIES", 2)
    assert told(found) == [("added", "new")]


def test_a_restart_with_an_unreadable_folder_is_refused_and_lets_go_of_it(reviewing):
    name = "0123456789ab"
    folder, _ = after(reviewing, write_one, "new", "1", sandbox_id=name)
    (folder.path / "about.json").write_text("{")
    with pytest.raises(HostError, match="cannot be read"):
        after(reviewing, write_one, "new", "2", sandbox_id=name)
    assert not folder.is_running


# -- what is never kept


def plant_in_bare():
    import os

    hooks = "x/repo.git/hooks"
    for name in (f"{hooks}/objects", f"{hooks}/refs", "common/objects", "common/refs", "d"):
        os.makedirs(name, exist_ok=True)
    os.makedirs("common/hooks")
    for name in (f"{hooks}/HEAD", f"{hooks}/post-receive", "d/HEAD", "common/config",
                 "common/hooks/pre-commit"):  # fmt: skip
        open(name, "w").write("evil")
    open("d/commondir", "w").write("../common")
    os.chmod(f"{hooks}/old", 0o755)


def test_no_repository_in_another_and_no_common_part_of_one_brings_programs(reviewing, workdir):
    hooks = workdir / "x/repo.git/hooks"
    for name in ("objects", "refs", "hooks"):
        (workdir / "x/repo.git" / name).mkdir(parents=True)
    (workdir / "x/repo.git/HEAD").write_text("ref: refs/heads/main\n")
    (hooks / "old").write_text("")
    (hooks / "old").chmod(0o644)
    left = why_not(kept(after(reviewing, plant_in_bare)))
    assert left.keys() >= {
        "x/repo.git/hooks/post-receive", "x/repo.git/hooks/old", "d/commondir", "common/config",
        "common/hooks/pre-commit",
    }  # fmt: skip
    assert os.listdir(hooks) == ["old"]
    assert stat.S_IMODE((hooks / "old").stat().st_mode) == 0o644
    assert sorted(os.listdir(workdir / "common")) == ["objects", "refs"]
    assert os.listdir(workdir / "d") == ["HEAD"]


def make_all(paths, text="ref: refs/heads/main"):
    """Files, directories (with a slash behind them) and links (" -> ")."""
    import os

    for path in paths:
        name, _, target = path.partition(" -> ")
        os.makedirs(os.path.dirname(name), exist_ok=True)
        if target:
            os.symlink(target, name)
        elif not name.endswith("/"):
            open(name, "w").write("../common" if name.endswith("commondir") else text)


# What is kept of one kernel's, and of a later one's: together they are a repository, whose programs
# have been there before it was one.
IN_TWO = {
    "its parts last": (
        ("fake/HEAD", "fake/config", "fake/hooks/pre-commit"),
        ("fake/objects/", "fake/refs/heads/"),
        {"fake/objects", "fake/refs", "fake/refs/heads"},
    ),
    "one of its parts last": (
        ("fake/config", "fake/objects/", "fake/HEAD"),
        ("fake/refs/",),
        {"fake/refs"},
    ),
    "links for its parts": (
        ("fake/HEAD", "fake/config", "parts/objects/a", "parts/refs/a"),
        ("fake/objects -> ../parts/objects", "fake/refs -> ../parts/refs"),
        {"fake/objects", "fake/refs"},
    ),
    "a common directory of others": (
        ("work/commondir", "common/config", "common/hooks/pre-commit"),
        ("work/HEAD", "common/objects/", "common/refs/"),
        {"work/HEAD", "common/objects", "common/refs"},
    ),
}


@pytest.mark.parametrize("name", IN_TWO)
def test_no_repository_comes_of_what_is_kept_one_after_the_other(reviewing, workdir, name):
    first, second, refused = IN_TWO[name]
    assert why_not(kept(after(reviewing, make_all, first))) == {}
    left = why_not(kept(after(reviewing, make_all, second)))
    assert left.keys() == refused
    assert set(left.values()) == {"git would run what stands beside it"}
    for folder in ("fake", "work"):
        look = ["git", "-c", "safe.directory=*", "-C", str(workdir / folder), "rev-parse"]
        assert subprocess.run(look, capture_output=True).returncode


def test_a_repository_without_a_work_tree_is_kept_but_for_what_it_would_run(reviewing, workdir):
    parts = ("new.git/HEAD", "new.git/objects/a", "new.git/refs/heads/main")
    assert why_not(kept(after(reviewing, make_all, parts))) == {}
    more = ("new.git/refs/heads/other", "new.git/config")
    assert why_not(kept(after(reviewing, make_all, more))).keys() == {"new.git/config"}
    assert (workdir / "new.git/refs/heads/other").exists()


def plant():
    import os
    import socket

    os.makedirs("new/.git/hooks")
    for name in ("new/.git/hooks/pre-commit", "new/.git/config", "new/.git/HEAD", "new/code"):
        open(name, "w").write("evil")
    os.makedirs("bare/objects")
    os.makedirs("bare/refs")
    for name in ("bare/HEAD", "bare/config"):
        open(name, "w").write("evil")
    os.mkdir("elsewhere")
    open("elsewhere/.git", "w").write("gitdir: ../new/.git")
    os.mkfifo("fifo")
    socket.socket(socket.AF_UNIX).bind("socket")
    open("set-id", "w").write("#!/bin/sh")
    open(".sandbox-keep-x", "w").close()


def test_nothing_is_kept_that_a_kernel_may_never_write(reviewing, workdir):
    found = after(reviewing, plant)
    os.chmod(found[0].upper / "set-id", 0o6755)  # which its system call filter refuses
    left = why_not(kept(found))
    assert left.keys() == {
        "new/.git/hooks", "new/.git/hooks/pre-commit", "new/.git/config", "bare/config",
        "elsewhere/.git", "fifo", "socket", ".sandbox-keep-x",
    }  # fmt: skip
    assert stat.S_IMODE((workdir / "set-id").stat().st_mode) == 0o755
    assert sorted(snapshot(workdir)) == [
        "bare", "bare/HEAD", "bare/objects", "bare/refs", "elsewhere", "new", "new/.git",
        "new/.git/HEAD", "new/code", "set-id",
    ]  # fmt: skip


def test_the_covers_of_a_repository_are_in_no_diff_and_nothing_of_them_is_kept(reviewing, workdir):
    subprocess.run(["git", "init", "-q", str(workdir)], check=True)
    found = after(reviewing, write_one, ".git/description", "mine")
    assert told(found) == [("changed", ".git/description")]
    # Whoever got out of the box, and writes where an overlay keeps it.
    upper = found[0].upper
    os.chmod(upper / ".git", 0o755)
    for name in ("hooks", "info"):
        (upper / ".git" / name).mkdir(exist_ok=True, mode=0o755)
        os.chmod(upper / ".git" / name, 0o755)
        (upper / ".git" / name / "planted").write_text("evil")
    (upper / ".git/config").write_text("evil")
    assert why_not(kept(found)).keys() >= {".git/hooks/planted", ".git/info/planted", ".git/config"}
    assert not list(workdir.rglob("planted"))
    assert (workdir / ".git/config").read_text() != "evil"
    assert (workdir / ".git/description").read_text() == "mine"


def test_no_change_leads_out_of_the_work_directory(reviewing, workdir, outside):
    """Links that a kernel makes, and links that take the place of directories meanwhile."""
    for name in ("sub", "other"):
        (workdir / name).mkdir()
        (workdir / name / "secret").write_text("mine")
    found = after(reviewing, write_and_link, str(outside))
    for name in ("sub", "other"):
        (workdir / name).rename(workdir / f"{name}-was")
        (workdir / name).symlink_to(outside)
    left = why_not(kept(found, overwrite=True))
    assert {"sub/secret", "other/secret"} & left.keys() == set()
    assert (outside / "secret").read_text() == SECRET
    assert os.listdir(outside) == ["secret"]


def write_and_link(outside):
    import os

    open("sub/secret", "w").write("evil")
    os.unlink("other/secret")
    os.symlink(outside, "out")
    os.mkdir("folder")
    os.rename("folder", "folder2")


def test_a_directory_swapped_for_a_link_while_it_is_kept_leads_nowhere(
    reviewing, workdir, outside, monkeypatch
):
    (workdir / "sub").mkdir()
    (workdir / "sub/secret").write_text("mine")
    found = after(reviewing, write_one, "sub/secret", "evil")
    real = keeping.open_below

    def swapped(directory: int, path: str, flags: int) -> int:
        if path == "sub" and not (workdir / "sub").is_symlink():
            (workdir / "sub").rename(workdir / "was")
            (workdir / "sub").symlink_to(outside)
        return real(directory, path, flags)

    monkeypatch.setattr(keeping, "open_below", swapped)
    assert "sub/secret" in why_not(kept(found))
    assert (outside / "secret").read_text() == SECRET
    assert (workdir / "was/secret").read_text() == "mine"


def test_names_cannot_speak_to_the_terminal_of_whoever_looks(reviewing):
    folder, about = after(reviewing, write_one, "a\x1b]0;title\x07\nKept 3 changes", "1")
    text = as_text(folder, about, changes((folder, about)))
    assert "\x1b" not in text
    assert "\\x1b]0;title\\x07\\x0aKept 3 changes" in text


def test_what_lies_too_deep_is_told_and_not_kept(reviewing, workdir):
    found = after(reviewing, dig)
    left = kept(found).left
    assert [why for _, why in left] == [
        "what is in it is not looked at: it lies deeper than 128 directories"
    ]
    assert not list(workdir.rglob("bottom"))


def dig():
    import os

    for _ in range(300):
        os.mkdir("d")
        os.chdir("d")
    open("bottom", "w").close()


@pytest.mark.requires("root")
def test_devices_and_whiteouts_that_somebody_planted_are_not_kept(reviewing, workdir):
    (workdir / "precious").mkdir()
    (workdir / "precious/file").write_text("mine")
    found = after(reviewing, write_one, "new", "1")
    upper = found[0].upper
    os.mknod(upper / "disk", stat.S_IFBLK | 0o666, os.makedev(8, 0))
    os.mknod(upper / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert why_not(kept(found)) == dict.fromkeys(("disk", "null"), "a device is never kept")


# -- where it cannot be had


def test_a_kernel_is_not_given_the_changes_of_others(runtime_dir, workdir):
    launcher = LocalLauncher(runtime_dir=str(runtime_dir), layer_dir=str(workdir / "layers"))
    boxes = Boxes(launcher, workdir)
    with pytest.raises(SpecError, match="this kernel would be given that"), boxes():
        pass  # nothing lies there yet, and it could make it
    (workdir / "layers/review").mkdir(mode=0o700, parents=True)
    with pytest.raises(SpecError, match="this kernel would be given that"), boxes():
        pass
    close_nurseries()


def test_a_file_system_that_can_be_no_upper_one_is_refused_with_the_remedy(
    reviewing, monkeypatch, layers
):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "setxattr", unsupported)
    with pytest.raises(HostError, match="Set layer_dir to a directory on ext4") as refused:
        after(reviewing, write_one, "new", "1")
    assert "needs extended attributes" in str(refused.value)
    assert list((layers / "review").iterdir()) == []
