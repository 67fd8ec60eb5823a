"""What the server takes in of a kernel's status messages is bounded, whatever the kernel sends."""

from __future__ import annotations

import asyncio
import json
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from jupyter_client.session import Session

from sandbox_provisioner import last_words, subscriber
from sandbox_provisioner.last_words import LastWords

MANY = 20_000
ARRIVES_MS = 20_000
MEBIBYTE = 1 << 20
FLOOD = """
import os, threading
thread = get_ipython().kernel.iopub_thread
big = b"x" * (4 << 20)
done = threading.Event()
def flood():
    for _ in range(200):
        frames = [b"kernel.x.status", b"<IDS|MSG>", b"", b"{}", big, b"{}", b"{}"]
        thread.socket.send_multipart(frames)
    done.set()
thread.schedule(flood)
done.wait()
"""


def status(state: str, cell: Any = None, **frames: bytes) -> list[bytes]:
    """As ipykernel sends it; *frames* in place of its own."""
    header = cell or {"msg_type": "execute_request", "msg_id": "cell", "session": "s"}
    parts = {
        "topic": b"kernel.1.status",
        "delimiter": b"<IDS|MSG>",
        "signature": b"",
        "header": b"{}",
        "parent": json.dumps(header).encode(),
        "metadata": b"{}",
        "content": json.dumps({"execution_state": state}).encode(),
    }
    return list((parts | frames).values())


class Publisher:
    """A kernel's iopub socket, and who listens to it."""

    def __init__(self, folder: Path) -> None:
        self.context: Any = zmq.Context()
        self.socket = self.context.socket(zmq.XPUB)
        self.socket.sndhwm = 0
        self.socket.linger = 0
        self.socket.bind(f"ipc://{folder}/s-2")
        manager = SimpleNamespace(
            session=Session(key=b"k"), ip=f"{folder}/s", iopub_port=2, curve_publickey=None
        )
        self.tap = LastWords(manager)
        self.tap.begin()
        for _ in range(2):  # both topics
            assert self.socket.poll(ARRIVES_MS)
            self.socket.recv()
        self.noted = 0
        note = self.tap._note

        def count(frames: list[bytes]) -> None:
            self.noted += 1
            note(frames)

        self.tap._note = count  # type: ignore[method-assign]

    def send(self, frames: list[bytes]) -> None:
        self.socket.send_multipart(frames)

    def arrived(self) -> bool:
        waits = select.poll()
        waits.register(self.tap._source.fileno(), select.POLLIN)
        return bool(waits.poll(ARRIVES_MS))

    def take_all(self) -> None:
        """Until the message "end" has been seen."""
        self.send(status("busy", {"msg_type": "execute_request", "msg_id": "end"}))
        while self.tap._running.get("msg_id") != "end":
            assert self.arrived()
            asyncio.run(self.tap.keep_up())

    def close(self) -> None:
        self.tap.close()
        self.socket.close()
        self.context.term()


@pytest.fixture
def publisher(new_folder: Callable[[], Path]) -> Iterator[Publisher]:
    found = Publisher(new_folder())
    yield found
    found.close()


def test_the_running_cell_is_that_of_the_last_busy_message(publisher: Publisher) -> None:
    publisher.send(status("busy"))
    publisher.send(status("busy", {"msg_type": "comm_msg", "msg_id": "other"}))
    publisher.send(status("idle", {"msg_type": "comm_msg", "msg_id": "other"}))
    publisher.take_all()
    publisher.send(status("idle", {"msg_type": "execute_request", "msg_id": "end"}))
    assert publisher.arrived()
    publisher.tap.drain()
    assert publisher.tap._running == {}


def test_a_flood_is_read_in_small_portions_and_the_loop_goes_on(publisher: Publisher) -> None:
    for number in range(MANY):
        publisher.send(status("busy", {"msg_type": "execute_request", "msg_id": str(number)}))
    turns = 0

    async def keep_up_beside_others() -> None:
        nonlocal turns
        reading = asyncio.ensure_future(publisher.tap.keep_up())
        while not reading.done():
            turns += 1
            await asyncio.sleep(0)

    goes = 0
    while publisher.noted < MANY:
        assert publisher.arrived()
        before, turns = publisher.noted, 0
        asyncio.run(keep_up_beside_others())
        read = publisher.noted - before
        assert read <= last_words._GOES * last_words._A_GO
        assert turns >= read // last_words._A_GO
        goes += 1
    assert goes >= MANY // (last_words._GOES * last_words._A_GO)
    publisher.take_all()


def test_who_sends_more_than_is_read_makes_us_forget_the_cell(publisher: Publisher) -> None:
    """Better no parent than that of a while ago."""
    publisher.tap.drain = lambda: True  # type: ignore[method-assign]
    publisher.tap._running = publisher.tap._last = {"msg_id": "of a while ago"}
    asyncio.run(publisher.tap.keep_up())
    assert publisher.tap._running == publisher.tap._last == {}


