"""meaning.py - in who launches, reads only: what a value in the policy comes to.

The options, their notations and their errors are those of options.py: an option that has `fields`
there can stand in the policy, and none is named here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from traitlets import Bool, Dict, Enum, List, TraitError, TraitType

from sandbox_provisioner.errors import SpecError, did_you_mean
from sandbox_provisioner.facilities.caps.wish import CAPS
from sandbox_provisioner.facilities.network.wish.network import Network
from sandbox_provisioner.facilities.volumes.wish import filled_in
from sandbox_provisioner.host import memory_bytes
from sandbox_provisioner.option_errors import bad_value
from sandbox_provisioner.options import SandboxOptions, every_option, spec_of
from sandbox_provisioner.policy.terms import Kind
from sandbox_provisioner.spec import SandboxSpec

_MOST_DIGITS = 9


class _Options(SandboxOptions):
    """Those of one value, beside what others are about: a network, and memory."""

    def __init__(self) -> None:
        super().__init__(network=Network.GATEWAY.value, mem_limit="1T")

    def machine_bytes(self) -> int:
        return memory_bytes()


@functools.cache
def governed() -> Mapping[str, TraitType[Any, Any]]:
    """The options that a policy can decide about."""
    options = every_option().items()
    return {name: trait for name, trait in options if trait.metadata.get("fields")}


def fields_of(option: str) -> tuple[str, ...]:
    """The fields of a `SandboxSpec` that *option* comes to."""
    found: tuple[str, ...] = governed()[option].metadata["fields"]
    return found


def reach(spec: SandboxSpec, path: str) -> Any:
    """The field of *spec* with this dotted name."""
    return functools.reduce(getattr, path.split("."), spec)


def is_restriction(option: str) -> bool:
    """Whether more of it is less for the kernel."""
    return bool(governed()[option].metadata.get("restricts"))


def is_choice(option: str) -> bool:
    """Whether it is one of some values."""
    return bool(choices_of(option))


def is_any_text(option: str) -> bool:
    """Whether it is a choice of more texts than are known here."""
    return is_choice(option) and not isinstance(governed()[option], Enum)


def choices_of(option: str) -> tuple[Any, ...]:
    """The values of a choice that are known, the strictest first; () for what is none."""
    trait = governed()[option]
    if isinstance(trait, Enum):
        return tuple(trait.values or ())
    return tuple(trait.metadata.get("choice", ()))


def is_list(option: str) -> bool:
    """Whether it has any number of entries."""
    return isinstance(governed()[option], List)


def check_option(kind: Kind, option: str) -> None:
    """Refuse an *option* of which a section of this *kind* can say nothing; SpecError."""
    attempt = f"read {option}"
    known = governed()
    if option not in known:
        is_option = option in every_option()
        answer = "no policy decides about that option" if is_option else "there is no such option"
        remedy = did_you_mean(option, known, f"Options are: {', '.join(known)}.")
        raise SpecError(attempt=attempt, answer=answer, remedy=remedy)
    if kind is Kind.SUM and option not in _OF_CAPS:
        raise SpecError(
            attempt=attempt,
            answer="all kernels of a person have no such sum",
            remedy=f"A sum can be of: {', '.join(_OF_CAPS)}.",
        )
    if kind is Kind.CEILINGS and (isinstance(known[option], Bool | Dict) or is_restriction(option)):
        raise SpecError(
            attempt=attempt,
            answer="of that option nothing is more than something else",
            remedy="Write it below forced.",
        )


_OF_CAPS = tuple(option for cap in CAPS for option in cap.options)


def parse(kind: Kind, option: str, value: Any) -> dict[str, Any]:
    """What *value* of *option* comes to, by fields; SpecError. Of a ceiling on a choice it is a set
    of values."""
    check_option(kind, option)
    if kind is Kind.CEILINGS and is_choice(option):
        values = value if isinstance(value, list) else [value]
        return _choices(option, values)
    options = _Options()
    try:
        setattr(options, option, value)
    except TraitError as error:
        raise bad_value(error, options.traits(config=True), {option: value}) from None
    spec = spec_of(options, workdir="/")
    return {path: reach(spec, path) for path in fields_of(option)}


def _choices(option: str, values: Iterable[Any]) -> dict[str, Any]:
    found = [parse(Kind.FORCED, option, value) for value in values]
    if not found:
        raise SpecError(
            attempt=f"read {option}",
            answer="it leaves nothing to choose",
            remedy="Name at least one value.",
        )
    return {path: frozenset(one[path] for one in found) for path in fields_of(option)}


def for_user(value: Any, name: str) -> Any:
    """*value* with the user's *name* in its texts."""
    if isinstance(value, str):
        return filled_in(value, name)
    if isinstance(value, list):
        return [for_user(one, name) for one in value]
    if isinstance(value, dict):
        return {filled_in(key, name): for_user(one, name) for key, one in value.items()}
    return value


def parse_count(option: str, value: Any) -> int:
    """How many at once; SpecError."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**_MOST_DIGITS:
        raise SpecError(
            attempt=f"read {option}",
            answer=f"{value!r} is not a number of kernels",
            remedy="Write a whole number; 0 lets nobody start one.",
        )
    return value
