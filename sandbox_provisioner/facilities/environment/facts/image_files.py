"""image_files.py - reads only, whoever launches: a kernel's program in another root.

It is looked for there, by descriptor, and never run to be asked. A Python has to have ipykernel
where it looks for modules, as far as the folders tell it: else the start would end with a traceback
in place of a sentence.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise

import sandbox_provisioner
from sandbox_provisioner.errors import COMMAND, LaunchError
from sandbox_provisioner.facilities.environment.facts.kernel_files import KernelFiles, OwnSite
from sandbox_provisioner.root_files import RootFiles

# Where a nursery in there finds our code, and nothing else of the host.
OURS = "/.sandbox-provisioner"
_PACKAGE = os.path.dirname(os.path.abspath(sandbox_provisioner.__file__))
# Where programs are looked for, besides PATH: that of the root itself, and where images have one.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_USUAL_PATH = "/usr/local/bin:/usr/bin:/bin"
_ENVIRONMENTS = ("/opt/conda/bin", "/opt/venv/bin", "/venv/bin")
_PYTHON = re.compile(r"python(?:3(?:\.\d+)?)?", re.ASCII)
_LIBRARY = re.compile(r"python3\.\d+", re.ASCII)
_KERNEL = "ipykernel"
_MODULES = ("ipykernel_launcher", "ipykernel")
# elf(5): the header's first bytes, and its e_machine.
_ELF, _MACHINE_AT = b"\x7fELF", 18
_MACHINES = {"x86_64": 62, "aarch64": 183}
_NAMES = {
    3: "i386", 8: "mips", 20: "ppc", 21: "ppc64", 22: "s390x", 40: "arm", 62: "x86_64",
    183: "aarch64", 243: "riscv64", 258: "loongarch64",
}  # fmt: skip
_MOST_INTERPRETERS = 4
# An image can have any number of either, and a start does not look at all of them.
_MOST_CANDIDATES = 16
_MOST_LIBRARIES = 16


def find_image_files(
    argv: Sequence[str],
    environment: Mapping[str, str],
    files: RootFiles,
    name: str,
    machine: str,
    extra: Iterable[str] = (),
) -> KernelFiles:
    """What *argv* is in the root *name* of this *machine*; *environment* is what the kernel gets of
    variables, *extra* are paths of the host that show all the same. LaunchError where it is not
    there, or cannot run."""
    found = list(islice(_candidates(argv[0], environment, files), _MOST_CANDIDATES))
    if not found:
        raise _no_program(argv[0], name)
    if not _wants_ipykernel(argv):
        program = found[0]
    else:
        having = (path for path in found if _has_module(path, environment, files))
        program = next(having, "")
        if not program:
            raise _no_ipykernel(found[0], name)
    _check_machine(program, files, name, machine)
    shown = {_shown_at(path): os.path.realpath(path) for path in extra}
    return KernelFiles(
        program=program,
        readonly=tuple(shown),
        real=shown,
        variables=_path_with(os.path.dirname(program), environment),
        own_site=_own_site(program, files),
        behind=files.real_path(program),
        freshness=_freshness(program, files),
    )


def _path_with(folder: str, environment: Mapping[str, str]) -> dict[str, str]:
    """PATH, where nobody has set it for this kernel: a shell finds what the kernel runs."""
    if "PATH" in environment or folder in _USUAL_PATH.split(":"):
        return {}
    return {"PATH": f"{folder}:{_USUAL_PATH}"}


def _shown_at(path: str) -> str:
    """Where the host's *path* is inside: our own code at a place of its own."""
    return f"{OURS}/{os.path.basename(path)}" if path == _PACKAGE else path


def _freshness(program: str, files: RootFiles) -> tuple[float, ...]:
    """Changes when the program, or what is installed for it, does."""
    prefix = os.path.dirname(os.path.dirname(program))
    places = (program, f"{prefix}/pyvenv.cfg", *_folders(program, files))
    found = (files.status(place) for place in places)
    return tuple(status.st_mtime if status else 0.0 for status in found)


def _candidates(word: str, environment: Mapping[str, str], files: RootFiles) -> Iterator[str]:
    """Programs that *word* may mean there, the likeliest first. jupyter_client puts the path of the
    server's own interpreter in the place of "python3"; there is none such inside."""
    if word.startswith("/") and files.is_program(word):
        yield word
    name = os.path.basename(word)
    if word.startswith("/") and not _PYTHON.fullmatch(name):
        return
    names = dict.fromkeys((name, "python3") if _PYTHON.fullmatch(name) else (name,))
    folders = (*environment.get("PATH", "").split(":"), *_ENVIRONMENTS, *PATH.split(":"))
    for folder in dict.fromkeys(filter(None, folders)):
        for one in names:
            if folder.startswith("/") and files.is_program(f"{folder}/{one}"):
                yield f"{folder}/{one}"


