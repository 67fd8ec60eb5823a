"""r_files.py - reads only, whoever launches: where an R will look for its user's own packages.

R looks in R_LIBS_USER, or in a folder of the home, and writes "%p" for the platform and "%v" for
its version (.libPaths). Inside, HOME is another one: so the box gets the folders, and R is told
their full names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from sandbox_provisioner.python_files import Found, entries_of

VARIABLE = "R_LIBS_USER"
_DEFAULT = "~/R/%p-library/%v"
_SPECIFIERS = {
    "%V": r"\d+\.\d+\.\d+",
    "%v": r"\d+\.\d+",
    "%p": r"[\w.+]+-[\w.+-]+",
    "%o": r"[\w-]+",
    "%a": r"\w+",
}


def is_r(program: str) -> bool:
    """Whether *program* is R's interpreter."""
    return os.path.basename(program) in {"R", "Rscript"}


def find_r_files(environment: Mapping[str, str], home: str) -> tuple[list[Found], dict[str, str]]:
    """The libraries, and the variable that names them; nothing where there are none."""
    told = environment.get(VARIABLE) or _DEFAULT
    paths = [re.sub(r"^~(?=/)", lambda _: home, path) for path in told.split(os.pathsep)]
    libraries = [Found(folder) for path in paths for folder in _folders(path)]
    return libraries, {VARIABLE: os.pathsep.join(paths)} if libraries else {}


def _folders(path: str) -> Iterator[str]:
    """What is there of *path*: where it has a "%", what can be meant by that name."""
    if not path.startswith("/"):
        return
    if "%" not in path:
        yield path
        return
    parent = os.path.dirname(path.partition("%")[0])
    name = path[len(parent.rstrip("/")) + 1 :].partition("/")[0]
    texts = re.split(r"(%[A-Za-z])", name)
    meant = re.compile("".join(_SPECIFIERS.get(text, re.escape(text)) for text in texts))
    for entry in entries_of(parent):
        if entry.is_dir() and meant.fullmatch(entry.name):
            yield entry.path
