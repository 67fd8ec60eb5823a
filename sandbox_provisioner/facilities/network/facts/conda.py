"""conda.py - whoever launches; reads only: which channels conda is configured to use here.

conda's "Searching for .condarc" tells the files and their order. Of YAML only what stands in such a
file is read: lists and pairs of plain texts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from sandbox_provisioner.facilities.network.facts.configured import (
    Configured,
    Files,
    Said,
    expanded,
    has_password,
    unreadable,
)

_ALIAS = "https://conda.anaconda.org"
_DEFAULTS = "https://repo.anaconda.com/pkgs/main"
_USUAL = "defaults"
_KEYS = (
    "channels", "default_channels", "channel_alias", "custom_channels", "custom_multichannels",
    "proxy_servers",
)  # fmt: skip
_NAMES = (".condarc", "condarc")
_KEY = re.compile(r"([\w-]+)\s*:(?:\s+(.*)|)$", re.ASCII)
_PAIR = re.compile(r"""(?:"[^"]*"|'[^']*'|[^\s'":#][^'"#]*?)\s*:(?:\s+(.*)|)$""")
_NOT_PLAIN = "|>&*!%@`{"


@dataclass(slots=True)
class _Settings:
    """What all files and variables say, in their order."""

    values: dict[str, list[Said]] = field(default_factory=dict)

    def of(self, key: str) -> list[Said]:
        """What is said of *key*."""
        return self.values.get(key, [])


def add_conda(found: Configured, files: Files, environment: Mapping[str, str]) -> None:
    """What conda and its kind are configured to use; *environment* tells where they are."""
    settings = _Settings()
    for path in _paths(files, environment):
        for key, values in _read(files, path).items():
            meant = [replace(said, value=expanded(said.value, environment)) for said in values]
            settings.values.setdefault(key, []).extend(meant)
    for key in ("channels", "default_channels", "channel_alias"):
        if value := environment.get(f"CONDA_{key.upper()}"):
            told = [Said(v, f"the variable CONDA_{key.upper()}") for v in re.split("[,&]", value)]
            settings.values.setdefault(key, []).extend(told)
    for said in settings.of("proxy_servers"):
        found.add_proxy(said)
        break
    _add_channels(found, settings)


def _add_channels(found: Configured, settings: _Settings) -> None:
    channels = settings.of("channels") or [Said(_USUAL, "conda's default")]
    alias = [Said(_ALIAS, "conda's default"), *settings.of("channel_alias")][-1]
    named = [*channels, *settings.of("custom_channels"), *settings.of("custom_multichannels")]
    if any(said.value == _USUAL for said in channels):
        named += settings.of("default_channels") or [Said(_DEFAULTS, "conda's default")]
    urls = [found.add(said) for said in (alias, *named) if "://" in said.value]
    if any(url and has_password(url) for url in urls):
        found.notices.append(
            "conda's configuration has a password or token in the URL of a channel, which a kernel "
            "is not told. If it shall be: set CONDA_CHANNELS in the env of its kernel.json."
        )
        return
    if settings.of("channels"):
        found.variables["CONDA_CHANNELS"] = ",".join(dict.fromkeys(s.value for s in channels))
    if settings.of("channel_alias"):
        found.variables["CONDA_CHANNEL_ALIAS"] = alias.value


def _paths(files: Files, environment: Mapping[str, str]) -> Iterator[str]:
    of_user = environment.get("XDG_CONFIG_HOME") or f"{files.home}/.config"
    root = environment.get("CONDA_ROOT", "")
    if not root and environment.get("CONDA_EXE", "").startswith("/"):
        root = os.path.dirname(os.path.dirname(environment["CONDA_EXE"]))
    home = files.home
    for folder in ("/etc/conda", root, f"{of_user}/conda", f"{home}/.config/conda",
                   f"{home}/.conda", "", environment.get("CONDA_PREFIX", "")):  # fmt: skip
        if folder:
            yield from (f"{folder}/{name}" for name in _NAMES)
            yield from files.within(f"{folder}/condarc.d", (".yml", ".yaml"))
    yield f"{home}/.condarc"
    if (chosen := environment.get("CONDARC", "")).startswith("/"):
        yield chosen


def _read(files: Files, path: str) -> dict[str, list[Said]]:
    """The texts below each of `_KEYS`."""
    found: dict[str, list[Said]] = {}
    key = ""
    for line in files.lines(path):
        text = re.sub(r"(^|\s)#.*", "", line.value).rstrip()
        if not text or text in {"---", "..."}:
            continue
        if text[0] not in " -\t":
            match = _KEY.fullmatch(text)
            if not match:
                raise unreadable(line.where, "it is no line of conda's settings")
            key, text = match[1], match[2] or ""
        if key in _KEYS:
            found.setdefault(key, []).extend(_texts(text, line))
    return found


def _texts(text: str, line: Said) -> Iterator[Said]:
    """What of a line behind a key, or below one, is a text."""
    text = text.strip()
    while text.startswith("-"):
        text = text[1:].strip()
    if not text.startswith("{") and (match := _PAIR.fullmatch(text)):
        text = match[1] or ""
    if text.startswith("[") and text.endswith("]"):
        parts = text[1:-1].split(",")
    elif text and text[0] in f"{_NOT_PLAIN}[":
        raise unreadable(line.where, "of YAML only lists and pairs of plain texts are read here")
    else:
        parts = [text]
    for part in parts:
        if value := part.strip().strip("'\""):
            yield Said(value, line.where, line.file)
