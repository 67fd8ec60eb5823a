"""network/tell/counts.py: what a gateway has counted, and what a broken one may write."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest

from sandbox_provisioner.facilities.network.tell.counts import (
    MOST_BYTES,
    MOST_NAMES,
    NamesRoom,
    OfName,
    Traffic,
    Writer,
    read_counts,
)

FIELDS = ("up_bytes", "down_bytes", "connections", "refusals")
NAMES = {
    "data.example.org:443": OfName(up_bytes=7, down_bytes=1 << 40, connections=3),
    "example.org": OfName(refusals=2),
}
SOME = Traffic(up_bytes=7, down_bytes=1 << 40, connections=3, refusals=2, names=NAMES)


class Paper:
    """A file in memory. *meanwhile* is called before each read, and *reads* are how many bytes
    each has asked for."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.text = bytearray()
        self.meanwhile = meanwhile
        self.reads: list[int] = []

    def write(self, text: bytes, position: int) -> None:
        self.text[position : position + len(text)] = text

    def read(self, most: int, position: int) -> bytes:
        self.meanwhile()
        self.reads.append(most)
        return bytes(self.text[position : position + most])


def test_what_is_written_is_read():
    paper = Paper()
    Writer(paper.write).all(SOME)
    assert read_counts(paper.read) == SOME


def test_the_last_word_says_so():
    paper = Paper()
    writer = Writer(paper.write)
    writer.all(SOME)
    assert not read_counts(paper.read).is_last
    writer.all(replace(SOME, is_last=True))
    assert read_counts(paper.read) == replace(SOME, is_last=True)


def test_numbers_are_current_though_the_names_are_those_of_before():
    paper = Paper()
    writer = Writer(paper.write)
    writer.all(SOME)
    writer.numbers(Traffic(up_bytes=9, quota_used_up=True, unnamed=1))
    found = read_counts(paper.read)
    assert (found.up_bytes, found.quota_used_up, found.unnamed) == (9, True, 1)
    assert found.names == NAMES


def test_fewer_names_than_before_leave_no_rest_of_the_old_ones():
    paper = Paper()
    writer = Writer(paper.write)
    writer.all(SOME)
    writer.all(Traffic(names={"a:1": OfName(connections=1)}))
    assert read_counts(paper.read).names == {"a:1": OfName(connections=1)}


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_disk_that_was_full_spoils_but_what_was_to_be_written_then(failing):
    paper, errors = Paper(), [None] * failing + [OSError(28, "No space left on device")]

    def write(text: bytes, position: int) -> None:
        if errors and (error := errors.pop(0)):
            raise error
        paper.write(text, position)

    writer = Writer(write)
    with pytest.raises(OSError, match="space"):
        writer.all(SOME)
    writer.all(SOME)
    assert read_counts(paper.read) == SOME


def test_a_reader_who_comes_in_the_middle_reads_again():
    paper = Paper()
    writer = Writer(paper.write)
    writer.all(SOME)
    new = Traffic(up_bytes=8, names={"b:2": OfName(up_bytes=8)})
    acts = [lambda: None, lambda: writer.all(new)]
    paper.meanwhile = lambda: acts.pop(0)() if acts else None
    assert read_counts(paper.read) == new


def test_a_writer_who_never_stops_costs_the_names_and_not_the_reader():
    paper = Paper()
    writer = Writer(paper.write)
    writer.all(SOME)
    paper.meanwhile = lambda: writer.all(SOME)
    found = read_counts(paper.read)
    assert found.down_bytes == 1 << 40
    assert found.names == {}
    assert len(paper.reads) < 20


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\1",
        b"\xff" * 80,
        b"\0" * 200,
        struct.pack("<10Q", 1, 2, 3, 4, 5, 1, 0, 0, 1 << 63, 0) + b"[" * 100_000,
        struct.pack("<10Q", 1, 2, 3, 4, 5, 1, 0, 0, 20, 0) + b'{"a": [1, 2, 3, -4]}',
        struct.pack("<10Q", 1, 2, 3, 4, 5, 1, 0, 0, 15, 0) + b'{"a": [1, 2, 3]}',
        struct.pack("<10Q", 1, 2, 3, 4, 5, 1, 0, 0, 8, 0) + b'{"a": 1}',
        struct.pack("<10Q", 1, 2, 3, 4, 5, 1, 0, 0, 2, 0) + b"\xff\xff",
    ],
)
def test_what_is_no_counts_has_no_names(text):
    paper = Paper()
    paper.text[:] = text
    assert read_counts(paper.read).names == {}
    assert max(paper.reads) <= MOST_BYTES


def test_what_is_shown_is_bounded_whatever_is_there():
    paper = Paper()
    many = {f"{number}{'x' * 400}": [1, 1, 1, 1] for number in range(2000)}
    text = json.dumps(many).encode()
    paper.text[:] = struct.pack("<10Q", 1, 0, 0, 0, 0, 0, 0, 0, len(text), 0) + text
    found = read_counts(paper.read).names
    assert len(found) <= MOST_NAMES
    assert all(len(name) <= 300 for name in found)


@pytest.mark.parametrize("letter", ["x", "\N{REPLACEMENT CHARACTER}", '"'])
def test_all_names_that_have_room_are_written_however_long_and_large(letter):
    room, most = NamesRoom(), OfName(**dict.fromkeys(FIELDS, (1 << 63) - 1))
    names = {name: most for n in range(6000) if room.take(name := f"{n:05}{letter * 245}")}
    assert len(names) < 6000
    paper = Paper()
    Writer(paper.write).all(Traffic(names=names))
    assert MOST_BYTES * 0.99 < len(paper.text) <= MOST_BYTES
    assert read_counts(paper.read).names == names


def test_no_more_names_have_room_than_are_read():
    room = NamesRoom()
    assert sum(room.take(f"{n}.example:443") for n in range(6000)) == MOST_NAMES
