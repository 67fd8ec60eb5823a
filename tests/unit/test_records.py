"""The folder of each sandbox: ids, locks, and what is removed when."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox_provisioner import locks, records
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.ids.facts import FIRST_ID, FIRST_PERSONS_ID, INIT_ID, LAST_ID
from sandbox_provisioner.ledger import _counted
from sandbox_provisioner.records import (
    Record,
    RecordFolder,
    all_records,
    open_init,
    runtime_directory,
    start_time,
)
from sandbox_provisioner.spec import WRITTEN_THROUGH
from sandbox_provisioner.stand_ins import remove_stand_ins
from sandbox_provisioner.sweeping import sweep


def identity_of(workdir):
    """What a record has to know of it, if it is there."""
    if not os.path.exists(workdir):
        return {}
    status = os.stat(workdir)
    return {"device": status.st_dev, "inode": status.st_ino}


@pytest.fixture
def make(runtime_dir, monkeypatch):
    """Makes records; their folders are removed at the end. Nobody else on this machine has ids."""
    monkeypatch.setattr(records, "_has_processes", lambda uid: False)
    folders = []

    def make(name, **fields):
        ids = fields.pop("ids", False)
        fields = {**identity_of(fields.get("workdir", "")), **fields}
        folder, record = RecordFolder.create(
            runtime_dir, Record(sandbox_id=name, **fields), ids=ids
        )
        folders.append(folder)
        return folder, record

    yield make
    for folder in folders:
        folder.remove()


def test_a_record_that_nobody_would_read_is_not_written(make, runtime_dir):
    planned = (("file", "/" + "x" * records._MOST_BYTES),)
    with pytest.raises(HostError, match="File too large"):
        make("0123456789ab", planned=planned)
    assert not (runtime_dir / "0123456789ab").exists()
    folder, record = make("0123456789ab")
    with pytest.raises(OSError, match="File too large"):
        folder.write(replace(record, planned=planned))
    assert folder.read() == record


def test_a_record_survives_being_written_and_read(make):
    fields = {
        "kernel_id": "k",
        "started": 1.5,
        "made": (("file", "/a"), ("directory", "/b")),
        "cgroup_bases": {"memory": "/sys/fs/cgroup/memory"},
    }
    folder, record = make("one", **fields)
    assert folder.read() == record


def test_the_folder_and_its_sockets_are_the_servers_alone(make):
    folder, _ = make("one")
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert folder.sockets.stat().st_mode & 0o777 == 0o700


def test_the_same_id_twice_is_refused_and_the_first_one_stays(make, runtime_dir):
    folder, _ = make("one")
    with pytest.raises(HostError):
        RecordFolder.create(runtime_dir, Record(sandbox_id="one"), ids=False)
    assert folder.path.exists()


# -- ids


def test_ranges_of_ids_do_not_overlap_and_are_used_again(make):
    first, one = make("one", ids=True)
    _, two = make("two", ids=True)
    assert (one.first_id, two.first_id) == (FIRST_ID, FIRST_ID + (1 << 16))
    first.remove()
    assert make("three", ids=True)[1].first_id == FIRST_ID


@pytest.mark.parametrize("of_init", [0, INIT_ID])  # the latter where the kernel is root
def test_ids_that_somebody_else_runs_processes_by_are_left_alone(make, monkeypatch, of_init):
    monkeypatch.setattr(records, "_has_processes", lambda uid: uid == FIRST_ID + of_init)
    assert make("one", ids=True)[1].first_id == FIRST_ID + (1 << 16)


def test_the_last_range_of_ids_ends_where_systemds_table_says():
    assert LAST_ID < 0x7FFE0000
    assert (LAST_ID - FIRST_ID) >> 16 > 4000


def test_a_range_that_is_a_persons_is_never_a_kernels(make, monkeypatch):
    monkeypatch.setattr(records, "_has_processes", lambda uid: uid < FIRST_PERSONS_ID)
    with pytest.raises(HostError, match="ranges are taken"):
        make("one", ids=True)


def test_who_has_a_range_already_keeps_it(make, runtime_dir):
    one, record = make("one", ids=True, first_id=FIRST_PERSONS_ID)
    _, same = make("two", ids=True, first_id=FIRST_PERSONS_ID)
    assert record.first_id == same.first_id == FIRST_PERSONS_ID
    one.remove()
    assert sorted(os.listdir(runtime_dir)) == ["lock", "two"]


def test_no_free_range_of_ids_is_an_error_with_a_remedy(make, monkeypatch):
    monkeypatch.setattr(records, "FIRST_PERSONS_ID", FIRST_ID + (1 << 16))
    make("one", ids=True)
    with pytest.raises(HostError, match=r"all 1 ranges.*gc"):
        make("two", ids=True)


def test_the_lock_of_a_killed_maker_goes_and_that_of_a_living_one_stays(make, runtime_dir):
    make("one")
    for name in ("left.building", "held.building"):
        (runtime_dir / name).touch()
    fd = os.open(runtime_dir / "held.building", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    sweep(runtime_dir)
    os.close(fd)
    assert sorted(os.listdir(runtime_dir)) == ["held.building", "lock", "one"]


# -- another one's folder


def test_a_folder_that_is_taken_over_has_the_new_name_and_the_same_ids(make, runtime_dir):
    spare, record = make("spare", ids=True)
    spare.release()
    ours = spare.turn_into(replace(record, sandbox_id="kernel", group="spare"))
    assert ours.path == runtime_dir / "kernel"
    assert (ours.read().sandbox_id, ours.read().tree) == ("kernel", "spare")
    assert not RecordFolder(ours.path).own_if_orphan()
    assert os.readlink(runtime_dir / f"{FIRST_ID}.ids") == "kernel"
    ours.remove()
    assert os.listdir(runtime_dir) == ["lock"]


def test_a_folder_that_has_gone_cannot_be_taken_over(make, runtime_dir):
    spare, record = make("spare")
    spare.remove()
    with pytest.raises(HostError):
        spare.turn_into(replace(record, sandbox_id="kernel"))
    assert os.listdir(runtime_dir) == ["lock"]


def test_a_folder_that_cannot_be_written_to_is_not_left_half_taken(make, runtime_dir, monkeypatch):
    spare, record = make("spare", ids=True)
    spare.release()

    def full(folder, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordFolder, "write", full)
    with pytest.raises(HostError, match="No space left"):
        spare.turn_into(replace(record, sandbox_id="kernel"))
    assert os.listdir(runtime_dir) == ["lock"]


# -- the runtime directory


def test_a_missing_runtime_directory_is_made_for_us_alone(new_folder):
    path = runtime_directory(str(new_folder() / "a" / "b"))
    assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_runtime_directory_that_others_may_write_to_is_refused(new_folder, mode):
    folder = new_folder()
    folder.chmod(mode)
    with pytest.raises(HostError, match=r"others than this user.*runtime_dir"):
        runtime_directory(str(folder))


@pytest.mark.requires("root")
def test_a_runtime_directory_of_somebody_else_is_refused(new_folder):
    folder = new_folder()
    os.chown(folder, 4321, 4321)
    with pytest.raises(HostError, match="others than this user"):
        runtime_directory(str(folder))


def test_a_file_in_place_of_the_runtime_directory_is_an_error_with_a_remedy(new_folder):
    file = new_folder() / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(HostError, match="runtime_dir"):
            runtime_directory(str(path))


def test_a_path_too_long_for_a_socket_is_refused_before_anything_is_made(new_folder):
    runtime = new_folder() / ("x" * 90)
    runtime.mkdir(mode=0o700)
    with pytest.raises(HostError, match="107 bytes"):
        RecordFolder.create(runtime, Record(sandbox_id="one"), ids=False)
    assert os.listdir(runtime) == []
    missing = runtime.parent / ("y" * 90)
    with pytest.raises(HostError, match="107 bytes"):
        runtime_directory(str(missing))
    assert not missing.exists()


# -- who is still there


def test_start_time_is_that_of_the_process_whatever_its_name():
    assert start_time(os.getpid()) > 0
    assert start_time(1 << 30) == 0


def test_a_pid_that_was_given_to_somebody_else_is_not_opened():
    here = Record(sandbox_id="one", init_pid=os.getpid(), init_start=start_time(os.getpid()))
    pidfd = open_init(here)
    assert pidfd is not None
    os.close(pidfd)
    assert open_init(replace(here, init_start=here.init_start + 1)) is None
    assert open_init(replace(here, init_pid=0)) is None
    assert open_init(replace(here, init_pid=1 << 30)) is None


def test_a_dead_process_that_nobody_waited_for_counts_as_ended():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    record = Record(sandbox_id="one", init_pid=child, init_start=start_time(child))
    assert open_init(record) is None
    os.waitpid(child, 0)


def test_what_a_living_server_holds_is_not_swept(make, runtime_dir):
    folder, _ = make("one")
    assert sweep(runtime_dir) == []
    folder.release()
    assert sweep(runtime_dir) == ["one"]
    assert os.listdir(runtime_dir) == ["lock"]


def test_a_folder_without_a_record_is_swept_unless_a_server_is_making_it(make, runtime_dir):
    folder, _ = make("one")
    (folder.path / "record.json").unlink()
    sweep(runtime_dir)
    assert folder.path.exists()
    folder.release()
    sweep(runtime_dir)
    assert not folder.path.exists()


def test_sweeps_at_the_same_time_neither_stop_a_start_nor_leave_its_folder(runtime_dir):
    """What fails is made again under the same name: a start from a nursery, then a cold one."""
    done = threading.Event()

    def sweep_on():
        while not done.is_set():
            sweep(runtime_dir)

    sweepers = [threading.Thread(target=sweep_on) for _ in range(2)]
    for thread in sweepers:
        thread.start()
    try:
        for _ in range(200):
            folder, _ = RecordFolder.create(runtime_dir, Record(sandbox_id="one"), ids=True)
            folder.remove()
            assert not folder.path.exists()
    finally:
        done.set()
        for thread in sweepers:
            thread.join()


def test_a_folder_that_somebody_has_removed_and_made_anew_is_no_orphan(
    make, runtime_dir, monkeypatch
):
    """Between the moment at which a sweep opens the lock and that at which it has it."""
    make("one")[0].release()

    def flock(fd, operation):
        monkeypatch.undo()
        RecordFolder(runtime_dir / "one").remove()
        make("one")
        fcntl.flock(fd, operation)

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    assert not RecordFolder(runtime_dir / "one").own_if_orphan()


def test_a_folder_whose_remover_was_killed_goes_with_a_sweep(make, runtime_dir):
    folder, _ = make("one")
    folder.release()
    (folder.path / "owner").unlink()
    sweep(runtime_dir)
    assert not folder.path.exists()


def test_a_sweep_looks_at_none_of_what_this_process_holds(make, runtime_dir, monkeypatch):
    make("ours")
    left, _ = make("left")
    left.release()
    looked_at: list[str] = []
    own_if_orphan = RecordFolder.own_if_orphan
    monkeypatch.setattr(
        RecordFolder,
        "own_if_orphan",
        lambda self: looked_at.append(self.path.name) or own_if_orphan(self),
    )
    assert sweep(runtime_dir) == ["left"]
    assert looked_at == ["left"]


def test_a_range_of_ids_that_somebody_else_has_now_is_not_given_back(make, runtime_dir):
    folder, record = make("one", ids=True)
    link = runtime_dir / f"{record.first_id}.ids"
    link.unlink()
    link.symlink_to("two")
    folder.remove()
    assert os.readlink(link) == "two"


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"sandbox_id": "x", "version": 2}', '{"no_such": 1}'),
        '{"sandbox_id": "x", "confinement": "unheard-of"}',
    ],
)
def test_a_broken_record_stops_nobody(make, runtime_dir, text):
    folder, _ = make("one")
    (folder.path / "record.json").write_text(text)
    make("two")
    assert [record.sandbox_id for _, record in all_records(runtime_dir)] == ["two"]
    assert sweep(runtime_dir) == []


# -- stand-ins


def made_in(workdir, *paths):
    """Make stand-ins at *paths* ("x/" is a directory) as `Record.made` has them."""
    made = []
    for path in paths:
        if path.endswith("/"):
            (workdir / path).mkdir()
        else:
            (workdir / path).touch()
        made.append(
            ("directory" if path.endswith("/") else "file", str(workdir / path).rstrip("/"))
        )
    return tuple(made)


def test_stand_ins_are_removed_children_before_parents(make, runtime_dir, workdir):
    made = made_in(workdir, ".local/", ".local/share/", ".local/share/x", ".bashrc")
    _, record = make("one", workdir=str(workdir))
    remove_stand_ins(runtime_dir, replace(record, made=made))
    assert os.listdir(workdir) == []


def test_what_somebody_wrote_over_a_stand_in_stays(make, runtime_dir, workdir):
    made = made_in(workdir, ".bashrc", ".profile", ".ssh/", ".config/")
    (workdir / ".bashrc").write_text("mine")
    (workdir / ".profile").write_text(".\n")
    (workdir / ".ssh/key").touch()
    _, record = make("one", workdir=str(workdir), made=made)
    remove_stand_ins(runtime_dir, record)
    assert sorted(os.listdir(workdir)) == [".bashrc", ".ssh"]


def test_a_record_of_an_earlier_version_is_swept_like_any_other(make, runtime_dir):
    folder, record = make("one")
    folder.release()
    told = json.loads((folder.path / "record.json").read_text())
    for name in ("planned", "repositories", "device", "inode", "shown_at"):
        del told[name]
    (folder.path / "record.json").write_text(json.dumps(told))
    assert folder.read() == record
    assert sweep(runtime_dir) == ["one"]


# As records were before they had a version.
FIRST = """
{"sandbox_id": "0f1e2d3c4b5a", "kernel_id": "134530eb-4baf-483d-99e0-a6d1c78f8ef7",
 "name": "Python 3 (sandboxed)", "notebook": "a.ipynb", "user": "alice", "started": 1777890030.5,
 "init_pid": 4194300, "init_start": 77, "survives_server": true, "cgroup_version": 1,
 "cgroup_manager": "", "cgroup_bases": {"memory": "/sys/fs/cgroup/memory"},
 "memory_limit_bytes": 268435456, "cpu_cores": 0.5, "first_id": 1879048192,
 "workdir": "/home/alice", "shown_at": "/home/alice", "device": 64769, "inode": 12, "review": "",
 "repositories": ["/home/alice/r"], "made": [["file", "/home/alice/.bashrc"]], "planned": [],
 "confinement": "namespaces", "kind": "kernel", "nursery": "", "network": "none",
 "group": "hub/alice/kernels/0f1e2d3c4b5a", "person": "alice", "uid": 1000, "box": "",
 "changed": "", "sum_bytes": null, "unheard": false, "storage": ""}
