"""An image with packages of conda, of a channel on this disk: built, locked, and a kernel in it."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import ipykernel
import pytest
import roots
from channels import PLACEHOLDER, Channel

from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.images import build as module
from sandbox_provisioner.images import store as stores
from sandbox_provisioner.images.store import Image, Store

pytestmark = [
    pytest.mark.requires("root", "sqfstar", "userns"),
    pytest.mark.timeout(300),
]
RECIPE = 'conda = ["tool>=1"]\nchannels = ["file:channel"]\n'
PACKAGES = f"lib/{roots.LIBRARY}/site-packages"
DPKG = "Package: libc6\nStatus: install ok installed\nVersion: 2.36-9+deb12u10\n\n"


@pytest.fixture
def base(request: Any, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What mmdebstrap would have made: a shell, or the small root with Python where the test asks
    for that; how often it was asked to."""
    asked: list[object] = []
    root = roots.directory if hasattr(request, "param") else roots.shell

    def make(recipe: object, target: Path, work: Path, told: Any) -> None:
        asked.append(recipe)
        (work / "status").write_text(DPKG)
        with tarfile.open(target, "w") as tar:
            tar.add(root(), arcname=".")
            tar.add(work / "status", arcname="./var/lib/dpkg/status")

    monkeypatch.setattr(module, "_run_mmdebstrap", make)
    which = module.shutil.which
    monkeypatch.setattr(
        module.shutil, "which",
        lambda name, **more: "/bin/true" if name == "mmdebstrap" else which(name, **more),
    )  # fmt: skip
    return asked


@pytest.fixture
def channel(tmp_path: Path) -> Channel:
    """With a Python that does nothing, a kernel for it, and a tool with a script of its own for
    when it is installed."""
    made = Channel(tmp_path / "channel")
    made.add(
        "python", {"bin/python3": "#!/bin/sh\n"}, executable=("bin/python3",),
        links={"bin/python": "python3"}, depends=("__glibc >=2.17,<2.37",),
    )  # fmt: skip
    made.add("ipykernel", {f"{PACKAGES}/ipykernel/__init__.py": ""}, depends=("python",))
    add_tool(made, "1.0")
    return made


def add_real_kernel(channel: Channel) -> None:
    """A Python, which is that of the base, and ipykernel itself."""
    channel.add(
        "python", {"pyvenv.cfg": "home = /usr/bin\ninclude-system-site-packages = true\n"},
        links={"bin/python": "python3", "bin/python3": "/usr/bin/python3"}, version="3.99",
    )  # fmt: skip
    source = Path(ipykernel.__file__).parent
    files = {f"{PACKAGES}/ipykernel/{p.relative_to(source)}": p.read_bytes()
             for p in source.rglob("*.py") if "tests" not in p.parts}  # fmt: skip
    channel.add("ipykernel", files, version="99", depends=("python >=3.99",))


def add_tool(channel: Channel, version: str) -> Path:
    return channel.add(
        "tool",
        {
            "bin/tool": f"#!/bin/sh\necho {version} at {PLACEHOLDER}\n",
            "bin/.tool-post-link.sh": "#!/bin/sh\ntouch $PREFIX/ran\n",
            f"{PACKAGES}/tool.py": f"version = {version!r}\n",
        },
        version=version, executable=("bin/tool", "bin/.tool-post-link.sh"),
    )  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def image(name: str) -> Image:
    (found,) = (one for one in store().images() if one.name == name)
    return found


def store() -> Store:
    return Store(stores.ROOTS_STORE, os.geteuid())


def in_image(name: str, path: str) -> str:
    words = ["unsquashfs", "-cat", str(store().file(image(name))), path]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def names_in(name: str) -> str:
    words = ["unsquashfs", "-lln", str(store().file(image(name)))]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("base", ["with Python"], indirect=True)
def test_a_recipes_packages_of_conda_are_an_environment_in_which_a_kernel_starts(
    command: Any, base: list[object], channel: Channel, recipe: Path, capfd: Any
) -> None:
    add_real_kernel(channel)
    command("image", "build", "course", recipe)
    said = capfd.readouterr()
    assert "Its kernel is /opt/kernel/bin/python3" in said.out
    assert "conda: 3 of 3" in said.err
    command("image", "check", "course")
    assert f"with ipykernel {ipykernel.__version__}" in capfd.readouterr().out
    assert in_image("course", "opt/kernel/bin/tool") == "#!/bin/sh\necho 1.0 at /opt/kernel\n"
    listed = names_in("course")
    # No program of a package has run; what it may import is compiled.
    assert "opt/kernel/ran" not in listed
    assert "ipykernel/__pycache__/__init__" in listed
    owners = {line.split()[1] for line in listed.splitlines() if "/opt/kernel" in line}
    assert owners == {"1000/1000"}


def test_with_its_lock_a_recipe_has_the_same_digest_whatever_is_new_in_the_channel(
    command: Any, base: list[object], channel: Channel, recipe: Path
) -> None:
    command("image", "build", "one", recipe)
    add_tool(channel, "2.0")
    for cache in (store().path / "layers").iterdir():
        subprocess.run(["rm", "-r", cache], check=True)
    command("image", "build", "two", recipe)
    assert len(base) == 2
    assert image("one").digest == image("two").digest
    recipe.with_suffix(".lock").unlink()
    command("image", "build", "three", recipe)
    assert "2.0" in in_image("three", f"opt/kernel/{PACKAGES}/tool.py")
    assert image("three").digest != image("one").digest


def test_what_was_fetched_is_there_for_the_next_build_whatever_has_gone(
    command: Any, base: list[object], channel: Channel, recipe: Path, capfd: Any
) -> None:
    file = add_tool(channel, "1.5")
    command("image", "build", "one", recipe)
    for package in file.parent.glob("*.bz2"):
        package.unlink()
    command("image", "build", "two", recipe)
    assert "1.5" in in_image("two", f"opt/kernel/{PACKAGES}/tool.py")
    assert len(base) == 1
    forget_fetched()
    with pytest.raises(SandboxError, match="the box ended with status 1"):
        command("image", "build", "three", recipe)
    assert "failed to fetch" in capfd.readouterr().err
    assert {one.name for one in store().images()} == {"one", "two"}
    assert not list((store().path / "work").iterdir())


def forget_fetched() -> None:
    for path in (store().path / "layers").iterdir():
        if path.is_dir():
            subprocess.run(["rm", "-r", path], check=True)


def test_a_package_that_has_changed_under_its_lock_is_refused(
    command: Any, base: list[object], channel: Channel, recipe: Path, capfd: Any
) -> None:
    command("image", "build", "course", recipe)
    channel.add("tool", {f"{PACKAGES}/tool.py": "version = 'of somebody else'\n"})
    with pytest.raises(SandboxError, match=r"remove .*recipe\.lock"):
        command("image", "build", "course", recipe)
    assert "tool-1.0-0.tar.bz2 is not the package that it was" in capfd.readouterr().err


def test_what_does_not_fit_together_is_told_in_the_solvers_words(
    command: Any, base: list[object], channel: Channel, recipe: Path, capfd: Any
) -> None:
    channel.add("newer", {"share/newer": ""}, depends=("__glibc >=2.40",))
    recipe.write_text(RECIPE.replace("tool>=1", "newer"))
    with pytest.raises(SandboxError, match="the box ended with status 1"):
        command("image", "build", "course", recipe)
    assert "__glibc >=2.40" in capfd.readouterr().err
    assert not recipe.with_suffix(".lock").exists()
