"""A start goes well or says what failed, whose fault it is, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import resource
import shutil
import subprocess
import sys

import boxes
import pytest
from facilities import missing
from golden import verbs_of
from stand_in import in_place_of_the_gateway

from sandbox_provisioner import stages
from sandbox_provisioner.caller import Caller
from sandbox_provisioner.contract import Stdio
from sandbox_provisioner.errors import (
    HostError,
    InternalError,
    LaunchError,
    SandboxError,
    SpecError,
)
from sandbox_provisioner.inside.wire import FAIL_AT
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.records import RecordFolder
from sandbox_provisioner.spec import Limits, Network, NetworkWish, Volume
from sandbox_provisioner.stages import SERVER_STEPS
from sandbox_provisioner.stem import interpreter as stem_interpreter
from sandbox_provisioner.stem import stem

pytestmark = pytest.mark.requires("userns")

MIB = 1 << 20
WHO = ("root", "user", "range")
VERBS = sorted(
    {v for kind in ("cold", "gateway", "disk") for who in WHO for v in verbs_of(f"{kind}-{who}")}
)


def add(one, other):
    return one + other


@pytest.fixture
def everything(workdir, new_folder, monkeypatch):
    """The options of a start whose plan has nearly every step."""
    monkeypatch.setenv("HOME", str(workdir))
    monkeypatch.chdir(workdir)
    (workdir / ".git").mkdir()
    (workdir / ".git/config").touch()
    limits = Limits(pids=64, memory_bytes=256 * MIB, interrupt_share=0.92)
    # A Python of no virtual environment, which leaves out what a user has installed for herself.
    python, own = stem_interpreter(), new_folder()
    library = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (own / library).mkdir(parents=True)
    with in_place_of_the_gateway(monkeypatch):
        yield {
            "argv": (python, "-c", boxes.PROGRAM),
            "environment": {**os.environ, "PYTHONUSERBASE": str(own)},
            "limits": dataclasses.replace(
                Limits() if missing("cgroup-memory") else limits, disk_bytes=16 * MIB
            ),
            "network": NetworkWish(mode=Network.GATEWAY),
            "volumes": (Volume(source=str(new_folder()), target="/data"),),
            "connection_file": ("kernel.json", "{}"),
            "survive_server": True,
            "pump": True,
        }


@pytest.mark.parametrize("step", [*VERBS, *SERVER_STEPS])
def test_a_failing_step_is_named_and_leaves_nothing(
    sandbox, everything, monkeypatch, step, workdir, runtime_dir
):
    has_it = {one.verb for one in sandbox.explain(**everything).steps} | {*SERVER_STEPS}
    if step not in has_it:
        pytest.skip(f"a start by this user on this host has no step {step}")
    before = sorted(workdir.rglob("*"))
    monkeypatch.setenv(FAIL_AT, step)
    with pytest.raises(LaunchError, match=rf"\[{step}( [^]]+)?\].*made to fail") as caught:
        with sandbox(**everything):
            pass
    assert caught.value.step == step
    assert sorted(workdir.rglob("*")) == before
    # The server may fail before it takes the lock.
    assert os.listdir(runtime_dir) in [["lock"], *([[]] if step in SERVER_STEPS else [])]


@pytest.mark.parametrize("step", ["exit-file", "pivot", "fork-kernel", "become", *SERVER_STEPS])
def test_a_mistake_of_ours_is_told_as_one_and_leaves_nothing(
    sandbox, monkeypatch, step, workdir, runtime_dir
):
    """In the server, the launcher, PID 1 and the kernel's process."""
    monkeypatch.setenv(FAIL_AT, f"{step}:mistake")
    with pytest.raises(InternalError) as caught, sandbox():
        pass
    told = caught.value.for_people()
    assert "AssertionError: made to fail" in told
    assert re.search(r"inside/wire\.py:\d+", told), told
    assert "jupyter sandbox doctor --json" in told
    assert (step in told) is (step not in SERVER_STEPS)
    assert set(os.listdir(runtime_dir)) <= {"lock"}


