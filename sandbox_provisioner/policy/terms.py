"""terms.py - pure: what one person may have, as the policy says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from sandbox_provisioner.errors import COMMAND, HostError, SpecError
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.spec import Limits

# Whom a person may ask, where the policy does not say.
ADMINISTRATOR = "the administrator of this machine"


class Kind(StrEnum):
    """What a section of the policy can say of an option."""

    DEFAULTS = "defaults"
    CEILINGS = "ceilings"
    FORCED = "forced"
    SUM = "sum"


class OnExcess(StrEnum):
    """What becomes of a start that asks for more than a ceiling, or other than what is forced."""

    NARROW = "narrow"
    REFUSE = "refuse"


class NotAllowed(SpecError):
    """Somebody has asked for more than the policy lets them have."""


class NoRoom(HostError):
    """By what the policy counts, there is no room for one more."""


class PolicyError(HostError):
    """The policy is there and cannot be relied on: nothing starts until somebody corrects it. The
    one who reads this may be a user, who is told whom to ask, or that very administrator."""

    def __init__(
        self, file: str, line: int, answer: str, remedy: str, ask: str = ADMINISTRATOR
    ) -> None:
        self.line = line
        where = f", line {line}" if line else ""
        super().__init__(
            attempt=f"use the policy {file}{where}",
            answer=answer,
            remedy=(
                f"Nothing starts until it is corrected. Ask {ask}, who can do this:",
                remedy,
                "Then look at it again:",
                f"{COMMAND}jupyter sandbox policy check",
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """What the policy says of one *option*, and where: *shown* is as it was written, *fields* what
    that comes to in a `SandboxSpec`. Of a ceiling on a choice these are the values to choose from.
    """

    option: str
    shown: str
    fields: Mapping[str, Any]
    line: int
    section: str

    def where(self, file: str) -> str:
        """For a sentence."""
        return f"{file}, line {self.line}, [{self.section}]"


_NONE: Mapping[str, Term] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What *person* may have: by options, what is meant where nobody asked, the most, and what is
    in any case. *kernels* is how many at once; *sum* caps the groups of all that the person runs,
    of which *sums* tells the lines. *host_memory* and *host_kernels* are for all people together.
    """

    person: Person
    file: str = ""
    ask: str = ADMINISTRATOR
    defaults: Mapping[str, Term] = field(default_factory=lambda: _NONE)
    ceilings: Mapping[str, Term] = field(default_factory=lambda: _NONE)
    forced: Mapping[str, Term] = field(default_factory=lambda: _NONE)
    on_excess: OnExcess = OnExcess.NARROW
    kernels: Term | None = None
    sum: Limits = field(default_factory=Limits)
    sums: Mapping[str, Term] = field(default_factory=lambda: _NONE)
    host_memory: Term | None = None
    host_kernels: Term | None = None
