"""recipe.py - in who makes images, reads only: what a person writes of an image to be built.

A recipe is data. Nothing of it is run on the host, or handed to a shell; each name goes to one
program, as one word, and has to look like what that program takes it for.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_provisioner.images.tree import Refused, names_of
from sandbox_provisioner.images.written import Written, read_bytes
from sandbox_provisioner.inside import kernel_calls as kernel

KEYS = ("suite", "mirror", "components", "apt", "pip", "requirements", "index", "wheels", "conda",
        "channels", "files", "date")  # fmt: skip
# What other tools call these.
_HINTS = {"base": "suite", "packages": "apt", "debian": "suite", "python": "pip", "copy": "files",
          "dependencies": "pip", "channel": "channels"}  # fmt: skip
_SUITE = re.compile(r"[a-z][a-z0-9-]{0,40}")
# Debian Policy 5.6.1, with a version: no path, no pattern of apt's.
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9-]+)?(=[A-Za-z0-9.+~:-]+)?")
# With a host that a rule of a network can have: a name, or an address.
_HOST = r"[A-Za-z0-9._-]+(:[0-9]{1,5})?"
_URL = re.compile(rf"https?://([^\s\[\]\"'\\/@]*@)?{_HOST}(/[^\s\[\]\"'\\]*)?")
_COMPONENT = re.compile(r"[a-z][a-z-]{0,40}")
# Not an option of the installer's, and no path of the host's.
_REQUIREMENT = re.compile(r"[A-Za-z0-9][^\n\0]*")
# A name with a version and a build, as conda writes them; no address, and no path.
_OF_CONDA = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*( ?[=<>!~][A-Za-z0-9_.+*!|,<>=~ -]*)?")
_CHANNEL = re.compile(rf"[a-z0-9][a-z0-9._-]*|{_URL.pattern}|file:[^\0]+")
_CONDA_FORGE = "conda-forge"
_CHANNELS_OF_NAMES = "https://conda.anaconda.org"
# Passwords and tokens in an address (conda's documentation, "channels").
_SECRET = re.compile(r"//[^/]*@|/t/")
# What all files are said to have been written at, if the recipe does not say it.
_EPOCH = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
_VERSION = 2  # of what a base is made of; another one makes all bases anew
_NO_LINKS = kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_MAGICLINKS


@dataclass(frozen=True, slots=True)
class Folder:
    """Where a recipe lies, open as *fd*. Whoever wrote the recipe may put a link there while it is
    built: what it names is opened from here, and no link is followed."""

    path: Path
    fd: int

    def opened(self, path: Path) -> int:
        """A descriptor of what is at *path* now; OSError where it is not in the folder."""
        below = str(path.relative_to(self.path))
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
        return kernel.openat2(self.fd, below, flags, kernel.RESOLVE_BENEATH | _NO_LINKS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What an image shall be. *files* are targets and their sources, *time* is that of all.

    *channels* are addresses, and folders. Without *mirrors* mmdebstrap takes Debian's own, with
    updates and security (mmdebstrap(1)).
    """

    path: Path
    folder: Folder
    suite: str
    mirrors: tuple[str, ...]
    components: tuple[str, ...]
    apt: tuple[str, ...]
    pip: tuple[str, ...]
    requirements: str
    index: str
    wheels: Path | None
    conda: tuple[str, ...]
    channels: tuple[str | Path, ...]
    files: tuple[tuple[str, Path], ...]
    time: int

    @property
    def has_pip(self) -> bool:
        """Whether Python packages come from an index, and ipykernel with them."""
        return bool(self.pip or self.requirements.strip())

    @property
    def packages(self) -> tuple[str, ...]:
        """All that apt installs: a kernel needs Python and ipykernel."""
        needed = {"python3-venv"} if self.has_pip else {"python3-ipykernel"}
        if self.conda:
            needed = {"ca-certificates"}
        return tuple(sorted({*self.apt, *needed, "ca-certificates"}))

    @property
    def base_key(self) -> str:
        """The same for all recipes whose base is the same."""
        told = [_VERSION, platform.machine(), self.suite, self.mirrors, self.components,
                self.packages, self.time]  # fmt: skip
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def read_recipe(path: str, opened: ExitStack) -> Recipe:
    """The recipe in the file *path*, whose folder stays open until *opened* closes; SpecError, with
    the line of what is wrong."""
    real = Path(path).resolve()
    written = Written.read(path)
    written.know(KEYS, _HINTS)
    folder = _folder(written, real.parent, opened)
    wheels = written.text("wheels")
    recipe = Recipe(
        path=written.path,
        folder=folder,
        suite=_checked(written, "suite", (written.text("suite", "bookworm"),), _SUITE)[0],
        mirrors=_checked(written, "mirror", written.texts("mirror"), _URL),
        components=_checked(written, "components", written.texts("components") or ("main",),
                            _COMPONENT),
        apt=_checked(written, "apt", written.texts("apt"), _PACKAGE),
        pip=_checked(written, "pip", written.texts("pip"), _REQUIREMENT),
        requirements=_requirements(written, folder),
        index=_checked(written, "index", (written.text("index"),), _URL)[0]
        if "index" in written.found else "",
        wheels=_beside(written, folder, "wheels", wheels) if wheels else None,
        conda=_checked(written, "conda", written.texts("conda"), _OF_CONDA),
        channels=tuple(_channels(written, folder)),
        files=tuple(_files(written, folder)),
        time=_time(written),
    )  # fmt: skip
    if recipe.conda and recipe.has_pip:
        written.refuse(("conda",), "it has packages of conda and of pip", "Write one of them.")
    return recipe