def test_of_many_places_the_one_that_failed_is_named(sandbox, new_folder, monkeypatch):
    """The step of the second volume, not the first step of that verb."""
    volumes = [Volume(source=str(new_folder()), target=f"/data/{n}") for n in range(3)]
    real = LocalLauncher.look

    def look(launcher, request, opened):
        site, tree = real(launcher, request, opened)
        with open("/proc/self/status") as other:
            os.dup2(other.fileno(), site.volumes[1].place.fd, inheritable=False)
        return site, tree

    monkeypatch.setattr(LocalLauncher, "look", look)
    with pytest.raises(SandboxError) as caught, sandbox(volumes=tuple(volumes)):
        pass
    told = caught.value.for_people()
    assert "/data/1" in told
    assert f"(from {volumes[1].source})" in told
    assert "/data/0" not in told


def test_what_is_the_servers_own_is_told_by_who_asks_and_not_by_who_launches(
    runtime_dir, workdir, monkeypatch
):
    """What the server has, too, is no wish for this kernel; a server without it has wished it."""

    def variable():
        import os

        return os.environ.get("FOR_THIS_KERNEL")

    monkeypatch.setenv("FOR_THIS_KERNEL", "yes")
    nobody = dataclasses.replace(Caller.this_process(), environment={})
    found = []
    for caller in (Caller.this_process, lambda: nobody):
        launcher = LocalLauncher(runtime_dir=str(runtime_dir), caller=caller)
        with boxes.Boxes(launcher, workdir)() as box:
            found.append(box.call(variable))
    assert found == [None, "yes"]


COLD_STAGES = [
    "spawn-launcher", "survey", "make-record", "make-image", "compile-plan", "await-launcher",
    "create-cgroup", "perform", "write-record",
]  # fmt: skip


def test_a_start_names_its_stages_in_their_order(sandbox):
    heard = []
    with stages.heard_by(heard.append), sandbox():
        pass
    assert heard == COLD_STAGES


@pytest.mark.parametrize("stage", sorted({*COLD_STAGES} - {*SERVER_STEPS}))
def test_a_start_can_be_made_to_fail_at_a_stage_that_makes_nothing(
    sandbox, workdir, runtime_dir, monkeypatch, stage
):
    monkeypatch.setenv(FAIL_AT, stage)
    with pytest.raises(LaunchError, match="made to fail") as caught, sandbox():
        pass
    assert caught.value.step == stage
    assert set(os.listdir(runtime_dir)) <= {"lock"}
    assert os.listdir(workdir) == []


def test_a_start_that_is_cancelled_leaves_nothing(launcher, workdir, runtime_dir):
    async def start_and_cancel():
        task = asyncio.ensure_future(launcher.start(boxes.request_for(workdir)))
        # One turn of the loop: the launcher is spawned, and its report is waited for.
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(start_and_cancel())
    assert set(os.listdir(runtime_dir)) <= {"lock"}


def test_a_start_that_is_cancelled_when_its_record_is_written_leaves_nothing(
    launcher, workdir, runtime_dir, monkeypatch
):
    """Its kernel runs by then; there is a handle for nobody."""
    finish = RecordFolder.finish

    async def start():
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def cancelled(folder, record):
            loop.call_soon_threadsafe(task.cancel)
            return finish(folder, record)

        monkeypatch.setattr(RecordFolder, "finish", cancelled)
        await launcher.start(boxes.request_for(workdir))

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(start())
    assert set(os.listdir(runtime_dir)) <= {"lock"}


@pytest.mark.parametrize("free", [0, 1, 2, 3, 4, 8, 16])
def test_a_start_without_descriptors_says_so_and_leaves_nothing(
    launcher, workdir, runtime_dir, free
):
    stem.end()
    with few_descriptors(free), pytest.raises(HostError, match="ulimit -n"):
        asyncio.run(launcher.start(boxes.request_for(workdir)))
    assert set(os.listdir(runtime_dir)) <= {"lock"}


@pytest.mark.parametrize("free", [0, 4])
def test_a_sandbox_can_be_ended_without_descriptors(sandbox, runtime_dir, free):
    loop = asyncio.new_event_loop()  # which has its own
    with sandbox() as box:
        with few_descriptors(free):
            loop.run_until_complete(box.handle.close())
        assert os.listdir(runtime_dir) == ["lock"]
    loop.close()


