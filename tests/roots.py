"""roots.py - in the test process: a small Linux root with a Python of ours, for kernels to run in.

It has this very Python, its standard library, ipykernel with all that it needs, a shell and a few
programs: nothing is downloaded. It is made once in the life of a process, in seconds, as a
directory that every user may read, and as image files of it.
"""

from __future__ import annotations

import atexit
import os
import re
import select
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

_PROGRAMS = ("sh", "bash", "cat", "chmod", "cp", "id", "ls", "mkdir", "mv", "rm", "touch")
# Of the standard library, and of packages, what no kernel looks at; of packages what is large.
_UNNEEDED = shutil.ignore_patterns(
    "test", "tests", "idlelib", "turtledemo", "tkinter", "ensurepip", "lib2to3", "config-*",
    "site-packages", "dist-packages", "*.opt-[12].pyc", "*.a", "third_party", "sphinxext", "lexers",
)  # fmt: skip
_LEFT_OUT = {"debugpy", "cffi", "pycparser", "tzdata"}
_LEXERS = ("__init__.py", "_mapping.py", "python.py", "unicodedata.py", "special.py")
# Whatever makes it, the root of a file system belongs to root.
_MAKERS = {
    "squashfs": "mksquashfs {root} {image} -quiet -no-progress -all-root -noI -noD -noF -noX",
    "erofs": "mkfs.erofs --quiet --all-root {image} {root}",
    "ext4": "mkfs.ext4 -q -d {root} -E root_owner=0:0 {image} {megabytes}M",
}
LIBRARY = f"python{sys.version_info[0]}.{sys.version_info[1]}"
PYTHON = "/usr/bin/python3"


@cache
def folder() -> Path:
    """Where everything of this process is; it goes with it."""
    path = Path(tempfile.mkdtemp(prefix="sbx-roots-", dir="/opt" if os.geteuid() == 0 else None))
    path.chmod(0o755)
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def directory() -> Path:
    """The root as a directory. Nobody changes it: who wants another one copies it."""
    return make(folder() / "root")


@cache
def image(kind: str) -> Path:
    """The same as a file: "squashfs", "erofs" or "ext4"."""
    return make_image(directory(), folder() / f"root.{kind}", kind)


def make_image(root: Path, path: Path, kind: str) -> Path:
    """The directory *root* as an image file."""
    megabytes = int(subprocess.check_output(["du", "-sm", root]).split()[0]) * 3 // 2 + 16
    command = _MAKERS[kind].format(root=root, image=path, megabytes=megabytes)
    subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL)
    path.chmod(0o644)
    return path


def devices_of(path: Path) -> list[str]:
    """The loop devices of the file *path*, or of all files below that directory."""
    found = []
    for name in os.listdir("/sys/block"):
        try:
            backing = Path(f"/sys/block/{name}/loop/backing_file").read_text().strip()
        except OSError:
            continue
        # Of a file that was removed it says so, behind its path.
        if path == Path(backing) or path in Path(backing).parents:
            found.append(name)
    return found


def is_let_go_of(path: Path, left: int = 0) -> bool:
    """Whether so many are left, when Linux has ended those that are nobody's: in a queue."""
    for _ in range(3000):
        if len(devices_of(path)) == left:
            return True
        select.poll().poll(10)
    return False


def make(root: Path, packages: Iterable[str] = ("ipykernel",)) -> Path:
    """A root at *root*, with these *packages* of the test's own environment."""
    _make_folders(root)
    library = root / "usr/lib" / LIBRARY
    shutil.copytree(os.path.dirname(os.__file__), library, symlinks=True, ignore=_UNNEEDED)
    (library / "site-packages").mkdir()
    (root / "usr/lib/python3/dist-packages").symlink_to(f"../{LIBRARY}/site-packages")
    for package in packages:
        _copy_package(package, library / "site-packages")
    shutil.copy(os.path.realpath(sys.executable), root / f"usr/bin/{LIBRARY}")
    (root / "usr/bin/python3").symlink_to(LIBRARY)
    for name in _PROGRAMS:
        shutil.copy(str(shutil.which(name)), root / f"usr/bin/{name}")
    _copy_libraries(root, (root / "usr").rglob("*"))
    return root


