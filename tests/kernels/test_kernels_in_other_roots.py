"""Kernels in another root file system than the host's: cold, from a nursery in it, from a spare."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import roots
from warmth import came_from, made, spares

from sandbox_provisioner.provisioner import StartRefused
from sandbox_provisioner.warm import ahead

pytestmark = pytest.mark.requires("userns")
WHERE = "import ipykernel, sys; print(sys.executable, sys.prefix, ipykernel.__file__)"
THERE = f"{roots.PYTHON} /usr /usr/lib/{roots.LIBRARY}/site-packages/ipykernel/__init__.py\n"
FILE = pytest.param("squashfs", marks=pytest.mark.requires("root", "mksquashfs"))


def _root(kind: str) -> str:
    return str(roots.directory() if kind == "directory" else roots.image(kind))


@pytest.mark.parametrize("kind", ["directory", FILE])
def test_a_kernel_runs_the_interpreter_of_its_root(kernel: Any, kind: str) -> None:
    with kernel(rootfs=_root(kind)) as k:
        assert k.run(WHERE) == THERE
        assert k.run("open('/etc/os-release').readline()") == "'ID=tiny\\n'"
        k.manager.restart_kernel()
        k.client.wait_for_ready(timeout=60)
        assert k.run(WHERE) == THERE


@pytest.mark.requires("root", "mksquashfs")
def test_the_file_of_its_root_stays_mounted_for_the_next_one(kernel: Any) -> None:
    path = Path(shutil.copy(roots.image("squashfs"), roots.folder() / "stays.squashfs"))
    for _ in range(2):
        with kernel(rootfs=str(path)) as k:
            assert k.run(WHERE) == THERE
        assert len(roots.devices_of(path)) == 1
    ahead.end_own()
    assert roots.is_let_go_of(path)
    path.unlink()


@pytest.mark.parametrize("kind", [FILE])
def test_its_nursery_runs_in_that_root_and_its_kernels_see_none_of_our_code(
    warm: Any, runtime_dir: Path, kind: str
) -> None:
    root = _root(kind)
    with warm(rootfs=root, layer="none"):
        nursery = made(runtime_dir)
        with warm(rootfs=root, layer="none") as k:
            assert came_from(k) == nursery.sandbox_id
            assert k.run(WHERE) == THERE
            assert k.run("import os; os.path.exists('/.sandbox-provisioner')") == "False"
            assert "Error" in k.run("open('/usr/x', 'w')")
        with warm() as other:
            assert came_from(other) == ""
            assert other.run(WHERE) != THERE


def test_a_spare_waits_in_its_root(warm: Any, runtime_dir: Path) -> None:
    root = _root("directory")
    with warm(rootfs=root, spares=1):
        ahead.wait()
        (spare,) = spares(runtime_dir)
        with warm(rootfs=root, spares=1) as k:
            assert k.provisioner.handle.record.group == spare.sandbox_id
            assert k.run(WHERE) == THERE
            assert k.run("import os; os.getcwd()") == repr(os.getcwd())


def test_who_starts_a_kernel_is_told_what_its_root_lacks(kernel: Any, request: Any) -> None:
    root = roots.copy(f"lacks-{os.getpid()}")
    request.addfinalizer(lambda: shutil.rmtree(root))
    (root / "usr/bin/python3").unlink()
    with pytest.raises(StartRefused, match="no such program in it"), kernel(rootfs=str(root)):
        pass
