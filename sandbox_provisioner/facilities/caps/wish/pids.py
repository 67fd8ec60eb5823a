"""pids.py - any process outside; pure: the most processes and threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from traitlets import Integer, default

from sandbox_provisioner.facilities.caps.wish.cap import Cap, Options, Property, Write
from sandbox_provisioner.units import at_least

_SMALLEST = 8


class PidsOptions(Options):
    """What users write."""

    pids_limit = Integer(
        512,
        allow_none=True,
        help="The most processes and threads. Where no control group can cap them, a limit on "
        "those of a user (RLIMIT_NPROC) enforces the default. None: no cap.",
    ).tag(config=True, flag="pids-limit", fields=("limits.pids",))

    @default("pids_limit")
    def _usual_pids(self) -> int:
        return int(self.usual("pids_limit"))


@dataclass(frozen=True, kw_only=True)
class PidsWish:
    """*pids* counts threads too."""

    pids: int | None = None


class Pids(Cap):
    """The cap on processes."""

    facility = controller = "pids"
    options = ("pids_limit",)
    fields = ("pids",)
    noun = "number of processes"
    otherwise = "; for others RLIMIT_NPROC caps processes"

    def wish(self, options: PidsOptions) -> PidsWish:
        return PidsWish(pids=options.pids_limit)

    def check(self, limits: PidsWish) -> None:
        at_least("pids_limit", limits.pids, _SMALLEST, f"Use at least {_SMALLEST}.")

    def describe(self, limits: PidsWish) -> str:
        return f"cap processes at {limits.pids}"

    def v1(self, limits: PidsWish, disk: str) -> Iterator[Write]:
        if limits.pids is not None:
            yield Write("pids.max", str(limits.pids))

    v2 = v1

    def properties(self, limits: PidsWish, disk: str) -> Iterator[Property]:
        if limits.pids is not None:
            yield "TasksMax", ("t", limits.pids)
