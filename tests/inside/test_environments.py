"""Environments as tools make them, imported from in a box: links, editable installations, R."""

from __future__ import annotations

import json
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from boxes import PROGRAM

pytestmark = pytest.mark.requires("userns")

FINDER = """
import sys, importlib.util, os
MAPPING = {mapping}
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        for place in (MAPPING.get(name, "") + end for end in (".py", "/__init__.py")):
            if name in MAPPING and os.path.exists(place):
                return importlib.util.spec_from_file_location(name, place)
def install():
    sys.meta_path.append(Finder)
"""
# As meson-python's: it reads where the sources are, and logs unless it is told to be verbose.
LOADER = """
import json, os, sys
BUILD = (
    '{build}',
)
def init():
    if not os.environ.get("MESONPY_EDITABLE_VERBOSE"):
        open(BUILD[0] + "/log", "w").close()
    with open(BUILD[0] + "/meson-info/meson-info.json") as file:
        sys.path.append(json.load(file)["directories"]["source"])
"""


@pytest.fixture
def tools(new_folder: Callable[[], Path]) -> tuple[Path, Path]:
    """A virtual environment, and a folder of projects, both readable for all."""
    top = new_folder()
    top.chmod(0o755)
    venv.create(top / "env", symlinks=True)
    (top / "projects").mkdir()
    return top / "env", top / "projects"


def packages_of(prefix: Path) -> Path:
    (found,) = prefix.glob("lib/python*/site-packages")
    return found


def module(path: Path, name: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"NAME = {name!r}\n")
    return path


def install_all(packages: Path, projects: Path) -> list[str]:
    """One of each kind; the names of the modules."""
    module(projects / "one/src/plain.py", "plain")
    (packages / "plain.pth").write_text(f"{projects}/one/src\n")

    module(projects / "two/single.py", "single")
    module(projects / "two/package/__init__.py", "package")
    mapping = {name: f"{projects}/two/{name}" for name in ("single", "package")}
    (packages / "__editable___two_finder.py").write_text(FINDER.format(mapping=mapping))
    (packages / "two.pth").write_text("import __editable___two_finder as f; f.install()\n")

    real = module(projects / "three/src/strict/__init__.py", "strict")
    tree = projects / "three/build/__editable__.three-1"
    (tree / "strict").mkdir(parents=True)
    (tree / "strict/__init__.py").symlink_to(real)
    (packages / "three.pth").write_text(f"{tree}\n")

    module(projects / "four/built/__init__.py", "built")
    information = projects / "four/build/cp3/meson-info/meson-info.json"
    information.parent.mkdir(parents=True)
    information.write_text(json.dumps({"directories": {"source": f"{projects}/four"}}))
    loader = LOADER.format(build=f"{projects}/four/build/cp3")
    (packages / "_four_editable_loader.py").write_text(loader)
    (packages / "four.pth").write_text("import _four_editable_loader as f; f.init()\n")

    stored = module(projects / "cache/archive-v0/Xy/linked.py", "linked")
    (packages / "linked.py").symlink_to(stored)
    return ["plain", "single", "package", "strict", "built", "linked"]


def import_all(names):
    import importlib

    found = {}
    for name in names:
        try:
            found[name] = importlib.import_module(name).NAME
        except Exception as error:
            found[name] = repr(error)
    return found


def test_modules_of_every_kind_of_installation_are_imported(sandbox, tools):
    prefix, projects = tools
    names = install_all(packages_of(prefix), projects)
    with sandbox([f"{prefix}/bin/python", "-c", PROGRAM]) as box:
        assert box.call(import_all, names) == {name: name for name in names}


def test_r_finds_the_packages_of_its_user(sandbox, tools, monkeypatch):
    """What is called R here is a script: R itself is large."""

    def look():
        import os

        told = os.environ["R_LIBS_USER"].replace("%p", "x86_64-linux-gnu").replace("%v", "4.2")
        return open(f"{told}/mine/DESCRIPTION").read(), os.listdir(f"{told}/../..")

    prefix, home = tools
    package = home / "R/x86_64-linux-gnu-library/4.2/mine"
    package.mkdir(parents=True)
    (package / "DESCRIPTION").write_text("Package: mine\n")
    (home / "R/notes").mkdir()
    monkeypatch.setenv("HOME", str(home))
    (prefix / "bin/R").write_text(f'#!/bin/sh\nexec {sys.executable} -c "$2"\n')
    (prefix / "bin/R").chmod(0o755)
    with sandbox([f"{prefix}/bin/R", "-e", PROGRAM]) as box:
        assert box.call(look) == ["Package: mine\n", ["x86_64-linux-gnu-library"]]
