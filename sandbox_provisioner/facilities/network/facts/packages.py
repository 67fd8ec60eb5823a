"""packages.py - whoever launches; reads only: what the rule "packages" means on this machine.

It stands for what pip, conda, npm, R and apt are configured to use here, and for nothing else; for
their defaults, where they are installed and nothing else is said. It is read at each start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sandbox_provisioner.facilities.network.facts.apt import add_apt
from sandbox_provisioner.facilities.network.facts.conda import add_conda
from sandbox_provisioner.facilities.network.facts.configured import Configured, Files, Said
from sandbox_provisioner.facilities.network.facts.npm import add_npm
from sandbox_provisioner.facilities.network.facts.pip import add_pip
from sandbox_provisioner.facilities.network.facts.r import add_r
from sandbox_provisioner.facilities.network.wish.rules import PACKAGES
from sandbox_provisioner.python_files import is_python

_USUAL_PLACES = ("/usr/local/bin", "/usr/bin", "/bin")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packages:
    """*rules* are texts for `Rules.read`, *variables* tell installers inside what they were told
    outside, without passwords; *notices* are for whoever starts the kernel."""

    rules: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def find_packages(program: str, environment: Mapping[str, str], files: Files) -> Packages:
    """For a kernel of the interpreter *program*, which is asked for with *environment*; HostError
    for a configuration that cannot be read."""
    found = Configured()
    python = program if is_python(program) else _first("python3", program, environment)
    if python:
        add_pip(found, files, environment, python)
    if _has_conda(program, environment):
        add_conda(found, files, environment)
    if npm := _first("npm", program, environment):
        add_npm(found, files, environment, npm)
    if _first("R", program, environment):
        add_r(found, files, environment)
    if _first("apt-get", program, environment):
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


def _first(name: str, program: str, environment: Mapping[str, str]) -> str:
    """The program *name* that a kernel finds first, "" where there is none."""
    for folder in _places(program, environment):
        if os.access(f"{folder}/{name}", os.X_OK):
            return f"{folder}/{name}"
    return ""


def _has_conda(program: str, environment: Mapping[str, str]) -> bool:
    above = os.path.dirname(os.path.dirname(program))
    names = ("conda", "mamba", "micromamba")
    return os.path.isdir(f"{above}/conda-meta") or any(
        _first(name, program, environment) for name in names
    )
