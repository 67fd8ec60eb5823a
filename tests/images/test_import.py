"""An image that another engine has made, as the root of a box: by its path, and by a name."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import roots
from layouts import Layout, layer, member

from sandbox_provisioner.caller import Caller
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.images import store as module
from sandbox_provisioner.images.importing import import_image
from sandbox_provisioner.images.store import Store, store_of
from sandbox_provisioner.images.tree import Bounds

pytestmark = pytest.mark.requires("sqfstar", "userns")


@pytest.fixture
def store(new_folder: Any, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Ours for this test: root's elsewhere, a user's in a home directory of its own."""
    monkeypatch.setattr(module, "ROOTS_STORE", new_folder() / "images")
    monkeypatch.setenv("HOME", str(new_folder()))
    return store_of(Caller.this_process())


@pytest.fixture
def layout(new_folder: Any) -> Path:
    """The small root as an OCI image, in two layers."""
    first = io.BytesIO()
    with tarfile.open(fileobj=first, mode="w") as tar:
        tar.add(roots.directory(), arcname=".")
    second = layer(member("etc/os-release", b"ID=imported\n"), member("usr/bin/.wh.touch", b""))
    made = Layout(new_folder() / "layout")
    made.fill(first.getvalue(), second, pack=bytes)
    return made.path


def look():
    import os
    import sys

    return [open("/etc/os-release").read(), sys.executable, os.path.exists("/usr/bin/touch")]


SEEN = ["ID=imported\n", roots.PYTHON, False]


def _a_box_has_it_as_its_root(run_inside: Any, store: Store, layout: Path) -> None:
    assert run_inside(look, rootfs=str(layout)) == SEEN
    (image,) = store.images()
    made = store.file(image).stat()
    # The next start finds it.
    assert run_inside(look, rootfs=str(layout)) == SEEN
    assert store.file(image).stat() == made
    again, _ = import_image("course", str(layout), store, Bounds(), lambda *_: None)
    assert again.blob == image.blob
    assert again.python == roots.PYTHON
    told = subprocess.run(["unsquashfs", "-lln", store.file(again)], capture_output=True, text=True)
    # Whoever makes it: the same image has the same digest.
    owners = {
        line.split()[1] for line in told.stdout.splitlines() if line.endswith("squashfs-root")
    }
    assert owners == {"0/0"}
    assert run_inside(look, rootfs="course") == SEEN


@pytest.mark.requires("root")
def test_a_box_has_it_as_its_root(run_inside, store, layout):
    _a_box_has_it_as_its_root(run_inside, store, layout)


@pytest.mark.ordinary_user
def test_an_ordinary_users_box_has_it_as_its_root(run_inside, store, layout):
    _a_box_has_it_as_its_root(run_inside, store, layout)


def test_a_box_keeps_its_root_when_the_image_is_removed(sandbox, store, layout):
    import_image("course", str(layout), store, Bounds(), lambda *_: None)
    with sandbox(rootfs="course") as box:
        store.remove("course")
        assert store.images() == []
        assert box.call(look) == SEEN
    with pytest.raises(SpecError, match="there is none in"), sandbox(rootfs="course"):
        pass


def test_no_kernel_writes_to_what_its_root_is_made_of(sandbox, store, layout, workdir):
    os.rename(layout, workdir / "layout")
    told = pytest.raises(SpecError, match="which the kernel may write to, lies in it or around it")
    with told, sandbox(rootfs=str(workdir / "layout")):
        pass


def test_a_broken_archive_starts_nothing_and_leaves_nothing(sandbox, store, layout):
    blob = max((layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    with blob.open("r+b") as file:
        file.truncate(blob.stat().st_size // 2)
    told = pytest.raises(SpecError, match="is not what its digest says")
    with told, sandbox(rootfs=str(layout)):
        pass
    assert store.images() == []
    assert not list((store.path / "work").iterdir())
    assert not list((store.path / "blobs").iterdir())
