"""r.py - whoever launches; reads only: which repositories R is configured to use here.

Rprofile.site and ~/.Rprofile are programs (Startup(?)); nothing is run. Read are the URLs that they
give a name, as in ``options(repos = c(CRAN = "https://cran.example.org"))``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from sandbox_provisioner.facilities.network.facts.configured import Configured, Files, Said

_CRAN = "https://cloud.r-project.org"
_NAMED = re.compile(r"""([\w.]+|\[\s*["'][\w.]+["']\s*\])\s*(?:=|<-)\s*["'](https?://[^"']+)["']""")
_MENTIONS = re.compile(r"\brepos\b")


def add_r(found: Configured, files: Files, environment: Mapping[str, str]) -> None:
    """What R is configured to use."""
    told = [said for path in _paths(files, environment) for said in _read(files, path)]
    for said in told or [Said(_CRAN, "R's default")]:
        found.add(said)


def _read(files: Files, path: str) -> Iterator[Said]:
    lines = [replace(line, value=_code(line.value)) for line in files.lines(path)]
    if not any(_MENTIONS.search(line.value) for line in lines):
        return
    for line in lines:
        for name, url in _NAMED.findall(line.value):
            if not name.lower().endswith(("proxy", "agent")):
                yield replace(line, value=url)


def _code(line: str) -> str:
    """*line* without a comment; URLs of repositories have no "#"."""
    return line.partition("#")[0]


def _paths(files: Files, environment: Mapping[str, str]) -> list[str]:
    home = environment.get("R_HOME", "")
    chosen = environment.get("R_PROFILE", "")
    own = environment.get("R_PROFILE_USER") or f"{files.home}/.Rprofile"
    of_all = [chosen] if chosen else [
        *([f"{home}/etc/Rprofile.site"] if home.startswith("/") else []),
        "/etc/R/Rprofile.site", "/usr/lib/R/etc/Rprofile.site", "/usr/lib64/R/etc/Rprofile.site",
        "/usr/local/lib/R/etc/Rprofile.site",
    ]  # fmt: skip
    return [path for path in dict.fromkeys((*of_all, own)) if path.startswith("/")]
