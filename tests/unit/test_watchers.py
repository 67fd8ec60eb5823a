"""What PID 1 waits for, and in which order it serves that: with watchers that a test makes up."""

from __future__ import annotations

import os
import select

import pytest

from sandbox_provisioner.facilities.caps.inside import Caps
from sandbox_provisioner.facilities.caps.inside.memory import Memory
from sandbox_provisioner.facilities.process.inside import Output
from sandbox_provisioner.facilities.sockets.inside import Sockets
from sandbox_provisioner.facilities.workdir.inside import Workdir
from sandbox_provisioner.facilities.workdir.inside.watch import Watch
from sandbox_provisioner.inside.box import Box
from sandbox_provisioner.inside.watcher import Watcher
from sandbox_provisioner.launcher import init, watchers


class Given(Watcher):
    """Waits for *fd*, for *wait* ms at most, and notes that it was served."""

    def __init__(self, name: str, served: list[tuple[str, bool]], fd: int = -1, **more) -> None:
        self.name, self.served, self.fd = name, served, fd
        self.wait: int | None = more.get("wait")
        self.known: str = more.get("known", "")

    def waits(self):
        return ((self.fd, select.POLLIN),) if self.fd >= 0 else ()

    def patience(self):
        return self.wait

    def serve(self, _init, ready):
        self.served.append((self.name, self.fd in ready))

    def why(self, code):
        return self.known if code == 9 else ""


class Enough(Exception):
    """Ends a loop that never does."""


class Last(Watcher):
    """Ends the loop when all have been served *rounds* times."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def serve(self, _init, _ready):
        self.rounds -= 1
        if not self.rounds:
            raise Enough


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def init_of(*found: Watcher) -> init._Init:
    one = init._Init.__new__(init._Init)
    one.watchers = list(found)
    return one


def test_all_are_served_after_each_wait_in_the_order_of_the_list(pipe):
    reader, writer = pipe
    os.write(writer, b"!")
    served: list[tuple[str, bool]] = []
    with pytest.raises(Enough):
        init_of(Given("first", served), Given("second", served, reader), Last(1)).loop()
    assert served == [("first", False), ("second", True)]


def test_who_waits_for_something_else_now_is_not_woken_by_what_it_waited_for(pipe):
    reader, writer = pipe
    os.write(writer, b"!")
    watcher = Given("one", [], reader, wait=0)
    one = init_of(watcher)
    assert one.wait() == {reader: select.POLLIN}
    watcher.fd = -1
    assert one.wait() == {}


def test_the_wait_is_the_shortest_of_all(monkeypatch):
    waited = []

    class Poll:
        def poll(self, patience):
            waited.append(patience)
            return []

    monkeypatch.setattr(select, "poll", Poll)
    init_of(Given("a", []), Given("b", [])).wait()
    init_of(Given("a", [], wait=50), Given("b", []), Given("c", [], wait=7)).wait()
    assert waited == [None, 7]


def test_the_first_that_knows_why_a_kernel_ended_tells():
    one = init_of(Given("a", []), Given("b", [], known="b"), Given("c", [], known="c"))
    assert one.why(9) == "b"
    assert one.why(0) == ""


def test_a_box_without_caps_or_sockets_is_watched_for_its_end_alone():
    box = Box(-1, -1)
    box.namespaces = False
    found = watchers.watchers_of(box)
    try:
        kinds = [type(one) for one in found]
        assert kinds == [watchers.ServersEnd, watchers.Control, watchers.Children]
    finally:
        os.close(found[-1]._signals)


def test_the_order_of_the_list_is_the_one_that_its_comments_give_reasons_for():
    box = Box(-1, -1)
    box.part(Workdir).watch = Watch(None, -1)
    box.part(Output).pipes = [os.pipe(), os.pipe()]
    box.part(Sockets).names = ("shell",)
    memory = box.part(Caps).memory = Memory.__new__(Memory)
    found = watchers.watchers_of(box)
    try:
        kinds = [type(one).__name__ for one in found]
        assert kinds == [
            "ServersEnd", "Watch", "Pump", "Pump", "Control", "Seal", "Folders", "Memory",
            "Children",
        ]  # fmt: skip
        assert memory in found
    finally:
        for fd in (found[1].mounts, found[2].read_fd, found[3].read_fd, found[-1]._signals):
            os.close(fd)
