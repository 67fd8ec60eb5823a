"""git_settings.py - reads only, whoever launches: what a repository's settings name for git to run.

`core.hooksPath = .husky` and its like lead git to programs in the work tree itself, which a kernel
could change. Of git-config(1) only the form is read that git itself writes: a line for each value.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator

from sandbox_provisioner.python_files import read_start

# git-config(1): whatever is run, or read as more settings, whatever section it stands in.
_NAMES = {
    "hookspath", "path", "fsmonitor", "sshcommand", "pager", "editor", "clean", "smudge", "process",
    "textconv", "command", "external", "driver", "cmd", "program", "helper", "askpass", "gitproxy",
}  # fmt: skip
_MORE_SETTINGS = "path"
_MOST_FILES = 16
# A repository that a kernel has made can name any number.
_MOST_NAMED = 256
_VALUE = re.compile(r'\s*([A-Za-z][A-Za-z0-9-]*)\s*=\s*!?\s*"?([^\s"#;]+)')


def named_by_settings(opened: str, settings: str, folder: str) -> Iterator[str]:
    """The paths, relative to the directory *opened*, that the file *settings* of a repository names
    and the files that it includes. Programs are found from *folder*, where git runs them."""
    yield from itertools.islice(_named(opened, settings, folder), _MOST_NAMED)


def _named(opened: str, settings: str, folder: str) -> Iterator[str]:
    waiting, seen = [settings], {settings}
    while waiting:
        file = waiting.pop()
        text = os.fsdecode(read_start(os.path.join(opened, file)))
        for name, value in map(_pair, text.splitlines()):
            if name not in _NAMES or not _is_path(name, value):
                continue
            base = os.path.dirname(file) if name == _MORE_SETTINGS else folder
            path = os.path.normpath(os.path.join(base, value))
            yield path
            if name == _MORE_SETTINGS and path not in seen and len(seen) < _MOST_FILES:
                seen.add(path)
                waiting.append(path)


def _pair(line: str) -> tuple[str, str]:
    found = _VALUE.match(line)
    return (found[1].lower(), found[2]) if found else ("", "")


def _is_path(name: str, value: str) -> bool:
    """Not a word that is looked for in PATH, nor one that a shell makes a path of."""
    return (
        value[0] not in "~$-"
        and "\0" not in value
        and ("/" in value or name in {"hookspath", _MORE_SETTINGS})
    )
