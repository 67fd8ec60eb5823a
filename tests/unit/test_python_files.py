"""Where a Python looks for its modules, read from files and compared with what it says itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_provisioner import python_files
from sandbox_provisioner.python_files import (
    Found,
    PythonFiles,
    Reader,
    find_python_files,
    flags_of,
    links_on_way,
    read_start,
)
from sandbox_provisioner.spec import relative

NOBODY_WRITES = Reader(())
SAY = (
    "import json, site, sys; json.dump({'paths': [sys.prefix, sys.exec_prefix, sys.base_prefix, "
    "*[p for p in sys.path if p]], 'user': site.getuserbase() if site.ENABLE_USER_SITE else ''}, "
    "sys.stdout)"
)


def found_by(
    program: str | Path,
    *words: str,
    home: Path | str = "/nonexistent",
    reader: Reader = NOBODY_WRITES,
    **environment: str,
) -> PythonFiles:
    return find_python_files(str(program), words, environment, str(home), reader)


def paths_of(files: PythonFiles) -> set[str]:
    return {found.path for found in (*files.environment, *files.modules)}


def untrusted(files: PythonFiles) -> set[str]:
    return {found.path for found in (*files.environment, *files.modules) if not found.trusted}


def installation(prefix: Path, version: str = "python3.12", library: str = "lib") -> Path:
    """What looks like one that was built there."""
    for name in ("bin", f"{library}/{version}/site-packages"):
        (prefix / name).mkdir(parents=True, exist_ok=True)
    (prefix / library / version / "os.py").touch()
    program = prefix / "bin" / version
    program.touch(0o755)
    return program


def environment(prefix: Path, home: Path | str, version: str = "3.12", **settings: str) -> Path:
    """What `python -m venv` makes."""
    packages = prefix / "lib" / f"python{version}" / "site-packages"
    for folder in (packages, prefix / "bin"):
        folder.mkdir(parents=True)
    lines = {"home": str(home), "version": f"{version}.1", **settings}
    text = "".join(f"{key.replace('_', '-')} = {value}\n" for key, value in lines.items())
    (prefix / "pyvenv.cfg").write_text(text)
    (prefix / "bin" / "python").symlink_to(f"{home}/python{version}")
    return packages


# -- the same as the interpreter itself


def real_pythons() -> list[str]:
    base = os.path.realpath(sys.executable)
    candidates = (sys.executable, base, "/usr/bin/python3", "/usr/local/bin/python3")
    return [path for path in dict.fromkeys(candidates) if os.path.exists(path)]


@pytest.mark.parametrize("kind", ["itself", "venv", "venv with system packages", "venv of a venv"])
@pytest.mark.parametrize("flags", [(), ("-s",), ("-I",)], ids=str)
@pytest.mark.parametrize("program", real_pythons())
def test_all_that_an_interpreter_tells_is_found_without_asking_it(
    tmp_path: Path, program: str, flags: tuple[str, ...], kind: str
) -> None:
    home, extra = tmp_path / "home", tmp_path / "extra"
    for folder in (extra, home):
        folder.mkdir()
    variables = {"HOME": str(home), "PYTHONPATH": str(extra)}
    if kind != "itself":
        program = str(make_venv(program, tmp_path / "one", system=kind.endswith("packages")))
    if kind == "venv of a venv":
        program = str(make_venv(program, tmp_path / "two", system=True))
    version = answer_of(program, "import sys; print('python%d.%d' % sys.version_info[:2])", {})
    (home / ".local/lib" / version.strip() / "site-packages").mkdir(parents=True)
    told = json.loads(answer_of(program, SAY, variables, *flags))
    found = found_by(program, *flags, "-c", "", home=home, **variables)
    places = paths_of(found)
    for path in told["paths"]:
        in_prefix = any(relative(path, place) is not None for place in places)
        assert in_prefix or not os.path.exists(path), path
    assert found.user_base == told["user"]
    assert (str(extra) in places) == (str(extra) in told["paths"])


def make_venv(program: str, folder: Path, *, system: bool) -> Path:
    """As its command would, but for pip; Debian's Python cannot always make one of its own."""
    if program == "/usr/bin/python3":
        version = answer_of(program, "import sys; print('%d.%d' % sys.version_info[:2])", {})
        setting = {"include_system_site_packages": str(system).lower()}
        environment(folder, "/usr/bin", version.strip(), **setting)
    else:
        words = ["-m", "venv", "--without-pip", *["--system-site-packages"] * system, str(folder)]
        subprocess.run([program, *words], check=True)
    return folder / "bin" / "python"


