"""Who reads what the broker tells may stop, or go."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from sandbox_provisioner.broker import patient
from sandbox_provisioner.broker.patient import PatientStream

LINE = "x" * 99 + "\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, PatientStream]]:
    reads, writes = os.pipe()
    yield reads, PatientStream(writes, "{} left out\n".format)
    os.close(writes)
    os.close(reads)


def everything(fd: int, stream: PatientStream, end: str) -> str:
    """All that is read until *end*; the thread that wrote it has ended then."""
    found = b""
    while not found.endswith(end.encode()):
        found += os.read(fd, 1 << 16)
    stream.finish()
    return found.decode()


def test_a_line_is_there_at_once(pipe: tuple[int, PatientStream]) -> None:
    reads, stream = pipe
    print("a line", file=stream, end="")
    assert os.read(reads, 100) == b"a line"
    assert threading.active_count() == 1 or "stderr" not in [t.name for t in threading.enumerate()]


def test_a_line_of_any_length_comes_whole(pipe: tuple[int, PatientStream]) -> None:
    reads, stream = pipe
    long = "é" * 200_000 + "\n"
    stream.write(long)
    stream.write("the end\n")
    assert everything(reads, stream, "the end\n") == long + "the end\n"


def test_who_reads_late_finds_all_in_order_and_how_many_are_missing(
    pipe: tuple[int, PatientStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, stream = pipe
    monkeypatch.setattr(patient, "_MOST_BYTES", 200_000)
    for number in range(5000):
        stream.write(f"{number:99}\n")
    told = everything(reads, stream, " left out\n").splitlines()
    lost = int(told.pop().split()[0])
    assert [int(line) for line in told] == [*range(5000 - lost)]
    assert lost > 2000
    stream.write("here again")
    assert os.read(reads, 100) == b"here again"


def test_nothing_waits_for_who_does_not_read_any_more() -> None:
    reads, writes = os.pipe()
    stream = PatientStream(writes, str)
    for _ in range(2000):
        stream.write(LINE)
    os.close(reads)
    stream.write(LINE)
    stream.finish()
    stream.write(LINE)
    os.close(writes)
    assert "stderr" not in [thread.name for thread in threading.enumerate()]


def test_the_end_does_not_wait_for_long(
    pipe: tuple[int, PatientStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, stream = pipe
    monkeypatch.setattr(patient, "_LAST_SECONDS", 0.01)
    stream.write(LINE * 2000)
    stream.finish()
    assert everything(reads, stream, "\n").startswith("x")


def test_what_no_thread_could_pass_on_goes_on_with_the_next_line_and_before_it(
    pipe: tuple[int, PatientStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, stream = pipe

    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        stream.write(LINE * 2000)
    stream.write("the end\n")
    assert everything(reads, stream, "the end\n") == LINE * 2000 + "the end\n"
