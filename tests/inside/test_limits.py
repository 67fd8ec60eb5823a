"""Attempted escapes: by using more than one's share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from boxes import close_nurseries, request_for, run

from sandbox_provisioner import handle, host, launch
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.host import HostFacts, WorkdirFacts
from sandbox_provisioner.places import disk_of
from sandbox_provisioner.records import all_records
from sandbox_provisioner.spec import Limits
from sandbox_provisioner.told import EndKind

pytestmark = pytest.mark.requires("userns")

MIB = 1 << 20


def fill_memory():
    kept = []
    while True:
        kept.append(bytearray(b"x" * (8 << 20)))


def add(one, other):
    return one + other


@pytest.mark.requires("cgroup-memory")
def test_more_memory_than_allowed_ends_this_sandbox_and_says_so(sandbox, new_folder):
    with sandbox(limits=Limits(memory_bytes=96 * MIB)) as box, sandbox() as other:
        box.send(fill_memory)
        story = box.wait()
        assert story.oom_killed
        assert story.signal == 9
        assert story.memory_limit_bytes == 96 * MIB
        assert story.memory_peak_bytes is not None
        assert 64 * MIB < story.memory_peak_bytes <= 96 * MIB
        assert "reached its memory limit of 96 MiB" in story.reason
        assert "mem_limit" in story.reason
        assert other.call(add, 1, 1) == 2
        assert other.handle.poll() is None


@pytest.mark.requires("cgroup-memory")
def test_a_child_that_takes_too_much_memory_does_not_go_unnoticed(sandbox):
    def in_a_child():
        import os

        child = os.fork()
        if child == 0:
            fill_memory()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    with sandbox(limits=Limits(memory_bytes=96 * MIB)) as box:
        try:
            assert box.call(in_a_child, using=(fill_memory,)) == -9
        except EOFError:  # v2 ends them all at once
            assert box.wait().oom_killed
        assert box.handle.usage().oom_kills >= 1


@pytest.mark.requires("cgroup-memory")
@pytest.mark.parametrize("place", ["/tmp", "/dev/shm"])
def test_files_in_memory_are_charged_to_the_sandbox(sandbox, place):
    def write(place):
        with open(f"{place}/file", "wb", buffering=0) as file:
            for _ in range(1024):
                file.write(bytes(1 << 20))

    limits = Limits(memory_bytes=96 * MIB, shm_bytes=1 << 30, tmp_bytes=1 << 30)
    with sandbox(limits=limits) as box:
        box.send(write, place)
        assert box.wait().oom_killed


@pytest.mark.requires("cgroup-memory")
def test_many_empty_files_are_charged_to_the_sandbox(sandbox):
    def write():
        import os

        try:
            for number in range(1 << 20):
                os.close(os.open(f"/tmp/{number}", os.O_CREAT))
        except OSError as error:
            return error.strerror

    with sandbox(limits=Limits(memory_bytes=48 * MIB, tmp_bytes=1 << 30)) as box:
        box.send(write)
        try:
            assert box.receive() == "No space left on device"
        except EOFError:
            assert box.wait().oom_killed


def touch_more_than_there_is(folder):
    """Of a file whose pages nobody has reserved: open(2), ftruncate(2), mmap(2)."""
    import mmap
    import os

    file = os.open(f"{folder}/sparse", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 64 << 20)
    mapped = mmap.mmap(file, 64 << 20)
    for page in range(0, 64 << 20, 4096):
        mapped[page] = 1


@pytest.mark.parametrize(
    ("folder", "kind", "option"),
    [("/dev/shm", EndKind.SHM_FULL, "shm_limit"), ("/tmp", EndKind.TMP_FULL, "tmp_limit")],
)
def test_a_mapping_that_finds_its_folder_full_says_which_and_what_raises_it(
    sandbox, folder, kind, option
):
    with sandbox(limits=Limits(shm_bytes=8 * MIB, tmp_bytes=8 * MIB)) as box:
        box.send(touch_more_than_there_is, folder)
        story = box.wait()
        assert (story.kind, story.signal) == (kind, signal.SIGBUS)
        assert f"{folder} was full, whose size is 8 MiB" in story.reason
        assert option in story.reason


def test_a_bus_error_of_another_cause_blames_no_folder(sandbox, workdir):
    def touch_what_is_cut_off(path):
        import mmap
        import os

        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(file, 4096)
        mapped = mmap.mmap(file, 4096)
        os.ftruncate(file, 0)
        mapped[0] = 1

    with sandbox() as box:
        box.send(touch_what_is_cut_off, f"{workdir}/short")
        story = box.wait()
        assert (story.kind, story.signal) == (EndKind.SIGNAL, signal.SIGBUS)
        assert "full" not in story.reason


@pytest.mark.requires("cgroup-memory")
def test_a_smaller_sandbox_than_a_python_needs_says_what_it_died_of(sandbox):
    argv = [sys.executable, "-c", "kept = b'x' * (64 << 20); print('alive')"]
    with sandbox(argv, limits=Limits(memory_bytes=32 * MIB)) as box:
        story = box.wait()
        assert box.readline() == b""
        assert story.oom_killed
        assert "32 MiB" in story.reason


@pytest.mark.requires("cgroup-io")
def test_reading_the_work_directorys_disk_takes_the_time_that_its_cap_says(sandbox, workdir):
    """Only the least that it may take: a busy machine may take longer."""

    def read_directly(path):
        import mmap
        import os
        import time

        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, 1 << 20)  # O_DIRECT wants whole pages
        begin, count = time.monotonic(), 0
        while got := os.readv(fd, [buffer]):
            count += got
        return count, time.monotonic() - begin

    assert disk_of(os.stat(workdir).st_dev)
    data = workdir / "data"
    data.write_bytes(bytes(4 * MIB))
    fd = os.open(data, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    with sandbox(limits=Limits(io_bytes_per_second=2 * MIB)) as box:
        count, seconds = box.call(read_directly, str(data))
    assert count == 4 * MIB
    assert seconds > 1.0


@pytest.mark.requires("cgroup-io")
def test_a_cap_on_a_disk_that_is_none_is_refused(launcher, monkeypatch):
    monkeypatch.setattr(launch, "disk_of", lambda device: "")
    request = request_for("/dev/shm", limits=Limits(io_bytes_per_second=2 * MIB))
    with pytest.raises(HostError, match=r"cap disk traffic at 2 MiB a second: .*on no disk"):
        launcher.tree(request, HostFacts.probe(), WorkdirFacts.nowhere(), "test")


@pytest.mark.requires("cgroup-pids")
def test_a_fork_bomb_meets_its_cap_and_ends_with_the_sandbox(sandbox):
    def bomb():
        import os
        import signal

        count = 0
        try:
            while count < 1 << 12:
                if os.fork() == 0:
                    while True:
                        signal.pause()
                count += 1
        except OSError as error:
            return count, error.errno
        return count, 0

    with sandbox(limits=Limits(pids=40)) as box:
        count, number = box.call(bomb)
        assert (count < 40, number) == (True, 11)
        assert box.handle.usage().pids_limit_hits >= 1
        begin = time.monotonic()
        box.close()
        assert time.monotonic() - begin < 2


def start_too_many(status):
    import os
    import signal

    try:
        while True:
            if os.fork() == 0:
                signal.pause()
    except OSError:
        if status is not None:
            os._exit(status)


@pytest.mark.requires("cgroup-pids")
@pytest.mark.parametrize("status", [0, 3])
def test_who_fails_just_after_it_was_refused_a_process_is_told_why(sandbox, status):
    with sandbox(limits=Limits(pids=20)) as box:
        box.send(start_too_many, status)
        story = box.wait()
        assert story.kind is (EndKind.PROCESSES_CAP if status else EndKind.EXIT)
        assert ("pids_limit" in story.reason) is bool(status)


@pytest.mark.requires("cgroup-pids")
def test_a_process_that_was_refused_before_is_not_why_a_kernel_ends(sandbox, monkeypatch):
    def fail():
        import os

        os._exit(3)

    monkeypatch.setattr(handle, "_OUTLIVED_SECONDS", 0.0)
    with sandbox(limits=Limits(pids=20)) as box:
        box.call(start_too_many, None)
        for _ in range(2):
            run(box.handle.look())
        box.send(fail)
        assert box.wait().kind is EndKind.EXIT


@pytest.mark.requires("cgroup-pids")
def test_threads_count_as_processes(sandbox):
    def start_threads():
        import threading

        stop = threading.Event()
        threads = []
        try:
            for _ in range(1 << 12):
                thread = threading.Thread(target=stop.wait)
                thread.start()
                threads.append(thread)
        except RuntimeError as error:
            return len(threads), str(error)
        finally:
            stop.set()

    with sandbox(limits=Limits(pids=40)) as box:
        count, answer = box.call(start_threads)
        assert count < 40
        assert "can't start new thread" in answer


@pytest.mark.requires("cgroup-cpu")
def test_threads_that_spin_get_no_more_time_than_allowed(sandbox):
    def spin(seconds):
        import os
        import time

        for _ in range(3):
            if os.fork() == 0:
                while True:
                    pass
        begin = time.monotonic()
        while time.monotonic() - begin < seconds:
            pass

    with sandbox(limits=Limits(cpu_cores=0.25)) as box:
        # The answer too is made by one who has a quarter of a quarter: time it from outside.
        begin, before = time.monotonic(), box.handle.usage().cpu_seconds
        box.call(spin, 2)
        lasted, used = time.monotonic() - begin, box.handle.usage().cpu_seconds - before
    assert used / lasted < 0.25 * 1.3


def test_a_flood_of_output_is_not_kept(sandbox):
    argv = [sys.executable, "-c", "import os\nfor _ in range(4000): os.write(2, b'x' * 4096)"]
    with sandbox(argv, pump=True, stderr=subprocess.DEVNULL) as box:
        assert len(box.wait().stderr_tail) <= 8192


def wait_in_streams():
    """Inside: how many bytes were sent, of those that nobody has read."""
    import socket

    sent, kept = 0, []
    listener = socket.create_server(("127.0.0.1", 0))
    for _ in range(300):
        ours = socket.create_connection(listener.getsockname())
        kept += [ours, listener.accept()[0]]
        ours.setblocking(False)
        try:
            while True:
                sent += ours.send(bytes(1 << 16))
        except BlockingIOError:
            continue
    return sent


def wait_in_datagrams():
    """Inside: the same, of datagrams, which are lost where there is no room."""
    import socket

    made = [socket.socket(type=socket.SOCK_DGRAM) for _ in range(600)]
    for receiver in made:
        receiver.bind(("127.0.0.1", 0))
        receiver.setblocking(False)
        for _ in range(5):
            made[0].sendto(bytes(60_000), receiver.getsockname())
    found = 0
    for receiver in made:
        try:
            while True:
                found += len(receiver.recv(1 << 16))
        except BlockingIOError:
            continue
    return found


@pytest.mark.requires("cgroup-memory")
@pytest.mark.parametrize("fill", [wait_in_streams, wait_in_datagrams])
def test_what_waits_in_sockets_is_capped_too(sandbox, fill):
    with sandbox(limits=Limits(memory_bytes=64 * MIB)) as box:
        box.send(fill)
        try:
            assert MIB < box.receive() < 80 * MIB
        except EOFError:  # where they count as memory of its own
            assert box.wait().oom_killed


@pytest.mark.requires("cgroup-cpu", "root")
def test_boxes_that_spin_count_as_one_without_a_cap(sandbox):
    """On one CPU: many processes in boxes, each of a session of its own (sched(7): autogroups), and
    one of the host's, which would have a fortieth of it."""

    def spin(cpu):
        import os

        os.sched_setaffinity(0, [cpu])
        for _ in range(20):
            if os.fork() == 0:
                os.setsid()
                while True:
                    pass

    cpu = min(os.sched_getaffinity(0))
    with sandbox() as one, sandbox() as other:
        one.call(spin, cpu)
        other.call(spin, cpu)
        code = (
            f"import os, time; os.sched_setaffinity(0, [{cpu}]); b = time.monotonic()\n"
            "while time.monotonic() - b < 2: pass\nprint(time.process_time())"
        )
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert float(told.stdout) > 0.2