"""


def test_a_record_of_the_first_version_is_read_as_one_of_today(make):
    folder, _ = make("one")
    (folder.path / "record.json").write_text(FIRST)
    found = folder.read()
    told = json.loads(FIRST)
    assert {name: getattr(found, name) for name in told} == told | {
        "repositories": ("/home/alice/r",),
        "made": (("file", "/home/alice/.bashrc"),),
        "planned": (),
    }
    assert (found.version, found.stopped_by, found.later) == (1, "", {})


def test_what_a_later_version_has_written_goes_on_with_its_record(make):
    folder, _ = make("one")
    text = json.dumps(json.loads(FIRST) | {"to_come": {"a": [1]}})
    (folder.path / "record.json").write_text(text)
    folder.change(lambda record: replace(record, changed="mem_limit = 1 GiB"))
    written = json.loads((folder.path / "record.json").read_text())
    assert written["to_come"] == {"a": [1]}
    assert "later" not in written
    assert folder.read().changed == "mem_limit = 1 GiB"


def test_a_record_that_only_a_later_version_can_mean_is_let_alone_and_told(make, runtime_dir):
    folder, _ = make("one")
    folder.release()
    text = json.dumps({"sandbox_id": "one", "version": records.VERSION + 1, "made": 7})
    (folder.path / "record.json").write_text(text)
    told = []
    assert (sweep(runtime_dir, told.append), all_records(runtime_dir)) == ([], [])
    assert records.of_later_versions(runtime_dir) == ["one"]
    assert "is let alone: its record is of version 2, and we know 1" in told[0]
    assert (folder.path / "record.json").read_text() == text
    folder.own_if_orphan()


def test_a_socket_that_stands_in_goes_and_what_somebody_put_there_stays(make, runtime_dir, workdir):
    os.mknod(workdir / "bin", stat.S_IFSOCK | 0o600)
    (workdir / "node_modules/mine").mkdir(parents=True)
    made = tuple(("socket", f"{workdir}/{name}") for name in ("bin", "node_modules"))
    _, record = make("one", workdir=str(workdir), made=made)
    remove_stand_ins(runtime_dir, record)
    assert os.listdir(workdir) == ["node_modules"]


def test_a_link_that_stands_in_gives_way_to_what_was_written_through_it(make, runtime_dir, workdir):
    """Whatever order the record has them in: that of a start that was killed is the names' own."""
    written = workdir / WRITTEN_THROUGH
    written.mkdir(parents=True)
    for name in (".bashrc", ".zshrc", ".profile"):
        (workdir / name).symlink_to(f"{WRITTEN_THROUGH}/{name}")
    (workdir / ".bashrc").write_text("mine")
    (workdir / ".profile").unlink()
    (workdir / ".profile").symlink_to("my/profile")
    folders = [written, *list(written.parents)[:3]]
    made = [("directory", str(path)) for path in reversed(folders)]
    made += [("link", f"{workdir}/{name}") for name in (".bashrc", ".zshrc", ".profile")]
    _, record = make("one", workdir=str(workdir), made=tuple(sorted(made)))
    remove_stand_ins(runtime_dir, record)
    assert sorted(os.listdir(workdir)) == [".bashrc", ".profile"]
    assert (workdir / ".bashrc").read_text() == "mine"
    assert not (workdir / ".bashrc").is_symlink()
    assert os.readlink(workdir / ".profile") == "my/profile"


