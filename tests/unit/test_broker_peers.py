"""What strangers send to a daemon, and what it costs others. All of it runs in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_broker import WISH

from sandbox_provisioner.broker import daemon, peer
from sandbox_provisioner.broker import kernels as kernels_
from sandbox_provisioner.broker.daemon import Daemon
from sandbox_provisioner.broker.desk import Desk
from sandbox_provisioner.broker.frames import MOST_BYTES, frame
from sandbox_provisioner.broker.kernels import _name_of, _shortened
from sandbox_provisioner.broker.wishes import STREAMS, written
from sandbox_provisioner.contract import WarmUnavailable
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.ids import facts
from sandbox_provisioner.hub import relay
from sandbox_provisioner.off_loop import apart
from sandbox_provisioner.records import Record

LINGER_SECONDS = 60


class Lingering:
    """A TCP socket whose last close lasts until `give_up`: nobody reads what was written to it."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self._sends = socket.create_connection(listening.getsockname())
            self._reads, _ = listening.accept()
        self._sends.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("2i", 1, LINGER_SECONDS)
        )
        self._sends.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                self._sends.send(bytes(1 << 16))

    def sent_over(self, connection: socket.socket, text: bytes) -> None:
        """Hand it over with *text*, and keep nothing of it."""
        socket.send_fds(connection, [text], [self._sends.fileno()])
        number = self._sends.detach()
        os.close(number)

    def give_up(self) -> None:
        """The end that did not read is closed, which resets the other one (tcp(7))."""
        self._reads.close()
        self._sends.close()


@pytest.fixture
def lingering() -> Iterator[Lingering]:
    made = Lingering()
    yield made
    made.give_up()


@pytest.fixture(autouse=True)
def linger_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where its sender sets it again meanwhile."""
    monkeypatch.setattr(peer, "_linger_no_more", lambda fd: None)


class Kernels:
    """In place of those of the daemon: it answers each question with *answer*."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.told = answer
        self.started = object()
        self.undone: list[object] = []
        self.desk = SimpleNamespace(
            refusal=lambda uid: "",
            peer=lambda uid, gid: SimpleNamespace(uid=uid, name="a"),
            together=2,
        )

    async def answer(self, peer: Any, question: Any) -> tuple[dict[str, Any], int]:
        return self.told, -1

    async def start(self, *_: Any) -> tuple[dict[str, Any], int, object]:
        return dict(self.told), -1, self.started

    async def undo(self, started: object) -> None:
        self.undone.append(started)


