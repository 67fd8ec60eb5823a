"""policy.py - in who launches, pure but for what a share of the machine's memory is: the policy.

::

    [everyone]            kernels = 4
    [everyone.defaults]   mem_limit = "1G"           where nobody has asked
    [everyone.ceilings]   mem_limit = "4G"           the most
    [everyone.forced]     network_audit = true       in any case
    [everyone.sum]        mem_limit = "8G"           of all that one person runs
    [group.ta.ceilings]   mem_limit = "8G"
    [user.alice.forced]   network = "none"
    [host]                mem_limit = "48G"          of all people
    [hub]                 account = "jupyterhub"     who may have servers for others (hub.py)

Of what sections say about an option one counts: a user's own comes before those of groups, and
these before everyone's; of several groups, the one that stands first in the file. *What is allowed*
(`forced` or `ceilings`) and *what is meant where nobody asked* (`defaults`) are found so, each for
itself; then what is allowed has the last word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sandbox_provisioner.policy.hub import HubTerms
from sandbox_provisioner.policy.meaning import for_user, parse, parse_count
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.policy.terms import ADMINISTRATOR, Kind, OnExcess, Term, Terms
from sandbox_provisioner.spec import Limits

EVERYONE = "everyone"
HOST = "host"
KERNELS = "kernels"
ON_EXCESS = "on_excess"


@dataclass(frozen=True, slots=True)
class Entry:
    """One value, as it was written, and its line."""

    value: Any
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What the policy says of everyone, or of one group or user: *name* is as the file has it."""

    name: str
    line: int
    options: Mapping[Kind, Mapping[str, Entry]] = field(default_factory=dict)
    own: Mapping[str, Entry] = field(default_factory=dict)

    def term(self, kind: Kind, option: str, person: str) -> Term:
        """What it says of *option* to a *person*."""
        entry = self.options[kind][option]
        value = for_user(entry.value, person)
        return Term(
            option=option,
            shown=", ".join(map(str, value)) if isinstance(value, list) else str(value),
            fields=parse(kind, option, value),
            line=entry.line,
            section=self.name if self.name == HOST else f"{self.name}.{kind}",
        )

    def says(self, kind: Kind) -> Mapping[str, Entry]:
        """By options."""
        return self.options.get(kind, {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """All of a file. *audit* is where a line goes for each start and end: a file, or "log"."""

    file: str
    ask: str = ADMINISTRATOR
    audit: str = ""
    everyone: Section = Section(name=EVERYONE, line=0)
    groups: Mapping[str, Section] = field(default_factory=dict)
    users: Mapping[str, Section] = field(default_factory=dict)
    host_memory: Term | None = None
    host_kernels: Term | None = None
    hub: HubTerms | None = None

    def sections_of(self, person: Person) -> Iterator[Section]:
        """Those that speak of *person*, the one that counts most first."""
        if person.name in self.users:
            yield self.users[person.name]
        yield from (section for name, section in self.groups.items() if name in person.groups)
        yield self.everyone

    def for_person(self, person: Person) -> Terms:
        """What *person* may have."""
        sections = tuple(self.sections_of(person))
        allowed = _first(sections, (Kind.FORCED, Kind.CEILINGS))
        by_default, sums = _first(sections, (Kind.DEFAULTS,)), _first(sections, (Kind.SUM,))

        def terms(found: Mapping[str, Section], kind: Kind) -> dict[str, Term]:
            return {
                option: section.term(kind, option, person.name)
                for option, section in found.items()
                if option in section.says(kind)
            }

        of_sum = terms(sums, Kind.SUM)
        on_excess = _own(sections, ON_EXCESS)
        return Terms(
            person=person,
            file=self.file,
            ask=self.ask,
            defaults=terms(by_default, Kind.DEFAULTS),
            ceilings=terms(allowed, Kind.CEILINGS),
            forced=terms(allowed, Kind.FORCED),
            on_excess=OnExcess(on_excess[1].value) if on_excess else OnExcess.NARROW,
            kernels=count_term(*found) if (found := _own(sections, KERNELS)) else None,
            sum=sum_limits(of_sum.values()),
            sums=of_sum,
            host_memory=self.host_memory,
            host_kernels=self.host_kernels,
        )


def _first(sections: Iterable[Section], kinds: tuple[Kind, ...]) -> dict[str, Section]:
    """By options, the first of *sections* that says something of these *kinds* about it."""
    found: dict[str, Section] = {}
    for section in sections:
        for kind in kinds:
            for option in section.says(kind):
                found.setdefault(option, section)
    return found


def _own(sections: Iterable[Section], name: str) -> tuple[str, Entry] | None:
    """The first of *sections* that has *name* itself, and that entry."""
    for section in sections:
        if name in section.own:
            return section.name, section.own[name]
    return None


def count_term(section: str, entry: Entry) -> Term:
    """How many kernels at once."""
    count = parse_count(KERNELS, entry.value)
    return Term(
        option=KERNELS,
        shown=str(count),
        fields={KERNELS: count},
        line=entry.line,
        section=section,
    )


def sum_limits(terms: Iterable[Term]) -> Limits:
    """The caps of all that one person runs; SpecError for some that do not go together."""
    values = {path: value for term in terms for path, value in term.fields.items()}
    return Limits(**{path.removeprefix("limits."): value for path, value in values.items()})
