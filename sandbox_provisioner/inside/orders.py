"""inside/orders.py - runs in the launcher and in PID 1: takes the server's "go", with the plan.

May import: os, kernel_calls, wire (where the message is drawn).
"""

from __future__ import annotations

import os

from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside import wire


class Orders:
    """What came: the plan, as `wire.encode` writes it, the step that shall fail, the report pipe,
    the server's pidfd, the other descriptors."""

    def __init__(
        self,
        plan: bytes,
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
    text, fds = kernel.receive_descriptors(control_fd)
    word, fail_at = wire.parts(text)
    if word != wire.GO:
        return None
    plan_fd, report_fd, server_fd, *rest = fds
    for number, fd in enumerate(rest[:3]):
        os.dup2(fd, number)
        os.close(fd)
    return Orders(read_all(plan_fd), fail_at, report_fd, server_fd, rest[3:])


def read_all(fd: int) -> bytes:
    """The whole of *fd*, which is closed then."""
    chunks = []
    while chunk := os.read(fd, 1 << 20):
        chunks.append(chunk)
    os.close(fd)
    return b"".join(chunks)