def listening(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen(64)
    return made


def connected(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.connect(str(path))
    return made


async def asked(path: Path, text: bytes) -> dict[str, Any]:
    """What is answered to *text*, {} for nothing."""
    reading, writing = await asyncio.open_unix_connection(str(path))
    writing.write(text)
    told = await reading.read()
    writing.close()
    return json.loads(told[4:]) if told else {}


def serve(path: Path, kernels: Any, scene: Callable[[Daemon], Awaitable[None]]) -> None:
    async def run() -> None:
        made = Daemon(listening(path), kernels)
        serving = asyncio.ensure_future(made.serve())
        await scene(made)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await made.close()

    asyncio.run(run())


QUESTION = frame({"ask": "list"})


@pytest.mark.parametrize("text", [QUESTION, b"x", b"\xff\xff\xff\xff", QUESTION + b"more"])
@pytest.mark.parametrize("is_refused", [False, True])
def test_what_never_closes_keeps_nobody_else_waiting(
    tmp_path: Path, lingering: Lingering, text: bytes, is_refused: bool
) -> None:
    kernels = Kernels({"kernels": []})

    async def scene(made: Daemon) -> None:
        words = iter(["go away"] if is_refused else [])
        kernels.desk.refusal = lambda uid: next(words, "")
        with connected(tmp_path / "socket") as attacks:
            lingering.sent_over(attacks, text)
        while not made._of_user:  # until the daemon has it
            await asyncio.sleep(0)
        assert (await asked(tmp_path / "socket", QUESTION))["kernels"] == []
        assert made._of_user.total() == 1  # it counts as long as it lasts
        lingering.give_up()
        while made._of_user:
            await asyncio.sleep(0)

    serve(tmp_path / "socket", kernels, scene)


def test_who_goes_while_he_is_looked_up_counts_until_that_has_an_end(tmp_path: Path) -> None:
    """A directory server may take its time, and each look-up has one of the threads."""
    kernels, has_answered = Kernels({"kernels": []}), threading.Event()
    real, looks = kernels.desk.peer, []

    def peer(uid: int, gid: int) -> Any:
        looks.append(uid)
        if len(looks) == 1:
            has_answered.wait()
        return real(uid, gid)

    kernels.desk.peer = peer

    async def scene(made: Daemon) -> None:
        with connected(tmp_path / "socket"):
            while not looks:
                await asyncio.sleep(0)
        try:
            assert (await asked(tmp_path / "socket", QUESTION))["kernels"] == []
            assert made._of_user.total() == 1
        finally:
            has_answered.set()
        while made._of_user:
            await asyncio.sleep(0)

    serve(tmp_path / "socket", kernels, scene)


def test_all_ids_that_somebody_has_besides_the_own_one_have_one_users_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "subuid").write_text("other:60000:1\nme:100000:65536\n")
    monkeypatch.setattr(facts, "_SUBUID", str(tmp_path / "subuid"))
    monkeypatch.setattr(daemon, "_MOST_OF_USER", 2)
    coming = iter([100000, 165535, 130000, 165536])
    monkeypatch.setattr(daemon, "credentials", lambda _: (os.getpid(), next(coming), 0))

    async def scene(made: Daemon) -> None:
        path = tmp_path / "socket"
        with connected(path), connected(path):  # and say nothing
            while made._of_user.total() < 2:
                await asyncio.sleep(0)
            assert made._of_user == {100000: 2}
            told = await asked(path, b"")
            assert "too much at once" in told["error"]["answer"]
            assert (await asked(path, QUESTION))["kernels"] == []

    serve(tmp_path / "socket", Kernels({"kernels": []}), scene)


def test_those_that_do_not_close_take_no_more_than_their_users_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "_MOST_OF_USER", 2)
    monkeypatch.setattr(daemon, "_MOST_REFUSED", 1)
    stuck = [Lingering() for _ in range(5)]

    async def scene(made: Daemon) -> None:
        for one in stuck:
            with connected(tmp_path / "socket") as attacks:
                one.sent_over(attacks, b"x")
        while sum(map(len, made._parked.values())) < 2:
            await asyncio.sleep(0)
        assert made._of_user.total() == 3
        told = await asked(tmp_path / "socket", b"")
        assert "too much at once" in told["error"]["answer"]
        for one in stuck:
            one.give_up()
        while made._of_user or made._parked:
            await asyncio.sleep(0)
        assert "kernels" in await asked(tmp_path / "socket", QUESTION)

    serve(tmp_path / "socket", Kernels({"kernels": []}), scene)


