"""packages.py - whoever launches; reads only: what the rule "packages" means on this machine.

It stands for what pip, conda, npm, R and apt are configured to use here, and for nothing else; for
their defaults, where they are installed and nothing else is said. It is read at each start
at which something of it has changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sandbox_provisioner.facilities.network.facts.apt import add_apt
from sandbox_provisioner.facilities.network.facts.conda import add_conda
from sandbox_provisioner.facilities.network.facts.configured import (
    Configured,
    Files,
    Said,
    State,
    state_of,
)
from sandbox_provisioner.facilities.network.facts.npm import add_npm
from sandbox_provisioner.facilities.network.facts.pip import add_pip
from sandbox_provisioner.facilities.network.facts.r import add_r
from sandbox_provisioner.facilities.network.wish.rules import PACKAGES
from sandbox_provisioner.python_files import is_python

_USUAL_PLACES = ("/usr/local/bin", "/usr/bin", "/bin")
# Variables that are others at each start, and that nobody's configuration names.
_OF_ONE_START = ("JPY_SESSION_NAME", "JPY_PARENT_PID")
_MOST_KNOWN = 64
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packages:
    """*rules* are texts for `Rules.read`, *variables* tell installers inside what they were told
    outside, without passwords; *notices* are for whoever starts the kernel."""

    rules: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


# What was found, with the state of all that was looked at: nothing changes between most starts.
_known: dict[object, tuple[dict[str, State], Packages]] = {}


def find_packages(program: str, environment: Mapping[str, str], files: Files) -> Packages:
    """For a kernel of the interpreter *program*, which is asked for with *environment*; HostError
    for a configuration that cannot be read."""
    told = frozenset(pair for pair in environment.items() if pair[0] not in _OF_ONE_START)
    key = program, told, files.who
    if key in _known:
        seen, packages = _known[key]
        if all(state_of(path) == state for path, state in seen.items()):
            return packages
    packages = _read(program, environment, files)
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known[key] = files.seen, packages
    return packages


def _read(program: str, environment: Mapping[str, str], files: Files) -> Packages:
    found, places = Configured(), tuple(dict.fromkeys(_places(program, environment)))
    for place in places:
        files.look(place)
    python = program if is_python(program) else _first(("python3",), places)
    if python:
        add_pip(found, files, environment, python)
    above = os.path.dirname(os.path.dirname(program))
    if os.path.isdir(f"{above}/conda-meta") or _first(("conda", "mamba", "micromamba"), places):
        add_conda(found, files, environment)
    if npm := _first(("npm",), places):
        add_npm(found, files, environment, npm)
    if _first(("R",), places):
        add_r(found, files, environment)
    if _first(("apt-get",), places):
        add_apt(found, files)
    for name, value in environment.items():
        if name.lower() in _PROXIES:
            found.add_proxy(Said(value, f"the variable {name}"))
    found.notices += [
        f"{path} counts for nothing in network_allow, since a kernel may have written it. If it "
        "shall count: move what it says to /etc, or to the user's own configuration."
        for path in dict.fromkeys(files.doubted)
    ]
    return Packages(
        rules=tuple(found.rules), variables=found.variables, notices=tuple(found.notices)
    )


def expanded_rules(allow: tuple[str, ...], packages: Packages) -> tuple[str, ...]:
    """*allow* with the rules of a preset in its place."""
    texts: list[str] = []
    for text in allow:
        texts += packages.rules if text == PACKAGES else [text]
    return tuple(dict.fromkeys(texts))


def _places(program: str, environment: Mapping[str, str]) -> Iterator[str]:
    yield os.path.dirname(program)
    yield from (p for p in environment.get("PATH", "").split(os.pathsep) if p.startswith("/"))
    yield from _USUAL_PLACES


def _first(names: tuple[str, ...], places: tuple[str, ...]) -> str:
    """The program of one of *names* that a kernel finds first, "" where there is none."""
    paths = (f"{folder}/{name}" for folder in places for name in names)
    return next((path for path in paths if os.access(path, os.X_OK)), "")