def answer_of(program: str, code: str, variables: dict[str, str], *flags: str) -> str:
    done = subprocess.run(
        [program, *flags, "-c", code], env=variables, check=True, capture_output=True, text=True
    )
    return done.stdout


# -- layouts


def test_a_virtual_environment_brings_its_base(tmp_path: Path) -> None:
    installation(tmp_path / "base")
    environment(tmp_path / "env", tmp_path / "base/bin")
    found = paths_of(found_by(tmp_path / "env/bin/python"))
    assert {f"{tmp_path}/env", f"{tmp_path}/base"} <= found


def test_an_environment_of_copies_is_known_by_its_settings(tmp_path: Path) -> None:
    installation(tmp_path / "base")
    environment(tmp_path / "env", tmp_path / "base/bin")
    program = tmp_path / "env/bin/python"
    program.unlink()
    program.touch(0o755)
    assert f"{tmp_path}/base" in paths_of(found_by(program))


def test_an_installation_behind_a_link_is_found(tmp_path: Path) -> None:
    """uv's home is a link to the folder with the whole version in its name."""
    installation(tmp_path / "cpython-3.12.8")
    (tmp_path / "cpython-3.12").symlink_to("cpython-3.12.8")
    environment(tmp_path / "env", tmp_path / "cpython-3.12/bin")
    assert f"{tmp_path}/cpython-3.12" in paths_of(found_by(tmp_path / "env/bin/python"))


@pytest.mark.parametrize(("version", "library"), [("python3.13t", "lib"), ("pypy3.10", "lib"),
                                                  ("python3.12", "lib64")])  # fmt: skip
def test_other_names_of_a_library_are_known(tmp_path: Path, version: str, library: str) -> None:
    program = installation(tmp_path / "base", version, library)
    packages = tmp_path / "base" / library / version / "site-packages"
    (packages / "other.pth").write_text(f"{tmp_path}/project\n")
    assert f"{tmp_path}/project" in paths_of(found_by(program))


def test_the_packages_of_the_base_count_only_where_the_environment_wants_them(
    tmp_path: Path,
) -> None:
    installation(tmp_path / "base")
    packages = tmp_path / "base/lib/python3.12/site-packages"
    (packages / "base.pth").write_text(f"{tmp_path}/project\n")
    for name, value, wanted in (("a", "false", False), ("b", "true", True)):
        prefix = tmp_path / name
        environment(prefix, tmp_path / "base/bin", include_system_site_packages=value)
        found = found_by(prefix / "bin/python", home=tmp_path)
        assert (f"{tmp_path}/project" in paths_of(found)) == wanted
        assert found.user_base == (f"{tmp_path}/.local" if wanted else "")


def test_what_debian_installs_for_all_is_found(tmp_path: Path) -> None:
    program = installation(tmp_path / "usr")
    for folder in ("lib/python3/dist-packages", "local/lib/python3.12/dist-packages"):
        (tmp_path / "usr" / folder).mkdir(parents=True)
        (tmp_path / "usr" / folder / "x.pth").write_text(f"{tmp_path}/{folder[:3]}-project\n")
    assert {f"{tmp_path}/lib-project", f"{tmp_path}/loc-project"} <= paths_of(found_by(program))


def test_variables_and_options_count_as_they_do_for_python(tmp_path: Path) -> None:
    program = installation(tmp_path / "base")
    variables = {"PYTHONPATH": f"{tmp_path}:relative:", "PYTHONUSERBASE": f"{tmp_path}/user"}
    found = found_by(program, **variables)
    assert Found(str(tmp_path)) in found.modules
    assert found.user_base == f"{tmp_path}/user"
    assert found_by(program, "-s", **variables).user_base == ""
    assert found_by(program, PYTHONNOUSERSITE="1").user_base == ""
    assert found_by(program, "-I", **variables).modules == ()
    assert found_by(program, "-E", home="/h", **variables).user_base == "/h/.local"


@pytest.mark.parametrize(
    ("words", "letters"),
    [
        (("-sE", "-c", "-I"), "sE"), (("-X", "dev", "-I", "x.py", "-s"), "I"), (("-m", "x"), ""),
        (("-Wdefault", "-W", "error", "-u"), "u"), (("--", "-s"), ""), (("--version", "-s"), "s"),
    ],
)  # fmt: skip
def test_only_pythons_own_options_are_read(words: tuple[str, ...], letters: str) -> None:
    assert flags_of(words) == frozenset(letters)


# -- editable installations, and environments made of links

