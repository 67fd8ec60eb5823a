"""Attempted escapes: by using up what the whole machine has a fixed number of."""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack

import pytest
from boxes import WARM, Boxes
from counted import open_queues, queue_bytes, queue_signals, waiting_signals

from sandbox_provisioner import host
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.caps.cgroup import CgroupFacts
from sandbox_provisioner.facilities.caps.plan import bounds
from sandbox_provisioner.facilities.caps.wish import FACILITIES
from sandbox_provisioner.facilities.ids.facts import FIRST_ID, IDS, LAST_ID
from sandbox_provisioner.facilities.root.plan import MOST_TERMINALS
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.spec import Limits

pytestmark = pytest.mark.requires("userns")

NS_GET_OWNER_UID = 0xB704  # ioctl_ns(2)


def limits():
    with open("/proc/self/limits") as file:
        lines = file.read().splitlines()[1:]
    return {line[:26].strip(): line[26:].split()[:2] for line in lines}


def take_watchers():
    import ctypes
    import os

    libc, taken = ctypes.CDLL(None, use_errno=True), []
    while (fd := libc.inotify_init1(os.O_CLOEXEC)) >= 0:
        taken.append(fd)
    return len(taken), os.strerror(ctypes.get_errno())


def test_every_limit_of_a_process_is_set_and_none_inherited(run_inside):
    """As far as the server's own hard limits go, which nobody but root can raise."""
    inside, ours = run_inside(limits), limits()
    for name, (wanted, value) in zip(inside, written(), strict=True):
        soft, hard = (number(word) for word in value)
        least = number(ours[name][1])
        expected = [min(soft, least), min(hard, least)]
        assert [number(word) for word in inside[name]] == expected, wanted


def written():
    """What the plan says, in the order of /proc/self/limits."""
    words = dict(word.split("=") for word in bounds.kernels_limits())
    order = (
        "cpu", "fsize", "data", "stack", "core", "rss", "nproc", "nofile", "memlock", "as", "locks",
        "sigpending", "msgqueue", "nice", "rtprio", "rttime",
    )  # fmt: skip
    assert set(words) == set(order)
    return [(name, words[name].split(":")) for name in order]


def number(word):
    return float("inf") if word == "unlimited" else float(word)


@pytest.mark.requires("root")
def test_boxes_that_watch_all_they_can_leave_the_host_its_watchers(sandbox):
    with ExitStack() as stack:
        for _ in range(10):
            taken, answer = stack.enter_context(sandbox()).call(take_watchers)
            assert answer in {"Too many open files", "No space left on device"}
            assert taken <= 16
        root = os.open("/", os.O_RDONLY)
        os.close(kernel_calls.watch_directory(root))
        os.close(root)
        if not os.environ.get(WARM):  # those of one nursery count together
            assert stack.enter_context(sandbox()).call(take_watchers)[0] == 16


@pytest.mark.requires("root")
def test_queues_and_signals_of_boxes_do_not_count_for_the_hosts_root(sandbox):
    """Four boxes take more queues than Linux lets one user have where no limit is raised. Others of
    root's on this machine may have some meanwhile, but not half as much."""
    with ExitStack() as stack:
        boxes = [stack.enter_context(sandbox()) for _ in range(4)]
        bytes_before, signals_before = queue_bytes(), waiting_signals()
        taken = [box.call(open_queues) for box in boxes]
        waiting = [int(box.call(queue_signals).partition("/")[0]) for box in boxes]
        assert queue_bytes() - bytes_before < 500_000
        assert waiting_signals() - signals_before < 2000
    assert taken[0] == [3, "Too many open files"]
    assert min(waiting) > 900
    if not os.environ.get(WARM):  # those of one nursery count together
        assert taken == [taken[0]] * 4


@pytest.mark.requires("root")
def test_what_a_box_takes_counts_for_ids_that_nobody_else_has(sandbox):
    """namespaces(7): all of it counts for the owner of the user namespace as well, in the one
    above, where root's own processes, and all other boxes, would count too."""
    with sandbox() as box:
        fd = os.open(f"/proc/{box.handle.pid}/ns/user", os.O_RDONLY)
        try:
            owner = fcntl.ioctl(fd, NS_GET_OWNER_UID, bytes(4))
        finally:
            os.close(fd)
        assert FIRST_ID <= int.from_bytes(owner, "little") <= LAST_ID


@pytest.mark.requires("root")
def test_servers_with_directories_of_their_own_give_no_id_twice(sandbox, workdir, new_folder):
    other = Boxes(LocalLauncher(runtime_dir=str(new_folder())), workdir)
    with sandbox() as one, other() as two:
        firsts = [box.handle.record.first_id for box in (one, two)]
    assert abs(firsts[0] - firsts[1]) >= IDS


def test_a_box_has_a_share_of_the_terminals_and_no_more(sandbox):
    def open_terminals():
        import os

        count = 0
        try:
            while True:
                os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
                count += 1
        except OSError as error:
            return count, error.strerror

    with sandbox() as box:
        count, answer = box.call(open_terminals)
        assert (count, answer) == (MOST_TERMINALS, "No space left on device")
        for fd in os.openpty():
            os.close(fd)


def test_signals_that_wait_are_few(run_inside):
    waiting, most = map(int, run_inside(queue_signals).split("/"))
    assert most == 1024
    assert 900 < waiting <= most


def test_a_default_cap_on_processes_holds_where_no_cgroup_can_have_it(sandbox, monkeypatch):
    def fork_all():
        import os
        import signal

        count = 0
        try:
            while count < 100:
                if os.fork() == 0:
                    signal.pause()
                count += 1
        except OSError as error:
            return count, error.strerror
        return count, ""

    nothing = CgroupFacts(version=0, bases={}, missing=dict.fromkeys(FACILITIES, "not here"))
    monkeypatch.setattr(host, "survey", lambda: nothing)
    limits = Limits(pids=20, memory_bytes=1 << 30, by_default=frozenset({"pids", "memory"}))
    with sandbox(limits=limits) as box:
        count, answer = box.call(fork_all)
    assert (count < 20, answer) == (True, "Resource temporarily unavailable")
    with pytest.raises(HostError, match="cap processes at 20"), sandbox(limits=Limits(pids=20)):
        pytest.fail("a cap that was asked for was given up")


def test_message_queues_are_few(run_inside):
    count, answer = run_inside(open_queues)
    assert 1 <= count <= 3
    assert answer == "Too many open files"


def test_a_new_file_has_the_mode_that_the_servers_umask_says(run_inside, workdir):
    def make():
        open("new", "w").close()

    before = os.umask(0o027)
    try:
        run_inside(make)
    finally:
        os.umask(before)
    assert (workdir / "new").stat().st_mode & 0o777 == 0o640
