"""build.py - in who makes images, with that person's rights: from a recipe to an image.

::

    base     mmdebstrap, from the archive of the distribution     layers/<what it is made of>.tar
    kernel   pip or conda, in a box                               /opt/kernel of the image
    files    what the recipe copies
    image    all of it as one squashfs file

Who is trusted with what: the distribution's packages, which apt checks by their signatures, run
their scripts as root of a user namespace, or as root in a chroot where there is none to be had.
What pip installs runs its scripts in a box, as any kernel does: it sees the base, the folder that
it fills, and the index. A base is kept for a day, so that a build whose pip failed goes on
from there.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sandbox_provisioner.errors import COMMAND, HostError, Remedy, SpecError, joined
from sandbox_provisioner.facilities.ids.facts import find_id_range, grant
from sandbox_provisioner.images.box import (
    BUILD,
    KERNEL,
    KERNELS_ID,
    WHEELS,
    Box,
    BoxOrder,
    Told,
    certificates,
    rules_of,
    run,
)
from sandbox_provisioner.images.conda import refuse_without_rattler, with_conda
from sandbox_provisioner.images.layers import FileLayer, FolderLayer, Layer, TarLayer
from sandbox_provisioner.images.oci import python_in
from sandbox_provisioner.images.recipe import Recipe
from sandbox_provisioner.images.squash import squash
from sandbox_provisioner.images.store import Image, Store
from sandbox_provisioner.images.tree import Bounds, Entry, Kind, Refused, Tree

_BOUNDS = Bounds()
# A base is what the archive had when it was made: later there are security updates.
_FRESH_SECONDS = 24 * 3600
# What dpkg and apt say of a disk without room.
_FULL = ("No space left", "enough free space")
# What differs from build to build, or is this machine's own.
_LEFT_OUT = re.compile(
    r"(etc/(machine-id|resolv\.conf|hostname)|var/lib/dbus/machine-id|var/cache/ldconfig/.+|"
    r"var/cache/(apt|debconf|man)/.+|var/lib/apt/lists/.+|var/log/.+|(tmp|run|root|dev)/.+)"
)
# In the box; the words of the recipe are its arguments. Files are compiled with the hash of their
# source in them, since all times become one (PEP 552; SOURCE_DATE_EPOCH).
_PIP = """
set -e
export SOURCE_DATE_EPOCH="$1" TMPDIR=/opt/build PIP_CERT="$2" PYTHONHASHSEED=0 HOME=/opt/build
export REQUESTS_CA_BUNDLE="$2" SSL_CERT_FILE="$2"  # requests takes them for PIP_CERT
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off
shift 2
unset PIP_REQUIRE_VIRTUALENV PIP_USER PYTHONUSERBASE
python3 -m venv /opt/kernel
exec /opt/kernel/bin/python -m pip install "$@"
"""


def build(name: str, recipe: Recipe, store: Store, box: Box, told: Told) -> Image:
    """Make the image that *recipe* describes, as *name* of *store*; SandboxError, and nothing of it
    is in the store then but a base to go on from."""
    _refuse_missing_programs(recipe)
    store.prepare()
    with _told(recipe), store.building(name), store.workplace() as work:
        base = _base(recipe, store, work, told)
        layers: list[Layer] = [_Cleaned(base, recipe.time)]
        if recipe.has_pip or recipe.conda:
            told.step("Preparing a box")
            root = store.for_a_box(_for_the_box(recipe, layers[0], work, told))
            if recipe.conda:
                kernel = with_conda(recipe, layers[0], root, store, work, box, told)
            else:
                kernel = _with_pip(recipe, root, work, box, told)
            layers.append(kernel)
            store.drop(root)
        layers += (_copied(recipe, source, target) for target, source in recipe.files)
        file = work / "image"
        told.step("Writing the image")
        tree = _tree_of(layers)
        squash(tree, layers, file, recipe.time, told.progress)
        python = python_in(tree, {})
        if not python:
            raise _no_kernel(recipe)
        origin = f"recipe {recipe.path.resolve()}"
        return store.add(file, name=name, origin=origin, python=python)


@contextlib.contextmanager
def _told(recipe: Recipe) -> Iterator[None]:
    """Let what is wrong with what goes into the image be told as an error."""
    try:
        yield
    except Refused as error:
        raise SpecError(
            attempt=f"build {recipe.path}",
            answer=str(error),
            remedy="See what it copies, and what its packages install.",
        ) from None


def _refuse_missing_programs(recipe: Recipe) -> None:
    """Before anything takes minutes."""
    if recipe.conda:
        refuse_without_rattler(recipe)
    _refuse_without_ids(recipe)
    for program, package in (("mmdebstrap", "mmdebstrap"), ("sqfstar", "squashfs-tools")):
        if shutil.which(program) is None:
            raise HostError(
                attempt=f"build {recipe.path}",
                answer=f"there is no {program} here",
                remedy=("Install it:", f"{COMMAND}apt install {package}"),
            )


def _refuse_without_ids(recipe: Recipe) -> None:
    """What Debian's packages install belongs to several users."""
    if os.geteuid() == 0:
        return
    try:
        find_id_range(os.geteuid())
    except HostError as error:
        attempt = f"build {recipe.path}, for which mmdebstrap maps a range of user ids"
        raise HostError(attempt=attempt, answer=error.answer, remedy=error.steps[:-1]) from None


