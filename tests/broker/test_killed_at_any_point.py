"""`kill -9` of the broker, or of whoever asks, at each point of a start (see `killing.py`): when
there is a broker again, nothing is left of it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import users
from brokers import User
from facilities import roots_python
from killing import PATIENCE_SECONDS

from sandbox_provisioner.facilities.caps.cgroup import open_existing
from sandbox_provisioner.facilities.storage.facts import STORAGE
from sandbox_provisioner.inside import wire
from sandbox_provisioner.plan import CONNECTIONS
from sandbox_provisioner.records import OF_NOBODY, RecordFolder, all_records, cgroup_facts
from sandbox_provisioner.warm.found import call

pytestmark = [
    pytest.mark.requires("userns", "root", "cgroup-memory", "setpriv", "public-python"),
    pytest.mark.timeout(900),
]

MIB = 1 << 20
ASK = """
message = wish(sandbox_id=name, no_input=True, **more)
message["start"]["spec"]["limits"] |= limits
answer = send(message, [*streams(), directory()])
"""
# By a process of its own, which ends when it is answered, or killed.
ASK_AND_END = f"""
child = os.fork()
if not child:
    try:{ASK.replace(chr(10), chr(10) + "        ")}
    finally:
        os._exit(0)
answer = os.waitpid(child, 0)[1]
"""
CLOSE = "answer = send(dict(ask='close', sandbox_id=name), [])"
PORTS = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
CONNECTION = {
    "transport": "ipc", "ip": "/run/kernel/s", "signature_scheme": "hmac-sha256", "key": "",
    **{name: number for number, name in enumerate(PORTS, 1)},
}  # fmt: skip
AHEAD = {
    "preload": [], "spares": 0, "idle_seconds": 900.0, "lonely_seconds": None, "alone": False,
    "waited_for": True,  # a busy machine takes minutes for what gives way
}  # fmt: skip


class Killing:
    """`killing.py`, and its brokers; a `User` sits down at it as at a `Broker`."""

    def __init__(self, home: Path, runtime: Path) -> None:
        self.home, self.runtime, self.socket = home, runtime, f"{runtime}/socket"
        self._groups: list[Path] = []
        program = Path(__file__).with_name("killing.py").name
        self._process = subprocess.Popen(
            [*users.with_files(home), sys.executable, f"{home}/code/tests/broker/{program}",
             self.socket, str(runtime), f"{home}/layers"],
            env={"PATH": os.defpath, "PYTHONPATH": f"{home}/code", "HOME": "/nonexistent"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, *words: str) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        assert not isinstance(told, dict), told
        return told

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def note_groups(self, name: str) -> None:
        """Where groups of sandboxes are made, as the record of *name* tells, which runs."""
        record = RecordFolder(self.runtime / name).read()
        files = open_existing(cgroup_facts(record), record.tree).join_files
        self._groups = [Path(os.path.dirname(file)).parent for file in files]
        assert self._groups

    def left(self, name: str = "", known: Collection[str] = ()) -> list[str]:
        """What is there of the sandbox of that *name*, and in the folders of all: but what is
        *known*, and what is ready for starts, with a link to it, which may lead to nothing."""
        places = [*(group / name for group in self._groups), STORAGE / name] if name else []
        folders = (self.runtime, self.home / "layers", self.home / "work")
        inside = {one for path in folders if path.exists() for one in path.iterdir()}
        ready = {self.runtime / sandbox_id for sandbox_id in self.ready()}
        found = {one: {(real := one.resolve()), *real.parents} for one in inside if one.exists()}
        more = {str(one) for one, around in found.items() if not around & ready}
        return [str(place) for place in places if place.exists()] + sorted(more - {*known})

    def ready(self) -> dict[str, str]:
        """The processes 1 of nurseries and spares, by their ids."""
        records = [record for _, record in all_records(self.runtime)]
        ready = [one for one in records if one.kind in OF_NOBODY and one.init_pid]
        return {one.sandbox_id: str(one.init_pid) for one in ready}

    def retire(self) -> None:
        """End those that are for all servers of a user."""
        for path in self.runtime.glob("*/requests"):
            if channel := call(path):
                with channel:
                    channel.send(wire.message(wire.RETIRE))
        assert not_gone(lambda: list(self.runtime.glob("*/owner"))) == []


def not_gone(look: Callable[[], list[Any]]) -> list[Any]:
    """What *look* finds in the end: who removes it tells nobody."""
    end = time.monotonic() + PATIENCE_SECONDS
    while (found := look()) and time.monotonic() < end:
        select.poll().poll(10)
    return found


def new_name() -> str:
    return uuid.uuid4().hex[:12]


@pytest.fixture
def killing(user_home: Path, runtime_dir: Path) -> Iterator[Killing]:
    made = Killing(user_home, runtime_dir)
    assert made("broker") == "listens"
    yield made
    made.close()


@pytest.fixture
def roots_alone() -> None:
    """Else nothing is ready for anybody."""
    if found := roots_python():
        pytest.skip(f"not root's alone: {found}")


@pytest.fixture
def asker(killing: Killing) -> Iterator[User]:
    with User(killing.home, users.USER) as made:
        made.sit_down(killing)  # type: ignore[arg-type]
        yield made


@dataclass(frozen=True)
class Question:
    """What is asked, and for whom something may be *ready* then."""

    killing: Killing
    asker: User
    limits: dict[str, int] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def ask(self, name: str, code: str = ASK) -> Any:
        """What the broker answers, {} if it ends before."""
        return self.asker(code, name=name, limits=self.limits, more=self.more)

    def points(self) -> list[str]:
        """All that there are until the answer."""
        self.killing("choose", "", "")
        name = new_name()
        told = self.ask(name)
        assert "error" not in told and "cold" not in told, json.dumps(told)
        found: list[str] = self.killing("reached")
        if "init" in told:
            self.killing.note_groups(name)
            assert "error" not in self.asker(CLOSE, name=name)
        return found

    def kills_broker(self, point: str) -> bool:
        """Ask for that; whether the broker was killed there. Nothing is left of it then, but what
        is ready for starts; there is another broker, and who asked wants nothing of that sandbox
        any more, as `BrokerLauncher` does."""
        killing = self.killing
        known, name = killing.left(), new_name()
        killing("choose", point, "broker")
        told = self.ask(name)
        killed = not told or point == "answered"
        if killed:
            assert killing("died") == signal.SIGKILL
            assert killing("broker") == "listens"
        self.asker(CLOSE, name=name)
        if "init" in told or not told:
            made, ready = killing.left(name, known), killing.ready()
            assert [*made, *killing("alone", *ready.values())] == [], point
        return killed

    def kills_asker(self, point: str) -> bool:
        """The same of a process that asks for it; what is ready for that one alone goes with it."""
        killing = self.killing
        known, name = killing.left(), new_name()
        killing("choose", point, "asker")
        killed = self.ask(name, ASK_AND_END) == signal.SIGKILL
        assert not_gone(lambda: killing.left(name, known)) == [], point
        return bool(killed)


def cold(killing: Killing, asker: User) -> list[Question]:
    """One as they mostly are, and one with an image for what the kernel writes."""
    return [Question(killing, asker, limits=more) for more in ({}, {"disk_bytes": 16 * MIB})]


def warm(killing: Killing, asker: User, act: str, spares: int, *, alone: bool = False) -> Question:
    """Of Python kernels that can be met."""
    python = asker("answer = sys.executable")
    more = {
        "act": act,
        "ahead": AHEAD | {"spares": spares, "alone": alone},
        "argv": [python, "-m", "ipykernel_launcher", "-f", f"{CONNECTIONS}/kernel.json"],
        "connection_file": ["kernel.json", json.dumps(CONNECTION)],
    }
    return Question(killing, asker, more=more)


def check(hits: list[bool]) -> None:
    """Some points are there once only, such as where the stem is made."""
    assert sum(hits) > 0.75 * len(hits)


def not_in(tried: set[str], points: list[str]) -> list[str]:
    """Those which were not, and are by now."""
    new = [point for point in points if point not in tried]
    tried.update(new)
    return new


def test_a_broker_that_is_killed_at_any_point_of_a_start_leaves_nothing_to_the_next(
    killing: Killing, asker: User
) -> None:
    tried: set[str] = set()
    for question in cold(killing, asker):
        new = not_in(tried, question.points())
        check([question.kills_broker(point) for point in new])


def test_a_broker_that_is_killed_where_starts_are_prepared_leaves_what_is_ready_and_no_more(
    roots_alone: None, killing: Killing, asker: User
) -> None:
    """And nothing of a start from that. What each start does is tried there."""
    empty, hits = killing.left(), []
    tried = {point for question in cold(killing, asker) for point in question.points()}
    for spares in (0, 1):
        fill, start = (warm(killing, asker, act, spares) for act in ("fill", "start-ready"))
        making = not_in(tried, fill.points())
        for point in not_in(tried, start.points()):
            assert "error" not in fill.ask(new_name())
            hits.append(start.kills_broker(point))
        killing.retire()
        for point in making:
            hits.append(fill.kills_broker(point))
            killing.retire()
    check(hits)
    assert killing("kill") == signal.SIGKILL
    assert killing("broker") == "listens"
    assert [*killing("alone"), *killing.left("", empty)] == []


def test_who_is_killed_at_any_point_of_a_start_has_nothing_left(
    killing: Killing, asker: User
) -> None:
    hits, tried = [], set[str]()
    for question in cold(killing, asker):
        hits += [question.kills_asker(point) for point in not_in(tried, question.points())]
    check(hits)
    assert not_gone(lambda: killing("children")[1:]) == []  # one is the stem


def test_who_is_killed_where_starts_are_prepared_has_nothing_left(
    roots_alone: None, killing: Killing, asker: User
) -> None:
    """Nor of a start from what is ready."""
    hits, tried = [], {point for one in cold(killing, asker) for point in one.points()}
    for spares in (0, 1):
        fill, start = (warm(killing, asker, act, spares) for act in ("fill", "start-ready"))
        making = not_in(tried, fill.points())
        for point in not_in(tried, start.points()):
            assert "error" not in fill.ask(new_name())
            hits.append(start.kills_asker(point))
        killing.retire()
        alone = warm(killing, asker, "fill", spares, alone=True)
        hits += [alone.kills_asker(point) for point in making]
    check(hits)
    assert not_gone(lambda: killing("children")[1:]) == []
