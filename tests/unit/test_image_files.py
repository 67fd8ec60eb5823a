"""Where a kernel's program is in another root than the host's: read from a folder, never run."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.facilities.environment.facts.image_files import OURS, find_image_files
from sandbox_provisioner.facilities.environment.facts.kernel_files import KernelFiles
from sandbox_provisioner.root_files import RootFiles
from sandbox_provisioner.warm.make_nursery import _PACKAGE

KERNEL = ("python3", "-m", "ipykernel_launcher", "-f", "/run/jupyter/k.json")
# The head of a program for x86_64 (elf(5)).
ELF = b"\x7fELF\2\1\1" + bytes(9) + b"\2\0\x3e\0" + bytes(64)


class Root:
    """A folder that is made out to be a root."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
        self.files = RootFiles(self.fd)

    def program(self, path: str, content: bytes = ELF) -> None:
        """One that everybody may run."""
        self.file(path, content).chmod(0o755)

    def file(self, path: str, content: bytes = b"") -> Path:
        place = self.path / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        return place

    def link(self, path: str, text: str) -> None:
        place = self.path / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(text)

    def python(self, program: str, packages: str) -> None:
        """An interpreter that finds ipykernel in the folder *packages*."""
        self.program(program)
        self.file(f"{packages}/ipykernel/__init__.py")

    def find(self, argv: tuple[str, ...] = KERNEL, **environment: str) -> KernelFiles:
        return find_image_files(argv, environment, self.files, "it", "x86_64", (_PACKAGE,))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    made = Root(tmp_path)
    yield made
    os.close(made.fd)


@pytest.mark.parametrize(
    ("program", "packages"),
    [
        ("/usr/bin/python3", "/usr/lib/python3/dist-packages"),
        ("/usr/bin/python3", "/usr/local/lib/python3.11/dist-packages"),
        ("/usr/local/bin/python3", "/usr/local/lib/python3.13/site-packages"),
        ("/opt/conda/bin/python3", "/opt/conda/lib/python3.12/site-packages"),
        ("/opt/venv/bin/python3", "/opt/venv/lib/python3.12/site-packages"),
    ],
)
def test_a_python_that_has_ipykernel_is_found(root: Root, program: str, packages: str) -> None:
    root.python(program, packages)
    assert root.find().program == program
    # jupyter_client has put the server's own interpreter in place of "python3".
    assert root.find(("/home/ann/env/bin/python3.9", *KERNEL[1:])).program == program


def test_of_several_the_first_one_is_taken_that_has_it(root: Root) -> None:
    root.program("/usr/bin/python3")
    root.python("/opt/conda/bin/python3", "/opt/conda/lib/python3.12/site-packages")
    assert root.find().program == "/opt/conda/bin/python3"
    root.python("/srv/bin/python3", "/srv/lib/python3.12/site-packages")
    assert root.find(PATH="/srv/bin:/usr/bin").program == "/srv/bin/python3"


def test_without_ipykernel_the_error_names_the_interpreter(root: Root) -> None:
    root.program("/usr/bin/python3")
    root.file("/usr/lib/python3.11/site-packages/numpy/__init__.py")
    with pytest.raises(LaunchError, match=r"run /usr/bin/python3 .* there is no ipykernel"):
        root.find()
    root.file("/usr/lib/python3.11/site-packages/__editable__.ipykernel-7.pth")
    assert root.find().program == "/usr/bin/python3"  # who can tell where that leads


def test_links_lead_where_they_lead_inside(root: Root) -> None:
    root.python("/usr/bin/python3.11", "/usr/lib/python3.11/site-packages")
    root.link("/venv/bin/python3", "/usr/bin/python3.11")
    assert root.find().program == "/venv/bin/python3"
    root.link("/usr/bin/python3", "/../../../../../../bin/sh")  # of the host
    assert root.find(("/usr/bin/python3", *KERNEL[1:])).program == "/venv/bin/python3"
    assert root.files.real_path("/venv/bin/python3") == "/usr/bin/python3.11"
    root.link("/loop", "loop")
    assert root.files.real_path("/loop") == ""