@cache
def shell() -> Path:
    """A root with a shell and nothing else: a megabyte or two."""
    root = folder() / "shell"
    _make_folders(root)
    shutil.copy(str(shutil.which("sh")), root / "usr/bin/sh")
    _copy_libraries(root, (root / "usr").rglob("*"))
    return root


def _make_folders(root: Path) -> None:
    for name in ("etc", "usr/bin", "usr/lib/python3", "proc", "dev", "sys", "tmp", "run", "root"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(exist_ok=True)
        (root / name).symlink_to(f"usr/{name}")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nmail:x:8:8::/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nmail:x:8:\n")
    (root / "etc/os-release").write_text('ID=tiny\nPRETTY_NAME="A tiny root"\n')


def _copy_package(name: str, to: Path) -> None:
    for needed in sorted(_with_needs(name, set()) - _LEFT_OUT):
        found = metadata.distribution(needed)
        tops = {file.parts[0] for file in found.files or () if file.parts[0] not in {"..", "/"}}
        for top in sorted(tops - {"__pycache__"}):
            source, target = Path(str(found.locate_file(top))), to / top
            if target.exists():
                continue
            if source.is_dir():
                shutil.copytree(source, target, ignore=_UNNEEDED)
            elif source.exists():
                shutil.copy2(source, target)
        if needed == "pygments":
            lexers = Path(str(found.locate_file("pygments/lexers")))
            (to / "pygments/lexers").mkdir()
            for lexer in _LEXERS:
                if (lexers / lexer).exists():
                    shutil.copy2(lexers / lexer, to / "pygments/lexers")


def _with_needs(name: str, found: set[str]) -> set[str]:
    """*name* and all that it needs here, as far as that is installed."""
    try:
        needs = metadata.requires(name) or ()
    except metadata.PackageNotFoundError:
        return found
    found.add(re.sub(r"[-_.]+", "-", name).lower())
    for need in needs:
        match = re.match(r"[\w.-]+", need)
        if match and "extra ==" not in need:
            other = re.sub(r"[-_.]+", "-", match[0]).lower()
            if other not in found:
                _with_needs(other, found)
    return found


def _copy_libraries(root: Path, paths: Iterable[Path]) -> None:
    """What those of *paths* in *root* that are programs or modules are linked with, where its
    loader looks for them."""
    binaries = [path for path in paths if _is_elf(path)]
    command = ["ldd", *map(str, binaries)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    named = dict(re.findall(r"^\s+(\S+) => (/\S+) \(", said, re.M))
    libc = os.path.dirname(os.path.realpath(named["libc.so.6"]))
    place = root / libc.lstrip("/")
    place.mkdir(parents=True, exist_ok=True)
    for name, path in named.items():
        if (place / name).exists():  # a link to what other roots have, too
            continue
        if not path.startswith(str(root)):
            shutil.copy(path, place / name)
    own = f"{sysconfig.get_config_var('LIBDIR')}/{sysconfig.get_config_var('LDLIBRARY')}"
    has_python = (root / f"usr/bin/{LIBRARY}").exists()
    if has_python and os.path.exists(own) and not own.endswith(".a"):  # found by an RPATH outside
        shutil.copy(own, place / os.path.basename(os.path.realpath(own)))
    for loader in set(re.findall(r"^\s+(/lib\S+/ld-\S+) \(", said, re.M)):
        target = root / loader.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(loader, target)


def _is_elf(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def copy(name: str) -> Path:
    """A copy of the directory, to be changed. Its files are links to the very same ones: replace
    what you change, do not write into it."""
    target = folder() / name
    subprocess.run(["cp", "-al", directory(), target], check=True)
    return target
