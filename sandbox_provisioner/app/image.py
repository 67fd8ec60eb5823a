"""app/image.py - a command of its own: `jupyter sandbox image` makes kernels' root file systems."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from traitlets import Unicode

from sandbox_provisioner.app.command import (
    COMMON_ALIASES,
    COMMON_FLAGS,
    SandboxCommand,
    silent_log,
)
from sandbox_provisioner.app.run import request_for_command, run_in_box, status_of
from sandbox_provisioner.app.tables import table
from sandbox_provisioner.broker.launcher import kernels_through
from sandbox_provisioner.caller import Caller
from sandbox_provisioner.errors import (
    COMMAND,
    SandboxError,
    SpecError,
    in_lines,
    told_as_host_error,
)
from sandbox_provisioner.images.box import BoxOrder
from sandbox_provisioner.images.build import build
from sandbox_provisioner.images.importing import import_image
from sandbox_provisioner.images.recipe import read_recipe
from sandbox_provisioner.images.store import Image, Store, check_name, find, store_of, stores_of
from sandbox_provisioner.images.tree import Bounds
from sandbox_provisioner.inside.printable import one_line, printable
from sandbox_provisioner.records import all_records
from sandbox_provisioner.units import format_bytes, parse_bytes

_ALIASES = {"most": "ImageApp.most", **COMMON_ALIASES}
# Each with the words behind it.
_WORDS = {
    "build": ("NAME", "RECIPE"),
    "import": ("NAME", "ARCHIVE"),
    "list": (),
    "remove": ("NAME",),
    "check": ("NAME|PATH",),
}
_HEAD = ("name", "size", "made", "kernel", "of")
_LOOK = (
    "import sys, ipykernel; "
    "print('Python', sys.version.split()[0], 'with ipykernel', ipykernel.__version__)"
)


class ImageApp(SandboxCommand):
    """Builds, imports, lists, removes and checks images."""

    usage = (
        "jupyter sandbox image [options] build NAME RECIPE | import NAME ARCHIVE | list | "
        "remove NAME | check NAME|PATH"
    )
    description = (
        "Make root file systems for kernels, which a kernel names with rootfs: build one of "
        "Debian's and Python's packages, as a recipe has them, or import one that Docker, podman "
        "or skopeo has written. Root's images are for everybody, a user's own for that user. "
        "check starts a kernel's box on one, and tells what its Python is. docs/images.md has all "
        "that a recipe can say."
    )
    examples = """
    jupyter sandbox image build course recipe.toml
    skopeo copy docker://quay.io/jupyter/scipy-notebook oci-archive:scipy.tar
    jupyter sandbox image import scipy scipy.tar
    jupyter sandbox image check scipy
    jupyter sandbox install --rootfs scipy --name scipy
    """
    most = Unicode("64G", help="import: refuse an image whose files have more than that.").tag(
        config=True
    )
    aliases = _ALIASES
    flags = COMMON_FLAGS

    def start(self) -> None:
        """Called once by `main`."""
        word, *more = self.extra_args or [""]
        if word not in _WORDS or len(more) != len(_WORDS[word]):
            known = ", ".join(" ".join((name, *words)) for name, words in _WORDS.items())
            raise self.wrong(f"write one of: {known}")
        with told_as_host_error(f"{word} an image"):
            getattr(self, f"_{word}")(*more)
            if word != "list" and self._runs_nothing():
                _own_store().collect()

    def _runs_nothing(self) -> bool:
        """Whether none of this user's kernels can have one of our directories as its root."""
        if all_records(self.runtime()):
            return False
        broker = self.provisioner().broker_socket
        if os.geteuid() == 0 or not os.path.exists(broker):
            return True
        try:
            return not kernels_through(broker)
        except SandboxError:  # who does not answer may have some
            return False

    def _build(self, name: str, path: str) -> None:
        check_name(name)
        with ExitStack() as opened, _Shown() as shown:
            recipe = read_recipe(path, opened)
            image = build(name, recipe, _own_store(), self._box(shown), shown)
        self._tell_made(image)

    def _import(self, name: str, path: str) -> None:
        bounds = Bounds(size_bytes=parse_bytes("most", self.most))
        with _Shown() as shown:
            shown.step(f"Reading {path}")
            image, left_out = import_image(name, path, _own_store(), bounds, shown.progress)
        self._tell_made(image)
        if left_out:
            print(f"{left_out} entries are left out that no box could use, such as devices.")

    def _tell_made(self, image: Image) -> None:
        print(printable(f"{image.name} is {image.digest}, {format_bytes(image.size_bytes)}."))
        if not image.python:
            print(in_lines(_NO_KERNEL))
            return
        print(printable(f"Its kernel is {image.python}. To use it:"))
        print(f"{COMMAND}jupyter sandbox install --rootfs {image.name} --name {image.name}")

    def _list(self) -> None:
        rows = [
            _row(image, store)
            for store in stores_of(Caller.this_process())
            for image in store.images()
        ]
        rows += [
            (name, "unusable", "", "", f"cannot be read, in {store.path}")
            for store in stores_of(Caller.this_process())
            for name in store.unusable()
        ]
        print(
            table([_HEAD, *rows], widest=(64, 12, 16, 40, 60)) if rows else "There are no images."
        )

    def _remove(self, name: str) -> None:
        check_name(name)
        _own_store().remove(name)
        print(f"Removed {name}. Kernels that run on it have it until they end.")

    def _check(self, name: str) -> None:
        python = ""
        if "/" not in name:
            image, _ = find(name, Caller.this_process())
            store = next(s for s in stores_of(Caller.this_process()) if s.image(name))
            if store.wrong_bytes(image):
                raise SpecError(
                    attempt=f"check the image {name!r}",
                    answer="its file has changed since it was made",
                    remedy="Make it anew.",
                )
            print(printable(f"{name} is {image.digest}, as it was made of {image.origin}."))
            python = image.python
        else:
            name = os.path.abspath(name)
        argv = (python or "python3", "-c", _LOOK)
        order = BoxOrder(root=name, argv=argv, volumes=(), allow=())
        if self._run(order) != 0:
            raise SpecError(
                attempt=f"use the image {name!r} for a kernel",
                answer="no Python with ipykernel starts in it",
                remedy=_NO_KERNEL,
            )

    # -- the box

    def _box(self, shown: _Shown) -> Any:
        def run(order: BoxOrder) -> int:
            shown.pause()
            return self._run(order)

        return run

    def _run(self, order: BoxOrder) -> int:
        """In a box of ours, which has nothing of the host but what *order* tells."""
        provisioner = self.provisioner()
        provisioner.log = silent_log()  # what it finds of this machine's settings is no news here
        options = {
            "rootfs": order.root,
            "layer": "none",
            "workdir": "none",
            "volumes": list(order.volumes),
            "network": "gateway" if order.allow else "none",
            "network_allow": list(order.allow),
            "warm": False,
        }
        for option, value in options.items():
            setattr(provisioner, option, value)
        request = request_for_command(provisioner, list(order.argv), "/")
        return status_of(asyncio.run(run_in_box(provisioner.starter, request)))


_NO_KERNEL = (
    "It has no Python with ipykernel, so no kernel starts in it. Add ipykernel where it is made, "
    "such as with RUN pip install ipykernel in a Dockerfile, and import it anew."
)


def _own_store() -> Store:
    return store_of(Caller.this_process())


def _row(image: Image, store: Store) -> tuple[str, ...]:
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(image.made_at))
    size = format_bytes(image.size_bytes)
    return image.name, size, made, image.python or "none", one_line(image.origin)


class _Shown:
    """What goes on, on standard error: a line that changes where that is a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False)
        columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
        self._bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("", total=None)
        self._lines = not console.is_terminal
        self._last = ""

    def __enter__(self) -> _Shown:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, text: str) -> None:
        """Something else begins."""
        text = one_line(text)
        if self._lines and text != self._last:
            print(text, file=sys.stderr)
        self._last = text
        self._bar.reset(self._task, total=None, description=text)

    def progress(self, done: int, whole: int) -> None:
        """Of what began last."""
        self._bar.update(self._task, completed=done, total=whole or None)

    def pause(self) -> None:
        """Somebody else writes to the terminal."""
        self._bar.stop()
        if not self._lines:
            print(self._last, file=sys.stderr)
