"""What the gateway may make PID 1 show to a person: text, not much of it, and its own end."""

from __future__ import annotations

import os
import select
import socket

import pytest

from sandbox_provisioner.facilities.network.inside.channel import Channel
from sandbox_provisioner.inside import wire


class Init:
    def __init__(self):
        self.said, self.told = [], []

    def say(self, text):
        self.said.append(text)

    def tell(self, word, *rest):
        self.told.append((word, *rest))


@pytest.fixture
def gateway():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        channel = Channel(theirs.detach(), is_network=True)
        yield ours, channel
        for fd, _ in channel.waits():
            os.close(fd)


def serve(channel, init):
    waited = dict(channel.waits())
    poll = select.poll()
    for fd, events in waited.items():
        poll.register(fd, events)
    channel.serve(init, dict(poll.poll(0)))


def said(gateway, *messages):
    ours, channel = gateway
    init = Init()
    for message in messages:
        ours.send(message)
        serve(channel, init)
    return init.said


def test_a_sentence_is_shown(gateway):
    assert said(gateway, wire.message(wire.SAY, "example.org:443 was refused.")) == [
        "example.org:443 was refused."
    ]


def test_what_a_program_may_have_put_into_it_moves_no_cursor_and_has_an_end(gateway):
    (shown,) = said(gateway, wire.message(wire.SAY, "\x1b]0;title\x07\nroot#\udcff" + "a" * 3000))
    assert shown.startswith("\\x1b]0;title\\x07\\x0aroot#\\udcff" + "a")
    assert len(shown) < 1100


def test_another_word_is_not(gateway):
    assert said(gateway, b"end now", b"\xff\xfe", wire.message(wire.SEALED)) == []


def test_a_gateway_that_speaks_without_end_is_heard_a_few_times(gateway):
    assert len(said(gateway, *[wire.message(wire.SAY, "no")] * 500)) < 15


@pytest.mark.parametrize("unread", [False, True])
def test_its_end_is_told_once_and_waited_for_no_more(gateway, unread):
    ours, channel = gateway
    if unread:  # then it is ECONNRESET in place of the end
        (fd, _), *_ = channel.waits()
        os.write(fd, b"listeners")
    ours.close()
    init = Init()
    serve(channel, init)
    assert len(init.said) == 1
    assert "no network any more" in init.said[0]
    assert init.told == [(wire.NETWORK_LOST,)]
    assert list(channel.waits()) == []
    serve(channel, init)
    assert len(init.said) == 1
