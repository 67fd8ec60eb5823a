"""Who shares an event loop: by turns, and a few at a time."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from types import SimpleNamespace
from typing import cast

import pytest

from sandbox_provisioner.contract import Labels, Warmth
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.off_loop import Gate, one_after_another
from sandbox_provisioner.plan import LaunchRequest
from sandbox_provisioner.warm import ahead
from sandbox_provisioner.warm.launcher import WarmLauncher

MANY = 20


def test_the_loop_looks_around_between_two_who_begin_at_once() -> None:
    looks = 0

    async def look_around() -> None:
        nonlocal looks
        while True:
            looks += 1
            await asyncio.sleep(0)

    async def begin() -> int:
        async with one_after_another():
            return looks

    async def begin_all() -> list[int]:
        looking = asyncio.ensure_future(look_around())
        seen = await asyncio.gather(*(begin() for _ in range(MANY)))
        looking.cancel()
        return seen

    seen = asyncio.run(begin_all())
    assert seen == sorted(set(seen))
    assert len(seen) == MANY


class Visitors:
    """Those who pass a gate, and how many were in it at once."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.inside = self.most = self.through = 0

    async def visit(self, stay: asyncio.Event | None = None) -> None:
        async with self.gate.passed():
            self.inside += 1
            self.most = max(self.most, self.inside)
            if stay:
                await stay.wait()
            for _ in range(3):
                await asyncio.sleep(0)
            self.inside -= 1
        self.through += 1


def test_no_more_pass_at_a_time_than_there_are_places() -> None:
    visitors = Visitors(Gate(3, seconds=60))

    async def visit_all() -> None:
        await asyncio.gather(*(visitors.visit() for _ in range(MANY)))

    for _ in range(2):  # each with a loop of its own
        asyncio.run(visit_all())
    assert (visitors.most, visitors.through) == (3, 2 * MANY)


def test_who_is_slow_holds_nobody_up_for_ever() -> None:
    visitors = Visitors(Gate(1, seconds=0.01))

    async def visit_both() -> None:
        stay = asyncio.Event()
        slow = asyncio.ensure_future(visitors.visit(stay))
        await asyncio.sleep(0)
        await visitors.visit()
        # The place that was given up once is not given up again at the end.
        visitors.gate._seconds, go = 60, asyncio.Event()
        others = [asyncio.ensure_future(visitors.visit(go)) for _ in range(3)]
        stay.set()
        await slow
        for _ in range(5):
            await asyncio.sleep(0)
        assert visitors.inside == 1
        go.set()
        await asyncio.gather(*others)

    asyncio.run(visit_both())
    assert visitors.through == 5


@pytest.mark.parametrize("who", ["waits", "is inside"])
def test_who_is_cancelled_takes_no_place_with_him(who: str) -> None:
    visitors = Visitors(Gate(1, seconds=60))

    async def cancel_one() -> None:
        stay = asyncio.Event()
        first, second = (asyncio.ensure_future(visitors.visit(stay)) for _ in range(2))
        await asyncio.sleep(0)
        victim = second if who == "waits" else first
        victim.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await victim
        stay.set()
        await (first if victim is second else second)
        await asyncio.wait_for(visitors.visit(), 10)

    asyncio.run(cancel_one())
    assert visitors.through == 2
    assert not visitors.gate._places


class Settling(WarmLauncher):
    """Tells which thread looks at the host for a start that is to be prepared."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def settled(self, request: LaunchRequest) -> LaunchRequest:
        self.threads.append(threading.current_thread().name)
        raise HostError(attempt="look", answer="that is enough", remedy="Nothing.")

    def warn(self, text: str) -> None:
        assert "that is enough" in text


def test_what_a_start_to_be_prepared_needs_to_know_of_the_host_is_found_in_its_thread() -> None:
    launcher, request = Settling(), cast(LaunchRequest, SimpleNamespace(argv=("looked-at",)))
    try:
        launcher.prepare(request, Labels(name="looked at beside"), Warmth())
        ahead.wait()
    finally:
        ahead._failed.clear()
    assert launcher.threads == [ahead.THREAD]