@contextlib.contextmanager
def few_descriptors(free):
    """So many are free for what is opened now."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(off_loop(len, ""))  # a thread of ours
    loop.close()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 64, before[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        # asyncio.run opens an epoll descriptor and a pair of sockets.
        for _ in range(min(free + 3, len(taken))):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for fd in taken:
            os.close(fd)


def test_a_runtime_directory_that_has_gone_stops_no_end(sandbox, runtime_dir):
    with sandbox() as box:
        shutil.rmtree(runtime_dir)
        boxes.run(box.handle.close())


# -- programs and directories


def test_a_program_that_does_not_exist_is_the_kernel_jsons_fault(sandbox):
    with pytest.raises(LaunchError, match="no such program") as caught:
        with sandbox(["/no/such/program"]):
            pass
    assert caught.value.step == "find-kernel"


def test_a_program_that_cannot_be_executed_is_told_from_a_missing_one(sandbox, workdir):
    (workdir / "program").write_text("#!/bin/sh\n")
    with pytest.raises(LaunchError, match="it is not executable"):
        with sandbox([str(workdir / "program")]):
            pass


@pytest.mark.requires("root")
def test_a_program_that_only_root_may_read_says_so(sandbox, new_folder):
    program = new_folder() / "bin" / "program"
    program.parent.mkdir(mode=0o700)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    with pytest.raises(LaunchError, match=r"not readable.*chmod -R o\+rX") as caught:
        with sandbox([str(program)]):
            pass
    assert caught.value.step == "execute"


def test_a_script_whose_interpreter_is_missing_says_so(sandbox, workdir):
    script = workdir / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    with pytest.raises(LaunchError, match="interpreter") as caught:
        with sandbox([str(script)]):
            pass
    assert caught.value.step == "execute"


def test_a_starting_directory_that_does_not_exist_is_named(sandbox, workdir):
    missing_folder = str(workdir / "missing")
    with pytest.raises(LaunchError, match=missing_folder) as caught:
        with sandbox(cwd=missing_folder):
            pass
    assert caught.value.step == "chdir"


def test_a_volume_that_does_not_exist_is_named(sandbox):
    with pytest.raises(SpecError, match="/no/such/volume"):
        with sandbox(volumes=(Volume(source="/no/such/volume", target="/data"),)):
            pass


SYSTEM = (
    "/",
    "/home",
    "/etc",
    "/usr/share",
    "/proc",
    "/tmp",
    "/var",
    "/run",
    "/dev/shm",
    "/root/..",
)


@pytest.mark.parametrize("path", SYSTEM)
def test_a_directory_of_the_system_is_no_work_directory(sandbox, path):
    with pytest.raises(SpecError, match="work directory"):
        with sandbox(workdir=path):
            pass


@pytest.mark.parametrize(
    "path", ["relative", "./here", "/tmp/../etc", "/tmp//x", "/a\nb", "/a\0b", ""]
)
def test_a_path_that_is_not_plain_is_no_work_directory(path):
    with pytest.raises(SpecError, match="work directory"):
        boxes.request_for(path)


def test_a_work_directory_that_is_a_file_or_missing_is_refused(sandbox, workdir):
    (workdir / "file").touch()
    for name in ("file", "missing"):
        with pytest.raises(SpecError, match=name), sandbox(workdir=workdir / name):
            pass


@pytest.mark.parametrize("path", ["/etc", "/", "/usr"])
def test_a_link_to_a_directory_of_the_system_is_no_work_directory(sandbox, workdir, path):
    (workdir / "link").symlink_to(path)
    with pytest.raises(SpecError, match="work directory"), sandbox(workdir=workdir / "link"):
        pass


def test_a_work_directory_behind_a_link_shows_at_the_path_that_was_asked_for(
    run_inside, workdir, new_folder
):
    def look():
        import os

        open("made", "w").close()
        return os.getcwd()

    real, link = workdir / "real", new_folder()
    real.mkdir()
    link.rmdir()
    link.symlink_to(real)  # in the host's /tmp
    try:
        assert run_inside(look, workdir=link) == str(link)
        assert (real / "made").exists()
    finally:
        link.unlink()


# -- the runtime directory


def test_a_runtime_directory_too_long_for_sockets_is_refused(workdir, new_folder):
    path = new_folder() / ("x" * 80)
    launcher = LocalLauncher(runtime_dir=str(path))
    with pytest.raises(HostError, match=r"107 bytes.*runtime_dir"):
        boxes.start(launcher, boxes.request_for(workdir))
    assert not path.exists()


@pytest.mark.parametrize("place", ["workdir", "volume"])
@pytest.mark.parametrize("below", ["", "runtime"])
def test_a_runtime_directory_in_what_the_kernel_is_given_is_refused(
    workdir, new_folder, place, below
):
    """Else it could reach the sockets of every other kernel."""
    given = workdir if place == "workdir" else new_folder()
    volumes = (Volume(source=str(given), target="/data"),) if place == "volume" else ()
    launcher = LocalLauncher(runtime_dir=str(given / below))
    with pytest.raises(SpecError, match=rf"lies in {given}|{given} lies in it"):
        boxes.start(launcher, boxes.request_for(workdir, volumes=volumes))


def test_what_the_kernel_is_given_is_no_part_of_the_runtime_directory(runtime_dir):
    workdir = runtime_dir / "notebooks"
    workdir.mkdir()
    launcher = LocalLauncher(runtime_dir=str(runtime_dir))
    with pytest.raises(SpecError, match=f"{workdir} lies in it"):
        boxes.start(launcher, boxes.request_for(workdir))
    workdir.rmdir()


def test_a_home_may_hold_the_runtime_directory_where_covers_hide_it(workdir, monkeypatch):
    def exists(path):
        import os

        return os.path.exists(path)

    monkeypatch.setenv("HOME", str(workdir))
    launcher = LocalLauncher(runtime_dir=str(workdir / ".local/share/jupyter/sandboxes"))
    box = boxes.start(launcher, boxes.request_for(workdir))
    try:
        assert box.call(exists, f"{workdir}/.local/share/jupyter/sandboxes") is False
    finally:
        box.close()


def test_a_runtime_directory_that_others_may_write_to_is_refused(workdir, new_folder):
    folder = new_folder()
    folder.chmod(0o777)
    with pytest.raises(HostError, match="others than this user"):
        boxes.start(LocalLauncher(runtime_dir=str(folder)), boxes.request_for(workdir))


FULL = """
import os, sys
import subprocess
from pathlib import Path
import boxes
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.launch import LocalLauncher
runtime, workdir, what = sys.argv[1:]
options = "size=16k,mode=0700" if what == "blocks" else "nr_inodes=3,mode=0700"
subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", runtime], check=True)
if what == "blocks":
    try:
        Path(runtime, "filler").write_bytes(bytes(1 << 20))
    except OSError:
        pass
