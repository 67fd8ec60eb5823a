"""kernel_files.py - reads only: which files of the host a kernel's command needs to run.

A kernel's environment (venv, conda, pyenv, a user's own packages) may lie anywhere. Of a Python the
files that tell its paths are read (`python_files.py`); any other program brings the installation
that it lies in. Nothing is run, since kernels may have written it.

What is named only by files that a kernel may write (the work directory, volumes with "rw") shows no
more than it could see anyway: the work directory, the system, and installations that its owner may
read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.links import real_path
from sandbox_provisioner.python_files import (
    Found,
    Reader,
    entries_of,
    find_python_files,
    is_python,
    read_start,
)
from sandbox_provisioner.spec import relative

_STANDARD_LIBRARY = re.compile(r"(?:python|pypy)3\.\d+t?", re.ASCII)
_DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFiles:
    """*program* is the absolute path to execute; *readonly* what must be there to read, and *real*
    the real paths of what of it is behind a link, as they were judged.
    *environment* is what of it is installed where the kernel could write: it may not change that.

    *user_base* is the value for PYTHONUSERBASE, "" without packages of the user's own.
    *too_broad* are paths that the kernel would look at but that would show whole homes; *doubtful*
    those that only something names that a kernel may write.
    """

    program: str
    readonly: tuple[str, ...]
    real: Mapping[str, str] = field(default_factory=dict)
    environment: tuple[str, ...] = ()
    user_base: str = ""
    too_broad: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What the kernel is given of the host anyway: *writable* are the real paths of what it may
    write, *owner_uid* is whom the work directory belongs to."""

    writable: tuple[str, ...] = ()
    owner_uid: int = 0


def find_kernel_files(
    argv: Sequence[str],
    environment: Mapping[str, str],
    facts: HostFacts,
    extra: Iterable[str] = (),
    given: Given | None = None,
) -> KernelFiles:
    """Look where *argv*'s program and its libraries live; *extra* paths are added as they are.

    Raises LaunchError if there is no such program, or if it cannot be executed.
    """
    given = given or Given()
    reader = Reader(given.writable)
    program = _find_program(argv[0], environment)
    installed = [Found(path) for path in (*extra, *_files_named(argv[1:]))]
    modules: list[Found] = []
    user_base = ""
    for path, words in _with_interpreter(program, argv[1:], environment):
        installed += _folders_on_way(path, reader)
        if is_python(path):
            found = find_python_files(path, words, environment, facts.home, reader)
            installed += found.environment
            modules += found.modules
            user_base = found.user_base
        else:
            installed.append(_installation_of(path, reader))
    sorter = _Sorter(facts, given, reader)
    sorter.refuse_doubtful(program)
    readonly = sorter.usable([*installed, *modules])
    return KernelFiles(
        program=program,
        readonly=readonly,
        real={path: sorter.real[path] for path in readonly if path in sorter.real},
        environment=sorter.writable(installed),
        user_base=user_base,
        too_broad=tuple(sorted(sorter.too_broad - {"/usr", "/"})),
        doubtful=tuple(sorted(sorter.doubtful)),
    )


def _find_program(name: str, environment: Mapping[str, str]) -> str:
    candidates = _candidates(name, environment)
    for path in candidates:
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return os.path.abspath(path)
    there = any(map(os.path.exists, candidates))
    answer = "it is not executable" if there else "there is no such program"
    raise LaunchError(
        attempt=f"run the kernel's program {name!r}",
        answer=answer,
        remedy="Correct the first word of argv in its kernel.json, or install the program.",
        step="find-kernel",
    )


def _candidates(name: str, environment: Mapping[str, str]) -> list[str]:
    """Where *name* may be. An empty or relative entry of PATH means the directory that the server
    happens to run in, which is not the kernel's: it is passed over."""
    if "/" in name:
        return [name]
    folders = environment.get("PATH", _DEFAULT_PATH).split(os.pathsep)
    return [os.path.join(folder, name) for folder in folders if folder.startswith("/")]


def _with_interpreter(
    program: str, words: Sequence[str], environment: Mapping[str, str]
) -> list[tuple[str, Sequence[str]]]:
    """*program* with its words, and, if it is a script, whoever "#!" names with theirs."""
    found: list[tuple[str, Sequence[str]]] = [(program, words)]
    line = read_start(program, 256).partition(b"\n")[0]
    if not line.startswith(b"#!") or b"\0" in line:
        return found
    command = os.fsdecode(line[2:]).split()
    if command and os.path.basename(command[0]) == "env":
        command = [word for word in command[1:] if not word.startswith("-")]
    for path in _candidates(command[0], environment) if command else ():
        if path.startswith("/") and os.path.isfile(path):
            return [*found, (path, command[1:])]
    return found


def freshness(program: str) -> tuple[float, ...]:
    """Changes when the program, its venv, or what is installed into it changes."""
    prefix = os.path.dirname(os.path.dirname(program))
    real = real_path(program)
    library = os.path.join(prefix, "lib", os.path.basename(real), "site-packages")
    times = []
    for path in (real, os.path.join(prefix, "pyvenv.cfg"), library):
        times.append(os.stat(path).st_mtime if os.path.exists(path) else 0.0)
    return tuple(times)


