"""What a kernel has said last, on its way to a reader who is slow."""

from __future__ import annotations

import os
import select
import threading

import pytest

from sandbox_provisioner.facilities.process.inside.output import Budget, Pump

LAST = b"the last words\n" * 2000


@pytest.fixture
def pipes():
    (read, said), (heard, write) = os.pipe(), os.pipe()
    os.write(said, LAST)
    os.close(said)
    # Our reader has not taken anything until now.
    os.set_blocking(write, False)
    while select.select([], [write], [], 0)[1]:
        os.write(write, b"." * 4096)
    os.set_blocking(write, True)
    yield read, write, heard
    os.close(heard)


def read_all(heard: int) -> bytes:
    text = b""
    while chunk := os.read(heard, 4096):
        text += chunk
    return text.lstrip(b".")


def finished(read: int, write: int, budget: Budget | None) -> threading.Thread:
    def finish() -> None:
        pump = Pump(read, write, budget)
        pump.finish()
        pump.close()
        os.close(write)

    thread = threading.Thread(target=finish)
    thread.start()
    return thread


def test_who_asked_for_all_of_it_gets_it_also_when_they_are_slow(pipes):
    read, write, heard = pipes
    thread = finished(read, write, None)
    thread.join(0.1)  # without patience it had given up by now
    assert read_all(heard) == LAST
    thread.join()


def test_nobody_waits_for_who_reads_a_log(pipes):
    read, write, heard = pipes
    finished(read, write, Budget()).join()
    assert read_all(heard) == b""
