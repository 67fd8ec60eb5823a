"""When a kernel near its memory cap is interrupted, and who is told: on plain files and pipes."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_provisioner.facilities.caps.cgroup import CgroupFacts, NullTree
from sandbox_provisioner.facilities.caps.inside import memory
from sandbox_provisioner.facilities.caps.inside.memory import (
    Level,
    Memory,
    open_files,
    thresholds,
    used_v1,
    used_v2,
)
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.say import say_to_person
from sandbox_provisioner.launcher import init
from sandbox_provisioner.records import SERVER, Record, RecordFolder

MIB = 1 << 20
CAP = 512 * MIB
SHARE = 471 * MIB


@pytest.fixture
def level():
    return Level(SHARE, CAP)


# -- when


def test_the_first_interrupt_is_due_at_the_share(level):
    assert not level.reached(SHARE - 1, 0.0)
    assert not level.raised
    assert level.reached(SHARE, 0.0)
    assert level.raised


def test_the_next_one_is_due_when_half_of_the_rest_is_gone(level):
    assert level.reached(SHARE, 0.0)
    assert not level.reached(SHARE + MIB, 1.0)
    assert level.next == (SHARE + CAP) // 2
    assert level.reached(level.next, 2.0)


def test_no_second_one_comes_while_the_first_is_being_heard(level):
    half = (SHARE + CAP) // 2
    assert level.reached(SHARE, 1.0)
    assert not level.reached(half, 1.9)
    assert level.reached(half, 2.1)


def test_below_the_share_it_begins_anew_and_at_once(level):
    assert level.reached(CAP - MIB, 0.0)
    assert not level.reached(100 * MIB, 0.01)
    assert not level.raised
    assert level.reached(SHARE, 0.02)


def test_a_little_below_the_share_the_first_one_is_still_being_heard(level):
    assert level.reached(SHARE + MIB, 0.0)
    assert not level.reached(SHARE - MIB, 0.1)
    assert not level.reached(SHARE, 0.2)
    assert level.reached(SHARE, 2.0)


def test_the_next_one_comes_sooner_where_little_is_left(level):
    assert level.reached(SHARE, 0.0)
    half = (SHARE + CAP) // 2
    assert not level.reached(half, 0.5)
    assert not level.reached((half + CAP) // 2, 0.05)
    assert level.reached((half + CAP) // 2, 0.11)
    assert not level.reached((half + CAP) // 2, 0.5)


@given(st.lists(st.integers(0, CAP), max_size=200))
def test_a_use_that_only_grows_is_interrupted_a_few_times(amounts):
    level = Level(SHARE, CAP)
    told = [used for now, used in enumerate(sorted(amounts)) if level.reached(used, float(now))]
    assert len(told) <= 5
    assert bool(told) == any(used >= SHARE for used in amounts)


@given(st.integers(50, 99), st.integers(32 * MIB, 1 << 40))
def test_thresholds_begin_at_the_share_and_stay_below_the_cap(percent, cap):
    found = thresholds(Level(cap * percent // 100, cap))
    assert found[0] == cap * percent // 100
    assert found == sorted(set(found))
    assert found[-1] < cap
    assert len(found) <= 7


# -- what counts


def test_the_page_cache_does_not_count_on_v1():
    told = {b"total_rss": 100 * MIB, b"total_shmem": 20 * MIB, b"total_cache": 380 * MIB}
    assert used_v1(told, 490 * MIB, CAP) == 130 * MIB


def test_the_linux_kernels_own_counts_on_v1_but_not_all_of_it():
    told = {b"total_rss": 100 * MIB, b"total_shmem": 0, b"total_cache": 0}
    assert used_v1(told, 500 * MIB, CAP) == 116 * MIB
    assert used_v1(told, 99 * MIB, CAP) == 100 * MIB


def test_on_v2_what_reclaim_can_get_back_does_not_count():
    told = {
        b"anon": 100 * MIB, b"file": 300 * MIB, b"shmem": 20 * MIB, b"kernel": 50 * MIB,
        b"slab_reclaimable": 40 * MIB,
    }  # fmt: skip
    assert used_v2(told) == 130 * MIB
    assert used_v2({b"anon": 1, b"shmem": 2, b"slab_reclaimable": 9}) == 3


# -- the files


@pytest.fixture
def watching():
    """Makes `Memory`s, whose descriptors live as long as an init; and closes them."""
    made = []

    def make(version: int, group: str, level: Level | None, sentence: str = "") -> Memory:
        made.append(Memory(version, open_files(version, group), level, sentence, "killed"))
        return made[-1]

    yield make
    for one in made:
        for name, fd in vars(one._events).items():
            with contextlib.suppress(OSError if name == "control" else ()):  # closed by `arm`
                os.close(fd)


def v1_group(folder: Path, rss: int, cache: int = 0) -> str:
    (folder / "cgroup.event_control").write_text("")
    (folder / "memory.pressure_level").write_text("")
    (folder / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 0\n")
    (folder / "memory.usage_in_bytes").write_text(f"{rss + cache}\n")
    (folder / "memory.stat").write_text(f"total_cache {cache}\ntotal_rss {rss}\ntotal_shmem 0\n")
    return str(folder)


def v2_group(folder: Path, anon: int) -> str:
    (folder / "memory.events").write_text("high 0\n")
    (folder / "memory.high").write_text("max\n")
    (folder / "memory.stat").write_text(f"anon {anon}\nfile 999\nshmem 0\nkernel 0\n")
    return str(folder)


def test_v1_asks_for_pressure_and_for_thresholds(tmp_path, level, watching):
    watched = watching(1, v1_group(tmp_path, 100 * MIB), level, "It uses {}.")
    watched.arm()
    words = (tmp_path / "cgroup.event_control").read_text().partition(f"{watched.fd} ")[2]
    assert " low" in words
    for at in thresholds(level):
        assert f" {at}" in words
    assert watched.look(os.getpid()) == 0
    os.eventfd_write(watched.fd, 3)
    v1_group(tmp_path, 480 * MIB)
    assert watched.look(os.getpid()) == 480 * MIB
    assert watched.sentence(480 * MIB) == "It uses 480 MiB."
    with pytest.raises(BlockingIOError):
        os.eventfd_read(watched.fd)


def test_v2_keeps_memory_high_at_the_level(tmp_path, level, watching):
    def high() -> str:
        return (tmp_path / "memory.high").read_text()[: len(text)]

    watched = watching(2, v2_group(tmp_path, 100 * MIB), level)
    assert watched.mask == select.POLLPRI
    watched.arm()
    text = str(SHARE)
    assert high() == text
    (tmp_path / "memory.stat").write_text(f"anon {480 * MIB}\nshmem 0\n")
    assert watched.look(os.getpid()) == 480 * MIB
    text = str(496 * MIB)
    assert high() == text
    (tmp_path / "memory.stat").write_text(f"anon {90 * MIB}\nshmem 0\n")
    assert watched.look(os.getpid()) == 0
    text = str(SHARE)
    assert high() == text


@pytest.mark.parametrize(("version", "make"), [(1, v1_group), (2, v2_group)])
def test_with_another_cap_the_same_share_of_it_calls_for_the_interrupt(
    tmp_path, level, watching, version, make
):
    """Of v1's events none is asked for again: then it looks by itself."""
    watched = watching(version, make(tmp_path, 100 * MIB), level, "It uses {} of 512 MiB.")
    watched.cap_is(2 * CAP, "It uses {} of 1 GiB.", "killed")
    make(tmp_path, 480 * MIB)
    watched._events.follow(watched._level)
    assert watched.look(os.getpid()) == 0
    make(tmp_path, 2 * SHARE + MIB)
    assert watched.look(os.getpid()) == 2 * SHARE + MIB
    assert watched.sentence(MIB) == "It uses 1 MiB of 1 GiB."
    assert (watched.patience() is None) is False
    if version == 2:
        watched.cap_is(CAP, "", "")
        assert (tmp_path / "memory.high").read_text().startswith(str(SHARE))


