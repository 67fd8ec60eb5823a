"""A kernel publishes what it likes; few and short frames of it are kept, and none before they are
read."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from sandbox_provisioner.subscriber import (
    FRAME_BYTES,
    MOST_FRAMES,
    Subscriber,
    subscriber,
)

ARRIVES_MS = 20_000
PLAIN = SimpleNamespace(curve_publickey=None)
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(16) + b"\x01" + bytes(31)
READY = b"\x04\x1a\x05READY\x0bSocket-Type\x00\x00\x00\x04XPUB"
TOPIC = b"\x00\x05\x01kern"


def heard(source: Any) -> list[bytes]:
    """The next message that is one."""
    while True:
        waits = select.poll()
        waits.register(source.fileno(), select.POLLIN)
        try:
            if found := source.receive():
                return list(found)
        except BlockingIOError:
            assert waits.poll(ARRIVES_MS)


# -- a socket of ZeroMQ's


@pytest.fixture(params=[zmq.XPUB, zmq.PUB], ids=["XPUB", "PUB"])
def publisher(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    with zmq.Context() as context, context.socket(request.param) as made:
        made.linger = 0
        made.bind(f"ipc://{tmp_path}/s")
        yield made


@pytest.fixture
def source(publisher: Any, tmp_path: Path) -> Iterator[Any]:
    """Which the publisher knows."""
    made = subscriber(f"{tmp_path}/s", PLAIN)
    made.subscribe(b"kern")
    while not made.is_subscribed:
        with contextlib.suppress(BlockingIOError):
            made.receive()
    if publisher.type == zmq.XPUB:  # what is sent before it has heard of us, it drops
        assert publisher.recv() == b"\x01kern"
    while publisher.type == zmq.PUB:  # it does not tell when it has
        publisher.send(b"kern?")
        with contextlib.suppress(BlockingIOError):
            if made.receive():
                break
    yield made
    made.close()


def until(source: Any, message: list[bytes]) -> None:
    while heard(source) != message:
        pass


def test_messages_come_whole_and_only_those_of_the_topics(publisher: Any, source: Any) -> None:
    for message in ([b"other", b"1"], [b"kernel", b"", b"x" * 200], [b"kern", b"y" * FRAME_BYTES]):
        publisher.send_multipart(message)
    until(source, [b"kernel", b"", b"x" * 200])
    assert heard(source) == [b"kern", b"y" * FRAME_BYTES]
    source.subscribe(b"other")
    source.unsubscribe(b"kern")
    if publisher.type == zmq.XPUB:
        assert [publisher.recv(), publisher.recv()] == [b"\x01other", b"\x00kern"]
        publisher.send_multipart([b"kernel"])
        publisher.send_multipart([b"other", b"2"])
        assert heard(source) == [b"other", b"2"]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ([b"kern", b"x" * (FRAME_BYTES + 1), b"more"], [b"kern"]),
        ([b"kern", b"x" * (10 << 20)], [b"kern"]),
        ([b"kern"] * (5 * MOST_FRAMES), [b"kern"] * MOST_FRAMES),
    ],
    ids=["a frame that is too long", "a very long one", "too many"],
)
def test_a_message_ends_before_what_is_too_much(
    publisher: Any, source: Any, sent: list[bytes], kept: list[bytes]
) -> None:
    publisher.send_multipart(sent)
    publisher.send_multipart([b"kern", b"next"])
    until(source, kept)
    assert heard(source) == [b"kern", b"next"]


# -- somebody else


@pytest.fixture
def met(tmp_path: Path) -> Iterator[Callable[[], tuple[Subscriber, socket.socket]]]:
    """Both ends of a connection to what does not need to be a kernel."""
    opened: list[Any] = []

    def meet() -> tuple[Subscriber, socket.socket]:
        path = str(tmp_path / f"s{len(opened)}")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            opened.append(Subscriber(path))
            opened.append(listener.accept()[0])
        return opened[-2], opened[-1]

    yield meet
    for one in opened:
        one.close()


def test_nothing_is_asked_for_before_the_kernel_is_ready(met: Any) -> None:
    """libzmq takes it for a part of the handshake, and hangs up."""
    source, kernel = met()
    source.subscribe(b"kern")
    assert kernel.recv(1000).endswith(b"SUB")
    for byte in GREETING + READY:
        with pytest.raises(BlockingIOError):
            kernel.setblocking(False)
            kernel.recv(1000)
        kernel.send(bytes([byte]))
        while select.select([source.fileno()], [], [], 0)[0]:
            assert source.receive() == []
    assert source.is_subscribed
    assert kernel.recv(1000) == TOPIC


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 400 Bad Request\r\n" + bytes(100),
        GREETING.replace(b"NULL", b"CURVE")[:64] + READY,
        GREETING.replace(b"\x03\x01", b"\x01\x00") + READY,
        GREETING + READY + b"\x02\xff" + b"\xff" * 7 + bytes(1 << 16),
        GREETING + b"\x04\xff" + b"x" * 255,
        b"",
    ],
    ids=["HTTP", "CURVE", "an old version", "a frame without end", "a command", "nothing"],
)
def test_who_does_not_speak_as_a_kernel_is_not_heard_and_not_waited_for(
    met: Any, sent: bytes
) -> None:
    source, kernel = met()
    kernel.send(sent)
    kernel.close()
    while True:
        try:
            assert source.receive() == []
        except BlockingIOError:
            break
    with pytest.raises(BlockingIOError):
        source.receive()
    assert len(source._buffer) <= 1 << 16


def test_where_nobody_listens_there_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Subscriber(f"{tmp_path}/s")


PIECES = st.lists(st.binary(max_size=300), max_size=20)


@given(PIECES)
def test_any_bytes_are_messages_of_few_short_frames_or_none(pieces: list[bytes]) -> None:
    source = Subscriber.__new__(Subscriber)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        vars(source).update(
            closed=False, is_subscribed=False, _socket=ours, _is_greeted=True, _later=b"",
            _buffer=bytearray(), _to_skip=0, _flags=0, _frames=[], _is_cut=False,
        )  # fmt: skip
        ours.setblocking(False)
        for piece in pieces:
            theirs.send(piece)
            for _ in range(len(piece) + 1):
                try:
                    found = source.receive()
                except BlockingIOError:
                    break
                assert len(found) <= MOST_FRAMES
                assert all(len(frame) <= FRAME_BYTES for frame in found)