@pytest.fixture
def narrow_group(monkeypatch, new_folder):
    """A group above all sandboxes of this test, with a cap of 96 MiB."""
    found = host.survey()
    base = f"{found.bases['memory']}/test-{os.path.basename(new_folder())}"
    os.mkdir(base)
    (Path(base) / "memory.limit_in_bytes").write_text(str(96 * MIB))
    narrow = replace(found, bases={**found.bases, "memory": base})
    monkeypatch.setattr(host, "survey", lambda: narrow)
    yield base
    close_nurseries()  # they are below it as well
    os.rmdir(base)


@pytest.mark.slow("memory fills up twice")
@pytest.mark.requires("root", "cgroup-v1", "cgroup-memory")
@pytest.mark.parametrize("own", [1 << 30, None])
def test_a_group_above_that_was_full_is_named_and_not_the_sandboxs_own_limit(
    sandbox, narrow_group, own
):
    with sandbox(limits=Limits(memory_bytes=own)) as box:
        box.send(fill_memory)
        story = box.wait()
        assert story.kind is EndKind.SURROUNDINGS_MEMORY
        assert f"the group {narrow_group}, with a memory limit of 96 MiB" in story.reason
        assert "its memory limit of" not in story.reason


def person(name):
    """Somebody whom no other run knows: groups are named after people, for all of the machine."""
    return f"{name}-{uuid.uuid4().hex[:8]}"


