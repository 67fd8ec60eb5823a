"""What other processes tell a server is read up to a size, and what means nothing is nothing."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from typing import cast

import pytest

from sandbox_provisioner.control import control_pair, hear
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.facilities.caps.cgroup import CgroupTree
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.box import Box
from sandbox_provisioner.records import Record, RecordFolder
from sandbox_provisioner.report import MOST_REPORTED_BYTES, Failure, Report
from sandbox_provisioner.warm.make_nursery import Told, _left_out

# -- the report pipe


def reported(*records):
    """As a launcher writes them, read in one go."""
    read_end, write_end = os.pipe()
    box = Box(write_end, -1)
    for words in records:
        box.report(*words)
    os.close(write_end)
    report = Report()
    asyncio.run(report.read(read_end))
    os.close(read_end)
    return report


def test_a_report_is_read_as_it_is_written():
    made = [("file", "/a b"), ("directory", "/with\nan end of a line\n"), ("file", "/\udcff")]
    report = reported(
        ("pid", "42"), *(("made", *pair) for pair in made), ("failed", "7", "take", "13", "no\nway")
    )
    assert (report.init_pid, report.made) == (42, made)
    assert report.failure == Failure(7, "take", 13, "no\nway")


def test_a_mistake_of_ours_is_told_from_what_the_machine_refuses():
    report = reported(("mistake", "7", "take", "KeyError: 'x' (at launcher/enter.py:1)"))
    assert report.failure == Failure(
        7, "take", 0, "KeyError: 'x' (at launcher/enter.py:1)", is_ours=True
    )


@pytest.mark.parametrize(
    "words",
    [
        "", "pid", "pid x", "pid -1", "pid 9999999999", "pid \xb2", "made file", "made a b c",
        "failed", "failed take 13 text", "failed x take 13 text", "failed 7 take x text",
        "mistake", "mistake 7 take", "mistake x take text", "nothing",
    ],
)  # fmt: skip
def test_a_record_that_is_none_is_nothing(words):
    assert reported(words.split(" ")) == Report()


def test_a_report_without_end_is_a_failure():
    read_end, write_end = os.pipe()

    def write():
        try:
            while True:
                os.write(write_end, b"x" * 65536)
        except BrokenPipeError:
            os.close(write_end)

    writer = threading.Thread(target=write)
    writer.start()
    report = Report()
    asyncio.run(report.read(read_end))
    os.close(read_end)
    writer.join()
    assert report.failure
    assert report.failure.verb == "read-report"


def test_who_sends_more_descriptors_than_one_leaves_none_of_them_with_us():
    ours, theirs = control_pair()
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(theirs, [wire.message(wire.HERE)], [0, 1])
    pid, fd = hear(ours, wire.HERE)
    assert pid == os.getpid()
    os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before
    ours.close()
    theirs.close()


def test_a_word_without_a_descriptor_has_none():
    ours, theirs = control_pair()
    theirs.send(wire.message(wire.HERE))
    assert hear(ours, wire.HERE) == (os.getpid(), -1)
    ours.close()
    theirs.close()


# -- a nursery's answer


@pytest.mark.parametrize(
    "answer",
    [b"", b"[", b"[]", b"1", b"null", b"{}", b'{"refused": 1, "failed": {}}',
     b'{"refused": [], "failed": []}', b"[" * 60_000, b"\xff"],
)  # fmt: skip
def test_an_answer_that_is_none_is_an_error_of_this_start(answer):
    with pytest.raises(LaunchError, match="not what a nursery answers"):
        Told.of(answer)


def test_only_modules_that_were_asked_for_are_told_of_and_not_at_length():
    answer = {
        "refused": {"cv2": "it starts threads", "made up\n": "x" * 10_000},
        "failed": {"numpy": "x" * 10_000, "forged": "[I ServerApp] all is well"},
    }
    told = Told.of(json.dumps(answer).encode())
    refused, failed = _left_out(told, ("cv2", "numpy", "pandas"))
    assert refused == "cv2 is not preloaded: it starts threads."
    assert failed.startswith("numpy is not preloaded: xxx")
    assert len(failed) < 600


def test_what_is_too_long_is_more_than_any_start_reports():
    most_stand_ins = 500
    assert most_stand_ins * 4096 < MOST_REPORTED_BYTES


def test_what_pid_1_tells_before_all_sockets_listen_is_no_failure_of_the_start(tmp_path):
    """A program outside may replace a covered file at any time."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        handle = LocalHandle(
            pidfd=-1,
            tree=cast(CgroupTree, None),
            folder=RecordFolder(tmp_path),
            record=Record(sandbox_id="one"),
            control=ours.fileno(),
        )
        for word in (b"covered .bashrc", b"sealed"):
            theirs.send(word)
        assert asyncio.run(handle.sealed()) == wire.SEALED
        (told,) = handle.notices()
        assert ".bashrc" in told