def test_a_program_that_is_there_for_nobody_is_none(root: Root) -> None:
    with pytest.raises(LaunchError, match="no such program"):
        root.find(("R", "--slave"))
    root.file("/usr/bin/R")
    (root.path / "usr/bin/julia").mkdir()
    for name in ("R", "/usr/bin/R", "julia"):
        with pytest.raises(LaunchError, match="no such program"):
            root.find((name,))
    root.program("/usr/bin/R", b"#!/bin/sh\n")
    root.program("/bin/sh")
    assert root.find(("R",)).program == "/usr/bin/R"


@pytest.mark.parametrize(("machine", "name"), [(183, "aarch64"), (243, "riscv64"), (9999, "9999")])
def test_a_program_of_another_machine_is_told(root: Root, machine: int, name: str) -> None:
    foreign = ELF[:18] + machine.to_bytes(2, "little") + ELF[20:]
    root.program("/usr/bin/tool", foreign)
    with pytest.raises(LaunchError, match=name):
        root.find(("tool",))
    root.program("/usr/bin/script", b"#!/usr/bin/tool -x\n")
    with pytest.raises(LaunchError, match=name):
        root.find(("script",))


def test_what_is_no_file_is_not_opened(root: Root) -> None:
    os.mkfifo(root.path / "pipe")
    assert root.files.read("/pipe", 10) == b""
    assert root.files.kind_at("/pipe") == stat.S_IFIFO
    root.file("/long", b"x" * (1 << 18))
    assert root.files.text("/long") == ""


def test_packages_of_the_users_own_are_for_what_is_no_virtual_environment(root: Root) -> None:
    root.python("/usr/bin/python3", "/usr/lib/python3.11/site-packages")
    site = root.find().own_site
    assert site
    assert (site.library, bool(site.base)) == ("python3.11", True)
    root.python("/opt/venv/bin/python3", "/opt/venv/lib/python3.11/site-packages")
    root.file("/opt/venv/pyvenv.cfg")
    found = root.find()
    assert found.program == "/opt/venv/bin/python3"
    assert found.own_site
    assert not found.own_site.base
    assert found.variables["PATH"].split(":")[0] == "/opt/venv/bin"
    assert root.find(PATH="/usr/bin").variables == {}


def test_our_own_code_shows_at_a_place_of_its_own(root: Root) -> None:
    root.python("/usr/bin/python3", "/usr/lib/python3.11/site-packages")
    found = root.find()
    shown = f"{OURS}/sandbox_provisioner"
    assert found.readonly == (shown,)
    assert found.real[shown] == os.path.realpath(_PACKAGE)


def test_what_is_installed_later_makes_another_nursery(root: Root) -> None:
    root.python("/usr/bin/python3", "/usr/lib/python3.11/site-packages")
    before = root.find().freshness
    packages = root.path / "usr/lib/python3.11/site-packages"
    os.utime(packages, (1, 1))
    assert root.find().freshness != before


def test_of_any_number_of_pythons_only_some_are_searched(root: Root, monkeypatch):
    for number in range(40):
        root.program(f"/bins/{number}/python3")
        (root.path / f"bins/lib/python3.{number}").mkdir(parents=True)
    looked: list[str] = []
    real = RootFiles.kind_at

    def kind_at(files: RootFiles, path: str) -> int:
        looked.append(path)
        return real(files, path)

    monkeypatch.setattr(RootFiles, "kind_at", kind_at)
    path = ":".join(f"/bins/{number}" for number in range(40))
    with pytest.raises(LaunchError, match="no ipykernel"):
        root.find(PATH=path)
    assert 0 < len([one for one in looked if one.endswith("__init__.py")]) <= 16 * 2 * 16
