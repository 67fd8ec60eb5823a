"""kernel_files.py - reads only: which files of the host a kernel's command needs to run.

A kernel's environment (venv, conda, pyenv, a user's own packages) may lie anywhere. A Python is
asked for its paths, in a process of its own and once for each state of what is installed; any other
program brings the installation that it lies in.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.spec import relative

_ASK_SECONDS = 30
# Runs in the kernel's interpreter. Ours may be the same one, but its sys.path has more: the folder
# of the script that it runs, and whatever was put there since.
_QUESTION = """
import json, site, sys
paths = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, *sys.path[1:]]
for finder in sys.meta_path:
    mapping = getattr(sys.modules.get(getattr(finder, "__module__", "")), "MAPPING", {})
    paths += [p for p in mapping.values() if isinstance(p, str)]
json.dump({"paths": paths, "user": site.getuserbase() if site.ENABLE_USER_SITE else ""}, sys.stdout)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFiles:
    """*program* is the absolute path to execute; *readonly* what must be there to read.

    *user_base* is the value for PYTHONUSERBASE, "" without packages of the user's own.
    *too_broad* are paths that the kernel would look at but that would show whole homes.
    """

    program: str
    readonly: tuple[str, ...]
    user_base: str = ""
    too_broad: tuple[str, ...] = ()


def find_kernel_files(
    argv: Sequence[str], environment: Mapping[str, str], facts: HostFacts, extra: Iterable[str] = ()
) -> KernelFiles:
    """Look where *argv*'s program and its libraries live; *extra* paths are added as they are.

    Raises LaunchError if there is no such program, or if it cannot be executed.
    """
    program = _find_program(argv[0], environment)
    user_base = ""
    if _is_python(program):
        paths, user_base = _ask(program, environment.get("PYTHONPATH", ""), freshness(program))
    else:
        paths = (_installation_of(program),)
    wanted = [*_links_of(program), *paths, *extra, *_files_named(argv[1:])]
    usable, too_broad = _sort_out(wanted, facts)
    return KernelFiles(program=program, readonly=usable, user_base=user_base, too_broad=too_broad)


def _find_program(name: str, environment: Mapping[str, str]) -> str:
    path = shutil.which(name, path=environment.get("PATH", os.defpath))
    if path is None:
        answer = "it is not executable" if os.path.exists(name) else "there is no such program"
        raise LaunchError(
            attempt=f"run the kernel's program {name!r}",
            answer=answer,
            remedy="Correct the first word of argv in its kernel.json, or install the program.",
            step="find-kernel",
        )
    return os.path.abspath(path)


def _is_python(program: str) -> bool:
    name = os.path.basename(os.path.realpath(program))
    return name.startswith(("python", "pypy")) and "-config" not in name


def freshness(program: str) -> tuple[float, ...]:
    """Changes when the program, its venv, or what is installed into it changes."""
    prefix = os.path.dirname(os.path.dirname(program))
    real = os.path.realpath(program)
    library = os.path.join(prefix, "lib", os.path.basename(real), "site-packages")
    times = []
    for path in (real, os.path.join(prefix, "pyvenv.cfg"), library):
        times.append(os.stat(path).st_mtime if os.path.exists(path) else 0.0)
    return tuple(times)


@lru_cache(maxsize=64)
def _ask(
    program: str, python_path: str, _freshness: tuple[float, ...]
) -> tuple[tuple[str, ...], str]:
    environment = {"PYTHONPATH": python_path, "HOME": os.environ.get("HOME", "/")}
    try:
        answer = subprocess.run(
            [program, "-c", _QUESTION],
            env=environment,
            cwd="/",
            capture_output=True,
            timeout=_ASK_SECONDS,
            check=True,
        )
        found = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        tail = getattr(error, "stderr", None) or b""
        raise LaunchError(
            attempt=f"ask {program} where its packages are",
            answer=str(error),
            remedy="Try it by hand: a kernel needs an interpreter that starts.",
            step="find-kernel",
            stderr_tail=tail.decode(errors="replace"),
        ) from None
    return tuple(found["paths"]), found["user"]


def _links_of(program: str) -> list[str]:
    """The folders of the symbolic links on the way from *program* to the file behind them."""
    folders = []
    for _ in range(40):
        folders.append(os.path.dirname(program))
        if not os.path.islink(program):
            break
        program = os.path.normpath(os.path.join(folders[-1], os.readlink(program)))
    return folders


def _installation_of(program: str) -> str:
    """.../env/bin/program -> .../env, which has its libraries; else the program alone."""
    real = os.path.realpath(program)
    folder = os.path.dirname(real)
    return os.path.dirname(folder) if os.path.basename(folder) == "bin" else real


def _files_named(words: Iterable[str]) -> list[str]:
    """Files that the command line names, such as a kernel's script beside its kernel.json."""
    return [word for word in words if word.startswith("/") and os.path.isfile(word)]


def _sort_out(wanted: Iterable[str], facts: HostFacts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Drop what is not there or is inside something else; set apart what would show a home."""
    paths: set[str] = set()
    for path in wanted:
        if path.startswith("/") and os.path.exists(path):
            paths |= {os.path.normpath(path), os.path.realpath(path)}
    too_broad = {path for path in paths if _is_too_broad(path, facts)}
    kept: list[str] = []
    for path in sorted(paths - too_broad):
        if not _within_any(path, (*kept, *facts.system_directories, *facts.root_links)):
            kept.append(path)
    return tuple(kept), tuple(sorted(too_broad - {"/usr", "/"}))


def _is_too_broad(path: str, facts: HostFacts) -> bool:
    crowded = ("/tmp", "/var/tmp", "/var", "/home", "/opt", "/run", "/etc", "/mnt", "/srv")
    return any(relative(place, path) is not None for place in (*crowded, *facts.homes))


def _within_any(path: str, folders: Iterable[str]) -> bool:
    return any(relative(path, folder) is not None for folder in folders)