def test_a_link_in_place_of_a_stand_in_or_above_it_is_not_followed(make, runtime_dir, new_folder):
    workdir, outside = new_folder(), new_folder()
    (outside / "x").touch()
    (outside / "empty").touch()
    made = made_in(workdir, ".local/", ".local/x", ".bashrc")
    (workdir / ".local/x").unlink()
    (workdir / ".local").rmdir()
    (workdir / ".local").symlink_to(outside)
    (workdir / ".bashrc").unlink()
    (workdir / ".bashrc").symlink_to(outside / "empty")
    _, record = make("one", workdir=str(workdir), made=made)
    remove_stand_ins(runtime_dir, record)
    assert sorted(os.listdir(outside)) == ["empty", "x"]
    assert (workdir / ".bashrc").is_symlink()
    (workdir / ".local").unlink()


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_what_stands_in_place_of_the_work_directory_now_is_left_alone(
    make, runtime_dir, new_folder, kind
):
    workdir, other = new_folder() / "me", new_folder()
    workdir.mkdir()
    made = made_in(workdir, ".bashrc", ".ssh/")
    made_in(other, ".bashrc", ".ssh/")
    _, record = make("one", workdir=str(workdir), made=made)
    workdir.rename(workdir.with_name("moved"))
    if kind == "link":
        workdir.symlink_to(other)
    else:
        other.rename(workdir)
    remove_stand_ins(runtime_dir, record)
    assert sorted(os.listdir(workdir)) == [".bashrc", ".ssh"]
    (workdir / ".bashrc").unlink()
    (workdir / ".ssh").rmdir()


