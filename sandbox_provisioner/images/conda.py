"""conda.py - in who makes images, with that person's rights: an environment of conda's packages.

::

    RECIPE.lock   beside the recipe: the very packages. Whoever has both has the same image
    a first box   whose root is this machine's, since rattler is there: it finds what fits
                  together, fetches and links it; no program of a package runs
    a second one  whose root is the base of the image: its Python starts, and compiles its library

What is fetched is kept for the next build of the same packages, and for no other.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import stat
import sys
import tempfile
from pathlib import Path

from sandbox_provisioner.errors import COMMAND, HostError, SpecError
from sandbox_provisioner.images import conda_in_box
from sandbox_provisioner.images.box import (
    BUILD,
    CACHE,
    CHANNELS,
    KERNEL,
    KERNELS_ID,
    Box,
    BoxOrder,
    Told,
    certificates,
    rules_of,
    run,
)
from sandbox_provisioner.images.layers import FolderLayer, Layer
from sandbox_provisioner.images.recipe import Recipe
from sandbox_provisioner.images.store import Store

_VERSION = 1  # of what a lock is made of
_LONGEST = 16 << 20
_DPKG_STATUS = "var/lib/dpkg/status"
_LIBC = re.compile(rb"^Package: libc6\n(?:\S.*\n| .*\n)*?^Version: (?:\d+:)?(\d+\.\d+)", re.M)
# Files are compiled with the hash of their source in them: `build._PIP`. What cannot be compiled,
# such as a template, no program can import either.
_COMPILE = """
export SOURCE_DATE_EPOCH="$1" PYTHONHASHSEED=0 HOME=/opt/build
/opt/kernel/bin/python -B -c 'import ipykernel' || exit
/opt/kernel/bin/python -m compileall -f -qq /opt/kernel/lib/python3.* || :
"""


def refuse_without_rattler(recipe: Recipe) -> None:
    """HostError where there is nobody who knows conda's packages."""
    if importlib.util.find_spec("rattler") is None:
        raise HostError(
            attempt=f"build {recipe.path}",
            answer="it wants packages of conda, and py-rattler, which gets them, is not installed",
            remedy=("Install it where this program is:",
                    f"{COMMAND}pip install 'sandbox-provisioner[conda]'"),
        )  # fmt: skip


def with_conda(
    recipe: Recipe, base: Layer, root: Path, store: Store, work: Path, box: Box, told: Told
) -> Layer:
    """The environment, over *base*, which is at *root* for a box."""
    glibc = libc_of(base)
    key = _key(recipe, glibc)
    cached = _cache_key(recipe, key)
    with store.making_layer(cached, told.step):
        stage, build = work / "kernel", work / "build"
        for folder in (stage, build):
            folder.mkdir(mode=0o755)
        is_locked = _take_lock(recipe, build, key)
        told.step("conda's packages, in a box")
        try:
            run(
                box, _find_and_link(recipe, glibc, stage, build, store.cache(cached)),
                f"install what {recipe.path} wants of conda", "the box",
                f"Correct the recipe; or remove {lock_of(recipe)}, if a package in it is gone. "
                "What has been fetched is kept: the next try begins here.",
            )  # fmt: skip
        finally:
            if not is_locked:
                _keep_lock(recipe, build, key)
    told.step("Its Python compiles, in a box")
    run(
        box, _compile(recipe, root, stage, build),
        f"start the Python of {recipe.path}", "it",
        "See what it says. A package may need others of apt's, or a newer suite.",
    )  # fmt: skip
    return FolderLayer(stage, KERNEL, KERNELS_ID, KERNELS_ID, recipe.time)


def _find_and_link(recipe: Recipe, glibc: str, stage: Path, build: Path, cache: Path) -> BoxOrder:
    local = [channel for channel in recipe.channels if isinstance(channel, Path)]
    words = {
        "specs": ["ipykernel", *recipe.conda],
        "channels": _shown(recipe),
        "glibc": glibc,
        "lock": f"{BUILD}/lock",
        "prefix": KERNEL,
        "cache": CACHE,
        "variables": {"HOME": BUILD, "TMPDIR": BUILD, "SSL_CERT_FILE": certificates(build)},
    }
    text = Path(conda_in_box.__file__).read_text()
    return BoxOrder(
        root="host",
        argv=(sys.executable, "-P", "-c", text, json.dumps(words)),
        volumes=(
            f"{stage}:{KERNEL}:rw", f"{build}:{BUILD}:rw", f"{cache}:{CACHE}:rw",
            *(f"{path}:{CHANNELS}/{at}:ro" for at, path in enumerate(local)),
        ),
        allow=tuple(
            rule
            for channel in recipe.channels
            if isinstance(channel, str)
            for rule in rules_of(channel)
        ),
    )  # fmt: skip


