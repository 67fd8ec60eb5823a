"""Whatever a kernel leaves in its folders is removed, a bit at a time, and never more than that."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sandbox_provisioner import records, removal, sweeping, traces
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.records import Record, RecordFolder, all_records
from sandbox_provisioner.sweeping import sweep

# A path has 4096 bytes at most, and Python 1000 calls in one another.
DEPTH = 5000
ENDLESS = float("inf")


@pytest.fixture
def tree():
    """A folder to fill and to remove, in memory: disks take their time."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name, "tree")
        folder.mkdir()
        yield folder


@pytest.fixture
def left(runtime_dir):
    """The folder of a sandbox whose server has been killed, which is not told of twice."""
    folder, _ = RecordFolder.create(runtime_dir, Record(sandbox_id="left"), ids=True)
    folder.release()
    sweeping._told_of.clear()
    yield folder
    sweep(runtime_dir, seconds=ENDLESS)


def dig(folder: Path, depth: int, mode: int = 0o700) -> None:
    """*depth* folders, each in the one before; no path leads to the last of them."""
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", mode, dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    Path(f"/proc/self/fd/{fd}", "file").touch()
    os.close(fd)


def remove(tree: Path) -> None:
    assert removal.empty(removal.set_aside(tree))
    assert os.listdir(tree.parent) == []


def test_a_tree_that_is_deeper_than_any_path_and_any_stack_is_removed(tree):
    dig(tree, DEPTH)
    remove(tree)


def test_few_descriptors_are_enough(tree):
    import resource

    dig(tree, 2000)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = len(os.listdir("/proc/self/fd")) + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        remove(tree)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_everything_that_a_folder_can_hold_is_removed_and_no_link_is_followed(tree, tmp_path):
    kept = tmp_path / "kept"
    (kept / "folder").mkdir(parents=True)
    (kept / "file").write_text("kept")
    (tree / "sub").mkdir()
    for place in (tree, tree / "sub"):
        os.mkfifo(place / "pipe")
        os.mknod(place / "socket", stat.S_IFSOCK | 0o600)
        for name, target in {"a": kept, "b": kept / "file", "c": "nowhere", "d": "."}.items():
            (place / name).symlink_to(target)
        (place / os.fsdecode(b"\xff\n\x1b")).touch()
    remove(tree)
    assert sorted(os.listdir(kept)) == ["file", "folder"]
    assert (kept / "file").read_text() == "kept"


@pytest.mark.ordinary_user
@pytest.mark.parametrize("mode", [0o000, 0o500, 0o100, 0o400])
def test_folders_that_their_owner_may_not_look_into_are_removed(tree, mode):
    for path in (tree / "a" / "b" / "c", tree / "a" / "d"):
        path.mkdir(parents=True)
        (path / "file").touch()
    for path in (tree / "a" / "b" / "c", tree / "a" / "b", tree / "a" / "d", tree / "a"):
        path.chmod(mode)
    remove(tree)


def test_no_more_is_removed_at_a_time_than_somebody_can_wait_for(tree):
    for number in range(removal.ALWAYS + 100):
        (tree / str(number)).touch()
    aside = removal.set_aside(tree)
    assert not removal.empty(aside, 0)
    assert len(os.listdir(aside)) == 100
    assert removal.empty(aside, 0)
    assert not aside.exists()


def test_every_go_at_a_wide_and_deep_tree_makes_its_progress(tree):
    for number in range(300):
        (tree / "wide" / str(number) / "a" / "b").mkdir(parents=True)
    aside = removal.set_aside(tree)
    steps = 2 * (1 + 300 * 3)  # each folder is moved up, and removed
    goes = 1
    while not removal.empty(aside, 0):
        goes += 1
    assert goes <= steps // removal.ALWAYS + 1


def test_what_somebody_else_takes_away_between_the_listing_and_the_removal_is_no_problem(
    tree, monkeypatch
):
    (tree / "7515").touch()
    aside = removal.set_aside(tree)
    unlink = os.unlink

    def too_late(name, **options):
        unlink(name, **options)
        unlink(name, **options)

    monkeypatch.setattr(os, "unlink", too_late)
    assert removal.empty(aside)
    assert not aside.exists()


def test_what_cannot_be_removed_is_told_by_its_name_when_all_else_is_gone(tree, monkeypatch):
    for name in ("a", "kept", "z"):
        (tree / name).touch()
    aside = removal.set_aside(tree)
    unlink = os.unlink

    def refused(name, **options):
        if name == "kept":
            raise PermissionError(1, "Operation not permitted", name)
        unlink(name, **options)

    monkeypatch.setattr(os, "unlink", refused)
    with pytest.raises(PermissionError, match="kept"):
        removal.empty(aside)
    assert os.listdir(aside) == ["kept"]
    monkeypatch.undo()
    assert removal.empty(aside)


