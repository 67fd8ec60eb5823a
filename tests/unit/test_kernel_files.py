"""Which files of the host a kernel's command needs."""

from __future__ import annotations

import os
import sys
import venv

import pytest

from sandbox_provisioner import kernel_files
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.kernel_files import find_kernel_files
from sandbox_provisioner.spec import relative


@pytest.fixture(scope="module")
def facts():
    return HostFacts.probe()


def make_program(path, text="#!/bin/sh\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def shows(found, path):
    return any(relative(str(path), folder) is not None for folder in found.readonly)


def test_our_own_interpreter_brings_its_environment(facts):
    found = find_kernel_files([sys.executable], os.environ, facts)
    system = facts.system_directories
    for path in {sys.prefix, sys.base_prefix}:
        assert shows(found, path) or any(relative(path, folder) is not None for folder in system)
    assert found.program == sys.executable


def test_our_own_interpreter_is_asked_without_a_process(facts, monkeypatch):
    monkeypatch.setattr(kernel_files.subprocess, "run", None)
    assert find_kernel_files([sys.executable], os.environ, facts).program == sys.executable


def test_another_interpreter_is_asked_once_for_its_paths(facts, tmp_path, monkeypatch):
    prefix = tmp_path / "env"
    venv.create(prefix, symlinks=True)
    program = str(prefix / "bin" / "python")
    first = find_kernel_files([program], os.environ, facts)
    assert shows(first, prefix / "lib")
    monkeypatch.setattr(kernel_files.subprocess, "run", None)
    assert find_kernel_files([program], os.environ, facts) == first


def test_an_interpreter_is_asked_again_when_packages_were_installed(facts, tmp_path):
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


def test_an_interpreter_that_does_not_start_shows_what_it_said(facts, tmp_path):
    program = make_program(tmp_path / "bin/python3", "#!/bin/sh\necho broken library >&2\nexit 3\n")
    with pytest.raises(LaunchError, match="broken library"):
        find_kernel_files([program], os.environ, facts)


def test_a_whole_home_is_never_shown_because_it_is_on_the_path(facts, tmp_path):
    home = tmp_path / "home"
    (home / "package").mkdir(parents=True)
    crowded = HostFacts(**{
        name: getattr(facts, name) for name in facts.__dataclass_fields__ if name != "homes"
    }, homes=frozenset({str(home)}))  # fmt: skip
    extra = [str(home), str(tmp_path), str(home / "package"), "/tmp", "/etc", "/home"]
    found = find_kernel_files(["/bin/sh"], {}, crowded, extra)
    assert found.readonly == (str(home / "package"),)
    assert {str(home), str(tmp_path), "/tmp", "/etc"} <= set(found.too_broad)


def test_what_lies_in_something_else_is_not_shown_twice(facts, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    extra = [str(tmp_path / "a" / "b"), str(tmp_path / "a")]
    assert find_kernel_files(["/bin/sh"], {}, facts, extra).readonly == (str(tmp_path / "a"),)
