"""narrow.py - pure: what becomes of a wish under the terms of whoever has it.

For each option: where nobody has set it, the policy's default is what was wished. What is forced
is in its place, and of a restriction added to it. Of what has a ceiling, no more than that is left:
of a number the smaller one; of a choice what was wished, or the nearest that is stricter (options
list the strictest first, which always fits); of a list what some entry of the ceiling covers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

from sandbox_provisioner.facilities.caps.wish import BY_FACILITY
from sandbox_provisioner.facilities.devices.wish import covers as covers_device
from sandbox_provisioner.facilities.network.wish.network import Network, NetworkWish
from sandbox_provisioner.facilities.network.wish.rules import Rule, place
from sandbox_provisioner.facilities.network.wish.rules import parse as parse_rule
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.policy.meaning import (
    choices_of,
    fields_of,
    governed,
    is_any_text,
    is_choice,
    is_list,
    is_restriction,
    parse,
    reach,
)
from sandbox_provisioner.policy.terms import ADMINISTRATOR, Kind, NotAllowed, OnExcess, Term, Terms
from sandbox_provisioner.spec import (
    SHM_BYTES,
    TMP_BYTES,
    Limits,
    OnMissing,
    SandboxSpec,
    Volume,
    folder_bytes,
    inodes_of,
    relative,
)
from sandbox_provisioner.units import format_bytes

_MEMORY = "mem_limit"
_NETWORK = "network"
_MODE = "network.mode"
_ON_MISSING = "on_missing"
# Of what stands under a cell: a list that was asked for may have any length.
_MOST_SENTENCES = 8
_MOST_LETTERS = 300
# What is the machine's, and no part of what all of a person's has together.
_OF_ROOT = ("devices", "disk_limit", "inode_limit", "workdir_limit", "workdir_inode_limit")


def narrow(spec: SandboxSpec, terms: Terms) -> tuple[SandboxSpec, tuple[str, ...]]:
    """*spec* as *terms* allow it, with a sentence for each wish that was more; NotAllowed where the
    policy refuses in place of that."""
    unwished = _unwished(spec, terms)
    judged = [_judge(option, spec, terms, unwished) for option in governed()]
    judged += _judge_missing(spec, terms, {one.option: one for one in judged})
    values = {path: value for one in judged for path, value in one.values.items()}
    if values[_MODE] is Network.NONE:
        judged = [one for one in judged if not one.option.startswith(f"{_NETWORK}_")]
    excess = [one for one in judged if one.is_excess and one.term]
    if excess and terms.on_excess is OnExcess.REFUSE:
        raise _refused(excess[0], terms)
    asked_by_policy = {one.option for one in judged if one.term}
    return _with(spec, values, asked_by_policy), tuple(_notice(one, terms) for one in excess)


def narrow_network(spec: SandboxSpec, terms: Terms) -> tuple[SandboxSpec, tuple[str, ...]]:
    """`narrow` for a box in which all of a person's runs: only the network of it is one that the
    terms of a kernel speak of. Whoever asks has set all of that."""
    found, notices = _narrow_whole(spec, terms)
    return replace(spec, network=found.network), notices


def narrow_of_account(spec: SandboxSpec, terms: Terms) -> tuple[SandboxSpec, tuple[str, ...]]:
    """`narrow_network` where it is not root who asks: also what was asked for of devices and disks
    is no more than the terms have."""
    asked = [option for option in _OF_ROOT if any(reach(spec, path) for path in fields_of(option))]
    found, notices = _narrow_whole(spec, terms, asked)
    return replace(spec, network=found.network, devices=found.devices, limits=found.limits), notices


def _narrow_whole(
    spec: SandboxSpec, terms: Terms, besides: Sequence[str] = ()
) -> tuple[SandboxSpec, tuple[str, ...]]:
    """By what *terms* say of the network, and of the options *besides*."""
    defaults, ceilings, forced = (
        {o: term for o, term in of.items() if o.startswith(_NETWORK) or o in besides}
        for of in (terms.defaults, terms.ceilings, terms.forced)
    )
    terms = replace(terms, defaults=defaults, ceilings=ceilings, forced=forced)
    return narrow(replace(spec, volumes=(), untouched=frozenset()), terms)


def narrower_sum(wished: Limits, terms: Terms) -> Limits:
    """Of all that one person runs: what somebody *wished*, and no more than *terms* have."""
    values = {
        path.removeprefix("limits."): _at_most(term.option, path, _field(wished, path), value)
        for term in terms.sums.values()
        for path, value in term.fields.items()
    }
    return replace(wished, **values)


def _field(limits: Limits, path: str) -> Any:
    """The field of *limits* with the dotted name that it has in a spec."""
    return getattr(limits, path.removeprefix("limits."))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """What is left of an option: its *values* by fields, and the *term* that has made them so.
    It *is_excess* where somebody has asked for something else."""

    option: str
    asked: Mapping[str, Any]
    values: Mapping[str, Any]
    term: Term | None = None
    is_excess: bool = False


def _unwished(spec: SandboxSpec, terms: Terms) -> Mapping[str, Any]:
    """By fields, what there is without a wish where that is not "without a limit": nobody shall
    have more of it since there is a most."""
    memory = _judge(_MEMORY, spec, terms, {}).values["limits.memory_bytes"]
    tmp = folder_bytes(memory, TMP_BYTES)
    written = spec.limits.disk_bytes or spec.limits.tmp_bytes or tmp
    return {
        "limits.swap_bytes": 0,
        "limits.shm_bytes": folder_bytes(memory, SHM_BYTES),
        "limits.tmp_bytes": tmp,
        "limits.disk_bytes": written,
        "limits.inodes": inodes_of(written),
    }


def _judge(option: str, spec: SandboxSpec, terms: Terms, unwished: Mapping[str, Any]) -> _Judged:
    values, term = {path: reach(spec, path) for path in fields_of(option)}, None
    if option in spec.untouched and (term := terms.defaults.get(option)):
        values = dict(term.fields)
    wished = values
    if forced := terms.forced.get(option):
        term = forced
        values = {path: _forced(option, values[path], forced.fields[path]) for path in values}
    elif ceiling := terms.ceilings.get(option):
        wished = {p: unwished.get(p) if value is None else value for p, value in values.items()}
        values = {p: _at_most(option, p, wished[p], ceiling.fields[p]) for p in wished}
        term = ceiling
    is_excess = values != wished and option not in spec.untouched and not is_restriction(option)
    return _Judged(option=option, asked=wished, values=values, term=term, is_excess=is_excess)


def _judge_missing(
    spec: SandboxSpec, terms: Terms, judged: Mapping[str, _Judged]
) -> Iterator[_Judged]:
    """Nobody but the policy may do without a cap that the policy has."""
    if _ON_MISSING in terms.forced:
        return
    kept = {**judged[_ON_MISSING].values[_ON_MISSING]}
    for facility, cap in BY_FACILITY.items():
        held = next((judged[o].term for o in cap.options if _is_held(o, terms)), None)
        if held and kept.get(facility) is OnMissing.WARN:
            del kept[facility]
            yield _Judged(
                option=_ON_MISSING,
                asked=judged[_ON_MISSING].asked,
                values={_ON_MISSING: dict(kept)},
                term=held,
                is_excess=_ON_MISSING not in spec.untouched,
            )


def _is_held(option: str, terms: Terms) -> bool:
    return option in terms.forced or option in terms.ceilings


def _with(spec: SandboxSpec, values: Mapping[str, Any], asked: Iterable[str]) -> SandboxSpec:
    """*spec* with these *values* by fields. What the policy *asked* for is no default any more: a
    cap that cannot be had is then a refusal."""
    parts: dict[str, dict[str, Any]] = {"": {}}
    for path, value in values.items():
        part, _, name = path.rpartition(".")
        parts.setdefault(part, {})[name] = value
    names = frozenset(asked)
    ours = {facility for facility, cap in BY_FACILITY.items() if names & {*cap.options}}
    parts.setdefault("limits", {})["by_default"] = spec.limits.by_default - ours
    if values[_MODE] is Network.NONE:
        network = spec.network if spec.network.mode is Network.NONE else NetworkWish()
        parts[""][_NETWORK] = network
        del parts[_NETWORK]
    top = parts.pop("")
    for part, fields in parts.items():
        top[part] = replace(getattr(spec, part), **fields)
    return replace(spec, **top, untouched=spec.untouched - names)


# -- one value


def _forced(option: str, wished: Any, forced: Any) -> Any:
    if not is_restriction(option):
        return forced
    return (*wished, *(entry for entry in forced if entry not in wished))


def _at_most(option: str, path: str, wished: Any, ceiling: Any) -> Any:
    """*wished*, or what *ceiling* leaves of it."""
    if is_choice(option):
        ranked = _ranked(option, path)
        return (_nearest if is_any_text(option) else _stricter)(ranked, wished, ceiling)
    if is_list(option):
        return _covered(wished, ceiling, _COVERS.get(path, _same), has_parts=path in _HAVE_PARTS)
    if ceiling is None or wished is None:
        return ceiling if wished is None else wished
    if isinstance(ceiling, frozenset):
        return wished & ceiling or ceiling
    if _without(option, path) == 0 and 0 in {wished, ceiling}:  # no limit
        return wished or ceiling
    return min(wished, ceiling)


def _stricter(ranked: Sequence[Any], wished: Any, allowed: frozenset[Any]) -> Any:
    below = ranked[: ranked.index(wished) + 1] if wished in ranked else ranked[:1]
    return next((value for value in reversed(below) if value in allowed), ranked[0])


def _nearest(ranked: Sequence[Any], wished: Any, allowed: frozenset[Any]) -> Any:
    """The same where any text can be wished: of these none fits that is not allowed."""
    known = (value for value in (wished, *ranked) if value in allowed)
    return next(known, min(allowed))


@cache
def _ranked(option: str, path: str) -> tuple[Any, ...]:
    """The values of a choice, the strictest first."""
    return tuple(parse(Kind.FORCED, option, value)[path] for value in choices_of(option))


@cache
def _without(option: str, path: str) -> Any:
    """What the field has where nobody sets a limit."""
    return parse(Kind.FORCED, option, None)[path] if governed()[option].allow_none else None


def _covered(
    wished: Iterable[Any],
    ceiling: Sequence[Any],
    covers: Callable[[Any, Any], bool],
    *,
    has_parts: bool,
) -> tuple[Any, ...]:
    """What of *wished* some entry of *ceiling* covers; where a part of a wish is one too, of what
    is wider the entries within it."""
    found: dict[Any, None] = {}
    for wish in wished:
        if any(covers(entry, wish) for entry in ceiling):
            found[wish] = None
        elif has_parts:
            found |= dict.fromkeys(entry for entry in ceiling if covers(wish, entry))
    return tuple(found)


def _same(wide: Any, narrow: Any) -> bool:
    return bool(wide == narrow)


def covers_volume(wide: Volume, narrow: Volume) -> bool:
    """By the source: where it shows inside is the kernel's own affair."""
    is_below = relative(narrow.source, wide.source) is not None
    return is_below and narrow.readonly >= wide.readonly and narrow.noexec >= wide.noexec


