"""network_trial.py - in the launching process: whether this Linux can hand the connections of a box
to one listener.

No file tells it: modules are loaded when they are first asked for, also from inside a namespace,
and Linux answers only who has one. So it is tried once, by a launcher that does it for nobody.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from sandbox_provisioner import orders
from sandbox_provisioner.facilities.network.plan.netlink import NETFILTER
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.performer import Performer
from sandbox_provisioner.plan import Plan
from sandbox_provisioner.report import Failure
from sandbox_provisioner.stem import stem

# An administrator may load what was missing; a module that is there stays.
_AGAIN_SECONDS = 60.0


class _Answer:
    """What was found, and until when that counts."""

    def __init__(self) -> None:
        self.obstacle = ""
        self.until = 0.0


_answer = _Answer()


def catch_obstacle(facts: HostFacts) -> str:
    """Why it cannot, as Linux tells it; "" if it can, or if that could not be found out: then the
    start itself, which has the same steps, tells why."""
    if time.monotonic() >= _answer.until:
        plan = orders.compile_network_trial(facts)
        failure = _failure_of(plan)
        _answer.obstacle = failure.text if failure and _is_of_tables(failure, plan) else ""
        lasts = _AGAIN_SECONDS if _answer.obstacle else 0.0 if failure else float("inf")
        _answer.until = time.monotonic() + lasts
    return _answer.obstacle


def forget() -> None:
    """Try again at the next start."""
    _answer.until = 0.0


def _failure_of(plan: Plan) -> Failure | None:
    with ThreadPoolExecutor(1) as own:  # the caller's may run a loop already
        return own.submit(asyncio.run, _tried(plan)).result()


def _is_of_tables(failure: Failure, plan: Plan) -> bool:
    step = plan.steps[failure.step - 1]
    return step.verb == "netlink" and step.words[0] == str(NETFILTER)


async def _tried(plan: Plan) -> Failure | None:
    performer = Performer()
    try:
        performer.ask(stem)
        await performer.here()
        performer.begin(plan)
        await performer.performed()
        return performer.report.failure
    finally:
        await performer.end()
