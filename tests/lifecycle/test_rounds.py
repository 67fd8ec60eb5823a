"""Whoever dies or hangs at any moment of a start: kernels start, nothing is left, nobody else is
hit. The long form is ``python -m tests.lifecycle``."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from rounds import Place, Server, finish, play_all

pytestmark = [
    pytest.mark.requires("userns"),
    pytest.mark.timeout(900),  # three minutes of it where others want the CPU too
    pytest.mark.slow("servers start and are killed, round by round"),
]

ROUNDS = 6


def test_whoever_is_killed_at_a_random_moment_nothing_is_left(watch: Any) -> None:
    hits = play_all(ROUNDS, 1, signal.SIGKILL, watch, least_hits=3)
    assert hits.total() - hits[""] >= 3


def test_whoever_hangs_the_next_kernel_starts(watch: Any) -> None:
    hits = play_all(3, 4, signal.SIGSTOP, watch, least_hits=2)
    assert hits.total() - hits[""] >= 2


def test_two_servers_of_one_user_do_not_disturb_each_other(watch: Any) -> None:
    place = Place.make(watch)
    first, second = Server(place), Server(place)
    try:
        for server in (first, second):
            server.say("start nursery")
        assert [first.hear(), second.hear()] == ["ran", "ran"]
        for server in (first, second):
            assert server.ask("prepare") == "prepared"
        for server in (first, second):
            server.say("start nursery")
        assert [first.hear(), second.hear()] == ["ran", "ran"]
        place.note(first.pid)
        place.note(second.pid)
        first.close()
        assert second.ask("start nursery") == "ran"
        assert second.ask("stop") == "stopped"
    finally:
        first.close()
        finish(second, place)
