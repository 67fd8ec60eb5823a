"""How long a nursery waits: its cost is its memory, its use is what its kernels share of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from sandbox_provisioner.nursery import main as nursery
from sandbox_provisioner.nursery.main import Patience
from sandbox_provisioner.warm import ahead

Wait = Callable[[float], None]


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Wait:
    """``wait(seconds)`` lets as much time pass, for whoever asks the clock."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def let_pass(seconds: float) -> None:
        now[0] += seconds

    return let_pass


def test_without_a_request_it_ends_after_its_time(wait: Wait) -> None:
    patience = Patience(900, 900, 0)
    wait(899)
    assert not patience.is_over()
    patience.renew()
    wait(899)
    assert not patience.is_over()
    wait(1)
    assert patience.is_over()


@pytest.mark.parametrize(("living", "is_over"), [(0, True), (2, True), (3, False)])
def test_with_few_kernels_it_ends_sooner(wait: Wait, living: int, is_over: bool) -> None:
    patience = Patience(900, 300, 0)
    patience.kernels = [os.getpid()] * living + [_ended()]
    wait(299)
    assert not patience.is_over()
    wait(1)
    assert patience.is_over() is is_over
    assert patience.kernels == [os.getpid()] * living
    wait(600)
    assert patience.is_over()


def test_a_machine_that_is_short_of_memory_is_not_waited_for(
    wait: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nursery, "available_bytes", lambda: 99)
    assert not Patience(900, 300, 99).is_over()
    assert Patience(900, 300, 100).is_over()


def test_it_looks_at_the_memory_every_few_seconds() -> None:
    assert Patience(900, 300, 0).look_seconds == 5
    assert Patience(900, 0.5, 0).look_seconds == 0.5


def _ended() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


@pytest.mark.parametrize(
    ("available", "free", "is_room"),
    [
        (1 << 50, None, True),
        (0, None, False),
        (1 << 50, 255 << 20, False),
        (1 << 50, 1 << 30, True),
    ],
)
def test_a_nursery_that_nobody_has_asked_for_needs_room_on_the_machine_and_in_its_group(
    monkeypatch: pytest.MonkeyPatch, available: int, free: int | None, is_room: bool
) -> None:
    monkeypatch.setattr(ahead, "available_bytes", lambda: available)
    monkeypatch.setattr(ahead, "free_bytes", lambda _: free)
    assert ahead._has_room() is is_room
