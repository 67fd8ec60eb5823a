"""What the broker reads of strangers: bytes, messages, wishes. None of it calls anybody."""

from __future__ import annotations

import json
import os
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox_provisioner.broker.eyes import Eyes
from sandbox_provisioner.broker.frames import MOST_BYTES, BadFrame, Reader, frame
from sandbox_provisioner.broker.values import BadValue, as_json, of_json
from sandbox_provisioner.broker.wishes import QUESTIONS, Question, Wish, read, written
from sandbox_provisioner.contract import Labels
from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.facilities.network.tell.counts import OfName, Traffic
from sandbox_provisioner.facilities.workdir.facts.run_by_host import Server
from sandbox_provisioner.places import Asker, Place
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
    for asked in (WISH, Question(ask="find", sandbox_id="0" * 12, init=(7, 8))):
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
     b'{"version": 2}', b'{"version": "1"}', b"{}", b'{"a": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_what_is_no_message_of_this_version_is_refused(text: bytes) -> None:
    with pytest.raises(BadFrame):
        taken(Reader(), len(text).to_bytes(4, "big") + text + b" " * (not text))


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
    message: Any = json.loads(json.dumps(written(WISH)))
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


@FUZZED
@given(st.dictionaries(st.sampled_from(["ask", "sandbox_id", "signal", "busy", "init"]), JSON))
def test_any_question_is_one_or_refused(message: dict[str, Any]) -> None:
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
        {"limits": {"memory_bytes": 1}}, {"limits": {"memory_bytes": True}}, {"uid": 0},
    ],
)  # fmt: skip
def test_a_box_is_none_that_the_broker_does_not_make(fields: dict[str, Any]) -> None:
    message = written(WISH)
    message["start"]["spec"] |= fields
    with pytest.raises((BadValue, SpecError)):
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
