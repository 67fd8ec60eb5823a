"""The attempted escapes of tests/escape, in a kernel that the broker has started for a user.

Its box is one of root's, so each has to answer what it does in a kernel of a server of root's.
"""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path

import pytest
import users
from brokers import Broker, User
from counted import open_queues, queue_bytes

sys.path.append(str(Path(__file__).parents[1] / "escape"))

import rooms  # noqa: F401
from frame import VARIANTS, table
from stage import Kernel, host_of, stage_for

pytestmark = [
    pytest.mark.requires("userns", "root", "cgroup-memory", "setpriv", "public-python"),
    pytest.mark.timeout(300),
]
ROOT = VARIANTS[0]
_LOOK_INTO_OPT = 10  # where our own code lies, which the kernel of this user may read


class _Through:
    """`stage.Kernel` as far as `answers` asks for it."""

    def __init__(self, user: User) -> None:
        self.run = lambda code, **_: user("answer = kernel(code)", code=code)


def test_no_attempt_gets_further_than_in_a_kernel_of_roots(broker: Broker, user: User) -> None:
    shared = [
        attempt
        for attempt in table.values()
        if attempt.inside and not attempt.alone and attempt.answer(ROOT) is not None
        and not attempt.options and attempt.number != _LOOK_INTO_OPT
    ]  # fmt: skip
    with stage_for(ROOT) as stage:
        os.chown(stage.workdir, users.USER, users.USER)
        stage.fill()
        user("kernel = Kernel(path)", path=str(stage.workdir))
        python, prefix = user("answer = os.path.realpath(sys.executable), sys.prefix")
        theirs = {"boxed": True, "sockets": "/run/kernel", "python": python, "prefix": prefix}
        found = Kernel.answers(_Through(user), shared, stage.facts | theirs)  # type: ignore[arg-type]
        assert user("answer = kernel('print(6 * 7)')") == "42"
        found |= {
            attempt.number: attempt.after(host_of(stage)) for attempt in shared if attempt.after
        }
        user("kernel.end()")
    wrong = [
        (attempt.title, found[attempt.number])
        for attempt in shared
        if found[attempt.number] not in attempt.allowed(ROOT)
    ]
    assert wrong == []


TAKEN = """
from counted import queue_bytes
before = queue_bytes()
kernels = [Kernel(warm=False) for _ in range(2)]
told = [kernel(source + "print(open_queues())") for kernel in kernels]
answer = told, queue_bytes() - before
"""


def test_what_kernels_take_counts_neither_for_root_nor_for_who_asked_for_them(user: User) -> None:
    """Half a megabyte; others of both may have some queues meanwhile."""
    before = queue_bytes()
    told, of_user = user(TAKEN, source=inspect.getsource(open_queues))
    of_root = queue_bytes() - before
    user("for kernel in kernels: kernel.end()")
    assert told == ["(3, 'Too many open files')"] * 2
    assert max(of_user, of_root) < 250_000
