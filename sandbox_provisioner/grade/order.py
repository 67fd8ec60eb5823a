"""grade/order.py - pure: how an assignment is to be graded, and what became of a submission."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sandbox_provisioner.grade.book import Graded
from sandbox_provisioner.grade.terms import SecondsOf, Terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """How an assignment is graded: *at_once* submissions at a time, each by *terms*, in boxes with
    *options* of ours; *kernel* is "" for those of the gradebook, and *seconds_of* tells the time of
    a cell where it is not the terms'. *anew* is all of them, whatever has been graded already."""

    at_once: int
    terms: Terms
    kernel: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    seconds_of: SecondsOf | None = None
    anew: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a submission: it was *graded*, or *problem* tells why not."""

    student: str
    graded: Graded | None
    problem: str = ""
    known: bool = False
