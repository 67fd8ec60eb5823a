"""What /proc and /sys tell of memory and CPUs is the box's, where it is capped, when it is read."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from probes import answer_of

from sandbox_provisioner.spec import Limits

pytestmark = pytest.mark.requires("userns", "cgroup-memory")

MIB = 1 << 20
CAP = 256 * MIB
CAPPED = {"limits": Limits(memory_bytes=CAP)}
ONE_CPU = {"limits": Limits(memory_bytes=CAP, cpu_cores=0.5)}


def meminfo():
    import re

    with open("/proc/meminfo") as file:
        return {name: int(kib) << 10 for name, kib in re.findall(r"(\w+): +(\d+) kB", file.read())}


def test_memory_is_the_boxs_at_the_moment_of_the_read(run_inside):
    """Nobody has read before: what was written at the start would tell of all of it as free."""

    def after_use():
        used = bytearray(64 << 20)
        found = meminfo()
        return [found[name] for name in ("MemTotal", "MemFree", "MemAvailable", "SwapTotal")], len(
            used
        )

    (total, free, available, swap), used = run_inside(after_use, using=(meminfo,), **CAPPED)
    assert (total, swap) == (CAP, 0)
    assert free <= CAP - used
    assert free <= available <= CAP - used + 16 * MIB


@pytest.mark.requires("cgroup-cpu")
def test_a_program_that_reads_them_before_anything_else_has_them_whole(sandbox):
    """They are written when somebody opens them, and not before."""
    with sandbox(["/bin/cat", "/proc/meminfo", "/proc/stat", "/proc/loadavg"], **ONE_CPU) as box:
        lines = list(iter(box.readline, b""))
    assert lines[0].split() == [b"MemTotal:", b"%d" % (CAP >> 10), b"kB"]
    assert [line.split()[0] for line in lines if line.startswith(b"cpu")] == [b"cpu", b"cpu0"]
    assert len(lines[-1].split()) == 5


def test_it_has_every_line_that_this_linux_has(run_inside):
    def names():
        return [line.split(":")[0] for line in open("/proc/meminfo")]

    assert run_inside(names, **CAPPED) == [
        line.split(":")[0] for line in Path("/proc/meminfo").read_text().splitlines()
    ]


def test_what_nobody_caps_is_the_machines(run_inside):
    def look():
        import os

        cpus = [line for line in open("/proc/stat") if line.startswith("cpu")]
        return meminfo()["MemTotal"], len(cpus), os.path.exists("/sys/devices/system/cpu")

    total, cpus, has_folder = run_inside(look, using=(meminfo,), limits=Limits())
    of_machine = re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())
    assert of_machine and total == int(of_machine[1]) << 10
    assert (cpus, has_folder) == ((os.cpu_count() or 0) + 1, False)


def test_cpus_are_as_many_as_the_cap_comes_to(run_inside):
    def look():
        import os

        names = [line.split()[0] for line in open("/proc/stat") if line.startswith("cpu")]
        processors = [line for line in open("/proc/cpuinfo") if line.startswith("processor")]
        online = open("/sys/devices/system/cpu/online").read().strip()
        folders = sorted(os.listdir("/sys/devices/system/cpu"))
        return os.cpu_count(), names, len(processors), online, folders

    assert run_inside(look, **ONE_CPU) == [
        1, ["cpu", "cpu0"], 1, "0", ["cpu0", "online", "possible", "present"],
    ]  # fmt: skip


@pytest.mark.requires("cgroup-cpu")
def test_cpu_time_is_the_boxs_at_the_moment_of_the_read(run_inside):
    def burn():
        import time

        while time.process_time() < 0.5:
            pass
        used, _, _, idle = map(int, open("/proc/stat").readline().split()[1:5])
        return used, idle, open("/proc/loadavg").read().split()

    used, idle, loads = run_inside(burn, limits=Limits(memory_bytes=CAP, cpu_cores=1))
    assert 40 <= used < 3000
    assert idle >= 0
    assert float(loads[0]) > 0 and loads[3].startswith("1/")


def test_nobody_inside_can_write_to_them_or_hold_up_who_reads(run_inside):
    def attempts():
        import fcntl
        import os

        def lease():
            with open("/proc/meminfo") as file:
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)

        path = "/proc/meminfo"
        calls = (
            lambda: open(path, "r+"),
            lambda: os.chmod(path, 0o666),
            lambda: os.truncate(path, 0),
            lambda: os.open(f"/proc/self/fd/{os.open(path, os.O_RDONLY)}", os.O_RDWR),
            lambda: os.open("/proc/1/fd", os.O_RDONLY),
        )
        return [answer_of(call) for call in calls], answer_of(lease), os.listdir("/")

    answers, lease, names = run_inside(attempts, using=(answer_of,), **CAPPED)
    assert set(answers) <= {"EROFS", "EACCES"}
    assert answers[1] == "EROFS"  # their owner, by whose rights PID 1 writes
    assert lease == "EINVAL"
    assert ".figures" not in names


def test_who_keeps_one_open_sees_it_change(run_inside):
    """inotify tells when PID 1 has written it."""

    def watch():
        import ctypes
        import os

        libc = ctypes.CDLL(None, use_errno=True)
        events = libc.inotify_init1(0)
        file = os.open("/proc/meminfo", os.O_RDONLY)
        modified = 2
        assert libc.inotify_add_watch(events, b"/proc/meminfo", modified) > 0
        before, free = len(os.pread(file, 1 << 14, 0)), free_kib(os.pread(file, 200, 0))
        used = bytearray(64 << 20)
        while free - free_kib(os.pread(file, 200, 0)) < 60 << 10:
            os.read(events, 4096)
        return len(used), before == len(os.pread(file, 1 << 14, 0))

    def free_kib(text):
        return int(text.split(b"MemFree:")[1].split()[0])

    assert run_inside(watch, using=(free_kib,), **CAPPED) == [64 << 20, True]


def test_who_opens_one_in_a_loop_makes_pid_1_write_ten_times_a_second_at_the_most(sandbox):
    def in_a_loop():
        import time

        began = time.monotonic()
        for _ in range(5000):
            open("/proc/meminfo").close()
        return time.monotonic() - began

    def switches(pid):
        text = Path(f"/proc/{pid}/status").read_text()
        return sum(map(int, re.findall(r"voluntary_ctxt_switches:\s+(\d+)", text)))

    with sandbox(**CAPPED) as box:
        init = box.handle.record.init_pid
        before = switches(init)
        seconds = box.call(in_a_loop)
        assert switches(init) - before < 100 + 100 * seconds < 5000 + 100 * seconds
