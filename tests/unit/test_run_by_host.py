"""What of a work directory the host runs by itself, and so no kernel may write."""

from __future__ import annotations

import importlib.machinery
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hosts import host_with

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.workdir.facts.run_by_host import (
    Server,
    find_run_by_host,
    look_there_last,
    notice,
    this_server,
)
from sandbox_provisioner.host import HostFacts, WorkdirFacts
from sandbox_provisioner.spec import Covers


def places(work: Path, **server: Any) -> set[str]:
    found = find_run_by_host(os.path.realpath(work), Server(**server))
    return {os.path.relpath(path, work) for path in found if path.startswith(f"{work}/")}


def make_environment(prefix: Path, mark: str = "pyvenv.cfg") -> str:
    (prefix / "bin").mkdir(parents=True)
    if mark == "conda-meta":
        (prefix / mark).mkdir()
    else:
        (prefix / mark).touch()
    return str(prefix)


# -- environments


def test_the_servers_own_environment_is_one(tmp_path: Path) -> None:
    prefix = make_environment(tmp_path / "deep/env")
    assert places(tmp_path, prefixes=(prefix,)) == {"deep/env"}


@pytest.mark.parametrize("mark", ["pyvenv.cfg", "conda-meta"])
def test_every_environment_that_stands_in_a_project_is_one(tmp_path: Path, mark: str) -> None:
    make_environment(tmp_path / ".venv", mark)
    (tmp_path / "notebooks").mkdir()
    assert places(tmp_path) == {".venv"}


def test_an_environment_behind_a_link_is_one_and_so_is_the_link(tmp_path: Path) -> None:
    make_environment(tmp_path / "else/where")
    (tmp_path / "work").mkdir()
    (tmp_path / "work/.venv").symlink_to("../else/where")
    assert places(tmp_path / "work") == {".venv"}


def test_of_a_project_that_is_an_environment_its_parts_are(tmp_path: Path) -> None:
    prefix = make_environment(tmp_path)
    (tmp_path / "lib").mkdir()
    assert places(tmp_path) == {"bin", "lib", "pyvenv.cfg"}
    found = places(tmp_path, prefixes=(prefix,))
    assert found == {"bin", "lib", "pyvenv.cfg", "etc", "share/jupyter"}


def test_the_servers_own_installation_is_no_work_directory(tmp_path: Path) -> None:
    for work in (tmp_path, tmp_path / "lib/work"):
        work.mkdir(parents=True, exist_ok=True)
        with pytest.raises(SpecError, match=r"installation of Python|which the host runs"):
            places(work, prefixes=(str(tmp_path),))


def test_our_own_code_is_no_work_directory() -> None:
    package = Path(sys.modules["sandbox_provisioner"].__file__ or "").parent
    for work in (package, package / "inside"):
        with pytest.raises(SpecError, match="which the host runs"):
            places(work)
    assert package.name in places(package.parent)


# -- paths


@pytest.mark.parametrize("existing", [True, False])
def test_entries_of_the_servers_paths_are(tmp_path: Path, existing: bool) -> None:
    for name in ("bin", "src") if existing else ():
        (tmp_path / name).mkdir()
    found = places(
        tmp_path,
        programs=(
            ("PATH", f"{tmp_path}/bin"),
            ("PATH", "/usr/bin"),
            ("PATH", str(tmp_path.parent)),
        ),
        modules=(f"{tmp_path}/src", str(tmp_path.parent)),
        single=(f"{tmp_path}/startup.py",),
    )
    assert found == {"bin", "src", "startup.py"}


def test_what_is_there_becomes_read_only_and_what_is_not_gets_a_stand_in(tmp_path: Path) -> None:
    make_environment(tmp_path / ".venv")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    server = Server(
        programs=tuple(("PATH", f"{tmp_path}/{name}") for name in ("tools/bin", "dangling"))
    )
    facts = host_with(HostFacts.probe(), server=server, homes=frozenset(), cwd="/")
    with ExitStack() as opened:
        found = WorkdirFacts.probe(str(tmp_path), facts, Covers(), opened)
    assert found.covered.frozen == (".venv",)
    assert found.covered.directories == ("dangling", "nowhere", "tools/bin")


def test_a_work_directory_on_the_path_of_programs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"on the server's PATH.*current directory"):
        places(tmp_path, programs=(("PATH", str(tmp_path)),))


def test_what_is_imported_from_a_project_is(tmp_path: Path) -> None:
    package = tmp_path / "src/package/inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    files = (f"{package}/module.py", f"{tmp_path}/alone.py", "/usr/lib/other.py")
    assert places(tmp_path, imported=files) == {"src/package", "alone.py"}
    assert places(package.parent, imported=files) == {"inner"}


def test_what_was_imported_by_a_way_up_lies_where_that_leads(tmp_path: Path) -> None:
    """``python ../script.py`` and ``sys.path.append(os.path.join(here, ".."))``."""
    work = tmp_path / "work"
    for folder in (work / "notebooks", tmp_path / "library"):
        folder.mkdir(parents=True)
    (work / "beside.py").touch()
    (tmp_path / "library/else.py").touch()
    (tmp_path / "script.py").write_text(_SCRIPT)
    command = [sys.executable, "../script.py"]
    told = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert f"{work}/beside.py" in told.split()
    assert ".." not in told


