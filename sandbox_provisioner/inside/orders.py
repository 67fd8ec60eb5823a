"""inside/orders.py - runs in the launcher and in PID 1: takes the server's word, with the plan.

May import: os, kernel_calls.  The word is one message, and with it come descriptors::

    "go FAIL_AT"   plan, report pipe, pidfd of the server, stdin, stdout, stderr, and what the
                   plan's ``receive`` names

FAIL_AT is the step that a fault injection wants to fail, "" for none.
"""

from __future__ import annotations

import os

from sandbox_provisioner.inside import kernel_calls as kernel


class Orders:
    """What came: the plan's steps as lists of words, the report pipe, the server's pidfd, the other
    descriptors."""

    def __init__(
        self,
        plan: list[list[bytes]],
        fail_at: str,
        report_fd: int,
        server_fd: int,
        fds: list[int],
    ):
        self.plan = plan
        self.fail_at = fail_at
        self.report_fd = report_fd
        self.server_fd = server_fd
        self.fds = fds


def receive(control_fd: int) -> Orders | None:
    """Wait for the word; None if the other side has thought better of it. Standard input, output
    and error are then those that came with it."""
    word, fds = kernel.receive_descriptors(control_fd)
    if not word.startswith(b"go "):
        return None
    plan_fd, report_fd, server_fd, *rest = fds
    for number, fd in enumerate(rest[:3]):
        os.dup2(fd, number)
        os.close(fd)
    plan = decode(read_all(plan_fd))
    return Orders(plan, os.fsdecode(word[3:]), report_fd, server_fd, rest[3:])


def read_all(fd: int) -> bytes:
    """The whole of *fd*, which is closed then."""
    chunks = []
    while chunk := os.read(fd, 1 << 20):
        chunks.append(chunk)
    os.close(fd)
    return b"".join(chunks)


def decode(text: bytes) -> list[list[bytes]]:
    """Read what `plan.Plan.encode` and `encode` write: a count, then so many "LENGTH:BYTES"."""
    position = 0

    def number(end: bytes) -> int:
        nonlocal position
        stop = text.index(end, position)
        value = int(text[position:stop])
        position = stop + 1
        return value

    plan = []
    while position < len(text):
        words = []
        for _ in range(number(b"#")):
            length = number(b":")
            words.append(text[position : position + length])
            position += length
        plan.append(words)
    return plan


def encode(lists: list[list[bytes]]) -> bytes:
    """What `decode` reads."""
    return b"".join(
        b"%d#%s" % (len(words), b"".join(b"%d:%s" % (len(word), word) for word in words))
        for words in lists
    )
