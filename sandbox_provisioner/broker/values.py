"""broker/values.py - the daemon and its clients; pure: our frozen values as JSON has them.

What is read comes from strangers: each field is of its type, and has to be there unless it has a
default; a name that is not known is refused. What the values check of themselves, they check.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

_Value = TypeVar("_Value")
_UNIONS = (Union, types.UnionType)


class BadValue(Exception):
    """What came is not of its type; the text says where, and what was wanted."""


def as_json(value: Any) -> Any:
    """*value* in dicts, lists, texts and numbers."""
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value))
        return {name: as_json(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): as_json(found) for key, found in value.items()}
    if isinstance(value, frozenset):
        return sorted(map(as_json, value))
    if isinstance(value, tuple | list):
        return list(map(as_json, value))
    return value.value if isinstance(value, enum.Enum) else value


def of_json(kind: type[_Value], found: Any, where: str) -> _Value:
    """The dataclass *kind* that *found* tells; BadValue, or what the value itself refuses with."""
    if not isinstance(found, dict):
        raise BadValue(f"{where} is no object")
    known = _fields(kind)  # type: ignore[arg-type]
    if unknown := sorted(found.keys() - known.keys()):
        raise BadValue(f"{where} has no {unknown[0][:64]!r}")
    values = {name: _read(known[name][0], found[name], f"{where}.{name}") for name in found}
    if missing := sorted(name for name in known.keys() - found.keys() if known[name][1]):
        raise BadValue(f"{where} lacks {missing[0]!r}")
    return kind(**values)


@lru_cache(maxsize=64)
def _fields(kind: type) -> dict[str, tuple[Any, bool]]:
    """Of each field its type, and whether it has to be there."""
    hints, unset = get_type_hints(kind), dataclasses.MISSING
    return {
        field.name: (hints[field.name], field.default is unset and field.default_factory is unset)
        for field in dataclasses.fields(kind)
    }


def _read(hint: Any, found: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in _UNIONS:
        return _read_one_of(get_args(hint), found, where)
    if origin is not None:
        read = _read_many if origin in {tuple, frozenset} else _read_mapping
        return read(hint, found, where)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _read_enum(hint, found, where)
    return _read_plain(hint, found, where)


def _read_plain(hint: Any, found: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return of_json(hint, found, where)  # type: ignore[arg-type]
    if hint is float and type(found) is int:
        return _as_float(found, where)
    if type(found) is not hint and not (hint is type(None) and found is None):
        raise BadValue(f"{where} is no {hint.__name__}")
    return found


def _as_float(found: int, where: str) -> float:
    try:
        return float(found)
    except OverflowError:
        raise BadValue(f"{where} is too large") from None


def _read_one_of(hints: tuple[Any, ...], found: Any, where: str) -> Any:
    for hint in hints:
        try:
            return _read(hint, found, where)
        except BadValue as error:
            last = error
    raise last


def _read_many(hint: Any, found: Any, where: str) -> Any:
    if not isinstance(found, list):
        raise BadValue(f"{where} is no list")
    kinds, origin = get_args(hint), get_origin(hint)
    if origin is tuple and kinds[-1] is not Ellipsis:
        if len(kinds) != len(found):
            raise BadValue(f"{where} has {len(found)} parts in place of {len(kinds)}")
        pairs = zip(kinds, found, strict=True)
        return tuple(_read(kind, one, f"{where}[]") for kind, one in pairs)
    return origin(_read(kinds[0], one, f"{where}[]") for one in found)


def _read_mapping(hint: Any, found: Any, where: str) -> Any:
    if not isinstance(found, dict):
        raise BadValue(f"{where} is no object")
    return {key: _read(get_args(hint)[1], one, f"{where}.{key[:64]}") for key, one in found.items()}


def _read_enum(hint: type[enum.Enum], found: Any, where: str) -> Any:
    try:
        return hint(found)
    except ValueError:
        choices = ", ".join(str(choice.value) for choice in hint)
        raise BadValue(f"{where} is none of {choices}") from None
