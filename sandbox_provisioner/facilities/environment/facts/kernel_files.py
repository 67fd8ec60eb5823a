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
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.facilities.environment.facts.r_files import find_r_files, is_r
from sandbox_provisioner.facilities.environment.facts.wrappers import (
    Behind,
    candidates,
    find_behind,
)
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.links import real_path
from sandbox_provisioner.python_files import (
    Found,
    Reader,
    entries_of,
    find_python_files,
    is_built_by_meson,
    is_python,
)
from sandbox_provisioner.spec import relative
from sandbox_provisioner.system_files import OF_BOX

_STANDARD_LIBRARY = re.compile(r"(?:python|pypy)3\.\d+t?", re.ASCII)
# Variables that tell programs of every language where to look. They are followed in what the kernel
# is given of the environment, and in what its command sets.
_SEARCH_PATHS = (
    "LD_LIBRARY_PATH", "R_LIBS", "R_LIBS_USER", "R_LIBS_SITE", "R_HOME", "JAVA_HOME", "CLASSPATH",
    "NODE_PATH", "PERL5LIB", "RUBYLIB", "GEM_HOME", "GEM_PATH", "OCAMLPATH", "TCLLIBPATH",
    "FONTCONFIG_PATH", "MAGICK_CONFIGURE_PATH", "TEXMFHOME", "TEXMFLOCAL", "GDAL_DATA", "PROJ_DATA",
    "PROJ_LIB", "SSL_CERT_DIR", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE",
)  # fmt: skip
# Of these in a home programs live beside keys, tokens and the files of other kernels.
_WITH_SECRETS = {".local", ".cargo"}


@dataclass(frozen=True, slots=True)
class OwnSite:
    """Where the kernel's Python has packages of its user's own: in the folder of a library called
    *library*, "python3.11". *base* is PYTHONUSERBASE outside; "" where a virtual environment, or a
    setting, leaves such packages out."""

    library: str
    base: str

    @property
    def outside(self) -> str:
        """The folder of packages outside."""
        return f"{self.base}/lib/{self.library}/site-packages" if self.base else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFiles:
    """*program* is the absolute path to execute, and *behind* the real path of that; *readonly* is
    what must be there to read, and *real* the real paths of what of it is behind a link, as they
    were judged.
    *environment* is what of it is installed where the kernel could write: it may not change that.

    *variables* tell programs where the user's own packages are, since HOME is another one inside;
    *own_site* is where a Python has them, None for other programs.
    *too_broad* are paths that the kernel would look at but that would show whole homes; *doubtful*
    those that only something names that a kernel may write. Of what is there outside and not inside
    *off_path* are the folders on its PATH, and *unseen* what its command names. *freshness* changes
    with the program and what is installed for it.
    """

    program: str
    readonly: tuple[str, ...]
    behind: str = ""
    real: Mapping[str, str] = field(default_factory=dict)
    environment: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    own_site: OwnSite | None = None
    too_broad: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()
    off_path: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    freshness: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What the kernel is given of the host anyway: *writable* are the real paths of what it may
    write, *owner_uid* is whom the work directory belongs to. *shown* is what whoever asks for it
    sees of the host besides the system: what is elsewhere is not there. None: that one sees all."""

    writable: tuple[str, ...] = ()
    owner_uid: int = 0
    shown: tuple[str, ...] | None = None


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
    behind = find_behind(program, argv[1:], environment, reader)
    needed = _needed_by(behind, facts, reader)
    installed = [*map(Found, extra), *needed.installed]
    modules = [*needed.modules, *_on_search_paths(behind)]
    sorter = _Sorter(facts, given, reader)
    sorter.refuse_elsewhere(program)
    sorter.refuse_doubtful(program)
    readonly = sorter.usable([*installed, *modules])
    seen = (*readonly, *given.writable, *sorter.system, *OF_BOX)
    return KernelFiles(
        program=program,
        readonly=readonly,
        real={path: sorter.real[path] for path in readonly if path in sorter.real},
        environment=sorter.writable(installed),
        variables=needed.variables,
        own_site=needed.own_site,
        too_broad=tuple(sorted(sorter.too_broad - {"/usr", "/"})),
        doubtful=tuple(sorted(sorter.doubtful)),
        off_path=_hidden(_entries(environment.get("PATH", "")), seen),
        unseen=_hidden(_all_named(behind), seen),
        behind=(real := real_path(program)),
        freshness=_freshness(program, real),
    )


def _find_program(name: str, environment: Mapping[str, str]) -> str:
    there = candidates(name, environment)
    for path in there:
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return os.path.abspath(path)
    answer = (
        "it is not executable" if any(map(os.path.exists, there)) else "there is no such program"
    )
    raise LaunchError(
        attempt=f"run the kernel's program {name!r}",
        answer=answer,
        remedy="Correct the first word of argv in its kernel.json, or install the program.",
        step="find-kernel",
    )


@dataclass(slots=True)
class _Needed:
    """What the commands of a kernel need: what is *installed*, further *modules*, and *variables*
    that tell where, since HOME is another one inside."""

    installed: list[Found]
    modules: list[Found]
    variables: dict[str, str]
    own_site: OwnSite | None = None


def _needed_by(behind: Behind, facts: HostFacts, reader: Reader) -> _Needed:
    needed = _Needed([found for found in behind.files if _is_public(found.path)], [], {})
    for command in behind.commands:
        own, modules = _folders_on_way(command.program, reader), list[Found]()
        if is_python(command.program):
            python = find_python_files(
                command.program, command.words, command.environment, facts.caller.home, reader
            )
            own += python.environment
            modules += python.modules
            if python.versions:
                needed.own_site = OwnSite(python.versions[0], python.user_base)
            if python.user_base:
                needed.variables["PYTHONUSERBASE"] = python.user_base
            if any(is_built_by_meson(found.path) for found in python.modules):
                # Else its loader opens a log in that folder, which is read-only, at each import.
                needed.variables["MESONPY_EDITABLE_VERBOSE"] = "1"
        else:
            own += _installation_of(command.program, reader)
        if is_r(command.program):
            libraries, variables = find_r_files(command.environment, facts.caller.home)
            modules += libraries
            needed.variables |= variables
        named = _files_named(command.words)
        own += [Found(path) for path in named if command is behind.commands[0] or _is_public(path)]
        needed.installed += [replace(f, trusted=f.trusted and command.trusted) for f in own]
        needed.modules += [replace(f, trusted=f.trusted and command.trusted) for f in modules]
    return needed


def _freshness(program: str, real: str) -> tuple[float, ...]:
    """Changes when the program, its venv, or what is installed into it changes."""
    prefix = os.path.dirname(os.path.dirname(program))
    library = os.path.join(prefix, "lib", os.path.basename(real), "site-packages")
    return tuple(map(_changed_at, (real, os.path.join(prefix, "pyvenv.cfg"), library)))


def _changed_at(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


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


def _installation_of(program: str, reader: Reader) -> list[Found]:
    """.../env/bin/program -> .../env, which has its libraries; else the program alone. pyenv's
    programs are scripts that run what lies in the folder beside theirs."""
    real = real_path(program)
    folder = os.path.dirname(real)
    above = os.path.dirname(folder)
    whole = os.path.basename(folder) == "bin" or os.path.exists(f"{above}/libexec/pyenv")
    places = [above] if whole else [real]
    if os.path.basename(above) in _WITH_SECRETS:
        places = [real, f"{above}/lib"]
    return [Found(path, reader.trusts(program)) for path in places]


def _is_public(path: str) -> bool:
    """Whether a wrapper's word is enough to show *path*: it may stand for a file of passwords."""
    status = os.stat(path) if os.path.exists(path) else None
    return bool(status and (stat.S_ISDIR(status.st_mode) or status.st_mode & stat.S_IROTH))