def _shown(recipe: Recipe) -> list[str]:
    """The channels as the box has them: a folder at a place of its own."""
    shown, local = [], 0
    for channel in recipe.channels:
        if isinstance(channel, Path):
            shown.append(f"file://{CHANNELS}/{local}")
            local += 1
        else:
            shown.append(channel)
    return shown


def _compile(recipe: Recipe, root: Path, stage: Path, build: Path) -> BoxOrder:
    return BoxOrder(
        root=str(root),
        argv=("/bin/sh", "-c", _COMPILE, "compile", str(recipe.time)),
        volumes=(f"{stage}:{KERNEL}:rw", f"{build}:{BUILD}:rw"),
        allow=(),
    )


def libc_of(base: Layer) -> str:
    """The version of the C library of *base*, which packages of conda ask for; "" for none."""
    for entry, content in base.members():
        if entry and content and entry.name.removeprefix("./") == _DPKG_STATUS:
            found = _LIBC.search(content.read(_LONGEST))
            return found[1].decode() if found else ""
    return ""


# -- the lock


def lock_of(recipe: Recipe) -> Path:
    """Where the lock of *recipe* is, or will be."""
    return recipe.folder.path / recipe.path.with_suffix(".lock").name


def _lock_at(recipe: Recipe) -> Path:
    """The same by the folder that is open, whatever its names lead to meanwhile."""
    return Path(f"/proc/self/fd/{recipe.folder.fd}", lock_of(recipe).name)


def _key(recipe: Recipe, glibc: str) -> str:
    """The same for all recipes whose packages of conda are found in the same way; nothing of this
    machine's names is in it."""
    folder = recipe.folder.path
    channels = [
        channel if isinstance(channel, str) else f"file:{channel.relative_to(folder)}"
        for channel in recipe.channels
    ]
    told = json.dumps([_VERSION, platform.machine(), recipe.conda, channels, glibc])
    return hashlib.sha256(told.encode()).hexdigest()


def _cache_key(recipe: Recipe, key: str) -> str:
    """Recipes of two folders may be two people's: nobody gets what another one's channel had."""
    told = json.dumps([key, str(recipe.folder.path)])
    return hashlib.sha256(told.encode()).hexdigest()


def _head(key: str) -> bytes:
    """The first line of a lock, by which it is known of what."""
    return f"# Of a recipe, {key}. Remove this file to have newer packages.\n".encode()


def _take_lock(recipe: Recipe, build: Path, key: str) -> bool:
    """Give the box the lock that there is of these very wishes; whether there is one."""
    text = _read(_lock_at(recipe))
    if not text.startswith(_head(key)):
        return False
    (build / "lock").write_bytes(text)
    return True


def _keep_lock(recipe: Recipe, build: Path, key: str) -> None:
    """What the box has found, if it has; HostError where it cannot be written."""
    text = _read(build / "lock")
    if not text:
        return
    lock = _lock_at(recipe)
    try:
        fd, new = tempfile.mkstemp(dir=lock.parent, prefix=f".{lock.name}-")
        try:
            with open(fd, "wb") as file:
                file.write(_head(key) + text)
                os.fchmod(fd, 0o644)
            os.rename(new, lock)
        except BaseException:
            os.unlink(new)
            raise
    except OSError as error:
        raise HostError(
            attempt=f"write {lock_of(recipe)}, which tells the packages that the recipe comes to",
            answer=error.strerror or str(error),
            remedy="The first build needs a folder that can be written to; later ones read it.",
        ) from None


def _read(path: Path) -> bytes:
    """All of the file, which a box may have made; b"" where there is none."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with contextlib.suppress(FileNotFoundError):
        try:
            with open(os.open(path, flags), "rb") as file:
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    text = file.read(_LONGEST + 1)
                    if len(text) <= _LONGEST:
                        return text
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _no_lock(path, error.strerror or str(error)) from None
        raise _no_lock(path, "it is no lock")
    return b""


def _no_lock(path: Path, answer: str) -> SpecError:
    return SpecError(attempt=f"read {path}", answer=answer, remedy="Remove it, to have a new one.")
