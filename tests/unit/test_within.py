"""What may wait for ever, called in a thread of its own."""

from __future__ import annotations

import threading

import pytest

from sandbox_provisioner.off_loop import within


def test_what_is_done_in_time_is_answered() -> None:
    undone: list[int] = []
    assert within(60, lambda: 42, undone.append) == 42
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 // 0, undone.append)
    assert undone == []


def test_what_comes_too_late_is_undone() -> None:
    go, undone = threading.Event(), threading.Event()

    def late() -> int:
        go.wait()
        return 42

    with pytest.raises(TimeoutError):
        within(0.01, late, lambda value: value == 42 and undone.set())
    assert not undone.is_set()
    go.set()
    assert undone.wait(60)
