"""notices.py - in the launching process, pure: what its log is told of a kernel's network."""

from __future__ import annotations

from sandbox_provisioner.facilities.network.tell.counts import Traffic
from sandbox_provisioner.facilities.network.tell.said import refused
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.told import Subject

_MOST_TOLD = 50  # names, of one kernel; it can make up any number


def _lost(_rest: str, of: Subject) -> str:
    return (
        f"{of.who} has lost its network: the gateway that served it has ended. What is started "
        "now gets a new one."
    )


NOTICES = {wire.NETWORK_LOST: _lost}


class Refusals:
    """What the network of a kernel was refused, told once for each name, and that its quota is used
    up."""

    def __init__(self) -> None:
        self._seen = 0
        self._told: set[str] = set()
        self._was_told_of_quota = False

    def new(self, traffic: Traffic | None, of: Subject) -> list[str]:
        """Sentences of what is new in *traffic*."""
        if traffic is None:
            return []
        told = []
        # Not the sum of all: it is written before the names are.
        refusals = sum(found.refusals for found in traffic.names.values())
        if refusals != self._seen:
            self._seen = refusals
            room = _MOST_TOLD - len(self._told)
            names = [name for name in refused(traffic.names) if name not in self._told][:room]
            self._told.update(names)
            if names:
                told.append(f"{of.who} was refused {', '.join(map(one_line, names))}.")
        if traffic.quota_used_up and not self._was_told_of_quota:
            self._was_told_of_quota = True
            told.append(f"{of.who} has used up its network_quota: it has no network more.")
        return told
