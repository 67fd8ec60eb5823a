"""What a gateway keeps books of: rates, quotas, counts, connections, what is said of a box."""

from __future__ import annotations

import json
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.network.tell.counts import (
    OTHERS,
    NamesRoom,
    Writer,
    read_counts,
)
from sandbox_provisioner.gateway import lookups
from sandbox_provisioner.gateway.box import Book
from sandbox_provisioner.gateway.meter import Bucket, Rate, Tally
from sandbox_provisioner.gateway.seats import Seats
from sandbox_provisioner.gateway.settings import Settings, read_settings


@given(
    st.integers(8_000, 10**10),
    st.lists(st.floats(0.0001, 0.3), min_size=30, max_size=30),
    st.integers(1, 1 << 18),
)
def test_what_passes_is_what_the_rate_says_however_late_turns_come(bits, delays, most):
    """Within a tenth, and never more at once than in a quarter of a second."""
    now, passed, rate = 0.0, 0, Rate(bits, 0.0)
    rate.take(rate.available(0.0))
    while now < 10:
        now += max(rate.seconds_to_turn(), delays[int(now) % len(delays)] / 100, 1e-6)
        taken = rate.available(now)
        assert taken <= max(1460, bits / 8 * 0.25)
        passed += taken
        rate.take(taken)
    assert abs(passed * 8 / now / bits - 1) < 0.1 + 1460 * 8 / bits / now


def test_one_connection_takes_a_small_part_at_a_time():
    rate = Rate(80_000_000, 0.0)
    assert rate.turn_bytes == 200_000
    rate.take(rate.available(0.0))
    assert rate.available(0.01) == 0
    assert rate.available(0.03) == 300_000


def test_a_bucket_fills_up_and_no_further():
    bucket = Bucket(10, 20, 0.0)
    assert bucket.available(100.0) == 20
    bucket.take(25)
    assert bucket.available(100.0) == 0
    assert bucket.seconds_to(1) == pytest.approx(0.6)
    assert bucket.available(100.7) == 2


def test_counts_are_kept_by_name_as_long_as_there_is_room():
    tally = Tally(0, room=NamesRoom(names=3))
    one = tally.connected("a:1")
    tally.passed(one, up=3, down=4)
    tally.refused("b:1")
    for name in ("c:1", "d:1"):
        tally.passed(tally.connected(name), down=1)
    found = tally.traffic(with_names=True)
    assert (found.up_bytes, found.down_bytes, found.connections, found.refusals) == (3, 6, 3, 1)
    assert list(found.names) == ["a:1", "b:1", OTHERS]
    assert found.names[OTHERS].down_bytes == found.unnamed == 2
    assert tally.traffic(with_names=False).names == {}


def test_what_is_left_out_of_long_names_is_counted_too():
    tally = Tally(0)
    for number in range(5000):
        tally.refused(f"{number:0250}")
    told = tally.traffic(with_names=True)
    assert len(told.names) < 4000
    assert told.names[OTHERS].refusals == told.unnamed == 5000 - len(told.names) + 1
    paper = bytearray()
    Writer(lambda text, at: paper.__setitem__(slice(at, at + len(text)), text)).all(told)
    assert read_counts(lambda most, at: bytes(paper[at : at + most])) == told


def test_many_names_are_written_more_seldom(tmp_path):
    class Delays:
        def __init__(self):
            self.asked = []

        def later(self, seconds, _what):
            self.asked.append(seconds)

    loop, tally = Delays(), Tally(0)
    book = Book(loop, os.open(tmp_path / "counts", os.O_WRONLY | os.O_CREAT), tally)
    book.changed()
    for number in range(4000):
        tally.of(f"{number}")
    book.changed()
    book.close()
    assert loop.asked[1] == 1.0
    assert max(loop.asked[2:]) == 8.0


def test_a_quota_is_of_both_directions():
    tally = Tally(10)
    tally.passed(tally.connected("a:1"), up=4, down=5)
    assert tally.left_bytes == 1
    tally.passed(tally.connected("a:1"), down=5)
    assert tally.left_bytes == 0
    assert Tally(0).left_bytes > 1 << 60


def test_of_a_names_many_addresses_some_are_enough(monkeypatch):
    """Each is judged, in which time nobody else is served."""
    many = [(socket.AF_INET, 1, 6, "", (f"192.0.{n // 250}.{n % 250}", 0)) for n in range(4000)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [*many, *many])
    assert lookups.look_up("data.example.org").addresses == tuple(f"192.0.0.{n}" for n in range(64))


def test_who_comes_last_finds_as_many_seats_as_each_other_box_has():
    assert Seats.of(1000).most == 375
    assert Seats.of(1 << 20).most == 40_000
    for greedy in range(1, 30):
        seats, taken = Seats(7500), [0] * greedy
        while any(seats.has_one_for(have) for have in taken):
            for box, have in enumerate(taken):
                if seats.has_one_for(have):
                    taken[box] += 1
                    seats.taken += 1
        assert max(taken) - min(taken) <= 1
        assert seats.most - seats.taken >= max(taken) - 1


TOLD = {
    "id": "a", "allow": ["data.example.org"], "deny": [], "up_bits": 8, "down_bits": 0,
    "quota_bytes": 5, "used_bytes": 4, "connections": 7, "new_per_second": 9, "audit": True,
    "own_addresses": ["192.0.2.1"],
}  # fmt: skip


def test_what_the_server_says_is_read():
    settings = read_settings(json.dumps(TOLD))
    assert settings == Settings(
        "a", ("data.example.org",), (), ("192.0.2.1",), 8, 0, 5, 4, 7, 9, audit=True
    )
    assert settings.rules().judge_name("data.example.org").allowed


@pytest.mark.parametrize(
    "change",
    [
        {"id": ""}, {"id": "a b"}, {"id": 5}, {"allow": "x"}, {"allow": [1]}, {"up_bits": -1},
        {"up_bits": True}, {"up_bits": 1.5}, {"quota_bytes": 1 << 70}, {"audit": 1}, {"what": 1},
    ],
)  # fmt: skip
def test_what_no_server_says_is_an_error(change):
    with pytest.raises(ValueError, match=r"\w"):
        read_settings(json.dumps(TOLD | change))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '"x"'])
def test_what_is_no_object_is_an_error(text):
    with pytest.raises(ValueError, match=r"\w"):
        read_settings(text)


def test_a_rule_that_does_not_parse_is_an_error():
    with pytest.raises(SpecError):
        read_settings(json.dumps(TOLD | {"allow": ["no rule!"]})).rules()
