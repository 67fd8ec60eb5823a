"""rules.py - any process outside, and the gateway; pure: with whom a sandbox may speak.

A rule is one text::

    data.example.org           a host, by its name: every port
    *.example.edu:443          every host below a domain, but not the domain itself
    10.1.0.0/16:5432,5433      addresses; of IPv6 with a port: [2001:db8::/32]:443
    all                        every name, and every public address
    packages                   a preset: rules that this machine's own configuration gives

What `network_deny` has is refused, whatever `network_allow` has. An address that is not public is
reached only by a rule that names it, of addresses: a name that leads there is not enough, unless a
preset gave it. Whoever resolves a name asks twice: `Rules.judge_name` before any look-up, and
`Rules.judge` with the very address that is dialled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import ip_interface, ip_network

from sandbox_provisioner.errors import SpecError, joined, nearest
from sandbox_provisioner.facilities.network.wish.addresses import (
    CARRIERS,
    Address,
    Block,
    Special,
    is_within,
    meant_by,
    own_special,
    read_address,
    special_of,
)
from sandbox_provisioner.facilities.network.wish.names import (
    BadNameError,
    host_name,
    written_name,
)

EVERYTHING = "all"
PACKAGES = "packages"
PRESETS = (PACKAGES,)
_FROM = " from "
_MOST_SHOWN = 6
_HAS_PORTS = ("tcp", "udp")
_FORMS = (
    'Write a host ("data.example.org"), the hosts of a domain ("*.example.edu:443"), addresses '
    '("10.1.0.0/16:5432", "[2001:db8::/32]:443"), "packages" or "all".'
)
_ASK = "Ask for it with network_allow."
_DIGITS = re.compile(r"[1-9]\d{0,4}", re.ASCII)
# "[2001:db8::/32]:443" and "[2001:db8::]/32:443"
_BRACKETS = re.compile(r"\[([^][]*)\](/[^:]*)?(?::(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: a *name*, or of a domain all names *below* it, or a *block* of addresses, or
    *everything*; no *ports* are all of them. *preset* is where it comes from, or, with nothing
    else, a preset that has yet to be replaced by its rules."""

    name: str = ""
    below: bool = False
    block: Block | None = None
    everything: bool = False
    ports: tuple[int, ...] = ()
    preset: str = ""

    @property
    def text(self) -> str:
        """It, as `parse` reads it."""
        text = self._whom()
        if self.ports:
            text = f"[{text}]" if ":" in text else text
            text += ":" + ",".join(map(str, self.ports))
        return f"{text}{_FROM}{self.preset}" if self.preset and text else text or self.preset

    def _whom(self) -> str:
        if self.block is not None:
            single = self.block.prefixlen == self.block.max_prefixlen
            return str(self.block.network_address if single else self.block)
        if self.everything:
            return EVERYTHING
        return f"*.{self.name}" if self.below else self.name + "." * _is_taken(self.name)

    @property
    def shown(self) -> str:
        """The same for a sentence: what a preset gave is known by the preset's name."""
        return self.preset or self.text

    def has_name(self, name: str) -> bool:
        """Whether *name*, in the form that counts, is meant."""
        if self.below:
            return name.endswith(f".{self.name}")
        return self.everything or (bool(self.name) and name == self.name)

    def has_address(self, address: Address) -> bool:
        """Whether it is a rule of addresses, and *address* one of them."""
        block = self.block
        return block is not None and block.version == address.version and address in block

    def has_port(self, port: int | None) -> bool:
        """None stands for a protocol without ports."""
        return not self.ports or port in self.ports

    def covers(self, other: Rule) -> bool:
        """Whether all that *other* allows is allowed by this one too. Of addresses only the same
        ones: a smaller range may name some that a larger one does not, such as the machine's own.
        """
        if self.preset or other.preset:
            return self == other
        if self.ports and not (other.ports and {*other.ports} <= {*self.ports}):
            return False
        if self.block is not None or other.block is not None or other.everything:
            return (self.block, self.everything) == (other.block, other.everything)
        if other.below and not self.everything:
            return self.below and f".{other.name}".endswith(f".{self.name}")
        return self.has_name(other.name)

    def names(self, special: Special) -> bool:
        """Whether it is meant for addresses that are *special*."""
        return (
            self.block is not None
            and special.is_named_by(self.block)
            and (special.in_presets or not self.preset)
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a wish; *why* it was refused, a clause for `sentence`, and what the person
    can do, a sentence."""

    allowed: bool
    why: str = ""
    remedy: str = ""

    def sentence(self, wanted: str) -> str:
        """For the person whose program *wanted* to speak with it."""
        return f"{wanted} was refused: {self.why}. {self.remedy}".rstrip()


_YES = Verdict(allowed=True)


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules of one box. *own* are addresses of this machine, and pools of ours."""

    allow: tuple[Rule, ...] = ()
    deny: tuple[Rule, ...] = ()
    own: tuple[Special, ...] = ()

    @classmethod
    def read(cls, allow: Iterable[str], deny: Iterable[str] = (), own: Iterable[str] = ()) -> Rules:
        """From texts; those of presets are replaced by now. SpecError, ValueError."""
        return cls(
            tuple(_parse_given(text, place("network_allow", n)) for n, text in enumerate(allow)),
            tuple(_parse_given(text, place("network_deny", n)) for n, text in enumerate(deny)),
            tuple(map(own_special, own)),
        )

    def with_own(self, address: str) -> Rules:
        """The same where *address* is one of this machine's own, too."""
        return replace(self, own=(own_special(address), *self.own))

    @property
    def allows(self) -> str:
        """What is allowed, for a sentence."""
        shown = [*dict.fromkeys(rule.shown for rule in self.allow)]
        if more := shown[_MOST_SHOWN:]:
            shown = [*shown[:_MOST_SHOWN], f"{len(more)} more"]
        return joined(shown) or "nothing"

    def judge_name(self, name: str) -> Verdict:
        """Whether *name* may be looked up at all."""
        try:
            name = host_name(name)
        except BadNameError as error:
            return Verdict(allowed=False, why=str(error))
        for rule in self.deny:
            if rule.has_name(name) and not rule.ports:
                return _denied(rule)
        if any(rule.has_name(name) for rule in self.allow):
            return _YES
        return self._not_among_them()

    def judge(self, name: str | None, address: str, port: int, protocol: str = "tcp") -> Verdict:
        """Whether a program may speak with *address*, which *name* has led to; None where it named
        the address itself."""
        read = read_address(address)
        if read is None:
            return Verdict(allowed=False, why=f"{address!r} is no address that leads anywhere")
        if name is not None:
            if not (verdict := self.judge_name(name)).allowed:
                return verdict
            name = host_name(name)
        number = port if protocol in _HAS_PORTS else None
        for rule in self.deny:
            if rule.has_port(number) and _concerns(rule, name, read):
                return _denied(rule)
        return self._judge_allowed(name, meant_by(read), number)

    def _judge_allowed(self, name: str | None, address: Address, port: int | None) -> Verdict:
        special = special_of(address, self.own)
        by_address = [r for r in self.allow if r.has_address(address) and r.has_port(port)]
        by_name = [r for r in self.allow if name and r.has_name(name) and r.has_port(port)]
        if name is not None and not by_name:
            return self._not_that_port(name)
        if special is None:
            every = any(rule.everything and rule.has_port(port) for rule in self.allow)
            return _YES if by_name or by_address or every else self._not_among_them()
        if any(rule.names(special) for rule in by_address):
            return _YES
        if special.in_presets and any(rule.preset for rule in by_name):
            return _YES
        what = f"{address} is {special.what}"
        why = f"it leads to {address}, which is {special.what}" if name else what
        return Verdict(
            allowed=False,
            why=f"{why}, and no rule of network_allow names that address",
            remedy=_ASK,
        )

    def _not_among_them(self) -> Verdict:
        why = f"this kernel's network allows {self.allows}"
        return Verdict(allowed=False, why=why, remedy=_ASK)

    def _not_that_port(self, name: str) -> Verdict:
        ports = {port for rule in self.allow if rule.has_name(name) for port in rule.ports}
        which = "port" if len(ports) == 1 else "ports"
        why = f"of {name} this kernel's network allows {which} {joined([*map(str, sorted(ports))])}"
        return Verdict(allowed=False, why=why, remedy=_ASK)


def _denied(rule: Rule) -> Verdict:
    return Verdict(allowed=False, why=f"network_deny has {rule.text}")


def _concerns(rule: Rule, name: str | None, address: Address) -> bool:
    """Whether it is about this name, or this address, or the one within it."""
    if name is not None and rule.has_name(name):
        return True
    return rule.everything or rule.has_address(address) or rule.has_address(meant_by(address))


def place(option: str, index: int) -> str:
    """Where a rule stands, as an error tells it."""
    return f"{option}, rule {index + 1}"


def parse(text: str, where: str) -> Rule:
    """The rule that a person wrote; SpecError, which tells *where* ("network_allow, rule 3")."""
    return _Text(text, text, where).rule()


def given_by(preset: str, text: str) -> str:
    """The rule *text* with a note that *preset* gave it."""
    return f"{text}{_FROM}{preset}"


def _parse_given(text: str, where: str) -> Rule:
    """The rule of a person, or that of `given_by`."""
    whom, given, preset = text.partition(_FROM)
    rule = _Text(whom, text, where).rule()
    if given and (preset not in PRESETS or rule.preset):
        raise _Text(whom, text, where).wrong(f"{preset!r} is no preset", _FORMS)
    return replace(rule, preset=preset) if given else rule


def _is_taken(name: str) -> bool:
    """Whether a host of that *name* is written with a dot behind it: the name means something else
    here, or is next to something that does."""
    return name == EVERYTHING or ("." not in name and bool(nearest(name, PRESETS)))


@dataclass(frozen=True, slots=True)
class _Text:
    """A rule's *whom* with its ports, being read; *text* and *where* are for errors."""

    whom: str
    text: str
    where: str

    def wrong(self, answer: str, remedy: str) -> SpecError:
        """The error for it."""
        return SpecError(attempt=f"read {self.where}, {self.text!r}", answer=answer, remedy=remedy)

    def rule(self) -> Rule:
        """What it comes to."""
        if self.whom in PRESETS:
            return Rule(preset=self.whom)
        whom, ports = self._apart()
        if whom in PRESETS:
            raise self.wrong("a preset brings its own ports", f'Write "{whom}".')
        if whom == EVERYTHING:
            return Rule(everything=True, ports=ports)
        if block := self._block(whom):
            return Rule(block=block, ports=ports)
        return self._of_names(whom, ports)

    def _apart(self) -> tuple[str, tuple[int, ...]]:
        """Whom, and the ports."""
        if not self.whom or re.search(r"[\s\0]", self.whom):
            raise self.wrong("it is empty, or has blanks in it", _FORMS)
        if "//" in self.whom:
            remedy = 'Write the host of the address alone, with its port: "data.example.org:443".'
            raise self.wrong("it is a URL, and rules know nothing of what follows a host", remedy)
        if match := _BRACKETS.fullmatch(self.whom):
            if ":" not in match[1]:
                raise self.wrong("brackets are for addresses of IPv6", _FORMS)
            return f"{match[1]}{match[2] or ''}", self._ports(match[3])
        if self.whom.count(":") > 1:  # IPv6, which has to have brackets before a port
            return self.whom, ()
        whom, colon, ports = self.whom.partition(":")
        return whom, self._ports(ports if colon else None)

    def _ports(self, text: str | None) -> tuple[int, ...]:
        if text is None:
            return ()
        numbers = text.split(",")
        for number in numbers:
            if not _DIGITS.fullmatch(number) or int(number) > 0xFFFF:
                remedy = 'Write numbers from 1 to 65535 behind the colon: ":443" or ":80,443".'
                raise self.wrong(f"{number!r} is no port", remedy)
        return tuple(sorted({*map(int, numbers)}))

    def _block(self, whom: str) -> Block | None:
        """The addresses that *whom* is, or None where it is a name."""
        if "%" in whom:
            remedy = "Write the address without what begins with %."
            raise self.wrong("an address with an interface holds on one machine only", remedy)
        try:
            block = ip_network(whom)
        except ValueError:
            self._refuse_near_block(whom)
            return None
        mask = whom.partition("/")[2]
        if mask and not mask.isdecimal():
            remedy = f'Write "{block}".'
            raise self.wrong("a mask is written as its length", remedy)
        if carrier := next((c for c in CARRIERS if is_within(block, c)), None):
            remedy = "Write a rule for that address of IPv4."
            answer = f"what lies in {carrier} carries an address of IPv4, and is judged by it"
            raise self.wrong(answer, remedy)
        return block

    def _refuse_near_block(self, whom: str) -> None:
        """Of names no one has a slash or a colon."""
        if "/" not in whom and ":" not in whom:
            return
        try:
            meant = ip_interface(whom).network
        except ValueError:
            raise self.wrong(f"{whom!r} is no range of addresses", _FORMS) from None
        raise self.wrong("it names a machine in a range of addresses", f'Write "{meant}" for all.')

    def _of_names(self, whom: str, ports: tuple[int, ...]) -> Rule:
        below = whom.startswith("*.")
        if whom == "*":
            raise self.wrong('"*" alone is no name', f'Write "{EVERYTHING}" for everything.')
        try:
            name = written_name(whom.removeprefix("*."))
        except BadNameError as error:
            raise self.wrong(f"it is no host: {error}", _FORMS) from None
        if not below and not whom.endswith(".") and _is_taken(name):
            meant = nearest(name, PRESETS)
            remedy = f'Write "{meant}", or "{name}." if there is a host of that name.'
            raise self.wrong("there is no such preset", remedy)
        return Rule(name=name, below=below, ports=ports)