def test_stand_ins_of_a_home_behind_a_link_are_removed(make, runtime_dir, new_folder):
    """Who made them knew the path that the home has inside."""
    real, link = new_folder(), new_folder() / "me"
    link.symlink_to(real)
    planned = made_in(real, ".config/")
    made = made_in(link, ".bashrc", ".local/", ".local/share/")
    beside = ("file", f"{link}-beside/x")
    _, record = make("one", workdir=str(real), shown_at=str(link), made=(*made, beside, *planned))
    remove_stand_ins(runtime_dir, record)
    assert os.listdir(real) == []


def test_one_directory_by_two_names_is_one_tree(make, runtime_dir, new_folder):
    """Such as by a bind mount, or if it was moved."""
    workdir = new_folder() / "me"
    workdir.mkdir()
    made = made_in(workdir, ".bashrc")
    _, record = make("one", workdir=str(workdir), made=made)
    make("two", workdir="/elsewhere", **identity_of(workdir))
    remove_stand_ins(runtime_dir, record)
    (workdir / ".bashrc").unlink()


def test_a_pipe_in_place_of_a_stand_in_does_not_block(make, runtime_dir, workdir):
    made = made_in(workdir, ".bashrc")
    (workdir / ".bashrc").unlink()
    os.mkfifo(workdir / ".bashrc")
    _, record = make("one", workdir=str(workdir), made=made)
    remove_stand_ins(runtime_dir, record)
    assert (workdir / ".bashrc").is_fifo()