def test_a_kernel_that_has_said_its_name_sends_no_results(publisher: Publisher) -> None:
    publisher.take_all()
    told = []
    while b"\x00kernel_core." not in told:
        assert publisher.socket.poll(ARRIVES_MS)
        told.append(publisher.socket.recv())
    assert told[:2] == [b"\x01kernel.1.statu", b"\x01kernel.1.execute_inpu"]
    assert set(told[2:]) == {b"\x00kernel.", b"\x00kernel_core."}


DEEP = b"[" * last_words._HEADER_BYTES
CRAFTED = {
    "a big parent": {"parent": b'{"msg_type": "execute_request", "x": "%s"}' % (b"x" * 5000)},
    "a big content": {"content": b'{"execution_state": "busy", "x": "%s"}' % (b"x" * 2000)},
    "a deep parent": {"parent": DEEP},
    "a list for a parent": {"parent": b"[]"},
    "a list for a content": {"content": b"[1]"},
    "no JSON": {"parent": b"\xff\xfe"},
    "a number of many digits": {"parent": b"1" * 4096},
    "no delimiter": {"delimiter": b"x"},
}


@pytest.mark.parametrize("frames", CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_message_is_nothing(publisher: Publisher, frames: dict[str, bytes]) -> None:
    see, seen = publisher.tap._see, []

    def note(parent: dict[str, str], state: Any) -> None:
        seen.append(parent.get("msg_id"))
        see(parent, state)

    publisher.tap._see = note  # type: ignore[method-assign]
    publisher.send(status("busy", **frames))
    publisher.send([b"kernel.1.status"])
    publisher.send([b"kernel.1.status", b"<IDS|MSG>"])
    publisher.take_all()
    assert publisher.noted == 4
    assert seen == ["end"]


def test_a_message_of_very_many_frames_is_read_bit_by_bit(publisher: Publisher) -> None:
    forged = status("busy", {"msg_type": "execute_request", "msg_id": "forged"})
    publisher.send([b"kernel."] * (subscriber.MOST_FRAMES * last_words._A_GO * 2) + forged)
    assert publisher.arrived()
    assert publisher.tap.drain()  # there is more
    assert publisher.tap._running == {}
    publisher.take_all()


def test_only_short_strings_of_a_parent_go_on_to_front_ends(publisher: Publisher) -> None:
    header = {
        "msg_type": "execute_request", "msg_id": "cell", "session": ["s"], "username": "u" * 300,
        "date": "2026-01-01", "x": "y",
    }  # fmt: skip
    publisher.send(status("busy", header))
    assert publisher.arrived()
    publisher.tap.drain()
    assert publisher.tap._running == {
        "msg_type": "execute_request", "msg_id": "cell", "date": "2026-01-01",
    }  # fmt: skip


SHOWN = {"topic": b"kernel.1.execute_input", "content": b'{"code": "%s"}' % (b"1;" * 2000)}


def test_the_first_cell_that_people_see_is_waited_for(publisher: Publisher) -> None:
    async def first() -> None:
        waited = asyncio.ensure_future(publisher.tap.shows_a_cell())
        for cell in ("kernel_info_request", "execute_request"):  # what is silent has no input
            publisher.send(status("busy", {"msg_type": cell, "msg_id": cell}))
        while publisher.noted < 2:
            await asyncio.sleep(0)
        assert not waited.done()
        publisher.send(status("busy", **SHOWN))
        assert await waited

    asyncio.run(first())


def test_a_kernel_that_says_very_much_is_not_waited_for(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(MANY):
        publisher.send(status("busy"))
    assert publisher.arrived()
    monkeypatch.setattr(last_words, "_LOOKS", 5)
    assert not asyncio.run(publisher.tap.shows_a_cell())
    assert 0 < publisher.noted <= 5 * last_words._A_GO


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmRSS:"))
    return int(line.split()[1]) << 10


def flood(k: Any) -> None:
    """From a real kernel, which nobody else listens to."""
    k.client.iopub_channel.stop()
    run(k, FLOOD)


def run(k: Any, code: str) -> str:
    request: str = k.client.execute(code)
    while k.client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") != request:
        pass
    return request


def test_big_messages_that_nobody_reads_do_not_make_the_server_grow(kernel: Any) -> None:
    with kernel() as k:
        before = resident_bytes()
        flood(k)
        assert resident_bytes() - before < 100 * MEBIBYTE


def test_who_sends_big_messages_is_heard_all_the_same(kernel: Any) -> None:
    with kernel() as k:
        flood(k)
        tap, end = k.provisioner._tap, ""
        while tap._last.get("msg_id") != end:
            end = run(k, "1")
            asyncio.run(tap.keep_up())


@pytest.mark.parametrize("big", ["'x' * (1 << 20)", "1" + " " * (1 << 15)], ids=["out", "in"])
def test_a_cell_after_a_big_one_is_known(kernel: Any, big: str) -> None:
    """A table of 60 rows has more than 16 KiB: that ended our listening once."""
    with kernel() as k:
        tap = k.provisioner._tap
        for code in ("1", big, "2"):
            end = run(k, code)
            while tap._last.get("msg_id") != end:
                tap.drain()