try:
    boxes.start(LocalLauncher(runtime_dir=runtime), boxes.request_for(workdir))
except HostError as error:
    print(error)
print(sorted(os.listdir(runtime)))
"""


@pytest.mark.requires("root", "unshare")
@pytest.mark.parametrize("what", ["blocks", "inodes"])
def test_a_full_runtime_directory_says_so_and_gets_no_fuller(new_folder, what):
    words = [str(new_folder()), str(new_folder()), what]
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", FULL, *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert "No space left on device" in done.stdout, done.stderr
    left = done.stdout.splitlines()[-1]
    assert left == ("['filler', 'lock']" if what == "blocks" else "['lock']")


ENDING = """
import errno, json, os, subprocess, sys
from pathlib import Path
import boxes
from sandbox_provisioner.sweeping import sweep
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.launch import LocalLauncher
runtime, workdir, what = sys.argv[1:]
def mount(*words):
    subprocess.run(["mount", *words, runtime], check=True)
def fill():
    try:
        Path(runtime, "filler").write_bytes(bytes(1 << 20))
    except OSError as error:
        assert error.errno == errno.ENOSPC
def use_up_inodes():
    try:
        for number in range(100):
            Path(runtime, f"filler{number}").mkdir()
    except OSError as error:
        assert error.errno == errno.ENOSPC
def cover_read_only():
    # What somebody has open for writing cannot be made read-only.
    mount("--bind", runtime)
    mount("-o", "remount,bind,ro")