def _entries(value: str) -> list[str]:
    return [path for path in value.split(os.pathsep) if path.startswith("/")]


def _on_search_paths(behind: Behind) -> list[Found]:
    found: dict[Found, None] = {}
    for command in behind.commands:
        for name in _SEARCH_PATHS:
            for path in _entries(command.environment.get(name, "")):
                found[Found(path, command.trusted)] = None
    return list(found)


def _all_named(behind: Behind) -> list[str]:
    """Programs, and whatever absolute path is an argument or stands in a script."""
    words = [word for command in behind.commands for word in (command.program, *command.words)]
    return [word for word in (*words, *behind.named) if word.startswith("/") and "\0" not in word]


def _hidden(paths: Iterable[str], seen: Iterable[str]) -> tuple[str, ...]:
    """Those of *paths* that are there, and in none of the folders *seen*."""
    found = {path for path in map(os.path.normpath, paths) if os.path.exists(path)}
    return tuple(sorted(path for path in found if not _within_any(path, seen)))


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
        machine = facts.machine
        self.system = (
            *machine.system_directories, *machine.root_links, *machine.system_files,
        )  # fmt: skip
        self._judged: dict[Found, set[str]] = {}

    def usable(self, found: Iterable[Found]) -> tuple[str, ...]:
        """What of *found* is there and may be shown, without what lies in something else."""
        paths: set[str] = set()
        for one in found:
            paths |= self._shown(one)
        kept: list[str] = []
        for path in sorted(paths):
            if not _within_any(path, (*kept, *self.system)):
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
        if _within_any(path, OF_BOX) or _within_any(real, OF_BOX):
            return set()
        if not (self._is_there(path) and self._is_there(real)):
            return set()
        trusted = self.reader.trusts(path, found.trusted) if real != path else found.trusted
        if not trusted and not self._is_harmless(real):
            self.doubtful.add(real)
            return set()
        if real != path:
            self.real[path] = real
        broad = {one for one in (path, real) if _is_too_broad(one, self.facts)}
        self.too_broad |= broad
        return {path, real} - broad

    def refuse_elsewhere(self, program: str) -> None:
        """LaunchError for a program that who asks does not see."""
        if self._is_there(program) and self._is_there(real_path(program)):
            return
        raise LaunchError(
            attempt=f"run the kernel's program {program}",
            answer="the box of its server does not show it, and so no kernel of that one",
            remedy="Ask whoever administers this hub to show it to servers: "
            "c.SandboxSpawner.read_only_volumes.",
            step="find-kernel",
        )

    def _is_there(self, path: str) -> bool:
        """Whether who asks sees *path*."""
        shown = self.given.shown
        return shown is None or _within_any(path, (*shown, *self.system))

    def _is_harmless(self, path: str) -> bool:
        """Whether *path* may be shown to a kernel that may have named it itself."""
        system, server = self.facts.machine.system_directories, self.facts.server.prefixes
        seen = (*self.given.writable, *system, *server)
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
