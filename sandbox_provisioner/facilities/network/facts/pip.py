"""pip.py - whoever launches; reads only: which indexes pip is configured to use here.

pip's "Configuration" tells the files and their order: global, of the user, of the environment, and
one that PIP_CONFIG_FILE names; in each the section of the command counts more than [global], and
variables count most.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from sandbox_provisioner.facilities.network.facts.configured import (
    Configured,
    Files,
    Said,
    has_password,
)
from sandbox_provisioner.links import real_path

_DEFAULT = "pip's default"
_INDEX = "https://pypi.org/simple"
# Where the files are that an index names, if that is not the host of the index.
_FILES_OF = {
    "pypi.org": "https://files.pythonhosted.org",
    "test.pypi.org": "https://test-files.pythonhosted.org",
}
_SECTIONS = ("global", "install")
_URLS = ("index-url", "extra-index-url", "find-links")
_HANDED_ON = ("cert", "trusted-host", "no-index", "timeout", "default-timeout", "retries")


def add_pip(found: Configured, files: Files, environment: Mapping[str, str], program: str) -> None:
    """What the pip of the interpreter *program* is configured to use."""
    settings = dict(_settings(files, environment, program))
    no_index = settings.get("no-index", Said("", "")).value.lower() in {"1", "true", "yes", "on"}
    shown = f"{_prefix(program)}/"  # what the box sees anyway
    for key in _URLS:
        default = _INDEX if key == "index-url" else ""
        said = settings.get(key, Said(default, _DEFAULT))
        if key == "find-links" or not no_index:
            _add_urls(found, key, said, is_shown=said.file.startswith(shown))
    for key in _HANDED_ON:
        if key in settings:
            found.variables[_variable(key)] = settings[key].value
    if "proxy" in settings:
        found.add_proxy(settings["proxy"])


def _add_urls(found: Configured, key: str, said: Said, *, is_shown: bool) -> None:
    told = []
    for text in said.value.split():
        url = found.add(Said(text, said.where, said.file))
        if url is None:
            continue
        if files := _FILES_OF.get(url.hostname or ""):
            found.add(Said(files, said.where))
        if not has_password(url):
            told.append(text)
        elif not is_shown:
            found.notices.append(
                f"{said.where}: a kernel is not told the password in {key}. If it shall be: set "
                f"{_variable(key)} in the env of its kernel.json."
            )
    if told and not is_shown and said.where != _DEFAULT:
        found.variables[_variable(key)] = " ".join(told)


def _variable(key: str) -> str:
    return "PIP_" + key.upper().replace("-", "_")


def _settings(
    files: Files, environment: Mapping[str, str], program: str
) -> Iterator[tuple[str, Said]]:
    """Every setting with its key, the later one counts."""
    told = [files.ini(path) for path in _paths(files, environment, program)]
    for section in _SECTIONS:
        for sections in told:
            for key, said in sections.get(section, {}).items():
                yield key.removeprefix("--").replace("_", "-"), said
    for name, value in environment.items():
        if name.startswith("PIP_") and value:
            key = name.removeprefix("PIP_").lower().replace("_", "-")
            yield key, Said(value, f"the variable {name}")


def _paths(files: Files, environment: Mapping[str, str], program: str) -> list[str]:
    chosen = environment.get("PIP_CONFIG_FILE", "")
    if chosen == os.devnull:
        return []
    of_system = (environment.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep)
    of_user = environment.get("XDG_CONFIG_HOME") or f"{files.home}/.config"
    return [
        *(f"{folder}/pip/pip.conf" for folder in of_system if folder.startswith("/")),
        "/etc/pip.conf",
        f"{files.home}/.pip/pip.conf",
        f"{of_user}/pip/pip.conf",
        f"{_prefix(program)}/pip.conf",
        *([chosen] if chosen.startswith("/") else []),
    ]


def _prefix(program: str) -> str:
    """sys.prefix of an interpreter."""
    above = os.path.dirname(os.path.dirname(program))
    if os.path.exists(f"{above}/pyvenv.cfg"):
        return above
    return os.path.dirname(os.path.dirname(real_path(program)))