@pytest.mark.parametrize("are_passed", [False, True])
def test_a_relay_waits_for_nothing_that_was_sent_over_it(
    tmp_path: Path, lingering: Lingering, monkeypatch: pytest.MonkeyPatch, are_passed: bool
) -> None:
    if are_passed:  # as before Linux 6.16
        monkeypatch.setattr(relay, "_SO_PASSRIGHTS", 0x7FFF)

    async def scene() -> None:
        far = listening(tmp_path / "far")
        listener = listening(tmp_path / "near")

        async def dial() -> socket.socket:
            return await relay.dialled(socket.AF_UNIX, str(tmp_path / "far"))

        made = relay.Relay(listener, dial, 2, apart)
        serving = asyncio.ensure_future(made.serve())
        await asyncio.sleep(0)
        with connected(tmp_path / "near") as attacks:
            if are_passed:
                lingering.sent_over(attacks, b"x")
                far.setblocking(False)
                first, _ = await asyncio.get_running_loop().sock_accept(far)
                assert await asyncio.get_running_loop().sock_recv(first, 1) == b""
                first.close()
            else:
                with contextlib.suppress(PermissionError):  # Linux has the option
                    lingering.sent_over(attacks, b"x")
        far.setblocking(False)
        reading, writing = await asyncio.open_unix_connection(str(tmp_path / "near"))
        writing.write(b"a question")
        loop = asyncio.get_running_loop()
        while True:
            answers, _ = await loop.sock_accept(far)
            if await loop.sock_recv(answers, 100) == b"a question":
                break
            answers.close()
        await loop.sock_sendall(answers, b"an answer")
        answers.close()
        assert await reading.read() == b"an answer"
        writing.close()
        lingering.give_up()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        far.close()

    asyncio.run(scene())


def test_an_answer_that_is_too_long_undoes_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "read", lambda message: WISH)
    kernels = Kernels({"warnings": [], "unseen": [], "folder": "x" * MOST_BYTES})

    async def scene(made: Daemon) -> None:
        assert await asked(tmp_path / "socket", frame(written(WISH))) == {}
        assert kernels.undone == [kernels.started]
        kernels.told = {"warnings": ["x" * MOST_BYTES] * 99, "unseen": ["y" * MOST_BYTES]}
        told = await asked(tmp_path / "socket", frame(written(WISH)))
        assert told["warnings"][-1] == "... and 83 more." and told["unseen"][0].endswith("y ...")
        assert len(kernels.undone) == 1

    serve(tmp_path / "socket", kernels, scene)


def test_who_does_not_wait_to_hear_that_nothing_is_ready_ends_nobody_elses_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The id of a start is what its user says, and may be that of somebody's kernel."""
    monkeypatch.setattr(daemon, "read", lambda message: WISH)
    desk: Any = Kernels({}).desk
    desk.has, desk.together, desk.kept_where = lambda record: False, 1, ""
    kernels = kernels_.Kernels(str(tmp_path), "", lambda *_, **__: None, desk=desk)

    async def start(*_: Any) -> None:
        raise WarmUnavailable("none is there")

    monkeypatch.setattr(kernels, "_start", start)
    fds = [0] * (STREAMS + len(WISH.sources))

    async def scene(made: Daemon) -> None:
        somebodys = kernels._all[WISH.sandbox_id] = kernels_.Kernel(of=1, handle=None)  # type: ignore[arg-type]
        with connected(tmp_path / "socket") as attacks:
            socket.send_fds(attacks, [frame(written(WISH))], fds)
        while not made._of_user:
            await asyncio.sleep(0)
        while made._of_user:
            await asyncio.sleep(0)
        assert kernels._all.pop(WISH.sandbox_id, None) is somebodys

    serve(tmp_path / "socket", kernels, scene)


def test_an_id_that_somebody_else_has_by_now_is_not_undone(tmp_path: Path) -> None:
    kernels = kernels_.Kernels(str(tmp_path), "", lambda *_, **__: None)
    handle: Any = SimpleNamespace(record=Record(sandbox_id=WISH.sandbox_id))
    kernels._all[WISH.sandbox_id] = somebodys = kernels_.Kernel(of=1, handle=handle)
    asyncio.run(kernels.undo(kernels_.Kernel(of=2, handle=handle)))
    assert kernels._all == {WISH.sandbox_id: somebodys}