def _covers_rule(wide: str, narrow: str) -> bool:
    return _rule(wide).covers(_rule(narrow))


@lru_cache(maxsize=4096)  # anybody may ask for any
def _rule(text: str) -> Rule:
    return parse_rule(text, place("network_allow", 0))


_COVERS: Mapping[str, Callable[[Any, Any], bool]] = {
    "volumes": covers_volume,
    "devices": covers_device,
    "network.allow": _covers_rule,
}


# A volume that nobody has named is none that somebody has opened.
_HAVE_PARTS = frozenset({"network.allow"})


# -- what does not go together


def contradiction(terms: Mapping[Kind, Mapping[str, Term]]) -> tuple[str, Kind, str] | None:
    """What one section says in two ways: an option, the kind, and the answer for an error."""
    for option, default in terms[Kind.DEFAULTS].items():
        ceiling = terms[Kind.CEILINGS].get(option)
        for path, value in default.fields.items() if ceiling else ():
            assert ceiling
            if _at_most(option, path, value, ceiling.fields[path]) != value:
                told = f"{option} is {default.shown} by default, and at most {ceiling.shown}"
                return option, Kind.DEFAULTS, f"{told} (line {ceiling.line})"
    said = {kind: terms[kind].get(_NETWORK) for kind in (Kind.FORCED, Kind.DEFAULTS)}
    for kind, term in said.items():
        for option in terms[kind] if term and term.fields[_MODE] is Network.NONE else ():
            if option.startswith(f"{_NETWORK}_"):
                return option, kind, f'it has {option}, and network = "none"'
    return None


