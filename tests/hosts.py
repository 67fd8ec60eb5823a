"""This machine, or one like it, where something else is true."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from sandbox_provisioner.caller import Caller
from sandbox_provisioner.host import HostFacts, Machine

_FACTS = {known.name for known in fields(HostFacts)}
_CALLERS = {known.name for known in fields(Caller)}
_MACHINES = {known.name for known in fields(Machine)}


def host_with(facts: HostFacts, **changes: Any) -> HostFacts:
    """*facts* with *changes* of the machine, of who asks, or of what that comes to."""
    caller = {name: changes.pop(name) for name in _CALLERS & set(changes) - _FACTS}
    machine = {name: changes.pop(name) for name in _MACHINES & set(changes)}
    return replace(
        facts,
        machine=replace(facts.machine, **machine),
        caller=replace(facts.caller, **caller),
        **changes,
    )