def test_a_list_that_is_too_long_tells_how_many_it_leaves_out() -> None:
    kernels = [{"record": "x" * (MOST_BYTES // 8)} for _ in range(12)]
    told = json.loads(daemon._framed({"kernels": kernels})[4:])
    assert len(told["kernels"]) == 7 and told["left_out"] == 5
    assert "left_out" not in json.loads(daemon._framed({"kernels": kernels[:2]})[4:])


def test_a_long_list_is_encoded_no_more_than_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """All who ask anything wait meanwhile."""
    texts: list[str] = []
    encode = json.dumps

    def counted(value: Any, **how: Any) -> str:
        texts.append(encode(value, **how))
        return texts[-1]

    monkeypatch.setattr(json, "dumps", counted)
    daemon._framed({"kernels": [{"record": "\0" * (MOST_BYTES // 32)}] * 64})
    assert sum(map(len, texts)) < 3 * MOST_BYTES


def test_a_list_has_the_beginnings_of_what_people_call_kernels() -> None:
    """Each of 64 may be called by 12 KiB, and all of them have to have room."""
    record = Record(sandbox_id="0" * 12, kernel_id="k" * 4096, name="n" * 4096, notebook="b")
    told = _shortened(record)
    assert (told.kernel_id, told.name, told.notebook) == ("k" * 256, "n" * 256, "b")


def test_a_line_of_the_log_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    daemon.log("refusal", text="x" * MOST_BYTES, of=7)
    line = capsys.readouterr().err
    assert len(line) < 5000 and json.loads(line)["of"] == 7


def test_a_process_by_number_is_one_of_the_users_that_lives() -> None:
    pidfd = peer._by_number(os.getpid(), os.geteuid())
    os.close(pidfd)
    with pytest.raises(ProcessLookupError):
        peer._by_number(os.getpid(), os.geteuid() + 1)
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessLookupError):
        peer._by_number(child, os.geteuid())
    os.waitpid(child, 0)


def test_who_never_reads_metrics_keeps_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scrape = pytest.importorskip("sandbox_provisioner.broker.scrape")
    ended: list[bool] = []
    monkeypatch.setattr(scrape, "_SECONDS", 0.05)
    monkeypatch.setattr(scrape, "_answer", lambda *_: bytes(1 << 23))
    abort = asyncio.selector_events._SelectorTransport.abort  # type: ignore[attr-defined]

    def aborted(transport: Any) -> None:
        abort(transport)
        ended.append(transport.get_write_buffer_size() == 0)

    monkeypatch.setattr(
        asyncio.selector_events._SelectorTransport,
        "abort",
        aborted,  # type: ignore[attr-defined]
    )

    async def scene() -> None:
        async with await scrape.serve(str(tmp_path / "metrics"), list):
            with connected(tmp_path / "metrics") as asks:
                asks.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                while not ended:
                    await asyncio.sleep(0.01)
        assert ended == [True]

    asyncio.run(scene())


def test_an_id_that_a_user_has_besides_the_own_one_is_no_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a user namespace of theirs somebody may be any of 65536."""
    monkeypatch.setattr(facts, "_SUBUID", str(tmp_path / "subuid"))
    (tmp_path / "subuid").write_text("ann:200000:65536\n0:4100000000:65536\n")
    for uid in (200000, 265535, 4100000001):
        with pytest.raises(SpecError, match=f"uid {uid} is no user's own"):
            Desk().peer(uid, uid)
    for uid in (199999, 265536):
        assert Desk().peer(uid, uid).groups == {uid}
    (tmp_path / "subuid").write_text("ann:0:65536\n")
    assert Desk().peer(os.getuid(), os.getgid()).uid == os.getuid()  # who has a name is a user


def test_what_is_remembered_of_a_program_is_short() -> None:
    """Of a user dozens are remembered that had nothing ready."""
    long = replace(WISH, argv=("/" + "x" * 200_000, *WISH.argv[1:]))
    other = replace(WISH, argv=("/" + "x" * 200_001, *WISH.argv[1:]))
    assert sum(map(len, _name_of(long))) < 1000
    assert len({_name_of(one) for one in (WISH, long, other)}) == 3