def groups_in(directory):
    return [path for path in directory.iterdir() if path.is_dir()]


def of_person(name, mib):
    """How a box of theirs is started, who may have so much memory together."""
    group = f"hub/{name}"
    return {"below": f"{group}/kernels", "sums": {group: Limits(memory_bytes=mib * MIB)}}


@pytest.mark.requires("root", "cgroup-v1", "cgroup-memory")
def test_all_boxes_of_a_person_share_what_the_person_has(sandbox):
    """The other one, and a box of somebody else, live on."""
    ann, bob = person("ann"), person("bob")
    of_ann, of_bob = of_person(ann, 96), of_person(bob, 96)
    with sandbox(**of_ann) as one, sandbox(**of_ann) as other, sandbox(**of_bob) as third:
        told = [record for _, record in all_records(sandbox.launcher.runtime())]
        assert [record.tree for record in told if record.kind != "nursery"] == [
            f"hub/{name}/kernels/{box.handle.record.sandbox_id}"
            for name, box in ((ann, one), (ann, other), (bob, third))
        ]
        one.send(fill_memory)
        story = one.wait()
        assert story.kind is EndKind.SURROUNDINGS_MEMORY
        whose = (
            f"the memory of all that {ann} runs here together, for which a limit of 96 MiB is set"
        )
        assert whose in story.reason
        assert "its memory limit of" not in story.reason
        assert other.call(add, 1, 2) == third.call(add, 1, 2) == 3