# -- what people are told


def _notice(one: _Judged, terms: Terms) -> str:
    assert one.term
    given, asked = described(one.values), described(one.asked)
    where = one.term.where(terms.file)
    return f"{one.option} is {given} in place of {asked}, by the policy: {where}."


def for_person(notices: Sequence[str], ask: str = ADMINISTRATOR) -> str:
    """What stands under a cell of a kernel of which `narrow` has told these *notices*: in lines, no
    more of them than somebody reads, and whom to *ask* for more. "" without any."""
    if not notices:
        return ""
    shown = [_cut(notice) for notice in notices[:_MOST_SENTENCES]]
    if more := len(notices) - len(shown):
        shown.append(f"The server's log has {more} more of these.")
    begin, end = "This kernel does not have all that was asked for:", f"Ask {_cut(ask)} for more."
    return "\n".join((begin, *shown, end))


def _cut(text: str) -> str:
    shown = one_line(text)
    is_short = len(shown) <= _MOST_LETTERS
    return shown if is_short else f"{shown[: _MOST_LETTERS - 1]}\N{HORIZONTAL ELLIPSIS}"


def _refused(one: _Judged, terms: Terms) -> NotAllowed:
    assert one.term
    given = described(one.values)
    return NotAllowed(
        attempt=f"start with {one.option} = {described(one.asked)}",
        answer=f"{terms.person.name} may have {given} ({one.term.where(terms.file)})",
        remedy=f"Ask for that, or ask {terms.ask} for more.",
    )


def described(values: Mapping[str, Any]) -> str:
    """The *values* of an option, by fields, for a sentence."""
    texts = dict.fromkeys(_text(path, value) for path, value in values.items())
    return " and ".join(texts)


def _text(path: str, value: Any) -> str:
    if value is None or (value == 0 and path.endswith(("_bits", "quota_bytes"))):
        return "without a limit"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={choice}" for name, choice in value.items()) or "empty"
    if isinstance(value, tuple | frozenset):
        return ", ".join(map(_entry, value)) or "empty"
    if path.endswith(("_bytes", "_bytes_per_second")):
        return format_bytes(value)
    return f"{value / 1e6:g}M" if path.endswith("_bits") else f"{value}"


def _entry(value: Any) -> str:
    if isinstance(value, Volume):
        return f"{value.source}:{value.target}:{value.options}"
    return str(value)