@pytest.mark.parametrize("other", ["", "below", ".."])
def test_stand_ins_are_left_to_another_sandbox_in_the_same_tree(
    make, runtime_dir, new_folder, other
):
    workdir = new_folder() / "me"
    (workdir / "below").mkdir(parents=True)
    made = made_in(workdir, ".bashrc")
    folder, record = make("one", workdir=str(workdir), made=made)
    heir, left = make("two", workdir=os.path.normpath(workdir / other))
    remove_stand_ins(runtime_dir, record)
    folder.remove()
    assert (workdir / ".bashrc").exists()
    assert heir.read().made == made
    where = {"workdir": str(workdir), **identity_of(workdir)}
    remove_stand_ins(runtime_dir, replace(heir.read(), **where))
    assert not (workdir / ".bashrc").exists()
    assert left.made == ()


def test_stand_ins_that_are_left_to_a_start_are_not_taken_for_those_it_has_planned(
    make, runtime_dir, workdir
):
    made = made_in(workdir, ".bashrc")
    folder, record = make("one", workdir=str(workdir), made=made)
    heir, starting = make("two", workdir=str(workdir), planned=made)
    remove_stand_ins(runtime_dir, record)
    folder.remove()
    remove_stand_ins(runtime_dir, heir.finish(starting))
    assert os.listdir(workdir) == []


