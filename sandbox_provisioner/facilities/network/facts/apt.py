"""apt.py - whoever launches; reads only: which servers apt is configured to use here.

sources.list(5): one line a source, or, in files that end in ".sources", paragraphs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from sandbox_provisioner.facilities.network.facts.configured import (
    Configured,
    Files,
    Said,
    unreadable,
)

_APT = "/etc/apt"
_LINE = re.compile(r"deb(?:-src)?\s+(?:\[[^\]]*\]\s+)?(\S+)(?:\s.*)?")
_FIELD = re.compile(r"([\w-]+):\s*(.*)", re.ASCII)
_PROXY = re.compile(r"\s*Acquire::(?:http|https)::Proxy(?:::\S+)?\s+\"?([^\";]*)\"?;?", re.I)
_WORDS = {"no", "false", "without", "off", "disable", "0"}


def add_apt(found: Configured, files: Files, folder: str = _APT) -> None:
    """What apt is configured to use by the files in *folder*."""
    lists = [f"{folder}/sources.list", *files.within(f"{folder}/sources.list.d", ".list")]
    said = [source for path in lists for source in _of_list(files, path)]
    for path in files.within(f"{folder}/sources.list.d", ".sources"):
        said += _of_paragraphs(files, path)
    for source in said:
        # "mirror+https://...", "tor+http://...": apt's own names of ways
        found.add(replace(source, value=re.sub(r"^[a-z-]+\+(?=https?:)", "", source.value)))
    for path in (f"{folder}/apt.conf", *files.within(f"{folder}/apt.conf.d", "")):
        for line in files.lines(path):
            if (match := _PROXY.match(line.value)) and match[1] not in {"", "DIRECT", "false"}:
                found.add_proxy(replace(line, value=match[1]))


def _of_list(files: Files, path: str) -> Iterator[Said]:
    for line in files.lines(path):
        text = line.value.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if not match:
            raise unreadable(line.where, "it is no line of apt's sources")
        yield replace(line, value=match[1])


def _of_paragraphs(files: Files, path: str) -> Iterator[Said]:
    urls: list[Said] = []
    field, enabled = "", True
    for line in files.lines(path):
        if line.value.startswith("#"):
            continue
        if not line.value:
            yield from urls if enabled else ()
            urls, field, enabled = [], "", True
            continue
        text = line.value
        if match := _FIELD.fullmatch(text):
            field, text = match[1].lower(), match[2]
        elif not text[0].isspace() or not field:
            raise unreadable(line.where, "it is no line of apt's sources")
        if field == "uris":
            urls += [replace(line, value=word) for word in text.split()]
        if field == "enabled":
            enabled = text.strip().lower() not in _WORDS
    yield from urls if enabled else ()
