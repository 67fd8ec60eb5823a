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
    """Why it cannot, as Linux tells it; "" if it can."""
    if time.monotonic() >= _answer.until:
        _answer.obstacle = _found(orders.compile_network_trial(facts))
        _answer.until = time.monotonic() + _AGAIN_SECONDS if _answer.obstacle else float("inf")
    return _answer.obstacle


def forget() -> None:
    """Try again at the next start."""
    _answer.until = 0.0


def _found(plan: Plan) -> str:
    """What fails before the tables is told by the start itself, which has that step too."""
    with ThreadPoolExecutor(1) as own:  # the caller's may run a loop already
        failure = own.submit(asyncio.run, _tried(plan)).result()
    if failure is None or failure.verb != "netlink":
        return ""
    is_tables = plan.steps[failure.step - 1].words[0] == str(NETFILTER)
    return failure.text if is_tables else ""


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