def test_a_start_that_fails_removes_what_was_left_to_it(make, runtime_dir, workdir):
    made = made_in(workdir, ".bashrc")
    folder, record = make("one", workdir=str(workdir), made=made)
    _, starting = make("two", workdir=str(workdir), planned=made)
    remove_stand_ins(runtime_dir, record)
    folder.remove()
    remove_stand_ins(runtime_dir, starting)
    assert os.listdir(workdir) == []


def test_who_is_leaving_is_left_nothing(make, runtime_dir, workdir):
    made = made_in(workdir, ".bashrc")
    _, leaving = make("one", workdir=str(workdir))
    _, record = make("two", workdir=str(workdir), made=made)
    remove_stand_ins(runtime_dir, leaving)  # its folder goes a moment later
    remove_stand_ins(runtime_dir, record)
    assert os.listdir(workdir) == []


def test_the_own_record_on_disk_is_not_another_sandbox(make, runtime_dir, workdir):
    """A start that fails half-way has written a record that does not know of the stand-ins yet."""
    _, record = make("one", workdir=str(workdir))
    made = made_in(workdir, ".bashrc")
    remove_stand_ins(runtime_dir, replace(record, made=made, init_pid=7))
    assert os.listdir(workdir) == []


def test_sandboxes_in_other_trees_do_not_matter(make, runtime_dir, new_folder):
    workdir = new_folder()
    made = made_in(workdir, ".bashrc")
    _, record = make("one", workdir=str(workdir), made=made)
    make("two", workdir=str(new_folder()))
    make("three", workdir=f"{workdir}-beside")
    remove_stand_ins(runtime_dir, record)
    assert not Path(workdir, ".bashrc").exists()


def test_a_child_that_was_forked_while_a_lock_was_held_does_not_keep_it(tmp_path):
    record = Record(sandbox_id="a")
    with locks.locked(tmp_path):
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        folder, _ = RecordFolder.create(tmp_path, record, ids=False)  # would wait for ever
        folder.release()
        seen = RecordFolder(tmp_path / "a")
        assert seen.own_if_orphan()
        seen.release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    folder.remove()


def test_a_record_that_cannot_be_read_counts_as_one(make, runtime_dir):
    folder, _ = make("0123456789ab")
    asks = Record(sandbox_id="b" * 12)
    assert [one.sandbox_id for one in _counted(runtime_dir, asks)] == ["0123456789ab"]
    (folder.path / "record.json").write_text("{")
    assert [one.sandbox_id for one in _counted(runtime_dir, asks)] == ["0123456789ab"]
