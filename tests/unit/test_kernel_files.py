"""Which files of the host a kernel's command needs."""

from __future__ import annotations

import os
import sys
import venv

import pytest
from hosts import host_with

from sandbox_provisioner import python_files
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.facilities.environment.facts import kernel_files
from sandbox_provisioner.facilities.environment.facts.kernel_files import (
    Given,
    find_kernel_files,
    may_read,
)
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.spec import relative


@pytest.fixture(scope="module")
def facts():
    return HostFacts.probe()


def make_program(path, text="#!/bin/sh\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def make_library(prefix):
    library = prefix / f"lib/python3.{sys.version_info.minor}"
    library.mkdir(parents=True)
    (library / "os.py").touch()


def shows(found, path):
    return any(relative(str(path), folder) is not None for folder in found.readonly)


def test_our_own_interpreter_brings_its_environment(facts):
    found = find_kernel_files([sys.executable], os.environ, facts)
    system = facts.machine.system_directories
    for path in {sys.prefix, sys.base_prefix}:
        assert shows(found, path) or any(relative(path, folder) is not None for folder in system)
    assert found.program == sys.executable


def test_nothing_is_run_to_find_them(facts, tmp_path):
    """The module has nothing to do it with, and a program that is none is no error."""
    program = make_program(tmp_path / "bin/python3", f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    find_kernel_files([program], os.environ, facts)
    assert not (tmp_path / "ran").exists()
    names = set(vars(kernel_files)) | set(vars(python_files))
    assert not names & {"subprocess", "importlib", "runpy", "ctypes", "exec", "ast"}


def test_what_was_installed_meanwhile_is_found(facts, tmp_path):
    prefix = tmp_path / "env"
    venv.create(prefix, symlinks=True)
    program = str(prefix / "bin" / "python")
    find_kernel_files([program], os.environ, facts)
    (packages,) = prefix.glob("lib/python*/site-packages")
    extra = tmp_path / "checkout"
    extra.mkdir()
    (packages / "editable.pth").write_text(f"{extra}\n")
    assert shows(find_kernel_files([program], os.environ, facts), extra)


def test_the_links_on_the_way_to_an_interpreter_are_there_too(facts, tmp_path):
    link = tmp_path / "bin" / "python"
    link.parent.mkdir()
    link.symlink_to(sys.executable)
    found = find_kernel_files([str(link)], os.environ, facts)
    assert found.program == str(link)
    assert shows(found, link)


def test_any_other_program_brings_the_installation_that_it_lies_in(facts, tmp_path):
    program = make_program(tmp_path / "env" / "bin" / "kernel")
    assert find_kernel_files([program], os.environ, facts).readonly == (str(tmp_path / "env"),)


def test_a_program_of_the_system_brings_nothing(facts):
    assert find_kernel_files(["/bin/sh"], os.environ, facts).readonly == ()


def test_files_that_the_command_line_names_are_there(facts, tmp_path):
    script = tmp_path / "kernel.py"
    script.touch()
    found = find_kernel_files(["/bin/sh", str(script), "-x", "/no/such/file"], os.environ, facts)
    assert found.readonly == (str(script),)


@pytest.mark.parametrize(
    "path", ["/proc/self/status", "/sys/devices/system/cpu/online", "/etc/passwd", "/dev/stdin"]
)
def test_what_each_box_has_of_its_own_is_not_the_hosts_because_somebody_names_it(
    facts, tmp_path, path
):
    link = tmp_path / "link"
    link.symlink_to(path)
    for argv in (["/bin/cat", path, str(link)], ["/bin/sh", "-c", f"cat {path} {link}"]):
        found = find_kernel_files(argv, os.environ, facts)
        assert (found.readonly, path in found.unseen) == ((), False)


def test_extra_paths_are_there(facts, tmp_path):
    assert find_kernel_files(["/bin/sh"], {}, facts, [str(tmp_path)]).readonly == (str(tmp_path),)


def test_a_program_is_looked_up_on_the_kernels_own_path(facts, tmp_path):
    program = make_program(tmp_path / "bin" / "my-kernel")
    found = find_kernel_files(["my-kernel"], {"PATH": str(tmp_path / "bin")}, facts)
    assert found.program == program


def test_a_program_that_is_not_there_is_the_kernel_jsons_fault(facts):
    with pytest.raises(LaunchError, match=r"no such program.*kernel\.json") as caught:
        find_kernel_files(["no-such-kernel"], {}, facts)
    assert caught.value.step == "find-kernel"


def test_a_program_that_is_not_executable_is_told_from_a_missing_one(facts, tmp_path):
    (tmp_path / "kernel").touch()
    with pytest.raises(LaunchError, match="not executable"):
        find_kernel_files([str(tmp_path / "kernel")], {}, facts)


def test_a_whole_home_is_never_shown_because_it_is_on_the_path(facts, tmp_path):
    home = tmp_path / "home"
    (home / "package").mkdir(parents=True)
    crowded = host_with(facts, homes=frozenset({str(home)}))
    extra = [str(home), str(tmp_path), str(home / "package"), "/tmp", "/etc", "/home"]
    found = find_kernel_files(["/bin/sh"], {}, crowded, extra)
    assert found.readonly == (str(home / "package"),)
    assert {str(home), str(tmp_path), "/tmp", "/etc"} <= set(found.too_broad)


def test_what_lies_in_something_else_is_not_shown_twice(facts, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    extra = [str(tmp_path / "a" / "b"), str(tmp_path / "a")]
    assert find_kernel_files(["/bin/sh"], {}, facts, extra).readonly == (str(tmp_path / "a"),)


def test_a_relative_entry_of_path_finds_nothing(facts, tmp_path, monkeypatch):
    """The server's current directory is not the kernel's, and a kernel may write there."""
    make_program(tmp_path / "my-kernel")
    monkeypatch.chdir(tmp_path)
    for path in ("", ".", "relative", ":/usr/bin:"):
        with pytest.raises(LaunchError, match="no such program"):
            find_kernel_files(["my-kernel"], {"PATH": path}, facts)


def test_a_script_brings_the_interpreter_that_it_names(facts, tmp_path):
    prefix = tmp_path / "env"
    venv.create(prefix, symlinks=True)
    script = make_program(prefix / "bin" / "tool", f"#!{prefix}/bin/python -I\n")
    assert shows(find_kernel_files([script], {}, facts), sys.base_prefix)
    make_program(prefix / "bin" / "tool", "#!/usr/bin/env -S python\n")
    assert shows(find_kernel_files([script], {"PATH": f"{prefix}/bin"}, facts), sys.base_prefix)


def test_pyenvs_programs_bring_what_they_run(facts, tmp_path):
    shim = make_program(tmp_path / "pyenv/shims/tool", "#!/bin/bash\n")
    make_program(tmp_path / "pyenv/libexec/pyenv")
    assert find_kernel_files([shim], {}, facts).readonly == (f"{tmp_path}/pyenv",)


# -- wrappers, and variables that tell where to look


def test_what_is_behind_a_wrapper_is_there(facts, tmp_path):
    program = make_program(tmp_path / "env/bin/kernel")
    script = make_program(tmp_path / "launch.sh", f"#!/bin/sh\nexec {program}\n")
    for argv in (["env", program], ["sh", "-c", f"exec {program}"], [script]):
        assert shows(find_kernel_files(argv, {}, facts), tmp_path / "env")
    assert shows(find_kernel_files([script], {}, facts), script)


def test_a_wrapper_that_a_kernel_may_write_shows_nothing_else(facts, tmp_path):
    secret = make_program(tmp_path / "bob/bin/secret")
    script = make_program(tmp_path / "work/launch.sh", f"#!/bin/sh\nexec {secret}\n")
    given = Given(writable=(str(tmp_path / "work"),), owner_uid=os.getuid())
    found = find_kernel_files([script], {}, facts, (), given)
    assert not shows(found, secret)
    assert found.doubtful


def test_a_file_that_only_its_owner_reads_is_not_shown_because_a_wrapper_names_it(facts, tmp_path):
    for name, mode in (("settings", 0o644), ("secret", 0o600), ("script.py", 0o644)):
        (tmp_path / name).touch(mode)
    text = f". {tmp_path}/settings\n. {tmp_path}/secret\nenv cat {tmp_path}/secret\n"
    script = make_program(tmp_path / "wrap/l.sh", f"#!/bin/sh\n{text}sh {tmp_path}/script.py\n")
    found = find_kernel_files([script], {}, facts)
    assert shows(found, tmp_path / "settings")
    assert shows(found, tmp_path / "script.py")
    assert not shows(found, tmp_path / "secret")
    assert found.unseen == (f"{tmp_path}/secret",)


def test_folders_of_search_paths_are_there(facts, tmp_path):
    names = ("LD_LIBRARY_PATH", "R_LIBS", "JAVA_HOME", "UNKNOWN_PATH")
    folders = {name: tmp_path / name for name in names}
    for folder in folders.values():
        folder.mkdir()
    variables = {name: f"/no/such:{folder}:relative" for name, folder in folders.items()}
    found = find_kernel_files(["/bin/sh"], variables, facts)
    assert [name for name in names if shows(found, folders[name])] == list(names[:3])


def test_what_is_left_out_of_the_path_and_of_the_command_is_told(facts, tmp_path):
    for name in ("bin", "data"):
        (tmp_path / name).mkdir()
    variables = {"PATH": f"{tmp_path}/bin:/usr/bin:/no/such"}
    argv = ["sh", "-c", f"cd {tmp_path}/data; exec kernel /no/such"]
    found = find_kernel_files(argv, variables, facts)
    assert found.off_path == (f"{tmp_path}/bin",)
    assert found.unseen == (f"{tmp_path}/data",)


def test_r_is_told_where_its_users_packages_are(facts, tmp_path):
    home = host_with(facts, home=str(tmp_path))
    library = tmp_path / "R/x86_64-pc-linux-gnu-library"
    library.mkdir(parents=True)
    for argv in ([make_program(tmp_path / "r/bin/R"), "-e", "1"], ["env", tmp_path / "r/bin/R"]):
        found = find_kernel_files([str(word) for word in argv], {}, home)
        assert shows(found, library)
        assert found.variables == {"R_LIBS_USER": f"{tmp_path}/R/%p-library/%v"}


@pytest.mark.parametrize("folder", [".local", ".cargo"])
def test_a_program_of_a_home_does_not_bring_what_lies_beside_it(facts, tmp_path, folder):
    program = make_program(tmp_path / folder / "bin/kernel")
    (tmp_path / folder / "lib").mkdir()
    (tmp_path / folder / "share").mkdir()
    found = find_kernel_files([program], {}, facts)
    assert shows(found, program)
    assert shows(found, tmp_path / folder / "lib")
    assert not shows(found, tmp_path / folder / "share")


# -- what a kernel may have written


def project(tmp_path, home=""):
    """A work directory with an environment; (its path, a function that looks what it shows)."""
    work = tmp_path / "work"
    prefix = work / ".venv"
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    packages = prefix / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (prefix / "bin").mkdir()
    (prefix / "bin/python").symlink_to(os.path.realpath(sys.executable))
    home = home or os.path.dirname(os.path.realpath(sys.executable))
    (prefix / "pyvenv.cfg").write_text(f"home = {home}\n")

    def look(facts, **changes):
        given = Given(writable=(str(work),), owner_uid=changes.pop("owner_uid", os.getuid()))
        return find_kernel_files([f"{prefix}/bin/python"], changes, facts, (), given)

    return work, packages, look


def test_an_environment_in_the_work_directory_may_not_name_what_lies_elsewhere(facts, tmp_path):
    work, packages, look = project(tmp_path)
    secret = tmp_path / "bob" / "secret"
    secret.mkdir(parents=True)
    (work / "inner").mkdir()
    (work / "out").symlink_to(secret)
    (packages / "x.pth").write_text(f"{secret}\n{work}/inner\n{work}/out\n/usr/share\n")
    found = look(facts)
    assert not shows(found, secret)
    assert not shows(found, work / "out")
    assert shows(found, work / "inner")
    assert found.doubtful == (str(secret),)


@pytest.mark.parametrize("what", ["finder", "link", "store", "home", "base of another"])
def test_no_other_way_to_name_it_helps(facts, tmp_path, what):
    work, packages, look = project(tmp_path)
    bob = tmp_path / "bob"
    (bob / "archive-v0/x").mkdir(parents=True)
    if what == "finder":
        (packages / "x.pth").write_text("import __editable___x_finder\n")
        (packages / "__editable___x_finder.py").write_text(f"MAPPING = {{'x': '{bob}'}}\n")
    elif what == "link":
        (packages / "x").symlink_to(bob)
    elif what == "store":
        (packages / "x").symlink_to(bob / "archive-v0/x")
    else:
        if what != "home":
            make_library(bob)
            bob.chmod(0o700)
            os.chown(bob, 4321, 4321) if os.getuid() == 0 else bob.chmod(0)
        (bob / "bin").mkdir(exist_ok=True) if os.access(bob, os.W_OK) else None
        (work / ".venv/pyvenv.cfg").write_text(f"home = {bob}/bin\n")
    assert not shows(look(facts), bob)


def test_an_installation_that_the_owner_may_read_is_shown(facts, tmp_path):
    base = tmp_path / "python"
    make_library(base)
    (base / "bin").mkdir()
    _, _, look = project(tmp_path, home=f"{base}/bin")
    assert shows(look(facts), base)


def test_the_servers_own_installation_is_shown(facts, tmp_path):
    _, _, look = project(tmp_path)
    found = look(facts, owner_uid=4321)
    assert shows(found, sys.base_prefix) or sys.base_prefix.startswith("/usr")


def test_a_program_that_is_a_link_to_elsewhere_is_refused(facts, tmp_path):
    work, _, look = project(tmp_path)
    secret = make_program(tmp_path / "bob" / "python3")
    (work / ".venv/bin/python").unlink()
    (work / ".venv/bin/python").symlink_to(secret)
    with pytest.raises(LaunchError, match="a kernel may have made that link"):
        look(facts)


def test_the_environment_is_told_apart_from_the_project_that_it_names(facts, tmp_path):
    work, packages, look = project(tmp_path)
    (packages / "x.pth").write_text(f"{work}\n")
    for variables in ({}, {"PYTHONPATH": str(work)}, {"PYTHONPATH": f"{work}/src"}):
        found = look(facts, **variables)
        assert found.environment == (f"{work}/.venv",)
        assert shows(found, work)


def test_modes_decide_who_may_read(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    uid = os.getuid()
    assert may_read(str(inner), uid)
    (tmp_path / "a").chmod(0o700)
    assert may_read(str(inner), uid)
    assert not may_read(str(inner), uid + 1)