def _folders_on_way(program: str, reader: Reader) -> list[Found]:
    """The folders of the symbolic links on the way from *program* to the file behind them."""
    found, trusted = [], True
    for _ in range(40):
        found.append(Found(os.path.dirname(program), trusted))
        if not os.path.islink(program):
            break
        trusted = reader.trusts(program, trusted)
        program = os.path.normpath(os.path.join(found[-1].path, os.readlink(program)))
    return found


def _installation_of(program: str, reader: Reader) -> Found:
    """.../env/bin/program -> .../env, which has its libraries; else the program alone. pyenv's
    programs are scripts that run what lies in the folder beside theirs."""
    real = real_path(program)
    folder = os.path.dirname(real)
    above = os.path.dirname(folder)
    whole = os.path.basename(folder) == "bin" or os.path.exists(f"{above}/libexec/pyenv")
    return Found(above if whole else real, reader.trusts(program))


def _files_named(words: Iterable[str]) -> list[str]:
    """Files that the command line names, such as a kernel's script beside its kernel.json."""
    return [word for word in words if word.startswith("/") and os.path.isfile(word)]


# -- what of it may be shown


class _Sorter:
    """Sets apart what would show a home, and what nobody names but those who want to see it."""

    def __init__(self, facts: HostFacts, given: Given, reader: Reader) -> None:
        self.facts = facts
        self.given = given
        self.reader = reader
        self.too_broad: set[str] = set()
        self.doubtful: set[str] = set()
        self.real: dict[str, str] = {}
        self._judged: dict[Found, set[str]] = {}

    def usable(self, found: Iterable[Found]) -> tuple[str, ...]:
        """What of *found* is there and may be shown, without what lies in something else."""
        paths: set[str] = set()
        for one in found:
            paths |= self._shown(one)
        facts = self.facts
        system = (*facts.system_directories, *facts.root_links, *facts.system_files)
        kept: list[str] = []
        for path in sorted(paths):
            if not _within_any(path, (*kept, *system)):
                kept.append(path)
        return tuple(kept)

    def writable(self, found: Iterable[Found]) -> tuple[str, ...]:
        """What of *found* lies where the kernel may write."""
        kept: list[str] = []
        for path in sorted(set().union(*map(self._shown, found))):
            strictly = any(relative(path, root) for root in self.given.writable)
            if strictly and not _within_any(path, kept):
                kept.append(path)
        return tuple(kept)

    def refuse_doubtful(self, program: str) -> None:
        """LaunchError for a program that only a link leads to which a kernel may have made."""
        real = real_path(program)
        if self.reader.trusts(program) or self._is_harmless(real):
            return
        raise LaunchError(
            attempt=f"run the kernel's program {program}",
            answer=f"it is a link to {real}, and a kernel may have made that link",
            remedy="Use an interpreter that every user may read, or one out of the work directory.",
            step="find-kernel",
        )

    def _shown(self, found: Found) -> set[str]:
        """The path and what is behind it, as far as they may be shown."""
        if found not in self._judged:
            self._judged[found] = self._judge(found)
        return self._judged[found]

    def _judge(self, found: Found) -> set[str]:
        if not found.path.startswith("/") or "\0" in found.path or not os.path.exists(found.path):
            return set()
        path, real = os.path.normpath(found.path), real_path(found.path)
        trusted = self.reader.trusts(path, found.trusted) if real != path else found.trusted
        if not trusted and not self._is_harmless(real):
            self.doubtful.add(real)
            return set()
        if real != path:
            self.real[path] = real
        broad = {one for one in (path, real) if _is_too_broad(one, self.facts)}
        self.too_broad |= broad
        return {path, real} - broad

    def _is_harmless(self, path: str) -> bool:
        """Whether *path* may be shown to a kernel that may have named it itself."""
        seen = (*self.given.writable, *self.facts.system_directories, *self.facts.server.prefixes)
        return _within_any(path, seen) or self._is_installation(path)

    def _is_installation(self, path: str) -> bool:
        """Whether *path* lies in an installation of Python, conda, or uv's store of packages that
        whoever owns the work directory may read: kernels cannot have made one there."""
        while path != "/":
            if _looks_installed(path) and may_read(path, self.given.owner_uid):
                return not _is_too_broad(path, self.facts)
            path = os.path.dirname(path)
        return False


def _looks_installed(folder: str) -> bool:
    if os.path.basename(folder) == "archive-v0":
        return os.path.exists(f"{os.path.dirname(folder)}/CACHEDIR.TAG")
    if os.path.isdir(f"{folder}/conda-meta"):
        return True
    names = (e.name for e in entries_of(f"{folder}/lib") if _STANDARD_LIBRARY.fullmatch(e.name))
    return any(os.path.isfile(f"{folder}/lib/{name}/os.py") for name in names)


def may_read(path: str, uid: int) -> bool:
    """Whether the modes of *path* and of every folder above let *uid* in, its groups left out."""
    while True:
        status = os.stat(path)
        if not status.st_mode & (0o100 if status.st_uid == uid else 0o001):
            return False
        if path == "/":
            return True
        path = os.path.dirname(path)


def _is_too_broad(path: str, facts: HostFacts) -> bool:
    crowded = ("/tmp", "/var/tmp", "/var", "/home", "/opt", "/run", "/etc", "/mnt", "/srv")
    return any(relative(place, path) is not None for place in (*crowded, *facts.homes))


def _within_any(path: str, folders: Iterable[str]) -> bool:
    return any(relative(path, folder) is not None for folder in folders)
