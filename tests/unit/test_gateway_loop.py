"""The parts of a gateway that wait, move and tell, one by one: loop.py, mover.py, sentences.py."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator

import pytest

from sandbox_provisioner.facilities.network.tell.pace import AGAIN_SECONDS
from sandbox_provisioner.gateway.connection import Connection
from sandbox_provisioner.gateway.listeners import Arrivals
from sandbox_provisioner.gateway.lookups import MOST_WAITING, Found, Lookups
from sandbox_provisioner.gateway.loop import READ, Group, Loop
from sandbox_provisioner.gateway.mover import Pipes, Share, Way
from sandbox_provisioner.gateway.sentences import Sentences
from sandbox_provisioner.gateway.shaper import Line


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


class Ear:
    """Notes what it hears; a *mistake* is made by it."""

    def __init__(self, heard: list[str], name: str, *, mistake: bool = False) -> None:
        self.heard, self.name, self.mistake = heard, name, mistake

    def on_event(self, fd: int, _events: int) -> None:
        os.eventfd_read(fd)
        self.heard.append(self.name)
        os.eventfd_write(fd, 1)  # it is ready again at once
        if self.mistake:
            raise AssertionError("a mistake")

    def on_mistake(self) -> None:
        self.heard.append("gone")


def groups(loop: Loop, heard: list[str], **sizes: int) -> tuple[list[Group], list[int]]:
    """Of each name so many descriptors that are ready all the time."""
    made, fds = [], []
    for name, count in sizes.items():
        made.append(Group(loop))
        for number in range(count):
            fds.append(os.eventfd(1, os.EFD_NONBLOCK))
            made[-1].watch(fds[-1], Ear(heard, f"{name}{number}"), READ)
    return made, fds


def test_a_box_that_floods_does_not_keep_another_one_waiting(loop):
    heard: list[str] = []
    made, fds = groups(loop, heard, flood=100, other=1)
    try:
        loop.run(lambda: len(heard) > 400)
    finally:
        for group in made:
            group.close()
        for fd in fds:
            os.close(fd)
    turns = "".join("o" if name == "other0" else "f" for name in heard).split("o")
    assert max(map(len, turns)) <= 8
    assert {f"flood{number}" for number in range(100)} <= set(heard)  # and none of its own


def test_a_mistake_ends_who_made_it_and_nobody_else(loop, capfd):
    heard: list[str] = []
    made, fds = groups(loop, heard, other=1)
    fd = os.eventfd(1, os.EFD_NONBLOCK)
    made[0].watch(fd, Ear(heard, "wrong", mistake=True), READ)
    try:
        loop.run(lambda: len(heard) > 200)
    finally:
        made[0].close()
        for one in (*fds, fd):
            os.close(one)
    assert heard.count("gone") == heard.count("wrong") > 50
    assert heard.count("other0") > 50
    said = capfd.readouterr().err
    assert 1 <= said.count("AssertionError: a mistake") <= 20


def test_timers_come_in_their_order_and_those_of_who_has_gone_take_no_room(loop):
    done: list[int] = []
    for number in (2, 1):
        loop.later(number / 1000, lambda n=number: done.append(n))
    for _ in range(5000):
        loop.later(1000, done.clear).cancel()
    loop.run(lambda: len(done) == 2)
    assert done == [1, 2]
    assert len(loop._timers) < 1100


class NoneLeft:
    """A listener of a process that has no descriptor left, until *again*."""

    def __init__(self, fd: int) -> None:
        self.fd, self.asked, self.again = fd, 0, False

    def fileno(self) -> int:
        return self.fd

    def setblocking(self, _flag: bool) -> None:
        """It is none."""

    def accept(self) -> tuple[socket.socket, object]:
        self.asked += 1
        if not self.again:
            raise OSError(errno.EMFILE, "none left")
        one, other = socket.socketpair()
        other.close()
        os.eventfd_read(self.fd)
        return one, None

    def close(self) -> None:
        os.close(self.fd)


def test_without_descriptors_it_waits_a_while_and_does_not_spin(loop, monkeypatch):
    monkeypatch.setattr("sandbox_provisioner.gateway.listeners.wanted_by", lambda _: ("a", 1))
    arrived: list[socket.socket] = []
    group = Group(loop)
    listener = NoneLeft(os.eventfd(1, os.EFD_NONBLOCK))
    arrivals = Arrivals(loop, group, lambda one, *_: arrived.append(one), lambda: 0.0)
    arrivals.add(listener)  # type: ignore[arg-type]
    done: list[int] = []
    loop.later(0.1, lambda: done.append(1))
    loop.run(lambda: bool(done))
    assert listener.asked == 1
    listener.again = True
    loop.run(lambda: bool(arrived))
    arrivals.close()
    group.close()
    arrived[0].close()


# -- pipes


def test_a_box_has_a_share_of_the_pipes_and_copies_where_it_is_used_up():
    pipes = Pipes()
    share, other = Share(pipes), Share(pipes)
    with contextlib.ExitStack() as stack:
        ways = []
        for _ in range(12):
            near, source, sink, far = socket.socketpair() + socket.socketpair()
            for one in (near, source, sink, far):
                stack.enter_context(one)
            near.sendall(b"some")
            ways.append(Way(source, sink, share))
            assert ways[-1].take(1 << 18) == 4
        assert (share.held, pipes.count) == (8, 8)
        pipe = other.take()
        assert pipe is not None
        other.drop(pipe)
        for way in ways:
            way.flush()
            assert way.is_empty
        assert far.recv(10) == b"some"
        assert (share.held, len(pipes.free)) == (0, 8)
        near.sendall(b"more")
        ways[-1].take(2)
        ways[-1].close()  # with something in its pipe, which nobody else may have
        assert (share.held, pipes.count, len(pipes.free)) == (0, 7, 7)
    for pipe in pipes.free:
        pipe.close()


# -- sentences


def test_of_one_thing_the_person_is_told_once_a_minute_and_not_too_much_in_all(loop):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        sentences = Sentences(loop, ours)
        theirs.setblocking(False)

        def heard() -> list[bytes]:
            found = []
            try:
                while True:
                    found.append(theirs.recv(4096))
            except BlockingIOError:
                return found

        for _ in range(3):
            sentences.say("a", "a \x1b was refused.")
        assert heard() == [b"say a \\x1b was refused."]
        loop.now += AGAIN_SECONDS + 1
        sentences.say("a", "é" * 2000)
        (long,) = heard()
        assert len(long) == len(b"say ") + 1000
        assert long.decode().endswith("é")
        for number in range(1000):
            sentences.say(str(number), "x")
        assert len(heard()) == 9  # of ten
        loop.now += 5
        sentences.say("b", "x")
        assert heard() == [b"say x"]
        for number in range(5000):  # who does not listen is not waited for
            loop.now += AGAIN_SECONDS
            sentences.say(str(number), "x" * 900)


# -- look-ups


def test_a_box_with_many_names_waits_for_itself(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(
        "sandbox_provisioner.gateway.lookups.Lookups._start",
        lambda self, job: _start(self, job, asked),
    )
    lookups = Lookups()
    try:
        answers = [lookups.ask("flood", f"f{n}", _nobody) for n in range(MOST_WAITING + 10)]
        assert answers.count(False) == 10 - 2  # two are being looked up already
        assert lookups.ask("other", "o", _nobody)
        assert asked == ["f0", "f1", "o"]
        lookups.forget("flood")
        assert lookups.ask("flood", "again", _nobody)
        assert asked == ["f0", "f1", "o"]
        for box in "abcd":
            for number in range(3):
                assert lookups.ask(box, f"{box}{number}", _nobody)
        assert asked[3:] == ["a0", "a1", "b0", "b1", "c0", "d0"]  # half of the threads are busy
    finally:
        os.close(lookups.event)


def _nobody(_found: Found) -> None:
    """Nobody waits for it."""


def _start(lookups: Lookups, job: object, asked: list[str]) -> None:
    lookups._busy += 1
    lookups._running[job.box] = lookups._running.get(job.box, 0) + 1  # type: ignore[attr-defined]
    asked.append(job.name)  # type: ignore[attr-defined]


# -- rates


class Parked:
    """A connection that has always something to move."""

    def __init__(self, line: Line, heard: list[int], number: int) -> None:
        self.line, self.heard, self.number = line, heard, number

    def resume(self, *, up: bool) -> None:
        assert up
        count = min(self.line.room(), self.line.turn_bytes)
        if count:
            self.line.passed(count)
            self.heard.append(self.number)
        self.line.park(self)  # type: ignore[arg-type]


def test_connections_of_a_box_take_turns_at_its_rate(loop):
    line, heard = Line(loop, 80_000_000, up=True), list[int]()
    line.passed(line.room())
    for number in range(4):
        one: Connection = Parked(line, heard, number)  # type: ignore[assignment]
        line.park(one)
    loop.run(lambda: len(heard) >= 16)
    loop.now += 1
    assert line.room() == 0  # for who comes now, while others wait
    turns = [heard.count(number) for number in range(4)]
    assert min(turns) >= 4 >= max(turns) - 1
    line.close()
