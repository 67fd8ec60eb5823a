"""What the broker finds out before it has heard all. All of it runs in this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_broker import WISH
from test_broker_peers import QUESTION, Kernels, asked, connected, serve

from sandbox_provisioner.broker import daemon
from sandbox_provisioner.broker.daemon import Daemon
from sandbox_provisioner.broker.early import Early
from sandbox_provisioner.broker.frames import frame
from sandbox_provisioner.broker.peer import Connection, Peer
from sandbox_provisioner.broker.wishes import written
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.host import Ground

SOMEBODY = Peer("ann", 4331, 4331, frozenset({4331}), "/home/ann")


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Ground]:
    """All looks at the host that have been had."""
    found: list[Ground] = []
    probe = Ground.probe

    def look() -> Ground:
        found.append(probe())
        return found[-1]

    monkeypatch.setattr(Ground, "probe", look)
    return found


async def until(is_so: Any) -> None:
    while not is_so():
        await asyncio.sleep(0.001)


async def read(connection: socket.socket) -> bytes:
    return await asyncio.get_running_loop().sock_recv(connection, 1 << 16)


def test_the_host_is_looked_at_while_the_wish_is_thought_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: list[Ground]
) -> None:
    monkeypatch.setattr(daemon, "read", lambda message: WISH)
    kernels, used = Kernels({"good": True}), list[Ground]()

    async def start(*given: Any) -> tuple[dict[str, Any], int, None]:
        used.append(await asyncio.to_thread(given[-1].ground))
        return {}, -1, None

    monkeypatch.setattr(kernels, "start", start)

    async def scene(_: Daemon) -> None:
        with connected(tmp_path / "socket") as asks:
            asks.setblocking(False)
            await until(lambda: looks)
            asks.sendall(frame(written(WISH)))
            assert await read(asks)
        assert used == looks[:1] and len(looks) == 1

    serve(tmp_path / "socket", kernels, scene)


def test_where_something_has_come_no_start_is_on_its_way() -> None:
    """Then nobody looks at the host: it is there with the connection, or was read by now."""

    async def scene(connection: Connection, asks: socket.socket) -> None:
        assert connection.is_quiet()
        asks.sendall(QUESTION)
        assert not connection.is_quiet()
        await connection.message()
        assert not connection.is_quiet()

    asks, answers = socket.socketpair()
    with asks, contextlib.closing(Connection(answers)) as connection:
        asyncio.run(scene(connection, asks))


def test_who_calls_very_often_and_says_nothing_has_the_host_looked_at_for_a_few_alone(
    tmp_path: Path, looks: list[Ground]
) -> None:
    kernels = Kernels({"kernels": []})

    async def scene(made: Daemon) -> None:
        with contextlib.ExitStack() as opened:
            for count in range(1, 13):
                opened.enter_context(connected(tmp_path / "socket"))
                few = min(count, kernels.desk.together)
                await until(lambda: made._of_user.total() == count and len(looks) == few)  # noqa: B023
            assert (await asked(tmp_path / "socket", QUESTION))["kernels"] == []
        await until(lambda: not made._of_user)
        assert len(looks) == kernels.desk.together

    serve(tmp_path / "socket", kernels, scene)


def test_what_was_seen_long_ago_is_looked_at_anew(
    looks: list[Ground], monkeypatch: pytest.MonkeyPatch
) -> None:
    early = Early()
    early.look(lambda: SOMEBODY, lambda: True)
    assert early.ground() is looks[0] and len(looks) == 1
    monkeypatch.setattr(early, "_since", time.monotonic() - 60)
    assert early.ground() is looks[1]
    early.close()


def test_a_look_that_fails_is_the_starts_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise OSError(5, "the disk is broken")

    monkeypatch.setattr(Ground, "probe", fail)
    early = Early()
    early.look(lambda: SOMEBODY, lambda: True)
    assert asyncio.run(early.peer()) is SOMEBODY
    with pytest.raises(OSError, match="the disk is broken"):
        early.ground()


def test_who_may_not_ask_has_nothing_looked_at(looks: list[Ground]) -> None:
    def refuse() -> Any:
        raise SpecError(attempt="ask", answer="no", remedy="Go.")

    early = Early()
    early.look(refuse, lambda: True)
    with pytest.raises(SpecError, match="no"):
        asyncio.run(early.peer())
    assert not looks


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes a user")
@pytest.mark.parametrize("are_taken", [False, True])
def test_eyes_that_were_opened_early_end_with_the_start(are_taken: bool) -> None:
    def looking() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "sandbox-eyes"}

    before, early = looking(), Early()  # those of tests before may still be ending
    early.look(lambda: SOMEBODY, lambda: True)
    [ours] = looking() - before
    if are_taken:
        eyes = early.eyes(SOMEBODY)
        with eyes.open():
            assert eyes(threading.current_thread) is ours
            assert looking() - before == {ours}
    early.close()
    ours.join(10)
    assert not ours.is_alive()
