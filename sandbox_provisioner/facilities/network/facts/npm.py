"""npm.py - whoever launches; reads only: which registries npm is configured to use here.

npmrc(5) tells the files: npm's own, one for all users, the user's, and variables over all. The one
of a project is left out, since a kernel may write it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from sandbox_provisioner.facilities.network.facts.configured import (
    Configured,
    Files,
    Said,
    expanded,
    has_password,
)
from sandbox_provisioner.links import real_path

_REGISTRY = "https://registry.npmjs.org/"
_LINE = re.compile(r"\s*([^=\s]+)\s*=\s*(.*?)\s*")
_PREFIX = "npm_config_"


def add_npm(found: Configured, files: Files, environment: Mapping[str, str], program: str) -> None:
    """What the *program* npm is configured to use."""
    settings = {"registry": Said(_REGISTRY, "npm's default")}
    for path in _paths(files, environment, program):
        settings |= _read(files, path)
    settings |= _variables(environment)
    for key, said in settings.items():
        if key == "registry" or key.endswith(":registry"):
            meant = replace(said, value=expanded(said.value, environment))
            url = found.add(meant)
            if url and key == "registry" and not has_password(url) and said.value != _REGISTRY:
                found.variables["npm_config_registry"] = meant.value
        elif key == "cafile":
            found.variables["npm_config_cafile"] = said.value
        elif key in {"proxy", "https-proxy"}:
            found.add_proxy(said)


def _read(files: Files, path: str) -> dict[str, Said]:
    found = {}
    for line in files.lines(path):
        match = _LINE.fullmatch(line.value)
        if match and not line.value.lstrip().startswith(("#", ";")):
            value = match[2].strip("\"'")
            found[match[1]] = replace(line, value="" if value in {"null", "false"} else value)
    return {key: said for key, said in found.items() if said.value}


def _variables(environment: Mapping[str, str]) -> dict[str, Said]:
    return {
        name.lower().removeprefix(_PREFIX).replace("_", "-"): Said(value, f"the variable {name}")
        for name, value in environment.items()
        if name.lower().startswith(_PREFIX) and value
    }


def _paths(files: Files, environment: Mapping[str, str], program: str) -> Iterator[str]:
    variables = _variables(environment)
    prefix = os.path.dirname(os.path.dirname(program))
    own = os.path.dirname(os.path.dirname(real_path(program)))  # .../node_modules/npm/bin/npm-cli
    none = Said("", "")
    yield f"{own}/npmrc"
    yield variables.get("globalconfig", none).value or f"{prefix}/etc/npmrc"
    yield "/etc/npmrc"  # Debian's
    yield variables.get("userconfig", none).value or f"{files.home}/.npmrc"
