"""What of a kernel's output reaches the server's log: printable, and within a budget."""

from __future__ import annotations

import os
import re

import pytest

from sandbox_provisioner.facilities.process.inside import output
from sandbox_provisioner.facilities.process.inside.output import (
    BURST_BYTES,
    BYTES_PER_SECOND,
    Budget,
    Pump,
)
from sandbox_provisioner.inside.printable import whole_letters

CHUNK = b"q" * 4095 + b"\n"
TOLD = re.compile(rb"\[sandbox: (\d+) bytes")


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(output, "time", found)
    return found


def test_what_a_kernel_usually_writes_goes_on_at_once(clock: Clock) -> None:
    budget = Budget()
    assert budget.passed(b"hello\n") == b"hello\n"
    assert budget.patience() is None
    assert budget.notice() == b""


def test_a_burst_goes_on_and_a_flood_does_not(clock: Clock) -> None:
    budget = Budget()
    flood = b"".join(budget.passed(CHUNK) for _ in range(1000))
    assert len(flood) == BURST_BYTES
    assert budget.patience() == 1000


def test_what_was_dropped_is_told_once_when_there_is_room_again(clock: Clock) -> None:
    budget = Budget()
    written = 1000 * len(CHUNK)
    passed = b"".join(budget.passed(CHUNK) for _ in range(1000))
    clock.now = 0.99
    assert budget.notice() == b""
    assert budget.passed(CHUNK) == b""
    clock.now = 1.0
    assert budget.patience() == 0
    told = TOLD.findall(budget.notice())
    assert [int(number) for number in told] == [written + len(CHUNK) - len(passed)]
    assert budget.notice() == b""
    assert budget.passed(CHUNK) == CHUNK


def test_over_a_long_time_it_is_so_much_a_second(clock: Clock) -> None:
    budget, passed, dropped = Budget(), 0, 0
    chunks, seconds = 20_000, 20
    for _ in range(chunks):
        clock.now += seconds / chunks
        text = budget.passed(CHUNK)
        told = [int(number) for number in TOLD.findall(text)]
        assert len(told) <= 1
        dropped += sum(told)
        passed += text.count(b"q")
    dropped += sum(int(number) for number in TOLD.findall(budget.notice(now=True)))
    assert passed <= BURST_BYTES + seconds * BYTES_PER_SECOND
    assert passed + passed // 4095 + dropped == chunks * len(CHUNK)


def test_what_is_made_printable_is_counted_as_it_is_passed_on(clock: Clock) -> None:
    budget = Budget()
    passed = b"".join(budget.passed(b"\x1b" * 4096) for _ in range(1000))
    assert set(passed) == set(b"\\x1b")
    assert len(passed) <= BURST_BYTES


@pytest.mark.parametrize("text", ["Grüße", "日本語", "🦀 crab", "a"])
def test_a_letter_that_comes_in_parts_is_whole(clock: Clock, text: str) -> None:
    budget = Budget()
    parts = [bytes([byte]) for byte in text.encode()]
    assert b"".join(map(budget.passed, parts)) == text.encode()


def test_a_letter_that_never_comes_whole_is_shown_at_the_end(clock: Clock) -> None:
    budget = Budget()
    assert budget.passed("ü".encode()[:1]) == b""
    assert budget.rest() == b"\\xc3"


@pytest.mark.parametrize(
    ("data", "whole"),
    [(b"", 0), (b"a", 1), (b"a\xc3", 1), (b"\xc3\xbc", 2), (b"\xe6\x97", 0), (b"\xf0\x9f\xa6", 0),
     (b"\xf0\x9f\xa6\x80", 4), (b"\x80\x80\x80\x80", 4), (b"\xff", 0), (b"\xffabc", 4)],
)  # fmt: skip
def test_only_the_beginning_of_a_letter_waits(data: bytes, whole: int) -> None:
    assert whole_letters(data) == (data[:whole], data[whole:])


MOST_IN_A_PIPE = 1 << 20  # pipe(7)


class Counting(Pump):
    read = 0

    def fill(self) -> bool:
        found = super().fill()
        self.read += len(self.waiting)
        assert self.read <= 2 * MOST_IN_A_PIPE, "it goes on for ever"
        return found


def test_who_writes_without_end_when_all_is_over_is_read_for_as_much_as_a_pipe_holds() -> None:
    endless, nowhere = os.open("/dev/zero", os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)
    pump = Counting(endless, nowhere, None)
    pump.finish()
    os.close(endless)
    os.close(nowhere)
    assert pump.read == MOST_IN_A_PIPE
    assert pump.waiting == b""
