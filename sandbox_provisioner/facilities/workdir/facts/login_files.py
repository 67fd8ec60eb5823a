"""login_files.py - reads only, whoever launches: what the start-up files of shells name in a home.

A login sources files, and puts directories on its paths, whose names begin with no dot:
``. ~/google-cloud-sdk/path.bash.inc``, ``PATH=$HOME/go/bin:$PATH``. Nothing is run to find them;
what only a run would tell (other variables, loops, what a program prints) is passed over.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

from sandbox_provisioner.links import real_path
from sandbox_provisioner.python_files import read_start
from sandbox_provisioner.spec import relative

_FILES = (
    ".bashrc", ".bash_profile", ".bash_login", ".bash_aliases", ".profile", ".zshrc", ".zshenv",
    ".zprofile", ".zlogin", ".kshrc",
)  # fmt: skip
_MOST_FILES = 32
_SOURCED = re.compile(r"(?:^|[;&|{]|\bthen|\bdo)\s*(?:source|\.)\s+(['\"]?)([^\s'\";&|]+)\1")
_ON_PATH = re.compile(r"\b(?:PATH|PERL5LIB|PYTHONPATH|LD_LIBRARY_PATH|FPATH)=(\S+)")
_INCLUDED = re.compile(r"\bperl\s+-I\s*(\S+)")
_HOME = re.compile(r"^(?:~|\$HOME|\$\{HOME\})(?=/)")


def named_at_login(home: str, opened: str) -> Iterator[str]:
    """What is sourced, or searched for programs, of *home*, a real path, relative to it; *opened*
    leads to the same directory."""
    waiting, seen = [*_FILES], {*_FILES}
    while waiting:
        text = os.fsdecode(read_start(os.path.join(opened, waiting.pop())))
        for line in map(str.lstrip, text.splitlines()):
            if line.startswith("#"):
                continue
            sourced = {*_inside((match[2] for match in _SOURCED.finditer(line)), home)}
            waiting += sourced - seen if len(seen) < _MOST_FILES else ()
            seen |= sourced
            yield from sourced
            searched = (*_ON_PATH.findall(line), *_INCLUDED.findall(line))
            yield from _inside((path for text in searched for path in text.split(":")), home)


def _inside(words: Iterable[str], home: str) -> Iterator[str]:
    """What a shell means by each of *words*, if that can be told and is below *home*."""
    for word in words:
        path = _HOME.sub(lambda _: home, word.strip("'\";)"))
        if path.startswith("/") and "$" not in path and "\0" not in path:
            inside = relative(os.path.normpath(path), home) or relative(real_path(path), home)
            if inside:
                yield inside
