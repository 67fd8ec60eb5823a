"""The order of a start: one list, whoever performs it."""

from __future__ import annotations

import pytest

from sandbox_provisioner.facilities.environment import plan as environment
from sandbox_provisioner.facilities.process import plan as process
from sandbox_provisioner.facilities.root import plan as root
from sandbox_provisioner.orders.namespaces import INIT, KERNEL, LAUNCHER, NOBODY, ORDER
from sandbox_provisioner.plan import Kind

LINES = [line for _, line in ORDER]


def column(kind):
    return [performers.split()[kind] for performers, _ in ORDER]


def test_each_line_says_of_each_kind_of_start_who_performs_it():
    for performers, line in ORDER:
        names = performers.split()
        assert len(names) == len(Kind), line
        assert set(names) <= {LAUNCHER, INIT, KERNEL, NOBODY}, line
        assert set(names) != {NOBODY}, line


def test_no_line_stands_twice():
    assert len(set(LINES)) == len(LINES)


@pytest.mark.parametrize("kind", [Kind.COLD, Kind.NURSERY])
def test_who_was_forked_never_waits_for_who_forked_it(kind):
    """One walks through the list after the other, each from where it was forked."""
    walked = [who for who in column(kind) if who != NOBODY]
    assert walked == sorted(walked, key=(LAUNCHER, INIT, KERNEL).index)


@pytest.mark.parametrize("kind", [Kind.FORK, Kind.SPARE, Kind.CLAIM])
def test_what_a_launcher_opens_is_there_before_it_is_received(kind):
    lines = [line for who, line in zip(column(kind), LINES, strict=True) if who == LAUNCHER]
    assert lines[-1] is process.hand_over


@pytest.mark.parametrize("kind", Kind)
def test_nobody_with_the_servers_rights_does_anything_after_the_pivot(kind):
    after = column(kind)[LINES.index(root.pivot) :]
    assert LAUNCHER not in after


def test_a_spare_and_its_claim_are_together_what_a_start_is():
    """But for what both do, each for its own connection file and variables."""
    for performers, line in ORDER:
        _, _, fork, spare, claim = performers.split()
        # No spare serves a start whose environment and work directory lie in one another.
        if fork != NOBODY and line is not environment.attach_around_workdir:
            assert {spare, claim} != {NOBODY}, line