FINDER = """
import sys
MAPPING: dict[str, str] = {{'one': '{0}/one', "two": "{0}/two.py"}}
NAMESPACES: dict[str, list[str]] = {{'space': ['{0}/space']}}
"""
LOADER = "install({'mod'}, '%s/build', ['ninja'], False)\n"


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("__editable___x_1_0_finder", FINDER, {"one", "two.py", "space"}),
        ("_editable_impl_x", "F.map_module('m', '{0}/m/__init__.py')", {"m/__init__.py"}),
        ("_x_editable_loader", LOADER.replace("{", "{{").replace("}", "}}").replace("%s", "{0}"),
         {"build"}),
    ],
    ids=["setuptools", "hatchling", "meson-python"],
)  # fmt: skip
def test_what_an_editable_installation_names_is_found(
    tmp_path: Path, name: str, text: str, named: set[str]
) -> None:
    program = installation(tmp_path / "base")
    packages = tmp_path / "base/lib/python3.12/site-packages"
    (packages / "x.pth").write_text(f"import {name}; {name}.install()\n")
    (packages / f"{name}.py").write_text(text.format("/project"))
    found = {found.path for found in found_by(program).modules}
    assert found == {f"/project/{path}" for path in named}


def test_a_module_whose_suffix_setuptools_leaves_out_is_found(tmp_path: Path) -> None:
    program = installation(tmp_path / "base")
    packages = tmp_path / "base/lib/python3.12/site-packages"
    (packages / "x.pth").write_text("import __editable___x_finder\n")
    (packages / "__editable___x_finder.py").write_text(f"MAPPING = {{'x': '{tmp_path}/x'}}\n")
    (tmp_path / "x.py").touch()
    assert [found.path for found in found_by(program).modules] == [f"{tmp_path}/x.py"]


def test_what_meson_builds_brings_its_sources(tmp_path: Path) -> None:
    """meson-python's loader names the folder that it builds in."""
    program = installation(tmp_path / "base")
    packages = tmp_path / "base/lib/python3.12/site-packages"
    (packages / "x.pth").write_text("import _x_editable_loader; _x_editable_loader.init()\n")
    (packages / "_x_editable_loader.py").write_text(f"    '{tmp_path}/build/cp312',\n")
    info = tmp_path / "build/cp312/meson-info/meson-info.json"
    info.parent.mkdir(parents=True)
    directories = {"source": f"{tmp_path}/src", "build": f"{tmp_path}/build/cp312"}
    info.write_text(json.dumps({"meson_version": {"major": 1}, "directories": directories}))
    found = [found.path for found in found_by(program).modules]
    assert found == [f"{tmp_path}/build/cp312", f"{tmp_path}/src"]
    assert python_files.is_built_by_meson(found[0])
    assert not python_files.is_built_by_meson(found[1])


def test_a_pth_names_folders_as_site_reads_it(tmp_path: Path) -> None:
    program = installation(tmp_path / "base")
    packages = tmp_path / "base/lib/python3.12/site-packages"
    text = "\ufeff# a comment\n\n  /one  \nrelative\nimport os; os.system('x')\nimport\tsys\n"
    (packages / "a.pth").write_text(text)
    (packages / ".hidden.pth").write_text("/hidden\n")
    (packages / "old.egg-link").write_text("/old\n.\n")
    found = {found.path for found in found_by(program).modules}
    assert found == {"/one", f"{packages}/relative", "/old", str(packages)}


def test_an_environment_made_of_links_brings_what_they_lead_to(tmp_path: Path) -> None:
    installation(tmp_path / "base")
    packages = environment(tmp_path / "env", tmp_path / "base/bin")
    package = tmp_path / "cache/archive-v0/Abc/x-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").touch()
    (packages / "x-1.dist-info").mkdir()
    (packages / "x-1.dist-info/METADATA").symlink_to(package / "METADATA")
    (packages / "flit").symlink_to(tmp_path / "project/flit")
    found = paths_of(found_by(tmp_path / "env/bin/python"))
    assert {f"{tmp_path}/cache/archive-v0", f"{tmp_path}/project/flit"} <= found


def test_condas_links_lead_to_its_packages(tmp_path: Path) -> None:
    program = installation(tmp_path / "env")
    store = tmp_path / "conda/pkgs/python-3.12/lib/python3.12"
    store.mkdir(parents=True)
    (store / "os.py").touch()
    (tmp_path / "env/lib/python3.12/os.py").unlink()
    (tmp_path / "env/lib/python3.12/os.py").symlink_to(store / "os.py")
    assert f"{tmp_path}/conda/pkgs" in paths_of(found_by(program))


