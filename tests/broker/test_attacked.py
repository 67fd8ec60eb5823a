"""What a kernel through the broker tries against the host: it gets what one of root's gets."""

from __future__ import annotations

import os

import attacks
import pytest
from brokers import Broker, User
from facilities import public_python

pytestmark = pytest.mark.requires("userns", "root", "cgroup-memory", "setpriv", "public-python")
IN_OPT = 10  # so does the user's home here


def test_what_fails_in_a_kernel_of_roots_fails_in_one_of_the_brokers(
    broker: Broker, user: User
) -> None:
    def run(code: str) -> str:
        return str(user("answer = kernel(code)", code=code))

    user("kernel = Kernel(mem_limit='512M')")
    python = os.path.realpath(public_python())
    with attacks.target(broker.home / "work") as stage:
        assert not attacks.wrong_answers(stage, run, attacks.chosen(IN_OPT), python=python)
    user("kernel.end()")
