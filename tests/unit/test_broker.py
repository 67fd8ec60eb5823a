"""What the broker reads of strangers: bytes, messages, wishes. None of it calls anybody."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from golden import ASKERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sandbox_provisioner
from sandbox_provisioner.broker import kept
from sandbox_provisioner.broker import kernels as kernels_
from sandbox_provisioner.broker.early import Early
from sandbox_provisioner.broker.eyes import Eyes
from sandbox_provisioner.broker.frames import MOST_BYTES, VERSION, BadFrame, Reader, frame
from sandbox_provisioner.broker.kernels import Kernel, Kernels
from sandbox_provisioner.broker.peer import Peer
from sandbox_provisioner.broker.server_wish import ServerWish
from sandbox_provisioner.broker.sockets import link_into
from sandbox_provisioner.broker.talk import Call, ask_now, silent
from sandbox_provisioner.broker.values import BadValue, as_json, of_json
from sandbox_provisioner.broker.wishes import (
    QUESTIONS,
    STREAMS,
    Ahead,
    Question,
    Wish,
    read,
    written,
)
from sandbox_provisioner.contract import Labels
from sandbox_provisioner.errors import HostError, LaunchError, SpecError
from sandbox_provisioner.facilities.network.tell.counts import OfName, Traffic
from sandbox_provisioner.facilities.workdir.facts.run_by_host import Server
from sandbox_provisioner.places import Asker, Place
from sandbox_provisioner.plan import SOCKET_NAMES
from sandbox_provisioner.spec import Limits, Network, NetworkWish, OnMissing, SandboxSpec, Volume
from sandbox_provisioner.story import ExitStory
from sandbox_provisioner.told import EndKind

WISH = Wish(
    sandbox_id="0123456789ab",
    spec=SandboxSpec(
        workdir="/home/a/work",
        limits=Limits(memory_bytes=64 << 20, cpuset=frozenset({0, 1})),
        network=NetworkWish(mode=Network.GATEWAY, allow=("pypi.org:443",)),
        volumes=(Volume(source="/srv/data", target="/data"),),
        on_missing={"cpu": OnMissing.WARN},
    ),
    argv=("python", "-m", "ipykernel_launcher"),
    environment={"LANG": "C", "strange\udcff": "\udcfe"},
    cwd="/home/a/work/in",
    connection_file=("kernel-1.json", "{}"),
    home="/home/a",
    here="/home/a",
    umask=0o27,
    inherited={"LANG": "C"},
    server=Server(programs=(("PATH", "/usr/bin"),)),
    labels=Labels(kernel_id="1"),
    logged=("stdout",),
)
SERVER_WISH = ServerWish(
    person="ann",
    user="ann@example.org",
    argv=("jupyterhub-singleuser", "--debug"),
    environment={"PATH": "/usr/bin", "JUPYTERHUB_API_TOKEN": "secret"},
    port=8888,
    api_port=8081,
    sum=Limits(memory_bytes=64 << 20, pids=100),
    box=Limits(shm_bytes=1 << 20),
    network=NetworkWish(mode=Network.GATEWAY, allow=("pypi.org:443",)),
    volumes=(Volume(source="/srv/data", target="/data"),),
    devices=("/dev/kvm",),
    installed="/opt/hub/bin",
    server=Server(programs=(("PATH", "/usr/bin"),)),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FUZZED = settings(
    max_examples=int(os.environ.get("BROKER_EXAMPLES", "200")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def taken(reader: Reader, text: bytes) -> dict[str, Any] | None:
    """What *reader* makes of *text*, which comes as it asks for it."""
    found = None
    while text and found is None:
        most = reader.wanted_bytes
        found, text = reader.take(text[:most]), text[most:]
    return found


def test_a_wish_arrives_as_it_was_sent() -> None:
    ahead = Ahead(preload=("numpy",), spares=2, lonely_seconds=30.0, alone=False)
    ready = replace(WISH, act="start-ready", ahead=ahead, no_input=True)
    question = Question(ask="find", sandbox_id="0" * 12, init=(7, 8))
    for asked in (WISH, ready, SERVER_WISH, question):
        message = taken(Reader(), frame(written(asked)))
        assert message is not None
        assert read(message) == asked


def test_a_story_arrives_as_it_was_told() -> None:
    traffic = Traffic(up_bytes=1, names={"a:443": OfName(refusals=2)})
    story = ExitStory(kind=EndKind.MEMORY_CAP, code=-9, signal=9, network=traffic, cpu_seconds=1)
    assert of_json(ExitStory, json.loads(json.dumps(as_json(story))), "story") == story


def test_no_more_is_read_than_one_message_has() -> None:
    reader, text = Reader(), frame({"ask": "look"})
    for number, byte in enumerate(text):
        assert reader.wanted_bytes <= len(text) - number
        found = reader.take(bytes([byte]))
    assert found == {"ask": "look"}
    with pytest.raises(BadFrame, match="more than one"):
        Reader().take(text)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"null", b'"a"', b"{", b"\xff", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"[" * 60000,
     b'{"version": 2}', b'{"version": "1"}', b"{}", b'{"version": true}',
     b'{"a": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_what_is_no_message_of_this_version_is_refused(text: bytes) -> None:
    with pytest.raises(BadFrame):
        taken(Reader(), len(text).to_bytes(4, "big") + text + b" " * (not text))


@pytest.mark.parametrize(
    ("version", "older"),
    [(VERSION + 1, "this server is"), (VERSION - 1, "the sandbox broker at /s is")],
)
def test_a_broker_of_another_version_is_told_with_which_of_the_two_is_older(
    version: int, older: str
) -> None:
    with pytest.raises(BadFrame) as caught:
        taken(Reader(), framed({"version": version, "kernels": []}))
    told = str(silent("/s", caught.value))
    assert f"it speaks version {version} of its language, and this server version {VERSION}" in told
    assert f"{older} of an older release" in told


def test_who_wrote_a_message_stands_in_it() -> None:
    reader = Reader()
    assert taken(reader, frame({"ask": "list"})) == {"ask": "list"}
    assert reader.release == sandbox_provisioner.__version__
    assert taken(reader := Reader(), framed({"version": VERSION})) == {}
    assert reader.release == ""


def framed(message: dict[str, Any]) -> bytes:
    """As somebody else's program writes it."""
    text = json.dumps(message).encode()
    return len(text).to_bytes(4, "big") + text