def test_setuptools_trees_of_links_lead_to_the_project(tmp_path: Path) -> None:
    program = installation(tmp_path / "base")
    tree = tmp_path / "build/__editable__.x-1"
    (tree / "x").mkdir(parents=True)
    (tree / "x/__init__.py").symlink_to(tmp_path / "project/src/x/__init__.py")
    (tmp_path / "base/lib/python3.12/site-packages/x.pth").write_text(f"{tree}\n")
    assert f"{tmp_path}/project/src/x" in paths_of(found_by(program))


# -- who says so


def test_what_is_named_where_kernels_may_write_is_not_trusted(tmp_path: Path) -> None:
    installation(tmp_path / "base")
    alone = {"include_system_site_packages": "false"}
    packages = environment(tmp_path / "work/env", tmp_path / "base/bin", **alone)
    (packages / "x.pth").write_text("/secret\n")
    program, reader = tmp_path / "work/env/bin/python", Reader((str(tmp_path / "work"),))
    assert untrusted(found_by(program, reader=reader)) == {"/secret", f"{tmp_path}/base"}
    assert untrusted(found_by(program, reader=reader, PYTHONPATH="/p")) >= {"/secret"}
    assert Found("/p") in found_by(program, reader=reader, PYTHONPATH="/p").modules
    elsewhere = Reader((str(tmp_path / "other"),))
    assert untrusted(found_by(program, reader=elsewhere)) == set()


def test_nobody_becomes_trusted_again_who_was_named_by_others(tmp_path: Path) -> None:
    """A kernel's environment names another person's, whose .pth would name their project."""
    installation(tmp_path / "bob")
    (tmp_path / "bob/lib/python3.12/site-packages/x.pth").write_text("/bobs/project\n")
    environment(tmp_path / "work/env", tmp_path / "bob/bin", include_system_site_packages="true")
    reader = Reader((str(tmp_path / "work"),))
    assert "/bobs/project" in untrusted(found_by(tmp_path / "work/env/bin/python", reader=reader))


def test_a_link_that_leads_through_the_work_directory_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/link").symlink_to("/")
    (tmp_path / "outer").symlink_to("work/link")
    reader = Reader((str(tmp_path / "work"),))
    assert links_on_way(f"{tmp_path}/outer/etc") == [f"{tmp_path}/outer", f"{tmp_path}/work/link"]
    assert not reader.trusts(f"{tmp_path}/outer/etc")
    assert reader.trusts(f"{tmp_path}/x")
    assert not reader.trusts("/", above=False)


# -- bombs


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    installation(tmp_path / "base")
    packages = environment(tmp_path / "env", tmp_path / "base/bin")
    os.mkfifo(packages / "a.pth")
    (packages / "b.pth").write_text("/b\n")
    assert Found("/b") in found_by(tmp_path / "env/bin/python").modules
    (tmp_path / "env/pyvenv.cfg").unlink()
    os.mkfifo(tmp_path / "env/pyvenv.cfg")
    found_by(tmp_path / "env/bin/python")


def test_no_device_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = os.open

    def note(path: str, flags: int, *rest: int) -> int:
        opened.append((path, flags))
        return real(path, flags, *rest)

    monkeypatch.setattr(python_files.os, "open", note)
    (tmp_path / "x").symlink_to("/dev/zero")
    assert read_start(str(tmp_path / "x")) == b""
    assert [flags & os.O_PATH for _, flags in opened] == [os.O_PATH]


def test_a_huge_file_is_read_from_its_start_only(tmp_path: Path) -> None:
    program = installation(tmp_path / "base")
    path = tmp_path / "base/lib/python3.12/site-packages/x.pth"
    path.write_text("/first\n")
    os.truncate(path, 1 << 30)
    assert Found("/first") in found_by(program).modules
    path.write_text("".join(f"/line/{n}\n" for n in range(100_000)))
    assert len(found_by(program).modules) <= 512


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert len(links_on_way(f"{tmp_path}/a/x")) <= 40
    found_by(tmp_path / "a/python3")


@pytest.mark.parametrize("text", ["/a\0b", "/" + "x" * 5000, "\udcff", "home = \0\n", "=\n=="])
def test_strange_text_is_no_error(tmp_path: Path, text: str) -> None:
    installation(tmp_path / "base")
    packages = environment(tmp_path / "env", tmp_path / "base/bin")
    for path in (packages / "x.pth", tmp_path / "env/pyvenv.cfg"):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        found_by(tmp_path / "env/bin/python")