def test_v2_slows_nobody_down_at_the_end(tmp_path, level, watching):
    watched = watching(2, v2_group(tmp_path, CAP), level)
    assert watched.look(os.getpid()) == CAP
    assert (tmp_path / "memory.high").read_text().startswith("max")


def write_kills(group: Path, version: int, count: int) -> None:
    name = {1: "memory.oom_control", 2: "memory.events"}[version]
    (group / name).write_text(f"oom_kill {count}\n")


@pytest.mark.parametrize(("version", "make"), [(1, v1_group), (2, v2_group)])
def test_a_kill_that_a_process_outlives_was_a_childs(
    tmp_path, watching, monkeypatch, version, make
):
    now = 100.0
    monkeypatch.setattr(memory.time, "monotonic", lambda: now)
    watched = watching(version, make(tmp_path, 0), None)
    assert watched.child_killed(os.getpid()) == 0
    write_kills(tmp_path, version, 1)
    assert watched.child_killed(os.getpid()) == 0  # its signal may be on its way
    assert watched.patience()
    assert watched.has_ended_it()
    now += 1
    assert watched.child_killed(os.getpid()) == 1
    assert watched.child_killed(os.getpid()) == 0  # it is said once
    assert watched.patience() is None
    assert not watched.has_ended_it()
    write_kills(tmp_path, version, 2)
    assert watched.has_ended_it()


