"""broker/values.py - the daemon and its clients; pure: our frozen values as JSON has them.

What is read comes from strangers: each field is of its type, and has to be there unless it has a
default; a name that is not known is refused. What the values check of themselves, they check.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

_Value = TypeVar("_Value")
_UNIONS = (Union, types.UnionType)
# What JSON has as it is. Most of a wish is texts, so they are looked for before anything is asked.
_PLAIN = frozenset({str, int, float, bool, type(None)})
_Reader = Callable[[Any, str], Any]


class BadValue(Exception):
    """What came is not of its type; the text says where, and what was wanted."""


def as_json(value: Any, *, whole: bool = True) -> Any:
    """*value* in dicts, lists, texts and numbers; unless it is to be *whole* without the fields
    that have their defaults, which is most of a wish."""
    if value.__class__ in _PLAIN:
        return value
    if dataclasses.is_dataclass(value):
        found = ((name, getattr(value, name), usual) for name, usual in _usual(value.__class__))
        return {
            name: as_json(one, whole=whole)
            for name, one, usual in found
            if whole or (one is not usual and one != usual)
        }
    if isinstance(value, Mapping):
        return {str(key): as_json(found, whole=whole) for key, found in value.items()}
    if isinstance(value, frozenset):
        return sorted(as_json(one, whole=whole) for one in value)
    if isinstance(value, tuple | list):
        return [as_json(one, whole=whole) for one in value]
    return value.value if isinstance(value, enum.Enum) else value


def of_json(kind: type[_Value], found: Any, where: str) -> _Value:
    """The dataclass *kind* that *found* tells; BadValue, or what the value itself refuses with."""
    if not isinstance(found, dict):
        raise BadValue(f"{where} is no object")
    known = _fields(kind)  # type: ignore[arg-type]
    if unknown := sorted(found.keys() - known.keys()):
        raise BadValue(f"{where} has no {unknown[0][:64]!r}")
    values = {name: known[name][0](one, f"{where}.{name}") for name, one in found.items()}
    if missing := sorted(name for name in known.keys() - found.keys() if known[name][1]):
        raise BadValue(f"{where} lacks {missing[0]!r}")
    return kind(**values)


@lru_cache(maxsize=64)
def _usual(kind: Any) -> tuple[tuple[str, Any], ...]:
    """Of each field its name and its default; MISSING where it has none."""
    unset = dataclasses.MISSING
    return tuple(
        (field.name, field.default if field.default_factory is unset else field.default_factory())
        for field in dataclasses.fields(kind)
    )


@lru_cache(maxsize=64)
def _fields(kind: type) -> dict[str, tuple[_Reader, bool]]:
    """Of each field what reads it, and whether it has to be there."""
    hints, unset = get_type_hints(kind), dataclasses.MISSING
    return {
        field.name: (
            _reader(hints[field.name]),
            field.default is unset and field.default_factory is unset,
        )
        for field in dataclasses.fields(kind)
    }


@lru_cache(maxsize=256)
def _reader(hint: Any) -> _Reader:
    """What reads values of the type *hint*: what that is, is found out once."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return partial(_read_one_of, tuple(map(_reader, inner)))
    if origin is not None:
        return _reader_of_many(origin, inner)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return partial(of_json, hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return partial(_read_enum, hint)
    return partial(_read_plain, hint)


def _reader_of_many(origin: Any, inner: tuple[Any, ...]) -> _Reader:
    if origin is tuple and inner[-1] is not Ellipsis:
        return partial(_read_parts, tuple(map(_reader, inner)))
    if origin in {tuple, frozenset}:
        return partial(_read_many, origin, _reader(inner[0]))
    return partial(_read_mapping, _reader(inner[1]))


def _read_plain(hint: type, found: Any, where: str) -> Any:
    if type(found) is hint or (hint is type(None) and found is None):
        return found
    if hint is float and type(found) is int:
        return _as_float(found, where)
    raise BadValue(f"{where} is no {hint.__name__}")


def _as_float(found: int, where: str) -> float:
    try:
        return float(found)
    except OverflowError:
        raise BadValue(f"{where} is too large") from None


def _read_one_of(readers: tuple[_Reader, ...], found: Any, where: str) -> Any:
    for read in readers:
        try:
            return read(found, where)
        except BadValue as error:
            last = error
    raise last


def _read_parts(readers: tuple[_Reader, ...], found: Any, where: str) -> Any:
    _require_list(found, where)
    if len(readers) != len(found):
        raise BadValue(f"{where} has {len(found)} parts in place of {len(readers)}")
    return tuple(read(one, f"{where}[]") for read, one in zip(readers, found, strict=True))


def _read_many(origin: Any, read: _Reader, found: Any, where: str) -> Any:
    _require_list(found, where)
    each = f"{where}[]"
    return origin([read(one, each) for one in found])


def _require_list(found: Any, where: str) -> None:
    if not isinstance(found, list):
        raise BadValue(f"{where} is no list")


def _read_mapping(read: _Reader, found: Any, where: str) -> Any:
    if not isinstance(found, dict):
        raise BadValue(f"{where} is no object")
    return {key: read(one, f"{where}.{key[:64]}") for key, one in found.items()}


def _read_enum(hint: type[enum.Enum], found: Any, where: str) -> Any:
    try:
        return hint(found)
    except ValueError:
        choices = ", ".join(str(choice.value) for choice in hint)
        raise BadValue(f"{where} is none of {choices}") from None