def test_who_finds_somebody_at_it_does_not_wait(tree):
    aside = removal.set_aside(tree)
    fd = os.open(aside, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert not removal.empty(aside)
    assert aside.exists()
    os.close(fd)
    assert removal.empty(aside)


# -- of sandboxes


def test_what_a_kernel_has_dug_neither_stops_a_sweep_nor_stays(left, runtime_dir):
    dig(left.sockets, 1200)
    assert sweep(runtime_dir, pytest.fail, seconds=0) == ["left"]
    goes = 1
    while os.listdir(runtime_dir) != ["lock"]:
        assert all_records(runtime_dir) == []
        assert sweep(runtime_dir, pytest.fail, seconds=0) == []
        goes += 1
    assert goes <= 2 * 1200 // removal.ALWAYS + 2


def test_a_start_with_the_same_name_does_not_wait_for_what_is_left(left, runtime_dir, monkeypatch):
    for number in range(removal.ALWAYS + 10):
        (left.sockets / str(number)).touch()
    monkeypatch.setattr(records, "_AN_END_SECONDS", 0)
    left.remove()
    assert len(os.listdir(runtime_dir)) == 2  # the lock, and what was set aside
    folder, record = RecordFolder.create(runtime_dir, Record(sandbox_id="left"), ids=True)
    assert sweep(runtime_dir) == []
    assert sorted(os.listdir(runtime_dir)) == [f"{record.first_id}.ids", "left", "lock"]
    folder.remove()


def immutable(path: Path, *, on: bool) -> None:
    """chattr(1): not even root can remove it."""
    subprocess.run(["chattr", "+i" if on else "-i", path], check=True, capture_output=True)


@pytest.fixture
def stuck(left):
    """A file among the sockets that nobody can remove."""
    path = left.sockets / "stuck"
    path.touch()
    try:
        immutable(path, on=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this file system has no immutable files: {error}")
    inode = path.stat().st_ino
    yield path
    for folder, _, names in os.walk(left.path.parent):
        for name in names:
            if Path(folder, name).lstat().st_ino == inode:
                immutable(Path(folder, name), on=False)


@pytest.mark.requires("root")
def test_what_cannot_be_removed_is_told_once_and_the_rest_goes(stuck, runtime_dir):
    for name in ("deep", "other"):
        dig(stuck.parent, 1) if name == "deep" else (stuck.parent / name).touch()
    other, _ = RecordFolder.create(runtime_dir, Record(sandbox_id="other"), ids=False)
    other.release()
    told: list[str] = []
    assert sorted(sweep(runtime_dir, told.append)) == ["left", "other"]
    assert sweep(runtime_dir, told.append) == []
    (sentence,) = told
    assert "Operation not permitted" in sentence
    (aside,) = (path for path in runtime_dir.iterdir() if path.name != "lock")
    assert [names for _, _, names in os.walk(aside) if names] == [["stuck"]]
    answer = subprocess.run(
        [sys.executable, "-m", "sandbox_provisioner.app", "gc", "--runtime-dir", runtime_dir],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 1
    assert aside.name in answer.stderr


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        json.dumps({"sandbox_id": "left", "made": [], "planned": [], "started": "soon"}),
        json.dumps({"sandbox_id": "left", "made": [], "planned": [], "init_pid": "1"}),
        json.dumps({"sandbox_id": "left", "made": [["a"]], "planned": []}),
        " " * (records._MOST_BYTES + 1),
    ],
    ids=["deep list", "deep object", "text for a time", "text for a pid", "short pair", "big"],
)
def test_a_record_that_is_none_is_told_once_and_stops_nothing(left, runtime_dir, text):
    (left.path / "record.json").write_text(text)
    good, _ = RecordFolder.create(runtime_dir, Record(sandbox_id="good"), ids=False)
    good.release()
    told: list[str] = []
    assert [record.sandbox_id for _, record in all_records(runtime_dir)] == ["good"]
    assert sweep(runtime_dir, told.append) == ["good"]
    assert sweep(runtime_dir, told.append) == []
    assert [str(left.path) in sentence for sentence in told] == [True]
    left.remove()


@pytest.mark.parametrize("name", ["record.json", "exit", "owner"])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_strange_file_in_place_of_one_of_ours_blocks_nobody(left, runtime_dir, name, kind):
    path = left.path / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    else:
        path.mkdir()
    assert left.read_exit_file() == b""
    all_records(runtime_dir)
    sweep(runtime_dir)
    left.remove()
    assert not left.path.exists()
    assert Path("/etc/passwd").stat().st_size


def test_whatever_goes_wrong_with_one_folder_is_a_warning(left, runtime_dir, monkeypatch):
    def fail(*_):
        raise RuntimeError("of a kind that nobody thought of")

    monkeypatch.setattr(traces, "remove_stand_ins", fail)
    told: list[str] = []
    assert sweep(runtime_dir, told.append) == []
    assert ["nobody thought of" in sentence for sentence in told] == [True]
    monkeypatch.undo()
    assert sweep(runtime_dir, told.append) == ["left"]


def test_what_could_not_be_removed_keeps_its_record_until_a_sweep_can(runtime_dir, monkeypatch):
    """The end of a sandbox is the same for who closes it and for who sweeps."""

    def fail(*_):
        raise HostError(attempt="lock it", answer="another has it", remedy="Wait.")

    folder, record = RecordFolder.create(runtime_dir, Record(sandbox_id="closed"), ids=False)
    monkeypatch.setattr(traces, "remove_stand_ins", fail)
    with pytest.raises(HostError):
        asyncio.run(traces.Traces(tree=None, kill=False, folder=folder, record=record).remove())
    assert folder.read() == record
    monkeypatch.undo()
    assert sweep(runtime_dir) == ["closed"]
    assert not folder.path.exists()


def test_an_endless_exit_file_is_not_read(left):
    with left.exit_file.open("wb") as file:
        file.truncate(1 << 40)
    assert left.read_exit_file() == b""
