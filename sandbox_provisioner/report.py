"""report.py - in the launching process: what comes through a report pipe (`wire.py`)."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field

from sandbox_provisioner.handle import readable
from sandbox_provisioner.inside import wire

# Some hundred paths of stand-ins, each of at most 4096 bytes.
MOST_REPORTED_BYTES = 1 << 22


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


@dataclass(frozen=True, slots=True)
class Failure:
    """What a process said of the step that failed: the step's number in the plan, counted from 1,
    its verb, the error's number, and its text; and whether it *is_ours*, a mistake in our code."""

    step: int
    verb: str
    errno: int
    text: str
    is_ours: bool = False


@dataclass(slots=True)
class Report:
    """What came through the report pipe until its end.

    A nursery's child, in whom modules have run, writes it as well: it has a size, and lines that
    are none are nothing.
    """

    init_pid: int = 0
    made: list[tuple[str, str]] = field(default_factory=list)
    failure: Failure | None = None

    def add(self, words: list[str]) -> None:
        """Take in one record."""
        match words:
            case [wire.PID, number] if _is_number(number):
                self.init_pid = int(number)
            case [wire.MADE, kind, path]:
                self.made.append((kind, path))
            case [wire.FAILED, step, verb, number, text] if self.failure is None and (
                _is_number(step) and _is_number(number)
            ):
                self.failure = Failure(int(step), verb, int(number), text)
            case [wire.MISTAKE, step, verb, text] if self.failure is None and _is_number(step):
                self.failure = Failure(int(step), verb, 0, text, is_ours=True)

    def drain(self, fd: int) -> None:
        """Take in what is there already; does not wait."""
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):
            for words in wire.records(os.read(fd, 1 << 16))[0]:
                self.add(words)

    async def read(self, fd: int) -> None:
        """Take in everything until the pipe's end. A report that is too long is a failure."""
        rest, left = b"", MOST_REPORTED_BYTES
        while True:
            await readable(fd)
            chunk = os.read(fd, 1 << 16)
            left -= len(chunk)
            if left < 0:
                text = "it has reported more than there is to report"
                self.failure = Failure(0, "read-report", 0, text)
                return
            found, rest = wire.records(rest + chunk)
            for words in found:
                self.add(words)
            if not chunk:
                return
