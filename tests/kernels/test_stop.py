"""Kernels that run are stopped by a command of another process, which knows them by records."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import users

from sandbox_provisioner import audit, handle, locks
from sandbox_provisioner.app import stop
from sandbox_provisioner.app.running import Sandbox
from sandbox_provisioner.app.stop import StopApp, _all_ended, _as_owner
from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.facilities.caps.cgroup import Usage
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.provisioner import user_name
from sandbox_provisioner.records import VERSION, Record, RecordFolder, start_time

pytestmark = pytest.mark.requires("userns", "cgroup-memory", "cgroup-pids")

DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
# What a record has that the first version of it lacks.
_NEW = ("version", "stopped_by")


def folder_of(k: Any) -> RecordFolder:
    return k.provisioner.handle.folder  # type: ignore[no-any-return]


def how_it_ended(k: Any) -> tuple[str, str, str]:
    assert not k.manager.is_alive()
    end = k.provisioner.end
    return str(end.kind), end.stopped_by, end.sentence


def test_who_is_stopped_has_ended_and_its_server_knows_by_whom(kernel: Any, command: Any) -> None:
    with kernel() as k:
        name = k.provisioner.kernel_id[:8]
        assert command("stop", name) == f"Kernel {name} has ended."
        kind, by, sentence = how_it_ended(k)
        assert (kind, by) == ("stopped", user_name())
        whom = "the administrator of this machine" if by == "root" else by
        assert f"Kernel {name} was stopped by {whom} with the command" in sentence
        assert k.provisioner.end.signal == 15
        assert "no such kernel runs" in command("stop", name)


def test_who_does_not_heed_it_is_killed(
    kernel: Any, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle, "_STOP_SECONDS", 0.2)
    with kernel() as k:
        k.run(DEAF)
        told = command("stop", folder_of(k).path.name)
        assert "did not end when it was asked to, and was killed" in told
        assert how_it_ended(k)[:2] == ("stopped", user_name())


def test_who_holds_the_records_keeps_nobody_from_being_stopped(
    kernel: Any, command: Any, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_LOCK_SECONDS", 0.1)
    with kernel() as k:
        name = k.provisioner.kernel_id[:8]
        with locks.locked(runtime_dir):
            assert command("stop", name) == f"Kernel {name} has ended."
        assert not k.manager.is_alive()


def test_who_is_frozen_does_nothing_more_before_it_ends(kernel: Any, command: Any) -> None:
    with kernel() as k:
        code = "import signal; signal.signal(15, lambda *_: open('heard', 'w').close())"
        k.run(code)
        command("freeze", folder_of(k).path.name)
        assert "was killed" in command("stop", "--user", user_name())
        assert how_it_ended(k)[0] == "stopped"
        assert not (Path(k.cwd) / "heard").exists()


def test_all_of_a_group_are_stopped_at_once_and_nobody_else(kernel: Any, command: Any) -> None:
    group = Person.find(user_name()).groups[0]
    with kernel() as one, kernel() as two:
        assert "nothing that you have started runs for them" in command("stop", "--group", "no")
        assert one.manager.is_alive() and two.manager.is_alive()
        assert command("stop", "--group", group).count("has ended") == 2
        assert {how_it_ended(k)[0] for k in (one, two)} == {"stopped"}
        assert "nothing that you have started runs" in command("stop", "--all")


@pytest.mark.parametrize(
    "words",
    [(), ("--all", "--user", "root"), ("0123", "--all"), ("--user", "a", "--group", "b")],
)
def test_who_does_not_say_whom_is_told_how_to(command: Any, words: tuple[str, ...]) -> None:
    assert command("stop", *words) == "name kernels, or --user, or --group, or --all"


def test_a_kernel_that_nobody_knows_stops_no_other(kernel: Any, command: Any) -> None:
    with kernel() as k:
        name = folder_of(k).path.name
        assert "no such kernel runs" in command("stop", name, "nothing.ipynb")
        assert k.manager.is_alive()


@contextlib.contextmanager
def users_sandbox(
    runtime_dir: Path, identity: Sequence[str]
) -> Iterator[tuple[subprocess.Popen[bytes], Sandbox]]:
    """What another user's record says of a process, which runs by *identity*."""
    folder = runtime_dir / "0123456789ab"
    folder.mkdir()
    process = subprocess.Popen([*identity, "sleep", "1000"])
    try:
        record = Record(
            sandbox_id=folder.name,
            init_pid=process.pid,
            init_start=start_time(process.pid),
            survives_server=True,
        )
        RecordFolder(folder).write(record)
        for path in (runtime_dir, folder, folder / "record.json"):
            os.chown(path, users.USER, users.USER)
        yield (
            process,
            Sandbox(record=record, state="running", usage=Usage(), folder=folder, owner=users.USER),
        )
    finally:
        process.kill()
        process.wait()
        os.chown(runtime_dir, 0, 0)