def test_a_kill_of_a_process_that_is_dying_is_its_own(tmp_path, watching, monkeypatch):
    now = 100.0
    monkeypatch.setattr(memory.time, "monotonic", lambda: now)
    watched = watching(1, v1_group(tmp_path, 0), None)
    child = os.fork()
    if child == 0:
        signal.pause()
    write_kills(tmp_path, 1, 1)
    assert not memory.is_dying(child)
    os.kill(child, signal.SIGKILL)
    assert watched.child_killed(child) == 0
    now += 1
    assert watched.child_killed(child) == 0
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert memory.is_dying(child)  # a zombie
    os.waitpid(child, 0)
    assert memory.is_dying(child)  # nobody
    assert watched.has_ended_it()


def test_after_an_event_of_v1_it_looks_on_for_what_is_counted_later(tmp_path, level, watching):
    watched = watching(1, v1_group(tmp_path, 0), level)
    assert watched.patience() is None
    os.eventfd_write(watched.fd, 1)
    assert watched.look(os.getpid()) == 0
    assert watched.patience()


def test_without_a_share_only_kills_are_asked_for(tmp_path, watching):
    watched = watching(1, v1_group(tmp_path, 480 * MIB), None)
    oom = watched._events.oom
    watched.arm()
    assert (tmp_path / "cgroup.event_control").read_text() == f"{watched.fd} {oom}"
    assert watched.look(os.getpid()) == 0


# -- who is told