_SCRIPT = """
import importlib, os, sys
from sandbox_provisioner.facilities.workdir.facts.run_by_host import find_run_by_host, this_server
here = os.path.realpath(".")
sys.path += [f"{here}/notebooks/..", f"{here}/../library"]
for name in ("beside", "else"):
    importlib.import_module(name)
print(*find_run_by_host(here, this_server(here, {})))
"""


# -- a project that is itself on the import path


def test_its_packages_and_what_every_python_imports_are_out_of_reach(tmp_path: Path) -> None:
    for name in ("package", "notebooks"):
        (tmp_path / name).mkdir()
    (tmp_path / "package/__init__.py").touch()
    found = places(tmp_path, modules=(str(tmp_path),))
    assert "package" in found
    assert "notebooks" not in found
    assert {"sitecustomize", "usercustomize.py", "sitecustomize.so"} <= found
    assert len(found) == 1 + 2 * (1 + len(importlib.machinery.all_suffixes()))
    assert str(tmp_path) in notice(str(tmp_path), Server(modules=(str(tmp_path),)))
    assert notice(str(tmp_path), Server(modules=(str(tmp_path.parent),))) == ""


def test_the_stand_ins_for_them_change_nothing_for_python(tmp_path: Path) -> None:
    """They are directories: none is taken for a module, and none is complained of."""
    names = places(tmp_path, modules=(str(tmp_path),))
    for name in names:
        (tmp_path / name).mkdir()
    code = "import sys; print(getattr(sys.modules.get('sitecustomize'), '__file__', None))"
    answers = []
    for path in ("", str(tmp_path)):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONPATH": path}, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stderr == ""
        answers.append(done.stdout)
    assert answers[1] in {answers[0], "None\n"}


def test_what_lies_in_the_work_directory_is_looked_at_last(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    library = os.path.dirname(os.__file__)
    early = [str(tmp_path), f"{tmp_path}/src"]
    path = [early[0], "/elsewhere", early[1], "/zip", library, "/site", f"{tmp_path}/installed"]
    look_there_last(str(tmp_path), path)
    assert path == ["/elsewhere", "/zip", library, "/site", f"{tmp_path}/installed", *early]
    before = list(path)
    look_there_last(str(tmp_path), path)
    assert path == before


def test_what_was_moved_there_is_not_taken_for_what_every_python_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for _ in range(2):
        look_there_last(str(tmp_path), sys.path)
        assert notice(str(tmp_path), this_server("/", os.environ)) == ""
    assert str(tmp_path) in sys.path


def test_the_current_directory_without_a_name_is_meant_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    library = os.path.dirname(os.__file__)
    path = ["", library]
    look_there_last(os.path.realpath(tmp_path), path)
    assert path == [library, ""]


# -- the start directory


@pytest.mark.parametrize("folder", ["", "below"])
def test_where_jupyterlab_looks_for_language_servers_is(tmp_path: Path, folder: str) -> None:
    names = ("node_modules", ".virtual_documents")
    found = places(tmp_path, cwd=os.path.normpath(tmp_path / folder))
    assert {os.path.join(folder, name) for name in names} <= found


def test_what_only_the_server_knows_of_is(tmp_path: Path) -> None:
    assert places(tmp_path, more=(f"{tmp_path}/lab",)) == {"lab"}
    with pytest.raises(SpecError, match="which the host runs"):
        places(tmp_path, more=(str(tmp_path),))


# -- this process


def test_this_process_tells_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin::relative")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/lib")
    monkeypatch.setattr(sys, "path", ["/of/this/command", *sys.path])
    found = this_server("/start", os.environ, ("/more",))
    assert {("PATH", f"{tmp_path}/bin"), ("PATH", "/start"), ("PATH", "/start/relative")} <= set(
        found.programs
    )
    assert f"{tmp_path}/lib" in found.modules
    assert "/of/this/command" not in found.modules
    assert any(path.endswith("site-packages") for path in found.modules)
    assert {sys.prefix, sys.base_prefix} <= set(found.prefixes)
    assert found.cwd == "/start"
    assert found.more == ("/more",)
    assert __file__ in found.imported


def test_of_what_is_imported_that_from_one_place_is_told_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was named by a way round, or lies beside a place of a like name."""
    for name in ("a/one.py", "b/../a/./two.py", "aa/beside.py", "b/away.py"):
        module = ModuleType(name)
        module.__file__ = f"{tmp_path}/{name}"
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "b").mkdir()
    every = this_server("/", {}).imported
    alone = this_server("/", {}, source=f"{tmp_path}/a").imported
    assert alone == tuple(f for f in every if f.startswith(f"{tmp_path}/a/"))
    assert set(alone) == {f"{tmp_path}/a/one.py", f"{tmp_path}/a/two.py"}
    assert this_server("/", {}, source="").imported == ()


def test_links_that_cannot_be_followed_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "host").symlink_to("/proc/1/root/proc")
    places(tmp_path, modules=(str(tmp_path),))