@pytest.mark.requires("root", "cgroup-v1", "cgroup-memory")
def test_a_sum_grows_and_shrinks_with_the_next_start(sandbox):
    ann = person("ann")
    with sandbox(**of_person(ann, 96)) as box:
        group = Path(box.handle.record.cgroup_bases["memory"], "sandbox-provisioner/hub", ann)
        for mib in (192, 128):
            with sandbox(**of_person(ann, mib)):
                found = int((group / "memory.limit_in_bytes").read_text())
                swap = group / "memory.memsw.limit_in_bytes"
                assert found == mib * MIB
                assert not swap.exists() or 0 <= int(swap.read_text()) - found < MIB
    close_nurseries()  # they are below it as well
    # Where no other lane has people here, what has them is gone as well.
    assert not group.exists() and (not group.parent.exists() or groups_in(group.parent))


def test_who_was_killed_beside_it_is_not_why_a_sandbox_without_a_group_ended(
    sandbox, new_folder, monkeypatch
):
    """Kills are counted in the server's own group then, whose ever they were."""

    def end_itself():
        import os

        os.kill(os.getpid(), 9)

    group = new_folder()
    (group / "memory.failcnt").write_text("0")
    counted = group / "memory.oom_control"
    counted.write_text("oom_kill 0\n")
    found = replace(host.survey(), version=0, bases={}, surroundings=(1, str(group)))
    monkeypatch.setattr(host, "survey", lambda: found)
    with sandbox() as box:
        counted.write_text("oom_kill 1\n")
        box.send(end_itself)
        story = box.wait()
        assert (story.kind, story.signal) == (EndKind.SIGNAL, signal.SIGKILL)
        assert "It may have been for want of memory" in story.reason