def _wants_ipykernel(argv: Sequence[str]) -> bool:
    return any(flag == "-m" and name in _MODULES for flag, name in pairwise(argv))


def _prefixes(program: str, files: RootFiles) -> Iterator[str]:
    """Where the installations may be that *program* is of: beside it, and beside what it is a link
    to; a virtual environment's comes first."""
    real = files.real_path(program)
    yield from dict.fromkeys(os.path.dirname(os.path.dirname(path)) for path in (program, real))


def _folders(program: str, files: RootFiles) -> Iterator[str]:
    """Where this Python looks for packages."""
    for prefix in _prefixes(program, files):
        for library in ("lib", "lib64", "local/lib", "../usr/local/lib"):
            place = f"{prefix}/{library}"
            if library.startswith("..") and prefix != "/usr":
                continue
            place = "/usr/local/lib" if library.startswith("..") else place
            pythons = (
                name for name in files.names(place)
                if _LIBRARY.fullmatch(name) or name == "python3"
            )  # fmt: skip
            for name in islice(pythons, _MOST_LIBRARIES):
                yield f"{place}/{name}/site-packages"
                yield f"{place}/{name}/dist-packages"


def _has_module(program: str, environment: Mapping[str, str], files: RootFiles) -> bool:
    """Whether it may have ipykernel: a .pth file can lead anywhere."""
    folders = [*_folders(program, files), *environment.get("PYTHONPATH", "").split(":")]
    for folder in filter(None, folders):
        if files.kind_at(f"{folder}/{_KERNEL}/__init__.py"):
            return True
    return any(
        name.endswith(".pth") and _KERNEL in name
        for folder in folders
        for name in files.names(folder)
    )


def _own_site(program: str, files: RootFiles) -> OwnSite | None:
    """Where a Python puts packages of its user's own; in a virtual environment it has none."""
    if not _PYTHON.fullmatch(os.path.basename(program)):
        return None
    folder = os.path.dirname(program)
    is_venv = bool(files.kind_at(f"{os.path.dirname(folder)}/pyvenv.cfg"))
    for prefix in _prefixes(program, files):
        for library in ("lib", "lib64"):
            for name in files.names(f"{prefix}/{library}"):
                if _LIBRARY.fullmatch(name) and files.kind_at(f"{prefix}/{library}/{name}"):
                    return OwnSite(library=name, base="" if is_venv else "/")
    return None


def _check_machine(program: str, files: RootFiles, name: str, machine: str) -> None:
    """LaunchError for a program of another machine, or a script whose interpreter is one."""
    path = program
    for _ in range(_MOST_INTERPRETERS):
        head = files.read(path, 256)
        if head[:4] == _ELF:
            order = ">" if head[5:6] == b"\2" else "<"
            number = struct.unpack_from(f"{order}H", head.ljust(64, b"\0"), _MACHINE_AT)[0]
            if number == _MACHINES.get(machine):
                return
            raise LaunchError(
                attempt=f"run {program} of the root {name}",
                answer=f"it is a program for {_NAMES.get(number, f'machine {number}')}, and this "
                f"machine is {machine}",
                remedy=f"Make the image for {machine}.",
                step="find-kernel",
            )
        words = head[2:].split(b"\n", 1)[0].split() if head[:2] == b"#!" else []
        if not words:
            return  # Linux says what it thinks of it
        path = os.fsdecode(words[0])


def _no_program(word: str, name: str) -> LaunchError:
    return LaunchError(
        attempt=f"run the kernel's program {word!r} in the root {name}",
        answer="there is no such program in it that everybody may run",
        remedy="Install a Python with ipykernel in it, or write as the first word of argv in "
        "kernel.json what it has; nothing of the host's shows there.",
        step="find-kernel",
    )


def _no_ipykernel(program: str, name: str) -> LaunchError:
    return LaunchError(
        attempt=f"run {program} of the root {name} as a kernel",
        answer="there is no ipykernel where it looks for modules",
        remedy=(
            "Add it to what the image is made of: python3-ipykernel (apt) or ipykernel (pip).",
            "In a directory, as administrator:",
            f"{COMMAND}sudo chroot DIRECTORY {program} -m pip install ipykernel",
        ),
        step="find-kernel",
    )