def _folder(written: Written, path: Path, opened: ExitStack) -> Folder:
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY
        fd = kernel.openat2(kernel.AT_FDCWD, str(path), flags, _NO_LINKS)
    except OSError as error:
        written.refuse((), f"its folder: {error.strerror}", "Leave it where it is meanwhile.")
    opened.callback(os.close, fd)
    return Folder(path, fd)


def _checked(
    written: Written, key: str, values: tuple[str, ...], pattern: re.Pattern[str]
) -> tuple[str, ...]:
    for value in values:
        if not pattern.fullmatch(value):
            answer = f"{value!r} is nothing that {key} could have"
            written.refuse((key,), answer, "See docs/images.md for what can stand there.")
    return values


def _requirements(written: Written, folder: Folder) -> str:
    """What the file has that `requirements` names: pip reads it in the box, where nothing of what
    it may name of this machine is there."""
    name = written.text("requirements")
    if not name:
        return ""
    path = _beside(written, folder, "requirements", name)
    return read_bytes(path, folder.opened).decode(errors="replace")


def _channels(written: Written, folder: Folder) -> Iterator[str | Path]:
    """Where conda's packages come from, the first one first: names are those of anaconda.org."""
    named = _checked(written, "channels", written.texts("channels"), _CHANNEL)
    if named and not written.texts("conda"):
        written.refuse(("channels",), "it has no packages of conda", 'Write conda = ["..."], too.')
    for name in named or (_CONDA_FORGE,) * bool(written.texts("conda")):
        if name.startswith("file:"):
            yield _beside(written, folder, "channels", name.removeprefix("file:"))
        elif _SECRET.search(name):
            remedy = "Name a channel that is open: its address stands in the image, for everybody."
            written.refuse(("channels",), "there is a password or a token in it", remedy)
        else:
            yield name.rstrip("/") if "://" in name else f"{_CHANNELS_OF_NAMES}/{name}"


def _files(written: Written, folder: Folder) -> Iterator[tuple[str, Path]]:
    table = written.found.get("files", {})
    if not isinstance(table, Mapping):
        written.refuse(("files",), "files is no table", 'Write [files], and "/target" = "source".')
    for target, source in sorted(table.items()):
        keys = ("files", target)
        if not isinstance(source, str):
            written.refuse(keys, "the source is no text", "Name a file or a folder.")
        if not target.startswith("/"):
            written.refuse(keys, f"{target!r} is no absolute path", "Write where in the image.")
        try:
            names_of(target)
        except Refused as error:
            written.refuse(keys, str(error), "Write where in the image.")
        yield target, _beside(written, folder, keys, source)


def _beside(written: Written, folder: Folder, keys: str | tuple[str, ...], name: str) -> Path:
    """The file *name*, which has to lie beside the recipe or below: a recipe that somebody else
    wrote takes nothing of the rest of the host into an image."""
    keys = (keys,) if isinstance(keys, str) else keys
    path = (folder.path / name).resolve()
    if name.startswith("/") or not path.is_relative_to(folder.path):
        written.refuse(keys, f"{name!r} is not beside the recipe", "Put it there.")
    if not path.exists():
        written.refuse(keys, f"there is no {name!r} beside it", "Put it there.")
    return path


def _time(written: Written) -> int:
    value: Any = written.found.get("date", _EPOCH)
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime(value.year, value.month, value.day, tzinfo=datetime.UTC)
    if not isinstance(value, datetime.datetime):
        written.refuse(("date",), "date is no date", "Write date = 2026-01-31, without quotes.")
    if value.tzinfo is None:
        value = value.replace(tzinfo=datetime.UTC)
    return int(value.timestamp())