def test_what_two_users_call_the_same_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Sandbox(
        record=Record(sandbox_id="0123", kernel_id="4567"), state="busy", usage=Usage(), owner=7
    )
    ours = replace(theirs, record=replace(theirs.record, kernel_id="89ab"), owner=None)
    monkeypatch.setattr(StopApp, "running", lambda _: [theirs, ours])
    assert StopApp().meant(["4567", "89ab"]) == [theirs, ours]


@pytest.mark.requires("root")
def test_root_stops_by_another_users_record_no_process_that_is_not_that_users(
    runtime_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    lines = tmp_path / "audit.jsonl"
    monkeypatch.setattr(audit, "audit_place", lambda: str(lines))
    with users_sandbox(runtime_dir, ()) as (process, sandbox):
        assert not _all_ended({users.USER: _as_owner(users.USER, [sandbox])})
        said = capfd.readouterr().err
        assert "Operation not permitted" in said and "Traceback" not in said
        assert process.poll() is None
    (line,) = map(json.loads, lines.read_text().splitlines())
    told = [line[field] for field in ("event", "by", "sandbox_id")]
    assert told == ["change", "root", sandbox.folder.name]
    assert f"with the rights of uid {users.USER}" in line["given"]


@pytest.mark.requires("root")
def test_another_users_record_is_judged_as_it_is_when_its_kernel_is_stopped(
    runtime_dir: Path, tmp_path: Path, capfd: Any
) -> None:
    with users_sandbox(runtime_dir, users.IDENTITY) as (process, sandbox):
        elsewhere = {"memory": str(tmp_path)}
        later = replace(sandbox.record, cgroup_version=1, cgroup_bases=elsewhere)
        (sandbox.folder / "record.json").write_text(json.dumps(asdict(later)))
        assert not _all_ended({users.USER: _as_owner(users.USER, [sandbox])})
        assert "its record tells by now what no sandbox has" in capfd.readouterr().err
        assert process.poll() is None


@pytest.mark.requires("root")
def test_a_user_who_holds_the_process_that_stops_theirs_holds_nobody_else(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    ours, theirs = os.pipe2(os.O_CLOEXEC)

    def stopped(*_: object) -> list[SandboxError]:
        uid = os.geteuid()
        if uid == users.USER:
            os.close(theirs)
            os.kill(os.getpid(), signal.SIGSTOP)
        elif uid == 0:
            os.close(theirs)
            assert os.read(ours, 1) == b""  # the other user's child has ended
        print(f"done as {uid}")
        return []

    found = [
        Sandbox(record=Record(sandbox_id="0123"), state="running", usage=Usage(), owner=owner)
        for owner in (users.USER, users.USER + 1, None)
    ]
    monkeypatch.setattr(stop, "_stopped", stopped)
    monkeypatch.setattr(StopApp, "meant", lambda *_: found)
    monkeypatch.setattr(stop, "_CHILD_SECONDS", 1.0)
    with pytest.raises(SystemExit):
        StopApp().start()
    os.close(ours)
    said = capfd.readouterr()
    assert f"done as {users.USER + 1}\n" in said.out and "done as 0\n" in said.out
    assert f"done as {users.USER}\n" not in said.out
    assert "was kept from it for 1 s, and was killed" in " ".join(said.err.split())


def test_a_kernel_with_a_record_of_the_first_version_is_listed_changed_and_stopped(
    kernel: Any, command: Any
) -> None:
    with kernel(mem_limit="200M") as k:
        folder = folder_of(k)
        told = json.loads((folder.path / "record.json").read_text())
        for name in _NEW:
            del told[name]
        (folder.path / "record.json").write_text(json.dumps(told))
        name = told["kernel_id"][:8]
        assert name in command("list", "--json")
        assert "mem_limit = 300 MiB" in command("limits", name, "mem=300M")
        assert command("stop", name) == f"Kernel {name} has ended."
        assert how_it_ended(k)[:2] == ("stopped", user_name())


def test_a_record_that_only_a_later_version_can_mean_is_told_and_let_alone(
    kernel: Any, command: Any
) -> None:
    with kernel() as k:
        folder = folder_of(k)
        record = folder.read()
        file = folder.path / "record.json"
        later = json.dumps({**asdict(record), "version": VERSION + 1, "made": "otherwise"})
        file.write_text(later)
        left_out = f"Left out: {record.sandbox_id}, whose records a later version of"
        assert left_out in command("list")
        for words in (("stop", "--all"), ("limits", record.sandbox_id, "pids=99")):
            assert "runs" in command(*words)
        command("gc")
        assert file.read_text() == later
        assert k.manager.is_alive()
        folder.write(record)