def test_what_is_said_comes_out_of_a_pipe_and_never_waits():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 2)
        os.write(writer, b"1")
        signal.pause()
    try:
        assert os.read(reader, 1) == b"1"
        say_to_person(child, "hello")
        assert os.read(reader, 99) == b"hello"
        os.set_blocking(writer, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(writer, bytes(4096))
        say_to_person(child, "nobody reads this")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
    say_to_person(child, "nobody is there")


class Given(Memory):
    """One whose looks are given, and are due."""

    fd, mask = 9, select.POLLIN

    def __init__(self, *looks: int, kills: int = 0) -> None:
        self.looks = list(looks)
        self.kills = kills
        self.killed = "a child was killed"
        self._is_armed = True

    def look(self, pid: int) -> int:
        return self.looks.pop(0)

    def sentence(self, used: int) -> str:
        return f"{used} used"

    def child_killed(self, pid: int) -> int:
        return self.kills


READY = {Given.fd: Given.mask}


@pytest.fixture
def doing(monkeypatch):
    """What an init does, in order."""
    done = []
    monkeypatch.setattr(init, "say_to_person", lambda pid, text: done.append(("say", pid, text)))
    monkeypatch.setattr(memory, "hears", lambda pid, number: (pid, number) == (7, signal.SIGINT))
    monkeypatch.setattr(os, "kill", lambda pid, number: done.append(("kill", pid, number)))
    return done


def init_of(control_fd: int) -> init._Init:
    one = init._Init.__new__(init._Init)
    one.box = init.Box(-1, control_fd)
    one.kernel_pid = 7
    return one


def test_init_says_why_before_it_interrupts_and_tells_the_server(doing):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        watched = Given(480)
        watched.serve(init_of(theirs.fileno()), READY)
        assert doing == [("say", 7, "\n480 used\n"), ("kill", -7, signal.SIGINT)]
        assert ours.recv(99) == b"memory 480"
        assert watched.why(1) == wire.INTERRUPTED  # it ended of it, most likely


def test_init_says_that_a_child_was_killed_and_interrupts_nobody_for_it(doing):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        Given(0, kills=3).serve(init_of(theirs.fileno()), READY)
        assert doing == [("say", 7, "\na child was killed\n")]
        assert ours.recv(99) == b"killed 3"


def test_init_does_nothing_while_none_is_due_and_needs_no_server(doing):
    one = init_of(-1)
    Given(0).serve(one, READY)
    assert doing == []
    Given(480).serve(one, READY)
    assert doing[-1] == ("kill", -7, signal.SIGINT)


def test_init_leaves_a_kernel_alone_that_the_signal_would_end(doing, monkeypatch):
    monkeypatch.setattr(memory, "hears", lambda pid, number: False)
    Given(480).serve(init_of(-1), READY)
    assert doing == []


def test_the_events_of_memory_are_asked_for_when_the_start_is_over(tmp_path, level, watching):
    """Not before: that takes v1 some 10 ms each."""
    one = init_of(-1)
    watched = watching(1, v1_group(tmp_path, 0), level)
    one.is_starting = True
    watched.begin(one)
    watched.serve(one, {})
    assert (tmp_path / "cgroup.event_control").read_text() == ""
    assert watched.waits() == ()
    one.is_starting = False
    watched.serve(one, {})
    assert " low" in (tmp_path / "cgroup.event_control").read_text()
    assert watched.waits() == ((watched.fd, watched.mask),)


def test_a_process_hears_what_it_has_a_handler_for():
    assert memory.hears(os.getpid(), signal.SIGINT)
    assert not memory.hears(os.getpid(), signal.SIGUSR2)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert not memory.hears(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def told_by_init(folder, record):
    """A handle of what *record* is, and where its PID 1 speaks."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    tree = NullTree(CgroupFacts(version=0, bases={}, missing={}), "x")
    with ours, theirs:
        yield (
            LocalHandle(
                pidfd=-1,
                tree=tree,
                folder=RecordFolder(folder),
                record=record,
                control=ours.fileno(),
            ),
            theirs,
        )


def test_the_handle_makes_sentences_of_what_init_tells(tmp_path):
    record = Record(sandbox_id="box", kernel_id="7f3a0123-4567", memory_limit_bytes=CAP)
    with told_by_init(tmp_path, record) as (handle, theirs):
        assert handle.notices() == []
        theirs.send(b"memory 493878272")
        theirs.send(b"memory 503316480")
        first, second = handle.notices()
        assert first == (
            "Kernel 7f3a0123 was interrupted: it uses 471 MiB of its memory limit of 512 MiB."
        )
        assert "480 MiB" in second
        assert handle.notices() == []
        theirs.send(b"killed 1")
        (third,) = handle.notices()
        assert third.startswith("A child process of kernel 7f3a0123 was killed")
        theirs.send(b"full disk_limit /tmp/with words")
        assert handle.notices() == [
            "/tmp/with words of kernel 7f3a0123 is full: it holds all that disk_limit allows."
        ]
        theirs.close()
        assert handle.notices() == []


def test_a_hubs_server_is_called_by_whose_it_is(tmp_path):
    record = Record(sandbox_id="box", kind=SERVER, user="ann")
    with told_by_init(tmp_path, record) as (handle, theirs):
        theirs.send(b"full tmp_limit /tmp")
        theirs.send(b"killed 1")
        theirs.send(b"network-lost ")
        full, killed, lost = handle.notices()
    assert full == "/tmp of the server of ann is full: it holds all that tmp_limit allows."
    assert killed.startswith("A child process of the server of ann was killed")
    assert lost.startswith("The server of ann has lost its network")


def test_a_sentence_that_was_cut_within_a_letter_ends_nobody():
    """What the server has PID 1 say may name a path of any letters."""
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    say_to_person(child.pid, "caf\udcc3")
    _, told = child.communicate()
    assert told == b"caf?"
