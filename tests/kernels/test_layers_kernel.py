"""Notebooks that install: what they find after a restart, and in the next kernel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import roots
from test_pip import WHEEL, wheel
from warmth import came_from, made, spares

from sandbox_provisioner.facilities.storage import images
from sandbox_provisioner.layers import disks
from sandbox_provisioner.layers.kept import layers_of
from sandbox_provisioner.warm import ahead

pytestmark = pytest.mark.requires("userns")

APP = (sys.executable, "-m", "sandbox_provisioner.app")
PATIENCE_SECONDS = 60
INSTALL = f"!pip install --no-index ./{WHEEL}"
USE = "import tiny_thing; print(tiny_thing.__file__)"


@pytest.fixture
def layers(new_folder: Callable[[], Path]) -> Path:
    return new_folder()


@pytest.fixture
def wheel_there(workdir: Path) -> None:
    (workdir / WHEEL).write_bytes(wheel())


def restarted(k: Any) -> Any:
    k.manager.restart_kernel()
    k.client.wait_for_ready(timeout=PATIENCE_SECONDS)
    return k


def layer(layers: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [*APP, "layer", f"--layer-dir={layers}", *words]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


def test_what_a_cell_installs_is_there_after_a_restart(kernel, layers, wheel_there):
    with kernel(layer="kernel", layer_dir=str(layers)) as k:
        k.run(INSTALL)
        where = restarted(k).run(USE)
        assert where.startswith("/home/jovyan/.local/lib/python")
        name = k.provisioner.sandbox_id
        assert kept_of(layers, name)
    assert not kept_of(layers, name)


def test_what_a_cell_installs_is_there_in_the_users_next_kernel_until_it_is_reset(
    kernel, layers, wheel_there
):
    options = {"layer": "user", "layer_dir": str(layers)}
    with kernel(**options) as k:
        k.run(INSTALL)
        refused = layer(layers, "reset", "host")
        assert (refused.returncode, "Shut that kernel down first" in refused.stderr) == (1, True)
    with kernel(**options) as k:
        assert k.run(USE).startswith("/home/jovyan/.local/lib/python")
    [told] = json.loads(layer(layers, "list", "--json").stdout)
    assert (told["name"], told["held"], told["root"]) == ("host", False, "host")
    assert told["files"] > 5
    assert "had it last" in layer(layers, "list").stdout
    assert layer(layers, "reset", "host").returncode == 0
    assert list(layers_of(layers, os.geteuid())) == []
    with kernel(**options) as k:
        assert "ModuleNotFoundError" in k.run(USE)
    assert "Did you mean 'host'" in layer(layers, "reset", "hots").stderr


@pytest.mark.ordinary_user
def test_an_ordinary_users_packages_last_as_well(kernel, layers, wheel_there):
    options = {"layer": "user", "layer_dir": str(layers)}
    with kernel(**options) as k:
        k.run(INSTALL)
    with kernel(**options) as k:
        assert k.run(USE).startswith("/home/jovyan/.local/lib/python")


# -- over another root


@pytest.fixture
def own_root() -> Iterator[str]:
    """A root whose packages belong to the kernel's user, with pip in it."""
    root = roots.copy(f"pip-{os.getpid()}")
    owner = 1000 if os.geteuid() == 0 else os.geteuid()
    for folder, folders, files in os.walk(root):
        for name in (".", *folders, *files):
            os.chown(os.path.join(folder, name), owner, owner, follow_symlinks=False)
    yield str(root)
    shutil.rmtree(root)


LEAVE = "open('/usr/lib/new', 'w').write('x'); open('/tmp/new', 'w').write('x')"
LEFT = "import os; [os.path.exists(path) for path in ('/usr/lib/new', '/tmp/new')]"


def test_what_is_written_over_another_root_outlives_a_restart_by_default_and_no_shutdown(
    kernel, layers, own_root
):
    options = {"rootfs": own_root, "layer_dir": str(layers)}
    with kernel(**options) as k:
        k.run(LEAVE)
        assert k.run(LEFT) == "[True, True]"
        assert restarted(k).run(LEFT) == "[True, False]"
        assert restarted(k).run(LEFT) == "[True, False]"
        name = k.provisioner.sandbox_id
        assert kept_of(layers, name)
    assert not kept_of(layers, name)
    with kernel(**options) as k:
        assert k.run(LEFT) == "[False, False]"


def kept_of(layers: Path, name: str) -> bool:
    return os.path.exists(layers / "kernel" / name) or images.is_there(name)


@pytest.mark.ordinary_user
def test_it_does_so_for_an_ordinary_user(kernel, layers, own_root):
    with kernel(rootfs=own_root, layer_dir=str(layers)) as k:
        k.run(LEAVE)
        assert restarted(k).run(LEFT) == "[True, False]"
    assert os.listdir(layers / "kernel") == []


def test_a_first_start_comes_from_a_nursery_and_a_restart_finds_what_it_has_written(
    warm, layers, own_root, runtime_dir
):
    options = {"rootfs": own_root, "layer_dir": str(layers)}
    with warm(**options):
        nursery = made(runtime_dir)
        with warm(**options) as k:
            assert came_from(k) == nursery.sandbox_id
            k.run(LEAVE)
            assert restarted(k).run(LEFT) == "[True, False]"
            assert came_from(k) == ""


def test_a_spare_has_a_layer_that_its_kernel_keeps(warm, layers, own_root, runtime_dir):
    options = {"rootfs": own_root, "layer_dir": str(layers), "spares": 1}
    with warm(**options):
        ahead.wait()
        (spare,) = spares(runtime_dir)
        with warm(**options) as k:
            assert k.provisioner.handle.record.group == spare.sandbox_id
            k.run(LEAVE)
            assert restarted(k).run(LEFT) == "[True, False]"
            name = k.provisioner.sandbox_id
        assert not kept_of(layers, name)
        assert not kept_of(layers, spare.sandbox_id)


FILL = """
import os
fd = os.open("/usr/lib/new", os.O_WRONLY | os.O_CREAT)
while True:
    os.write(fd, bytes(1 << 20))
"""


@pytest.mark.requires("root", "loop")
def test_a_layer_that_is_full_is_told_and_its_kernel_goes_on(kernel, own_root, monkeypatch):
    monkeypatch.setattr(disks, "usual_size", lambda *_, **__: 32 << 20)
    with kernel(rootfs=own_root) as k:
        request = k.client.execute(FILL)
        told = k.until(lambda m: "is full" in m["content"].get("text", ""), request)
        assert "/home/jovyan/.local is full; it holds" in told["content"]["text"]
        assert "raise disk_limit" in told["content"]["text"]
        assert k.run("1 + 1") == "2"
