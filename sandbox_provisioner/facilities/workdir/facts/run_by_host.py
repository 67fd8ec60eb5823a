"""run_by_host.py - reads only, whoever launches: what of a work directory the host runs by itself.

Not what a person starts there, but what the server, and programs that are started like it, find
through their settings: an environment, PATH, PYTHONPATH, what is imported, the parts of a project
that JupyterLab looks for in its start directory. Kernels may not change it, nor make what is not
there yet.

The line is drawn at what is looked *for*: an import path in the work directory is out of a kernel's
reach as a whole. One that *is* the work directory cannot be, or nothing could be written there: its
packages are, and what every interpreter imports at its start (site.py).
"""

from __future__ import annotations

import importlib.machinery
import os
import site
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from operator import is_
from typing import Any

import sandbox_provisioner
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.links import real_path
from sandbox_provisioner.places import Folders
from sandbox_provisioner.spec import relative

# Whose entries are searched for programs and libraries to run.
_PROGRAM_PATHS = ("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "NODE_PATH", "PERL5LIB", "RUBYLIB")
# Files and folders that are run or read by whoever is started with these.
_SINGLE = (
    "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONSTARTUP", "PYTHONHOME", "BASH_ENV", "ENV",
    "JUPYTERLAB_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR",
)  # fmt: skip
# jupyter-lsp starts language servers from node_modules of the directory that the server was started
# in, and they load plug-ins from that of the server's root; it writes to .virtual_documents there.
IN_START_DIRECTORY = ("node_modules", ".virtual_documents")
_ENVIRONMENT_MARKS = ("pyvenv.cfg", "conda-meta")
_OF_ENVIRONMENT = (
    "bin", "lib", "lib64", "include", "pyvenv.cfg", "conda-meta", "etc", "share/jupyter",
)  # fmt: skip
_MISSED_OF_ENVIRONMENT = ("etc", "share/jupyter")  # Jupyter looks for configuration and kernels
# site.py imports these, wherever they are found first.
_ALWAYS_IMPORTED = ("sitecustomize", "usercustomize")


# What `look_there_last` has moved: it stands behind the standard library in this process alone.
_moved: set[str] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What this process, and others that are started like it, have on their paths.

    *prefixes* are its Python's installations; *programs* the entries of PATH and its like with the
    variable's name; *single* what other variables name; *modules* where every Python of theirs
    looks for modules (PYTHONPATH, and what site.py adds), *imported* the files of what this one has
    imported; *cwd* is where it was started, and *more* what only it knows of.
    """

    prefixes: tuple[str, ...] = ()
    programs: tuple[tuple[str, str], ...] = ()
    modules: tuple[str, ...] = ()
    imported: tuple[str, ...] = ()
    single: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    cwd: str = "/"


def this_server(
    cwd: str, environment: Mapping[str, str], more: Iterable[str] = (), source: str | None = None
) -> Server:
    """Look at this process, and at what it was started with: in *cwd*, with *environment*; *more*
    are places that only it knows of. Of what is imported, all of it or what lies in *source*."""

    def entries(variable: str) -> tuple[str, ...]:
        return _entries(environment.get(variable, ""), cwd)

    return Server(
        prefixes=tuple({sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}),
        programs=tuple((name, path) for name in _PROGRAM_PATHS for path in entries(name)),
        modules=(*entries("PYTHONPATH"), *_shared(sys.path)),
        imported=tuple(_imported_files() if source is None else _imported_from(source)),
        single=(
            *_user_places(),
            *(p for name in _SINGLE for p in entries(name)),
        ),
        more=tuple(more),
        cwd=cwd,
    )


class _Imported:
    """The files of what this process has imported, which are thousands: they are asked for anew
    where something has been imported since."""

    def __init__(self) -> None:
        self._known: tuple[tuple[Any, ...], list[str], list[str]] = (), [], []

    def files(self) -> tuple[list[str], list[str]]:
        """Those with plain paths, in order, and those that may lie elsewhere (`_plain`)."""
        modules = tuple(sys.modules.values())
        known, plain, odd = self._known
        if len(modules) != len(known) or not all(map(is_, modules, known)):
            found = [getattr(module, "__file__", None) for module in modules]
            every = sorted({file for file in found if isinstance(file, str)})
            odd = [file for file in every if _is_odd(file)]
            plain = [file for file in every if not _is_odd(file)]
            self._known = modules, plain, odd
        return plain, odd


_imported_by_us = _Imported()


def _imported_files() -> list[str]:
    plain, odd = _imported_by_us.files()
    return [*plain, *map(_plain, odd)]


def _imported_from(source: str) -> list[str]:
    """Those in *source*, "" for none. A server has imported thousands of others: to look at each
    would take longer than all else that it does to ask a broker."""
    if not source:
        return []
    below = f"{source}/"
    plain, odd = _imported_by_us.files()
    inside = takewhile(lambda file: file.startswith(below), plain[bisect_left(plain, below) :])
    return [*inside, *(file for file in map(_plain, odd) if file.startswith(below))]


def _first_shared(path: list[str]) -> int:
    """Where the standard library stands in *path*. What comes before it is PYTHONPATH's, or of this
    one command: the directory of its script, or the current one."""
    library = os.path.dirname(os.__file__)
    return path.index(library) if library in path else len(path)


def _shared(path: list[str]) -> list[str]:
    """The part of *path* that every Python has which is started like this one."""
    return [_plain(entry) for entry in path[_first_shared(path) :] if entry not in _moved]


def _plain(path: str) -> str:
    """*path* without "." and "..", by which a script, and who adds to sys.path, may name places
    that lie elsewhere. To ask Linux about each module would take longer than all the rest."""
    return real_path(path) if _is_odd(path) else path


def _is_odd(path: str) -> bool:
    return "/./" in path or "/../" in f"{path}/"


@lru_cache(maxsize=64)  # at each start they are the same
def _entries(text: str, cwd: str) -> tuple[str, ...]:
    """The paths in a variable's *text*; an empty or relative one is meant as seen from *cwd*."""
    paths = text.split(":") if text else ()
    return tuple(os.path.normpath(os.path.join(cwd, path)) for path in paths)


def _user_places() -> tuple[str, ...]:
    base = site.getuserbase()
    return (site.getusersitepackages(), f"{base}/bin", f"{base}/share/jupyter")


def find_run_by_host(
    source: str, server: Server, opened: str = "", *, servers_alone: bool = False
) -> frozenset[str]:
    """The places in the work directory *source*, a real path, that *server* runs or imports from;
    they may be missing. SpecError if it is itself one where nothing could be written then,
    `places.TooManyFolders` if more lie in it than are looked at.

    *opened* leads to *source*, also where somebody has renamed it. *servers_alone*: without what
    its owner would run there, and other servers of theirs, since all of these are in the box."""
    opened = opened or source
    _refuse_on_program_path(source, server)
    found = {
        *(path for _, path in server.programs if _below(path, source)),
        *(path for path in (*server.single, *server.modules) if _below(path, source)),
        *server.more,
    }
    if servers_alone:
        found |= {path for path in server.prefixes if _below(path, source)}
    else:
        found |= {*_environments(source, opened, server)}
        found |= {f"{server.cwd}/{name}" for name in IN_START_DIRECTORY}
    found |= set(_imported(source, opened, server, found))
    if _is_imported_from(source, server):
        found |= set(_on_import_path(source, opened))
    for path in found:
        if relative(source, real_path(path)) is not None:
            raise _refusal(source, f"it lies in {path}, which the host runs or imports from")
    return frozenset(_outermost(found))


def _outermost(places: set[str]) -> Iterator[str]:
    """*places* without what lies in another one of them."""
    last = ""
    for place in sorted(places, key=lambda path: path.split("/")):
        if not last or relative(place, last) is None:
            last = place
            yield place


def _is_imported_from(source: str, server: Server) -> bool:
    return source in map(real_path, server.modules)


def _refusal(source: str, answer: str) -> SpecError:
    return SpecError(
        attempt=f"use {source!r} as the work directory",
        answer=answer,
        remedy="Start the notebook in a directory of its own, or set workdir to one.",
    )


def _refuse_on_program_path(source: str, server: Server) -> None:
    for variable, path in server.programs:
        if real_path(path) == source:
            raise SpecError(
                attempt=f"use {source!r} as the work directory",
                answer=f"it is on the server's {variable}, so the host would run what a kernel "
                "puts there",
                remedy=f"Take it from {variable} (an empty entry means the current directory), or "
                "work in a directory below it.",
            )


def _below(path: str, source: str) -> bool:
    """Whether *path* or what is behind it lies in *source*, and is not all of it."""
    return bool(relative(path, source) or relative(real_path(path), source))


def _environments(source: str, opened: str, server: Server) -> Iterator[str]:
    """The server's own ones, and every one that a person would activate in a project."""
    is_environment = _is_environment(opened)
    for prefix in server.prefixes:
        if _below(prefix, source):
            yield prefix
        elif prefix == source and not is_environment:
            raise _refusal(source, "it is the server's own installation of Python")
        elif prefix == source:
            yield from (f"{source}/{name}" for name in _MISSED_OF_ENVIRONMENT)
        else:
            yield from (f"{prefix}/{name}" for name in ("bin", "lib"))
    if is_environment:
        there = (name for name in _OF_ENVIRONMENT if os.path.lexists(f"{opened}/{name}"))
        yield from (f"{source}/{name}" for name in there)
    yield from (f"{source}/{name}" for name in _folders_with(opened, _ENVIRONMENT_MARKS))
    yield os.path.dirname(os.path.abspath(sandbox_provisioner.__file__))


def _is_environment(folder: str) -> bool:
    return any(os.path.lexists(f"{folder}/{mark}") for mark in _ENVIRONMENT_MARKS)


def _folders_with(opened: str, names: Iterable[str]) -> Iterator[str]:
    """The folders of the directory *opened* in which there is one of *names*; a link to one counts.
    What it is does not matter, or a kernel could exchange it between two looks."""
    for entry in Folders().of(opened):
        if any(os.path.lexists(f"{entry.path}/{name}") for name in names):
            yield entry.name


def _imported(source: str, opened: str, server: Server, known: Iterable[str]) -> Iterator[str]:
    """Of each file that was imported from *source*: the outermost package that it is in, if it is
    in none of the *known* places. A work directory in a package keeps what of it was imported."""
    prefix, done = f"{source}/", tuple(f"{place}/" for place in known)
    for file in server.imported:
        if file.startswith(prefix) and not file.startswith(done):
            place = file.removeprefix(prefix)
            above = os.path.dirname(place)
            while above and os.path.lexists(f"{opened}/{above}/__init__.py"):
                place, above = above, os.path.dirname(above)
            yield f"{source}/{place}"


def _on_import_path(source: str, opened: str) -> Iterator[str]:
    """For a work directory that the server imports from: its packages, and what every Python
    imports at its start, in each form that it may have. What is missing of those becomes a
    directory, whose name no import takes for a module."""
    yield from (f"{source}/{name}" for name in _folders_with(opened, ("__init__.py",)))
    for name in _ALWAYS_IMPORTED:
        for suffix in ("", *importlib.machinery.all_suffixes()):
            yield f"{source}/{name}{suffix}"


def notice(source: str, server: Server) -> str:
    """What a person should know who works in *source*, "" if there is nothing."""
    if not _is_imported_from(source, server):
        return ""
    return (
        f"{source} is on the server's own import path: a module that a kernel makes there may be "
        "imported outside, if nothing else has its name. Work in a directory below it, or keep "
        "the project's packages in a directory of their own (src)."
    )


def look_there_last(source: str, path: list[str]) -> None:
    """Move what of *path*, this process's sys.path, lies in *source* behind the standard library.

    ``python -m``, scripts, nbconvert and PYTHONPATH put the current directory first: what is
    imported later would then be whatever a kernel has put there under that name.
    """
    first = _first_shared(path)
    early = [e for e in path[:first] if relative(real_path(e or "."), source) is not None]
    _moved.update(early)
    path[:] = [*(e for e in path[:first] if e not in early), *path[first:], *early]
