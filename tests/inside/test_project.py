"""Attempted escapes: through what the host runs of a project with an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from boxes import PROGRAM, WARM
from probes import answer_of

from sandbox_provisioner import launch
from sandbox_provisioner.errors import SandboxError, SpecError
from sandbox_provisioner.unboxed import guarded_command

pytestmark = pytest.mark.requires("userns")

TOUCH = "import os; open({0!r}, 'a').close()\n"


@pytest.fixture
def project(workdir: Path) -> Path:
    """The work directory, with a virtual environment that knows the project itself."""
    command = [sys.executable, "-m", "venv", "--without-pip", str(workdir / ".venv")]
    subprocess.run(command, check=True)
    (workdir / "src/mine").mkdir(parents=True)
    (workdir / "src/mine/__init__.py").write_text("VALUE = 42\n")
    (workdir / "flat").mkdir()
    (workdir / "flat/__init__.py").touch()
    packages(workdir).joinpath("mine.pth").write_text(f"{workdir}/src\n{workdir}\n")
    return workdir


def packages(workdir: Path) -> Path:
    (found,) = (workdir / ".venv").glob("lib/python*/site-packages")
    return found


def python_of(project: Path) -> list[str]:
    return [f"{project}/.venv/bin/python", "-c", PROGRAM]


def plant_everywhere(folder):
    """Try all that would change *folder*; what Linux answers."""
    import os

    def write(path):
        with open(path, "a") as file:
            file.write("planted")

    return {
        "file": answer_of(lambda: write(f"{folder}/pyvenv.cfg")),
        "program": answer_of(lambda: write(f"{folder}/bin/planted")),
        "link": answer_of(lambda: os.symlink("/tmp", f"{folder}/link")),
        "away": answer_of(lambda: os.rename(folder, f"{folder}2")),
        "remove": answer_of(lambda: os.unlink(f"{folder}/bin/python")),
    }


def import_project():
    import flat  # noqa: F401
    import mine

    return mine.VALUE


@pytest.mark.parametrize("python_path", ["", "{}", "{}/src"])
def test_an_environment_is_read_only_though_the_project_is_on_its_path(
    project, sandbox, python_path
):
    variables = {**os.environ, "PYTHONPATH": python_path.format(project)}
    with sandbox(python_of(project), environment=variables) as box:
        assert box.call(import_project) == 42
        found = box.call(plant_everywhere, f"{project}/.venv", using=(answer_of,))
        assert set(found.values()) <= {"EROFS", "EBUSY"}, found
        assert box.call(write_and_read, str(project)) == "written"
    assert (project / "notebook").read_text() == "written"


def write_and_read(folder):
    with open(f"{folder}/notebook", "w") as file:
        file.write("written")
    return open(f"{folder}/notebook").read()


def test_an_environment_that_is_not_the_kernels_is_read_only_too(project, run_inside):
    found = run_inside(plant_everywhere, f"{project}/.venv", using=(answer_of,))
    assert set(found.values()) <= {"EROFS", "EBUSY"}, found


def test_a_link_to_an_environment_cannot_be_replaced(project, run_inside):
    def replace(folder):
        import os

        return [
            answer_of(lambda: os.rename(f"{folder}/env", f"{folder}/other")),
            answer_of(lambda: os.unlink(f"{folder}/env")),
            answer_of(lambda: os.symlink("/tmp", f"{folder}/env")),
            answer_of(lambda: open(f"{folder}/env/bin/planted", "w")),
            answer_of(lambda: open(f"{folder}/deep/venv/bin/planted", "w")),
        ]

    (project / "deep").mkdir()
    (project / ".venv").rename(project / "deep/venv")
    (project / "env").symlink_to("deep/venv")
    found = run_inside(replace, str(project), using=(answer_of,))
    assert found == ["EBUSY", "EBUSY", "EEXIST", "EROFS", "EROFS"]


@pytest.mark.parametrize("name", ["sitecustomize.py", "usercustomize.py", "x.pth", "os.py"])
def test_nothing_that_lies_in_an_environment_runs_outside(
    project, new_folder: Callable[[], Path], sandbox, name
):
    """It is found without being run, and runs inside, where it cannot leave the mark."""
    mark = new_folder() / "ran-outside"
    (packages(project) / name).write_text(TOUCH.format(str(mark)))
    control = subprocess.run([*python_of(project)[:1], "-c", "import sys"], check=True, env={})
    if name in {"sitecustomize.py", "x.pth"}:
        assert control.returncode == 0
        assert mark.exists(), "the attack does not work where it is not held up"
        mark.unlink()
    with sandbox(python_of(project)) as box:
        assert box.call(import_project) == 42
    assert not mark.exists()


def test_a_program_in_place_of_an_interpreter_does_not_run_outside(
    project, new_folder: Callable[[], Path], sandbox
):
    mark = new_folder() / "ran-outside"
    program = project / ".venv/bin/python"
    real = os.path.realpath(program)
    program.unlink()
    program.write_text(f'#!/bin/sh\ntouch {mark}\nexec {real} "$@"\n')
    program.chmod(0o755)
    with sandbox([str(program), "-c", PROGRAM]) as box:
        assert box.call(import_nothing) == "inside"
    assert not mark.exists()


@pytest.mark.parametrize("whose", ["a kernel's", "the kernel.json's"])
def test_what_a_wrapper_names_is_shown_only_if_no_kernel_can_have_written_it(
    workdir: Path, new_folder: Callable[[], Path], sandbox: Any, warnings: list[str], whose: str
) -> None:
    secret, elsewhere = new_folder(), new_folder()
    (secret / "bin").mkdir()
    (secret / "bin/tool").write_text("#!/bin/sh\n")
    (secret / "bin/tool").chmod(0o755)
    script = (workdir if whose == "a kernel's" else elsewhere) / "launch.sh"
    script.write_text(f'#!/bin/bash\n{secret}/bin/tool\nexec {sys.executable} -c "$1"\n')
    for path in (elsewhere, secret, script):
        path.chmod(0o755)
    with sandbox([str(script), PROGRAM]) as box:
        shown = box.call(exists, str(secret))
    assert shown == (whose != "a kernel's")
    assert any(f"{secret} is on the kernel's path only since" in w for w in warnings) != shown


def exists(path):
    import os

    return os.path.exists(path)


def test_an_environment_that_becomes_a_link_meanwhile_is_not_followed(
    new_folder: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, run_inside
):
    place = new_folder() / "environment"
    place.mkdir()
    compile_plan = launch.compile_for

    def replace_first(*arguments):
        place.rmdir()
        place.symlink_to("/etc")
        return compile_plan(*arguments)

    monkeypatch.setattr(launch, "compile_for", replace_first)
    monkeypatch.delenv(WARM, raising=False)
    with pytest.raises(SandboxError, match="symbolic links"):
        run_inside(import_nothing, extra_files=(str(place),))


def import_nothing():
    return "inside"


@pytest.mark.parametrize("variable", ["PATH", "PYTHONPATH", "LD_LIBRARY_PATH"])
def test_what_the_server_would_find_cannot_be_made(project, monkeypatch, run_inside, variable):
    def make(folder):
        import os

        os.makedirs(folder, exist_ok=True)
        open(f"{folder}/planted", "w").close()
        return os.listdir(folder)

    monkeypatch.setenv(variable, f"{project}/tools/bin:{os.environ.get(variable, '/usr/bin')}")
    assert run_inside(make, f"{project}/tools/bin") == ["planted"]
    assert not (project / "tools").exists()


def make_language_server(folder):
    import os

    os.makedirs(f"{folder}/node_modules/pyright", exist_ok=True)
    return os.listdir(f"{folder}/node_modules")


def test_language_servers_cannot_be_planted_where_the_server_was_started(
    project, monkeypatch, run_inside
):
    monkeypatch.chdir(project)
    with pytest.raises(NotADirectoryError):
        run_inside(make_language_server, str(project))
    assert not (project / "node_modules").exists()


def test_language_servers_that_are_there_cannot_be_changed(project, monkeypatch, run_inside):
    monkeypatch.chdir(project)
    (project / "node_modules/typescript").mkdir(parents=True)
    with pytest.raises(OSError, match="Read-only"):
        run_inside(make_language_server, str(project))


def test_a_module_that_a_kernel_makes_is_not_what_the_server_imports(
    project, monkeypatch, run_inside
):
    def make(folder):
        for name in ("colorsys", "mine"):
            open(f"{folder}/{name}.py", "w").write("PLANTED = True")

    monkeypatch.setattr(sys, "path", [str(project), *sys.path])
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    run_inside(make, str(project))
    import colorsys

    assert not hasattr(colorsys, "PLANTED")


def test_what_a_kernel_json_names_is_ours_wherever_it_runs(workdir, new_folder):
    """Front ends that know nothing of provisioners start it in the notebook's directory."""
    mark = new_folder() / "ran-outside"
    (workdir / "sandbox_provisioner").mkdir()
    for name in ("__init__", "unboxed"):
        (workdir / f"sandbox_provisioner/{name}.py").write_text(TOUCH.format(str(mark)))
    for name in ("asyncio", "jupyter_client", "traitlets", "zmq"):
        (workdir / f"{name}.py").write_text(TOUCH.format(str(mark)))
    command = guarded_command(["true"], sys.executable)
    bare = [word for word in command if word != "-P"]
    subprocess.run(bare, cwd=workdir, capture_output=True, check=False)
    assert mark.exists(), "the attack does not work where it is not held up"
    mark.unlink()
    done = subprocess.run(command, cwd=workdir, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no installed sandboxed kernel has this argv" in done.stderr
    assert not mark.exists()


def test_the_servers_import_path_may_be_the_project(project, monkeypatch, warnings, run_inside):
    def plant(folder):
        import os

        tried = [f"{name}{end}" for name in ("sitecustomize", "usercustomize")
                 for end in (".py", ".so", ".abi3.so", ".pyc")]  # fmt: skip
        found = {name: answer_of(lambda n=name: open(f"{folder}/{n}", "w")) for name in tried}
        found["package"] = answer_of(lambda: os.rename(f"{folder}/flat", f"{folder}/sitecustomize"))
        found["flat"] = answer_of(lambda: open(f"{folder}/flat/__init__.py", "w"))
        open(f"{folder}/notebook.ipynb", "w").close()
        return found

    monkeypatch.setenv("PYTHONPATH", str(project))
    before = sorted(os.listdir(project))
    found = run_inside(plant, str(project), using=(answer_of,))
    assert set(found.values()) <= {"EISDIR", "EROFS", "EBUSY"}, found
    assert sorted(os.listdir(project)) == sorted([*before, "notebook.ipynb"])
    assert any("import path" in text for text in warnings)


def test_a_work_directory_on_the_servers_path_is_refused(workdir, monkeypatch, run_inside):
    monkeypatch.setenv("PATH", f"{workdir}:/usr/bin")
    with pytest.raises(SpecError, match="on the server's PATH"):
        run_inside(import_nothing)
