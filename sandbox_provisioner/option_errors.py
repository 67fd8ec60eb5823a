"""option_errors.py - in the server, pure: what is wrong with an option that somebody wrote.

traitlets only warns of an option that does not exist, and tells of a bad value in the words of
Python's types, by an error that JupyterLab shows as "Unhandled error".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from traitlets import Bool, Dict, Enum, Float, Integer, List, TraitError, TraitType, Unicode, Union

from sandbox_provisioner.errors import SpecError, did_you_mean, nearest
from sandbox_provisioner.facilities.volumes.wish import Volumes

_KINDS: tuple[tuple[type[TraitType[Any, Any]], str], ...] = (
    (Bool, "true or false"),
    (Integer, "a whole number"),
    (Float, "a number"),
    (Unicode, "a text"),
    (List, "a list of texts"),
    (Dict, "a dictionary"),
    (Union, "a number or a text"),
)
_SEE_ALL = "To see all options: jupyter sandbox explain KERNEL"


def unknown_option(name: str, shown: str, known: Collection[str]) -> SpecError:
    """The error for an option *name*, which *shown* names as it was written."""
    return SpecError(
        attempt=f"read the option {shown}",
        answer="there is no such option",
        remedy=did_you_mean(name, known, _SEE_ALL),
    )


def bad_value(
    error: TraitError, traits: Mapping[str, TraitType[Any, Any]], given: Mapping[str, Any]
) -> SpecError:
    """What traitlets' *error* says of one of *traits*, whose value may be among *given*."""
    text = str(error)
    name = next((name for name in re.findall(r"'(\w+)'", text) if name in traits), "")
    if not name:
        return SpecError(attempt="read the options", answer=text.rstrip("."), remedy=_SEE_ALL)
    trait = traits[name]
    value = given.get(name)
    told = "" if value is None else f", not {value!r}"
    return SpecError(
        attempt=f"read the option {name}",
        answer=f"it has to be {_kind(trait)}{told}",
        remedy=_meaning(trait, value),
    )


def _kind(trait: TraitType[Any, Any]) -> str:
    if isinstance(trait, Enum):
        return " or ".join(f'"{value}"' for value in trait.values or ())
    if isinstance(trait, Integer) and trait.min is not None:
        return f"a whole number, at least {trait.min}"
    if isinstance(trait, Volumes):
        return "a list of texts, or a dictionary"
    if any(isinstance(one, Dict) for one in getattr(trait, "trait_types", ())):
        return "a number, a text or a dictionary"
    inner = getattr(trait, "_value_trait", None)
    if isinstance(inner, Enum):
        return f"a dictionary, each value {_kind(inner)}"
    return next((kind for cls, kind in _KINDS if isinstance(trait, cls)), "something else")


def _meaning(trait: TraitType[Any, Any], value: Any) -> str:
    values = trait.values if isinstance(trait, Enum) else ()
    found = nearest(str(value), map(str, values or ()))
    return f"Did you mean {found!r}?" if found else str(trait.help)
