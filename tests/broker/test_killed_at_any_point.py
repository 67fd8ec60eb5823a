"""`kill -9` of the broker, or of whoever asks, at each point of a start (see `killing.py`): when
there is a broker again, nothing is left of it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import users
from brokers import User
from facilities import packages, public_python, roots_python
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
# Where it is set, a server's start is tried at each point, which takes minutes.
EVERY_POINT = "SANDBOX_EVERY_POINT"
MOST_POINTS = 24
PERSON, UID = "sbxperson", 4323  # for whom the user, whose account is the hub's, has servers
POLICY = f'[hub]\naccount = "{users.NAME}"\n'
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
ASK_FOR_SERVER = """
from hub_asking import server_wish
answer = send(server_wish(person), streams()[:2])
"""
# By a hub of its own, which ends then, and has written down nothing; whether it was answered.
ASK_FOR_SERVER_AND_END = f"""
child = os.fork()
if not child:
    try:{ASK_FOR_SERVER.replace(chr(10), chr(10) + "        ")}
        os._exit(0 if "init" in answer else 1)
    finally:
        os._exit(2)
answer = os.waitpid(child, 0)[1]
"""
CLOSE_SERVER = "answer = send(dict(ask='server-close', sandbox_id=name), [])"
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

    def __init__(
        self, home: Path, runtime: Path, python: str = sys.executable, more: Sequence[str] = ()
    ) -> None:
        """Run by *python*, which has *more* packages than its own."""
        self.home, self.runtime, self.socket = home, runtime, f"{runtime}/socket"
        self._groups: list[Path] = []
        program = Path(__file__).with_name("killing.py").name
        self._process = subprocess.Popen(
            [*users.with_files(home), python, f"{home}/code/tests/broker/{program}",
             self.socket, str(runtime), f"{home}/layers", f"{home}/policy.toml", f"{home}/state"],
            env={"PATH": os.defpath, "PYTHONPATH": os.pathsep.join([f"{home}/code", *more]),
                 "HOME": "/nonexistent"},
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

    def left_of_servers(self, known: Collection[str]) -> list[str]:
        """What is there of servers of the person's, and of what leads to them: but what is
        *known*."""
        doors = [place for name in self.ways for place in Path(name).glob("*/")]
        people = {group.parent for group in self._groups}
        found = [str(place) for place in (*doors, *people) if place.exists()]
        return found + self.left(known=known)

    @property
    def ways(self) -> list[str]:
        """Folders of what leads to servers."""
        return [f"{self.runtime}-{kind}" for kind in ("hub", "ways")]

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


@contextlib.contextmanager
def begun(*given: Any) -> Iterator[Killing]:
    made = Killing(*given)
    assert made("broker") == "listens"
    yield made
    made.close()


@pytest.fixture
def killing(user_home: Path, runtime_dir: Path) -> Iterator[Killing]:
    with begun(user_home, runtime_dir) as made:
        yield made


@pytest.fixture
def roots_alone() -> None:
    """Else nothing is ready for anybody."""
    if found := roots_python():
        pytest.skip(f"not root's alone: {found}")


@pytest.fixture
def asker(killing: Killing) -> Iterator[User]:
    with seated(killing) as made:
        yield made


@contextlib.contextmanager
def seated(killing: Killing) -> Iterator[User]:
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


@dataclass(frozen=True)
class QuestionOfHub:
    """A server of the person's is asked for, by a hub that is not root and that has not written
    down where it is when it ends, answered or not."""

    killing: Killing
    asker: User

    def ask(self) -> int:
        """How the hub has ended: 0 where it was answered."""
        return int(self.asker(ASK_FOR_SERVER_AND_END, person=PERSON))

    def points(self) -> list[str]:
        """All that there are until the answer, or, unless all are wanted, some of them."""
        self.killing("choose", "", "")
        told = self.asker(ASK_FOR_SERVER, person=PERSON)
        assert "error" not in told, json.dumps(told)
        found: list[str] = self.killing("reached")
        self.killing.note_groups(told["id"])
        assert "error" not in self.asker(CLOSE_SERVER, name=told["id"])
        assert len(found) > MOST_POINTS
        if os.environ.get(EVERY_POINT):
            return found
        return random.Random(1).sample(found, MOST_POINTS)

    def kills_broker(self, point: str) -> bool:
        """Ask for it; whether the broker was killed there. Nothing is left then when there is
        another one."""
        killing, known = self.killing, self.killing.left()
        killing("choose", point, "broker")
        killed = self.ask() != 0 or point == "answered"
        if killed:
            assert killing("died") == signal.SIGKILL
            assert killing("broker") == "listens"
        assert not_gone(lambda: killing.left_of_servers(known)) == [], point
        assert killing("alone") == [], point
        return killed

    def kills_hub(self, point: str) -> bool:
        """The same of the hub; the broker lives on."""
        killing, known = self.killing, self.killing.left()
        killing("choose", point, "asker")
        killed = self.ask() == signal.SIGKILL
        assert not_gone(lambda: killing.left_of_servers(known)) == [], point
        return killed


@pytest.fixture
def server(user_home: Path, runtime_dir: Path) -> Iterator[QuestionOfHub]:
    """The Python of a broker runs a part of each server's box, with the ids of that."""
    home = user_home / "person"
    home.mkdir(mode=0o700)
    os.chown(home, UID, UID)
    with (user_home / "passwd").open("a") as file:
        file.write(f"{PERSON}:x:{UID}:{UID}::{home}:/bin/sh\n")
    (user_home / "policy.toml").write_text(POLICY)
    with begun(user_home, runtime_dir, public_python(), packages()) as killing:
        with seated(killing) as asker:
            yield QuestionOfHub(killing, asker)
        for folder in killing.ways:
            shutil.rmtree(folder, ignore_errors=True)


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


def test_a_broker_that_is_killed_at_a_point_of_a_servers_start_leaves_nothing_to_the_next(
    server: QuestionOfHub,
) -> None:
    check([server.kills_broker(point) for point in server.points()])
    assert server.ask() == 0


def test_a_hub_that_is_killed_at_a_point_of_a_servers_start_leaves_nothing(
    server: QuestionOfHub,
) -> None:
    check([server.kills_hub(point) for point in server.points()])
    assert server.ask() == 0
    assert not_gone(lambda: server.killing("children")[1:]) == []  # one is the stem
