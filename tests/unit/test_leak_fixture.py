"""The fixture that fails a test which leaves something behind really does so."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import leaks
import pytest
from boxes import run
from groups import ended
from leaks import Watch

from sandbox_provisioner.facilities.caps.cgroup import open_tree, survey
from sandbox_provisioner.performer import Performer
from sandbox_provisioner.records import Record, RecordFolder
from sandbox_provisioner.spec import Limits
from sandbox_provisioner.stem import stem

pytest_plugins = ["pytester"]


@pytest.fixture
def impatient(monkeypatch):
    """A leak that is made on purpose does not go by itself."""
    monkeypatch.setattr(leaks, "SETTLE_SECONDS", 0)


@pytest.fixture
def own_watch(impatient):
    """A second watch, which the leaks of this test are meant for."""
    watch = Watch()
    with pytest.MonkeyPatch.context() as patch:
        leaks.note_what_is_made(patch.setattr, watch)
        yield watch


def test_nothing_done_is_nothing_left(own_watch):
    assert own_watch.leaks() == []


def test_an_open_file_is_found(own_watch, tmp_path):
    with (tmp_path / "file").open("w"):
        assert own_watch.leaks() == [f"descriptor: {tmp_path / 'file'}"]
    assert own_watch.leaks() == []


def test_a_second_descriptor_of_the_same_file_is_found(tmp_path, impatient):
    with (tmp_path / "file").open("w") as file:
        watch = Watch()
        other = os.dup(file.fileno())
        assert watch.leaks() == [f"descriptor: {tmp_path / 'file'}"]
        os.close(other)


def test_an_open_pipe_is_found(own_watch):
    ends = os.pipe()
    assert own_watch.leaks() == [f"descriptor: {os.readlink(f'/proc/self/fd/{ends[0]}')}"]
    for end in ends:
        os.close(end)


def test_an_open_socket_is_found(own_watch):
    with socket.socket() as left:
        target = os.readlink(f"/proc/self/fd/{left.fileno()}")
        assert own_watch.leaks() == [f"descriptor: {target}"]


def test_a_running_child_and_a_dead_one_that_nobody_waited_for_are_found(own_watch):
    child = subprocess.Popen(
        [sys.executable, "-SIc", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    )
    assert any(f"child: {child.pid} (" in line for line in own_watch.leaks())
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    (found,) = own_watch.leaks()
    assert found.startswith(f"child: {child.pid} (")
    assert found.endswith(") dead")
    child.wait()
    assert own_watch.leaks() == []


def test_the_process_that_launchers_are_forked_from_may_stay_and_a_launcher_may_not(own_watch):
    launcher = Performer()
    launcher.ask(stem)
    run(launcher.here())
    found = own_watch.leaks()
    (child,) = (line for line in found if line.startswith("child: "))
    assert child.startswith(f"child: {launcher.pid} (")
    assert len(found) > 1  # with our end of its socket
    run(launcher.end())
    assert own_watch.leaks() == []
    assert stem._process
    assert stem._process.poll() is None


def test_the_folder_of_a_sandbox_is_found(own_watch, runtime_dir):
    folder, _ = RecordFolder.create(runtime_dir, Record(sandbox_id="left"), ids=False)
    assert f"folder: {runtime_dir / 'left'}" in own_watch.leaks()
    folder.remove()
    assert own_watch.leaks() == []


def test_a_stand_in_is_found_but_not_what_a_user_wrote_over_it(own_watch, runtime_dir, workdir):
    folder, _ = RecordFolder.create(runtime_dir, Record(sandbox_id="left"), ids=False)
    stand_in = workdir / ".bashrc"
    stand_in.touch()
    folder.write(Record(sandbox_id="left", made=(("file", str(stand_in)),)))
    folder.remove()
    assert own_watch.leaks() == [f"stand-in: {stand_in}"]
    stand_in.write_text("alias ll='ls -l'\n")
    assert own_watch.leaks() == []
    stand_in.write_text("")
    stand_in.unlink()


@pytest.mark.requires("cgroup-pids")
def test_a_control_group_is_found(own_watch):
    tree = open_tree(survey(), "test-left", Limits(pids=8), lambda _: False, print)
    tree.create(Limits(pids=8))
    assert [line for line in own_watch.leaks() if "cgroup: " in line and "test-left" in line]
    ended(survey(), "test-left")
    assert own_watch.leaks() == []


@pytest.mark.requires("root", "unshare")
def test_a_mount_is_found(tmp_path):
    script = """
import os, subprocess, sys, leaks
leaks.SETTLE_SECONDS = 0
watch = leaks.Watch()
subprocess.run(["mount", "-t", "tmpfs", "none", sys.argv[1]], check=True)
print(watch.leaks())
"""
    command = ["unshare", "--mount", sys.executable, "-c", script, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert found.stdout == f"['mount: / {tmp_path}']\n"


@pytest.mark.requires("root", "unshare")
def test_a_link_is_found():
    script = """
import subprocess, leaks
leaks.SETTLE_SECONDS = 0
subprocess.run(["mount", "-t", "sysfs", "none", "/sys"], check=True)
watch = leaks.Watch()
subprocess.run(["ip", "link", "add", "left", "type", "veth", "peer", "over"], check=True)
print(watch.leaks())
"""
    command = ["unshare", "--mount", "--net", sys.executable, "-c", script]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if "Unknown device type" in found.stderr:
        pytest.skip("this kernel has no veth")
    assert found.stdout == "['network: /sys/class/net/left', 'network: /sys/class/net/over']\n"


def test_what_goes_by_itself_is_waited_for():
    watch = Watch()
    with contextlib.closing(socket.socket()) as one:
        left = os.dup(one.fileno())
    child = subprocess.Popen([sys.executable, "-SIc", ""])
    child.wait()
    os.close(left)
    assert watch.leaks() == []


def _conftest() -> str:
    return Path(__file__).parent.parent.joinpath("conftest.py").read_text()


@pytest.fixture
def inner(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    pytester.makeconftest(_conftest())
    return pytester


def test_a_whole_test_run_fails_on_a_leak_and_names_it(inner):
    inner.makepyfile("import os\ndef test_leaks(): os.open('/etc/hostname', os.O_RDONLY)")
    result = inner.runpytest_subprocess("-p", "no:asyncio")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*descriptor: /etc/hostname*"])


NEEDS_V7 = """
import pytest, facilities
facilities._FACILITIES["cgroup-v7"] = lambda: "there is no such version yet"
@pytest.mark.requires("cgroup-v7")
def test_it(): raise AssertionError
"""


def test_a_missing_facility_skips_and_says_which(inner, monkeypatch):
    monkeypatch.delenv("SANDBOX_MUST_WORK", raising=False)
    inner.makepyfile(NEEDS_V7)
    result = inner.runpytest_subprocess("-p", "no:asyncio", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*requires cgroup-v7: there is no such version yet*"])


def test_a_missing_facility_fails_where_everything_must_work(inner, monkeypatch):
    monkeypatch.setenv("SANDBOX_MUST_WORK", "1")
    inner.makepyfile(NEEDS_V7)
    result = inner.runpytest_subprocess("-p", "no:asyncio")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*requires cgroup-v7: there is no such version yet*"])


def test_an_unknown_facility_is_an_error(inner):
    inner.makepyfile(NEEDS_V7.replace('requires("cgroup-v7")', 'requires("cgruop")'))
    inner.runpytest_subprocess("-p", "no:asyncio").assert_outcomes(errors=1)
