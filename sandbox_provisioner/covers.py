"""covers.py - reads only: what of a work directory the host would run or trust later.

`find_covered` is called for each start, by whoever launches, and turns the names of `Covers` into
paths below the work directory. What becomes of them is decided in `plan.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.spec import Covers, relative


@dataclass(frozen=True, slots=True, kw_only=True)
class Covered:
    """What `Covers` means in one work directory, as paths relative to it, with what symbolic links
    at these places lead to."""

    directories: tuple[str, ...]
    files: tuple[str, ...]
    server_files: tuple[str, ...]
    frozen: tuple[str, ...]


def find_covered(
    source: str,
    covers: Covers,
    *,
    home: str,
    homes: Iterable[str],
    own_folders: Iterable[str],
    cwd: str,
) -> Covered:
    """Look at the work directory *source*, a real path; SpecError if it is itself such a place.

    *home* is the server's own home, *homes* are all that the machine knows of, *own_folders* the
    server's settings and data, *cwd* the directory that the server runs in.
    """
    related = {home, *(other for other in homes if _is_related(other, source))}
    entries = {real: _entries(real, source) for real in map(os.path.realpath, related)}
    repository = (source,) if os.path.isdir(os.path.join(source, ".git")) else ()
    directories = {
        *_in_homes(entries, covers.home_directories),
        *_below(repository, covers.repository_directories),
        *own_folders,
    }
    frozen = _below(repository, covers.frozen) | _in_homes(entries, covers.home_frozen)
    return Covered(
        directories=_within(source, directories),
        files=_within(source, _in_homes(entries, covers.home_files)),
        server_files=_within(source, _below((cwd,), covers.server_files)),
        frozen=_frozen(source, frozen),
    )


def _is_related(home: str, source: str) -> bool:
    """Whether one lies in the other. Of all other homes only the server's own is looked at, since
    a link in it may lead here: there can be very many, and each path costs a look."""
    home = os.path.realpath(home)
    return relative(home, source) is not None or relative(source, home) is not None


def _frozen(source: str, places: set[str]) -> tuple[str, ...]:
    if os.path.isfile(os.path.join(source, ".git")):
        places |= {f"{source}/.git"}  # of a work tree: it names the repository, hooks and all
    apart = {place for place in places if relative(source, place) is None}
    return tuple(path for path in _within(source, apart) if os.path.exists(f"{source}/{path}"))


def _below(folders: Iterable[str], names: Iterable[str]) -> set[str]:
    names = tuple(names)
    real = {os.path.realpath(folder) for folder in folders}
    return {os.path.join(folder, name) for folder in real for name in names}


def _entries(home: str, source: str) -> frozenset[str] | None:
    """What is in *home*, where only that matters: where *source* lies elsewhere or deeper, what is
    not there can neither lead into it nor have it in it. Else, or if nobody may list it, None."""
    if relative(home, source) is not None:
        return None
    try:
        return frozenset(os.listdir(home))
    except OSError:
        return None


def _in_homes(homes: Mapping[str, frozenset[str] | None], names: Iterable[str]) -> set[str]:
    """*names* in all *homes*, but for those that need no look: see `_entries`. There can be many of
    them, and each path costs a look."""
    found: set[str] = set()
    for home, there in homes.items():
        wanted = names
        if there is not None:
            apart = there | {"", ".", ".."}  # not an entry of it
            wanted = [name for name in names if name.partition("/")[0] in apart]
        found |= {os.path.join(home, name) for name in wanted}
    return found


def _within(source: str, paths: Iterable[str]) -> tuple[str, ...]:
    """Those of *paths* that lie in *source*, relative to it; and where symbolic links at these
    places lead to in it, since the host would read what a kernel writes there (or makes there, if a
    link leads to nothing yet). SpecError if *source* itself is such a place."""
    found: set[str] = set()
    known: dict[str, str] = {}
    for path in paths:
        if relative(source, path) is not None:
            answer = f"it lies in {path}, which holds secrets or is run by the host"
            raise bad_workdir(source, answer)
        for candidate in (path, _real(path, known)):
            inside = relative(candidate, source)
            if inside:
                found.add(inside)
    return tuple(sorted(found))


def _real(path: str, known: dict[str, str]) -> str:
    """os.path.realpath, for many paths that share their directories: *known* has those."""
    if ".." in path.split("/"):
        return os.path.realpath(path)
    if path not in known:
        above, name = os.path.split(path)
        joined = os.path.join(_real(above, known), name) if name else above
        known[path] = os.path.realpath(joined) if os.path.islink(joined) else joined
    return known[path]


def bad_workdir(path: str, answer: str) -> SpecError:
    """The refusal of the work directory *path*."""
    return SpecError(
        attempt=f"use {path!r} as the work directory",
        answer=answer,
        remedy="Start the notebook in a directory of its own, or set workdir to one.",
    )