def test_a_length_beyond_the_limit_is_refused_before_anything_comes() -> None:
    with pytest.raises(BadFrame, match=f"more than {MOST_BYTES} bytes"):
        Reader().take((MOST_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(BadFrame):
        frame({"a": "x" * MOST_BYTES})


@FUZZED
@given(st.binary(max_size=200), st.lists(st.integers(1, 9), max_size=20))
def test_any_bytes_are_a_message_or_none(text: bytes, sizes: list[int]) -> None:
    reader = Reader()
    with suppress(BadFrame):
        for size in sizes:
            most = min(size, reader.wanted_bytes)
            if reader.take(text[:most]) is not None or not text:
                break
            text = text[most:]


@FUZZED
@given(st.data())
def test_any_change_of_a_wish_is_a_wish_or_refused(data: st.DataObject) -> None:
    wish = data.draw(st.sampled_from([WISH, SERVER_WISH]))
    message: Any = json.loads(json.dumps(written(wish)))
    for _ in range(data.draw(st.integers(1, 3))):
        above, key = data.draw(st.sampled_from(list(_places(message))))
        if data.draw(st.booleans()):
            above[key] = data.draw(JSON)
        else:
            del above[key]
        if not message:
            break
    with suppress(BadValue, SpecError):
        read(message)


def _places(value: Any) -> Any:
    """Each list or object in *value*, with a key in it."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("person", ""), ("person", "ann\0"), ("user", "a" * 300), ("argv", []), ("argv", [""]),
        ("argv", ["bin/python"]), ("argv", ["python", "a\0"]), ("environment", {"A=B": "1"}),
        ("environment", {"A": "\0"}), ("port", 0), ("api_port", 8888), ("port", 1 << 16),
        ("network", {"mode": "host"}), ("devices", ["kvm"]), ("uid", 0),
        ("volumes", [{"source": "/a/../b", "target": "/b"}]),
        ("volumes", [{"source": "/a", "target": "/usr/lib/a"}]),
        ("volumes", [{"source": "/a", "target": "/usr/lib/a", "is_of_device": True}]),
        ("volumes", [{"source": f"/{n}", "target": f"/data/{n}"} for n in range(33)]),
    ],
)  # fmt: skip
def test_a_wish_for_a_server_has_nothing_that_cannot_be_meant(name: str, value: Any) -> None:
    message = written(SERVER_WISH)
    message["server-start"][name] = value
    with pytest.raises((BadValue, SpecError)):
        read(message)


@FUZZED
@given(
    st.dictionaries(st.sampled_from(["sandbox_id", "signal", "busy", "init", "name"]), JSON),
    st.sampled_from(QUESTIONS) | JSON,
)
def test_any_question_is_one_or_refused(message: dict[str, Any], ask: Any) -> None:
    message["ask"] = ask
    with suppress(BadValue):
        assert read(message).ask in QUESTIONS  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sandbox_id", "../../etc"), ("sandbox_id", "0123456789ab\n"), ("argv", []),
        ("argv", ["./python"]), ("cwd", "/etc"), ("cwd", "/home/a/work/../x"),
        ("connection_file", ["../x", ""]), ("connection_file", ["..", ""]), ("umask", 0o1777),
        ("logged", ["stdin"]), ("environment", {"a=b": ""}), ("environment", {"a": "\0"}),
        ("uid", 0), ("watched", 3), ("terms", None), ("below", "hub/x/y"), ("steps", []),
        ("extra_files", ["x"]), ("home", "home"),
        ("labels", {"kind": "gateway"}), ("labels", {"nursery": "x"}),
        ("labels", {"notebook": "x" * 5000}),
    ],
)  # fmt: skip
def test_a_wish_says_nothing_that_the_broker_decides(name: str, value: Any) -> None:
    message = written(WISH)
    message["start"][name] = value
    with pytest.raises((BadValue, SpecError)):
        read(message)


@pytest.mark.parametrize(
    "fields",
    [
        {"confinement": "landlock"}, {"network": {"mode": "host"}}, {"workdir": "work"},
        {"hostname": "a b"}, {"volumes": [{"source": "/home/a/work", "target": "/x"}]},
        {"volumes": [{"source": f"/srv/{n}", "target": f"/x/{n}"} for n in range(33)]},
        {"volumes": [{"source": "/srv/a", "target": "/usr/lib/a"}]},
        {"volumes": [{"source": "/srv/a", "target": "/usr/lib/a", "is_of_device": True}]},
        {"limits": {"memory_bytes": 1}}, {"limits": {"memory_bytes": True}}, {"uid": 0},
    ],
)  # fmt: skip
def test_a_box_is_none_that_the_broker_does_not_make(fields: dict[str, Any]) -> None:
    message = written(WISH)
    message["start"]["spec"] |= fields
    with pytest.raises((BadValue, SpecError)):
        read(message)


@pytest.mark.parametrize(
    ("fields", "instead"),
    [
        ({"confinement": "landlock"}, 'Set confinement = "namespaces"'),
    ],
)
def test_what_an_option_asks_in_vain_is_told_with_what_to_set(
    fields: dict[str, str], instead: str
) -> None:
    message = written(WISH)
    message["start"]["spec"] |= fields
    with pytest.raises(SpecError, match=instead):
        read(message)


@pytest.mark.parametrize(
    "fields",
    [
        {"act": "start-ready"}, {"act": "steps", "ahead": {}}, {"ahead": {}},
        *({"act": "fill", "ahead": ahead} for ahead in (
            {"preload": ["a,b"]}, {"preload": ["a b"]}, {"preload": ["a"] * 65},
            {"preload": ["a" * 257]}, {"spares": -1}, {"spares": 1 << 20}, {"idle_seconds": -1.0},
            {"lonely_seconds": 1e12}, {"owner": "1 2"}, {"user": "0"}, {"watched": 3},
        )),
    ],
)  # fmt: skip
def test_what_cannot_be_ready_or_is_said_to_be_somebody_elses_is_refused(
    fields: dict[str, Any],
) -> None:
    message = written(WISH)
    message["start"] |= fields
    with pytest.raises(BadValue):
        read(message)


# -- the rights of who asks


def test_a_place_is_the_kernels_where_owner_and_group_are_the_users(tmp_path: Path) -> None:
    with ExitStack() as opened:
        fd = os.open(tmp_path, os.O_PATH)
        opened.callback(os.close, fd)
        place = Place.brought(str(tmp_path), fd, opened, attempt="")
    uid, gid = os.getuid(), os.getgid()
    assert place.not_own(Asker(uid, frozenset(), frozenset({gid}))) == ""
    assert place.not_own(Asker(uid + 1, frozenset())) == ""  # who launches is that user
    assert "belongs to uid" in place.not_own(Asker(uid + 1, frozenset(), frozenset({gid})))
    assert "its group is" in place.not_own(Asker(uid, frozenset(), frozenset()))


@pytest.mark.parametrize("kind", ["pipe", "nothing", "deleted", "replaced", "device"])
def test_what_is_no_place_any_more_is_refused(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    with ExitStack() as opened:
        fds = [*os.pipe(), os.open(folder, os.O_PATH), os.open("/dev/null", os.O_PATH)]
        for fd in fds:
            opened.callback(os.close, fd)
        if kind in {"deleted", "replaced"}:
            folder.rename(tmp_path / "gone") if kind == "replaced" else folder.rmdir()
            if kind == "replaced":
                (tmp_path / "gone").rmdir()
                folder.mkdir()
        brought = {"pipe": fds[0], "nothing": -1, "device": fds[3]}.get(kind, fds[2])
        with pytest.raises(SpecError, match="use it"):
            Place.brought(str(folder), brought, opened, attempt="use it")


@pytest.mark.requires("root")
def test_eyes_see_what_their_user_sees_and_nobody_elses_change(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "secret").write_text("")
    group = tmp_path / "group"
    group.mkdir()
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == 0 and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)
    os.chown(group, 0, 4999)
    group.chmod(0o750)
    look = Eyes(4321, 4321, frozenset({4321, 4999}))
    assert look(os.path.exists, str(closed)) and not look(os.path.exists, str(closed / "secret"))
    assert look(os.listdir, str(group)) == []
    with pytest.raises(PermissionError):
        Eyes(4321, 4321, frozenset({4321}))(os.listdir, str(group))
    with pytest.raises(PermissionError):
        look(os.listdir, str(closed))
    assert (closed / "secret").exists() and os.geteuid() == 0
    with pytest.raises(ValueError, match="root"):
        Eyes(0, 0, frozenset())


@pytest.mark.requires("root")
def test_nobody_waits_for_what_does_not_answer() -> None:
    answers, look = threading.Event(), Eyes(4322, 4322, frozenset(), seconds=0.01)
    for _ in range(4):
        with pytest.raises(HostError, match="it takes more than"):
            look(answers.wait)
    with pytest.raises(HostError, match="4 looks before have not ended"):
        look(os.getpid)
    assert Eyes(4323, 4323, frozenset())(os.getpid) == os.getpid()
    answers.set()
    for thread in threading.enumerate():
        if thread.name == "sandbox-eyes":
            thread.join()
    assert look(os.getpid) == os.getpid()


@pytest.mark.requires("root")
def test_looks_that_are_given_up_before_they_are_too_long_count_as_well() -> None:
    """As where a start waits no longer than its looks do; some starts of a user at once."""
    answers, begun = threading.Event(), threading.Semaphore(0)

    def hang() -> None:
        begun.release()
        answers.wait()

    def look() -> None:
        with pytest.raises(HostError, match="it takes more than"):
            eyes(hang)

    eyes = Eyes(4324, 4324, frozenset(), seconds=0.5)
    waiting = [threading.Thread(target=look) for _ in range(4)]
    for thread in waiting:
        with eyes.open():
            thread.start()
            begun.acquire()
    for thread in waiting:
        thread.join()
    with pytest.raises(HostError, match="4 looks before have not ended"):
        eyes(os.getpid)
    answers.set()
    for thread in threading.enumerate():
        if thread.name == "sandbox-eyes":
            thread.join()
    assert Eyes(4324, 4324, frozenset())(os.getpid) == os.getpid()


def test_a_broker_that_says_nothing_is_told_from_one_that_is_not_there(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        with pytest.raises(HostError, match="refused"):
            ask_now(path, {}, 1.0)
        listening.listen()
        with pytest.raises(HostError, match="it has not answered in time"):
            ask_now(path, {}, 1.0)


class Listening:
    """In place of a broker: it answers *told* to who asks; where it does *not_listen*, before."""

    def __init__(self, path: Path, told: dict[str, Any], *, not_listen: bool = False) -> None:
        self.path, self.connections = str(path), 0
        self._told, self._not_listen = frame(told), not_listen
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self.path)
        self._listening.listen()

    def accept(self) -> None:
        """One."""
        accepted, _ = self._listening.accept()
        self.connections += 1
        with accepted:
            if not self._not_listen and not accepted.recv(1 << 16):
                return
            accepted.sendall(self._told)

    def listen(self, most: int) -> None:
        """Let *most* and one wait."""
        self._listening.listen(most)

    def close(self) -> None:
        """Listen no more."""
        self._listening.close()


REFUSED = {"error": {"kind": "SpecError", "attempt": "ask", "answer": "no", "remedy": ["Go."]}}


def test_who_is_refused_before_he_has_asked_hears_why(tmp_path: Path) -> None:
    busy = Listening(tmp_path / "socket", REFUSED, not_listen=True)

    async def ask_late() -> None:
        with contextlib.closing(Call(busy.path)) as call:
            call.connect()
            busy.accept()  # and it has closed before anything was sent
            call.say({})
            await call.answer()

    with pytest.raises(SpecError, match="no"):
        asyncio.run(ask_late())
    connect = socket.socket.connect

    class Late(socket.socket):
        def connect(self, path: Any) -> None:
            connect(self, path)
            busy.accept()

    with pytest.MonkeyPatch.context() as patched, pytest.raises(SpecError, match="no"):
        patched.setattr(socket, "socket", Late)
        ask_now(busy.path, {}, 30.0)
    busy.close()


def test_who_thinks_for_long_asks_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker does not wait for a question as long as a file server may take."""
    there = Listening(tmp_path / "socket", {"good": True})
    accepting = threading.Thread(target=lambda: (there.accept(), there.accept()))

    async def run() -> Any:
        with contextlib.closing(Call(there.path)) as call:
            call.connect()
            monkeypatch.setattr(call, "_until", time.monotonic() - 1)
            call._connection.socket.shutdown(socket.SHUT_RDWR)  # the broker waits no more
            call.say({})
            return await call.answer()

    accepting.start()
    assert asyncio.run(run()) == ({"good": True}, -1)
    accepting.join()
    assert there.connections == 2
    there.close()


async def said(path: str, message: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """What is answered to *message*, which a thread asks, as it has thought of it."""
    with contextlib.closing(Call(path)) as call:

        def ask() -> None:
            call.connect()
            call.say(message)

        await asyncio.to_thread(ask)
        return await call.answer()


def test_a_question_that_does_not_go_in_one_piece_goes_in_several(tmp_path: Path) -> None:
    path, heard = str(tmp_path / "socket"), list[dict[str, Any]]()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()

        def answer() -> None:
            reader, (accepted, _) = Reader(), listening.accept()
            with accepted:
                while not heard:
                    found = reader.take(accepted.recv(min(reader.wanted_bytes, 1 << 12)))
                    heard.extend([found] if found else [])
                accepted.sendall(frame({"good": True}))

        answering = threading.Thread(target=answer)
        long = {"ask": "x" * (MOST_BYTES - 256)}
        call = said(path, long)
        answering.start()
        assert asyncio.run(call) == ({"good": True}, -1)
        answering.join()
    assert heard == [long]


def test_a_broker_whose_queue_is_full_is_asked_when_it_has_room(tmp_path: Path) -> None:
    there = Listening(tmp_path / "socket", {"good": True})
    there.listen(0)
    before = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    with suppress(BlockingIOError):
        for one in before:
            one.setblocking(False)
            one.connect(there.path)
    with contextlib.closing(Call(there.path)) as call:
        assert not call.connect()  # it is full

    async def run() -> Any:
        asking = asyncio.ensure_future(said(there.path, {}))
        while there.connections < 2:
            await asyncio.to_thread(there.accept)
            for one in before:
                one.close()
        return await asking

    for one in before:
        one.close()
    assert asyncio.run(run()) == ({"good": True}, -1)
    there.close()


def test_sockets_are_shown_also_after_a_try_that_did_not_come_to_its_end(tmp_path: Path) -> None:
    folder, shown = tmp_path / "a/sockets", tmp_path / "b/shown"
    folder.mkdir(parents=True)
    with ExitStack() as opened:
        for name in SOCKET_NAMES:
            made = opened.enter_context(socket.socket(socket.AF_UNIX))
            made.bind(str(folder / name))
        shown.mkdir(parents=True)
        (shown / SOCKET_NAMES[0]).touch()
        for _ in range(2):
            link_into(folder, shown)
    assert all((shown / name).samefile(folder / name) for name in SOCKET_NAMES)


def test_whose_a_kernel_was_is_known_as_long_as_something_is_kept_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not of one that never started, of which a user may ask for as many as he likes."""
    kernels = Kernels(str(tmp_path), "", lambda *_, **__: None)
    images: set[str] = set()
    monkeypatch.setattr(kept.images, "is_there", images.__contains__)
    monkeypatch.setattr(kept.disks, "end", images.discard)

    async def close() -> None:
        pass

    folder = SimpleNamespace(path=tmp_path / WISH.sandbox_id)
    ended = Kernel(of=1001, handle=SimpleNamespace(close=close, folder=folder))  # type: ignore[arg-type]

    async def check() -> None:
        kernels._kept.check(1001, WISH.sandbox_id, WISH.spec)
        assert not kept._whose
        kernels._kept.started(1001, WISH.sandbox_id)
        images.add(WISH.sandbox_id)
        await kernels._close(ended)
        kernels._kept.check(1001, WISH.sandbox_id, WISH.spec)
        with pytest.raises(LaunchError, match="not this user's"):
            kernels._kept.check(1002, WISH.sandbox_id, WISH.spec)
        await kernels._forget(1001, WISH.sandbox_id)
        assert not images and not kept._whose
        kernels._kept.started(1001, WISH.sandbox_id)
        await kernels._close(ended)
        assert not kept._whose

    asyncio.run(check())


@pytest.mark.parametrize("is_started", [False, True])
def test_no_kernel_runs_of_a_start_for_which_descriptors_are_wanting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_started: bool
) -> None:
    """Before it starts, or when it runs and has to be told of."""
    kernels = Kernels(str(tmp_path), "", lambda *_, **__: None)
    running: list[str] = []

    def no_descriptor(*_: int) -> int:
        raise OSError(errno.EMFILE, "as many are open as may be")

    class Running:
        record = SimpleNamespace(sandbox_id=WISH.sandbox_id)
        folder = SimpleNamespace(path=tmp_path / WISH.sandbox_id)
        end_descriptor = staticmethod(no_descriptor)

        async def wait(self) -> None:
            await asyncio.Event().wait()

        async def close(self) -> None:
            running.remove(WISH.sandbox_id)

    async def start(*_: Any) -> Running:
        running.append(WISH.sandbox_id)
        return Running()

    async def check() -> None:
        request = SimpleNamespace(watched=0, spec=WISH.spec, narrowed="")
        monkeypatch.setattr(kernels_, "start_cold", start)
        monkeypatch.setattr(kernels, "_prepared", lambda *_: (None, request, []))
        monkeypatch.setattr(kernels, "_told_of", lambda _: {})
        if not is_started:
            monkeypatch.setattr(os, "dup", no_descriptor)
        with pytest.raises(OSError, match="as many are open"):
            await kernels._start(Peer.of(0, 0), WISH, range(STREAMS), 0, Early())
        assert not running and not kernels._all

    asyncio.run(check())


def test_a_kernel_is_not_closed_while_its_server_is_noted_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = Kernels(str(tmp_path), "", lambda *_, **__: None)
    begun, goes_on, over = threading.Event(), threading.Event(), threading.Event()

    def note(_: Any, server: int) -> None:
        begun.set()
        goes_on.wait()
        os.fstat(server)
        over.set()

    class Running:
        folder = SimpleNamespace(path=tmp_path / WISH.sandbox_id)

        async def close(self) -> None:
            assert over.is_set()

    async def check() -> None:
        monkeypatch.setattr(kernels_, "_note_server", note)
        kernel = Kernel(of=1, handle=Running(), watched=os.open("/", os.O_PATH))  # type: ignore[arg-type]
        kernels._add(WISH.sandbox_id, kernel)
        while not begun.is_set():
            await asyncio.sleep(0)
        ending = asyncio.ensure_future(kernels._end(kernel))
        await asyncio.sleep(0)
        goes_on.set()
        await ending
        assert kernel.watched == -1

    asyncio.run(check())


def test_what_a_nursery_may_import_is_looked_at_by_its_user(tmp_path: Path) -> None:
    """Of root's own rights a file system could take its time for ever."""
    _, site = ASKERS["root"]
    kernels = Kernels(str(tmp_path), str(tmp_path / "none"), lambda *_, **__: None)
    server = os.pidfd_open(os.getpid())

    def seen_by(look: Any, *arguments: object) -> str:
        return f"{look.__name__} of {len(arguments)}"

    try:
        found = kernels._why_not_ahead(1001, server, seen_by, site, {})
    finally:
        os.close(server)
    assert found == "why_not_ahead of 2"


def test_of_one_user_only_so_many_starts_have_a_thread_at_a_time(tmp_path: Path) -> None:
    """The others wait for their turn; who is not served before is somebody else."""
    begun: list[int] = []

    async def check() -> None:
        kernels = Kernels(str(tmp_path), str(tmp_path / "none"), lambda *_, **__: None)
        go = asyncio.Event()

        async def start(peer: Peer, *_: Any) -> tuple[dict[str, Any], int]:
            begun.append(peer.uid)
            await go.wait()
            return {}, -1

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_start", start)
            fds = range(STREAMS + len(WISH.sources))
            peers = [replace(Peer.of(0, 0), uid=uid) for uid in [1001] * 6 + [1002]]
            asked = [asyncio.ensure_future(kernels.start(peer, WISH, fds, -1)) for peer in peers]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert begun == [1001] * 4 + [1002]
            go.set()
            await asyncio.gather(*asked)
        assert sorted(begun) == [1001] * 6 + [1002]
        assert not kernels._turns

    asyncio.run(check())


def test_what_a_kernel_has_installed_is_not_dropped_while_it_starts_again(tmp_path, monkeypatch):
    forgotten: list[str] = []
    monkeypatch.setattr(kernels_, "_MOST_LEFT", 1)
    kernels = Kernels(str(tmp_path), "", lambda *_, **__: None)
    monkeypatch.setattr(kernels._kept, "forget", lambda _, name: forgotten.append(name))

    async def leave(name: str) -> None:
        await kernels._leave(name, SimpleNamespace(of=1, watched=-1))

    async def run() -> None:
        await leave("first")
        with kernels._starts_again("first"):
            await leave("second")
            assert forgotten == []
        await leave("third")
        assert forgotten == ["first"]
        kernels.let_go()

    asyncio.run(run())