def vanish():
    subprocess.run(["umount", "--lazy", runtime], check=True)
    os.rmdir(runtime)
SPOIL = {"full": fill, "without-inodes": use_up_inodes, "read-only": cover_read_only,
    "vanished": vanish}
mount("-t", "tmpfs", "-o", "size=64k,nr_inodes=40,mode=0700", "none")
os.environ["HOME"] = workdir
launcher = LocalLauncher(runtime_dir=runtime)
box = boxes.start(launcher, boxes.request_for(workdir, ["/bin/sh", "-c", "read x; exit 7"]))
covered, groups = len(os.listdir(workdir)), box.handle._tree.groups
SPOIL[what]()
told = ""
story = box.finish()
try:
    box.close()
except HostError as error:
    told = str(error)
groups = [group for group in groups if os.path.isdir(group)]
if what == "read-only":
    subprocess.run(["umount", runtime], check=True)
os.makedirs(runtime, mode=0o700, exist_ok=True)
for name in filter(lambda name: name.startswith("filler"), os.listdir(runtime)):
    path = Path(runtime, name)
    path.unlink() if path.is_file() else path.rmdir()
sweep(Path(runtime))
left = sorted(set(os.listdir(runtime)) - {"lock"})
print(json.dumps([covered > 20, story.code, told, groups, os.listdir(workdir), left]))
"""


@pytest.mark.requires("root", "unshare")
@pytest.mark.parametrize("what", ["full", "without-inodes", "read-only", "vanished"])
def test_a_kernel_ends_and_leaves_nothing_where_its_runtime_directory_is(new_folder, what):
    words = [str(new_folder()), str(new_folder()), what]
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", ENDING, *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1:] == ['[true, 7, "", [], [], []]'], done.stderr


# -- caps


def test_a_cap_too_small_for_a_start_is_refused_before_it():
    for wish in ({"memory_bytes": MIB}, {"pids": 1}, {"cpu_cores": 0}, {"tmp_bytes": 0}):
        with pytest.raises(SpecError, match="too small"):
            Limits(**wish)


@pytest.mark.requires("cgroup-memory")
def test_the_smallest_memory_is_enough_for_the_launcher(sandbox):
    with sandbox(["/bin/cat"], limits=Limits(memory_bytes=32 * MIB)) as box:
        box.write(b"alive\n")
        assert box.readline() == b"alive\n"


@pytest.mark.requires("cgroup-pids")
def test_the_fewest_processes_are_enough_for_the_launcher(sandbox):
    with sandbox(["/bin/cat"], limits=Limits(pids=8)) as box:
        box.write(b"alive\n")
        assert box.readline() == b"alive\n"


# -- many


def test_thirty_starts_at_once_all_go_well(launcher, new_folder, runtime_dir):
    async def start_all():
        requests = [boxes.request_for(new_folder(), ["/bin/cat"]) for _ in range(30)]
        stdio = Stdio(subprocess.DEVNULL, subprocess.DEVNULL, None)
        handles = await asyncio.gather(*(launcher.start(r, stdio=stdio) for r in requests))
        stories = await asyncio.gather(*(handle.wait() for handle in handles))
        firsts = [handle.record.first_id for handle in handles]
        await asyncio.gather(*(handle.close() for handle in handles))
        return stories, firsts

    stories, firsts = asyncio.run(start_all())
    assert [story.code for story in stories] == [0] * 30
    if not missing("root"):
        assert len(set(firsts)) == 30
    assert os.listdir(runtime_dir) == ["lock"]


@pytest.mark.requires("root")
def test_a_start_gives_its_ids_back(sandbox, runtime_dir):
    """Which it gets depends on who else runs on this machine."""
    for _ in range(3):
        with sandbox() as box:
            assert f"{box.handle.record.first_id}.ids" in os.listdir(runtime_dir)
        assert os.listdir(runtime_dir) == ["lock"]


def test_every_error_tells_the_attempt_the_answer_and_the_remedy(sandbox):
    with pytest.raises(SandboxError) as caught, sandbox(["/no/such/program"]):
        pass
    error = caught.value
    assert str(error).startswith(f"Could not {error.attempt}: {error.answer}. ")
    assert error.remedy in str(error)