def _no_kernel(recipe: Recipe) -> HostError:
    return HostError(
        attempt=f"build {recipe.path}",
        answer="there is no ipykernel in what came of it",
        remedy="See whether the recipe removes it: jupyter needs it in the image.",
    )


# -- the base


def _base(recipe: Recipe, store: Store, work: Path, told: Told) -> Path:
    """The tar of the distribution's packages, made if it is not there from an earlier build."""
    kept = store.layer(recipe.base_key)
    with store.making_layer(recipe.base_key, told.step):
        if _is_fresh(kept):
            return kept
        count = len(recipe.packages)
        told.step(f"Debian {recipe.suite} with {count} packages that the recipe needs")
        made = work / "base.tar"
        _run_mmdebstrap(recipe, made, work, told)
        store.keep_layer(made, recipe.base_key)
    return kept


def _is_fresh(base: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return 0 <= time.time() - base.stat().st_mtime < _FRESH_SECONDS
    return False


def _run_mmdebstrap(recipe: Recipe, target: Path, work: Path, told: Told) -> None:
    # A group of its own: where the disk is full it sends SIGHUP to all of its group.
    with subprocess.Popen(
        _mmdebstrap(recipe, target), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, errors="backslashreplace", process_group=0,
        env=_variables(recipe, work),
    ) as process:  # fmt: skip
        try:
            said = _followed(process, recipe, told)
        except BaseException:
            os.killpg(process.pid, signal.SIGINT)  # as the terminal would: it cleans up
            raise
    if process.returncode != 0:
        raise _mmdebstrap_failed(recipe, said)


def _followed(process: subprocess.Popen[str], recipe: Recipe, told: Told) -> list[str]:
    """What it has said last, when it says no more."""
    assert process.stderr
    said: list[str] = []
    for line in process.stderr:
        said.append(line.strip())
        del said[:-40]
        if line.startswith("I: "):
            told.step(f"Debian {recipe.suite}: {line[3:].strip()}")
    return said


def _mmdebstrap(recipe: Recipe, target: Path) -> list[str]:
    """No word of the recipe's is anything but a name: `recipe.py` has looked."""
    return [
        "mmdebstrap", f"--mode={_mode()}", "--variant=apt", "--format=tar",
        f"--components={','.join(recipe.components)}", f"--include={','.join(recipe.packages)}",
        # What is not whole is thrown away, and what is whole is written to the disk by us.
        "--dpkgopt=force-unsafe-io",
        '--aptopt=Acquire::Languages "none"', '--aptopt=APT::Install-Recommends "false"',
        "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        recipe.suite, str(target), *recipe.mirrors,
    ]  # fmt: skip


def _mode() -> str:
    """Where Linux makes user namespaces, the packages' scripts have nobody's rights outside."""
    with contextlib.suppress(OSError, ValueError):
        if os.geteuid() != 0 or int(Path("/proc/sys/user/max_user_namespaces").read_text()):
            return "unshare"
    return "root"


def _variables(recipe: Recipe, work: Path) -> dict[str, str]:
    kept = ("PATH", "HOME", "http_proxy", "https_proxy", "no_proxy")
    variables = {name: os.environ[name] for name in kept if name in os.environ}
    variables |= {"SOURCE_DATE_EPOCH": str(recipe.time), "LC_ALL": "C.UTF-8"}
    if os.geteuid() == 0:  # another user's namespace could not look into it
        variables["TMPDIR"] = str(work)
    return variables


def _mmdebstrap_failed(recipe: Recipe, said: Sequence[str]) -> HostError:
    errors = [line[3:] for line in said if line.startswith(("E: ", "W: "))]
    answer = joined(errors[-4:]) or joined(said[-4:]) or "mmdebstrap was ended"
    remedy: Remedy = "See whether the mirror has that suite and those packages."
    if any(words in line for line in said for words in _FULL):
        answer, remedy = "the disk is full", "Make room there: a base takes 300 MB and more."
    elif any("/etc/sub" in line for line in errors):
        answer = next(line for line in errors if "/etc/sub" in line)
        name = pwd.getpwuid(os.geteuid()).pw_name  # by which alone mmdebstrap looks there
        remedy = ("As administrator:", f"{COMMAND}{grant(name)}")
    return HostError(attempt=f"install the packages of {recipe.path}", answer=answer, remedy=remedy)


@dataclass(frozen=True, slots=True)
class _Cleaned:
    """The base in *tar* without what is this machine's own; later than *time* nothing is."""

    tar: Path
    time: int

    def members(self) -> Iterator[tuple[Entry | None, IO[bytes] | None]]:
        layer = TarLayer(lambda: self.tar.open("rb"), "", _BOUNDS.size_bytes)
        for entry, content in layer.members():
            if entry and _LEFT_OUT.fullmatch(entry.name.removeprefix("./").strip("/")):
                yield None, None
            else:
                yield entry, content


def _tree_of(layers: Sequence[Layer]) -> Tree:
    tree = Tree(_BOUNDS)
    for number, layer in enumerate(layers):
        for at, (entry, _) in enumerate(layer.members()):
            if entry:
                tree.add(entry, number, at)
    return tree


# -- what comes on top


def _with_pip(recipe: Recipe, root: Path, work: Path, box: Box, told: Told) -> Layer:
    """An environment of Python's, made in a box with this *root*."""
    stage, build = work / "kernel", work / "build"
    for folder in (stage, build):
        folder.mkdir(mode=0o755)
    order = BoxOrder(
        root=str(root),
        argv=("/bin/sh", "-c", _PIP, "pip", str(recipe.time), certificates(build),
              *_pip_words(recipe, build)),
        volumes=(f"{stage}:{KERNEL}:rw", f"{build}:{BUILD}:rw",
                 *((f"{recipe.wheels}:{WHEELS}:ro",) if recipe.wheels else ())),
        allow=_index(recipe),
    )  # fmt: skip
    told.step("pip installs, in a box")
    run(
        box, order, f"install what {recipe.path} wants of pip", "pip",
        "Correct the recipe. What apt has installed is kept: the next try begins here.",
    )  # fmt: skip
    return FolderLayer(stage, KERNEL, KERNELS_ID, KERNELS_ID, recipe.time)


def _index(recipe: Recipe) -> tuple[str, ...]:
    """Whom pip speaks with."""
    if recipe.index:
        return rules_of(recipe.index)
    return () if recipe.wheels else ("packages",)


def _for_the_box(recipe: Recipe, base: Layer, work: Path, told: Told) -> Path:
    """The base as a root, with the places that a box fills."""
    tree, root = _tree_of([base]), work / "base.squashfs"
    for path in (KERNEL, WHEELS, BUILD):
        tree.add(Entry(name=path, kind=Kind.FOLDER), 1, 0)
    squash(tree, [base], root, recipe.time, told.progress)
    return root


def _pip_words(recipe: Recipe, build: Path) -> list[str]:
    words = ["--quiet"]
    if recipe.index:
        words += ["--index-url", recipe.index]
    elif recipe.wheels:
        words += ["--no-index"]
    if recipe.wheels:
        words += ["--find-links", WHEELS]
    if recipe.requirements:
        (build / "requirements.txt").write_text(recipe.requirements)
        words += ["--requirement", f"{BUILD}/requirements.txt"]
    return [*words, "ipykernel", *recipe.pip]


def _copied(recipe: Recipe, source: Path, target: str) -> Layer:
    name, opened = target.strip("/"), recipe.folder.opened
    fd = opened(source)
    try:
        is_folder = stat.S_ISDIR(os.fstat(fd).st_mode)
    finally:
        os.close(fd)
    if is_folder:
        return FolderLayer(source, name, mtime=recipe.time, opened=opened)
    return FileLayer(source, name, recipe.time, opened)
