"""trusted.py - on the host, between starts: what the host would run, or import, later."""

from __future__ import annotations

import os
import subprocess
import sys

from frame import Kind, between
from tools import answer_of, read

MARK = "import os; open({marker!r}, 'w').close()\n"


def environment_of(stage, *, program=""):
    """A virtual environment in the work directory, into which a kernel has put something."""
    own, marker = stage.workdir / ".venv", str(stage.place / "open/marker")
    packages = own / f"lib/python3.{sys.version_info[1]}/site-packages"
    packages.mkdir(parents=True)
    (own / "bin").mkdir()
    (own / "pyvenv.cfg").write_text(f"home = {os.path.dirname(os.path.realpath(sys.executable))}\n")
    (packages / "ours.pth").write_text(os.pathsep.join(stage.packages()) + "\n")
    if program:
        (own / "bin/python").write_text(f'#!/bin/sh\n: > {marker}\nexec {sys.executable} "$@"\n')
        (own / "bin/python").chmod(0o755)
    else:
        (own / "bin/python").symlink_to(os.path.realpath(sys.executable))
        (packages / "planted.pth").write_text(MARK.format(marker=marker))
    return str(own / "bin/python")


def was_run(stage):
    return "run" if (stage.place / "open/marker").exists() else "not run"


for number, title, program in (
    (320, "plant a .pth file in the environment that a kernel uses", ""),
    (321, "replace the interpreter of that environment by a script", "script"),
):

    @between(
        number, title, Kind.TRUSTED, "what is asked for its paths", program,
        expect="not run", control="run",
        without=lambda stage, program: subprocess.run(
            [environment_of(stage, program=program), "-c", ""]
        )
        and was_run(stage),
    )  # fmt: skip
    def plant_in_environment(stage, program):
        python = environment_of(stage, program=program)
        argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        stage.tries(stage.workdir, "1", argv=argv, start_timeout=15)
        return was_run(stage)


def plant_modules(stage):
    text = MARK.format(marker=str(stage.place / "open/marker"))
    for name in ("json", "ctypes", "struct", "select", "resource", "socket", "usercustomize"):
        (stage.workdir / f"{name}.py").write_text(text)
    (stage.workdir / "sandbox_provisioner").mkdir()
    for name in ("__init__", "unboxed"):
        (stage.workdir / f"sandbox_provisioner/{name}.py").write_text(text)


def run_json(stage):
    plant_modules(stage)
    subprocess.run([sys.executable, "-c", "import json"], cwd=stage.workdir)
    return was_run(stage)


@between(
    322, "plant modules of the standard library beside a notebook", Kind.TRUSTED,
    "a module search path that begins with the current directory",
    expect="not run", without=run_json, control="run",
)  # fmt: skip
def plant_standard_modules(stage):
    plant_modules(stage)
    stage.patch.chdir(stage.workdir if stage.variant.group != "landlock" else stage.place)
    stage.tries(stage.workdir, "1")
    return was_run(stage)


@between(
    323, "plant the module that refuses to run without a sandbox", Kind.TRUSTED,
    "a front end that runs argv by itself", expect="not run", without=run_json, control="run",
)  # fmt: skip
def plant_refusal(stage):
    plant_modules(stage)
    subprocess.run(stage.guarded_argv(), cwd=stage.workdir, capture_output=True)
    return was_run(stage)


PLANT = """
import os
def plant(path):
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, 'w').write('planted')
    except OSError as error:
        print(error)
plant({path!r})
"""


def plainly_planted(stage, variable, folder, name, exists):
    path = stage.workdir / folder / name
    path.parent.mkdir(parents=True)
    path.write_text("planted")
    return read(path)


PLACES = (
    (330, "make a directory of PATH that is not there yet", "PATH", "bin", "ls", False),
    (331, "write into a directory of PATH", "PATH", "bin", "ls", True),
    (332, "make a directory of PYTHONPATH that is not there yet", "PYTHONPATH", "lib",
        "sitecustomize.py", False),
    (333, "write into a directory of PYTHONPATH", "PYTHONPATH", "lib", "sitecustomize.py", True),
    (334, "plant a kernelspec", "JUPYTER_PATH", "share", "kernels/python3/kernel.json", False),
    (335, "plant a start-up file of IPython's", "IPYTHONDIR", "own",
        "profile_default/startup/0.py", False),
    (336, "plant a server's configuration", "JUPYTER_CONFIG_DIR", "own",
        "jupyter_server_config.py", False),
    (337, "plant programs that jupyter-lsp runs", "", "node_modules", ".bin/pyright", False),
)  # fmt: skip
for number, title, variable, folder, name, exists in PLACES:

    @between(
        number, title, Kind.TRUSTED, f"{variable or 'node_modules'} leads into a work directory",
        variable, folder, name, exists,
        expect="not there", landlock=None, without=plainly_planted, control="planted",
    )  # fmt: skip
    def plant_in_path(stage, variable, folder, name, exists):
        where = stage.place / "server" if not variable else stage.workdir
        if variable:
            rest = os.environ.get(variable, "") if variable.endswith("PATH") else ""
            stage.patch.setenv(variable, f"{where}/{folder}:{rest}".rstrip(":"))
        if exists:
            (where / folder).mkdir()
        path = f"{where}/{folder}/{name}"
        with stage.kernel(where) as kernel:
            kernel.run(PLANT.format(path=path))
            return "planted" if answer_of(read, path) == "planted" else "not there"


def run_server(stage, *options):
    """As a person does, where a configuration was planted."""
    words = [sys.executable, "-m", "jupyter_server", "--show-config", *options]
    subprocess.run(words, cwd=stage.place / "server", capture_output=True, timeout=60)
    return was_run(stage)


def run_configured(stage):
    """What a Jupyter before 2022 did by itself."""
    plant_configuration(stage)
    return run_server(stage, "--config=jupyter_server_config.py")


def plant_configuration(stage):
    text = MARK.format(marker=str(stage.place / "open/marker"))
    for name in ("jupyter_config", "jupyter_server_config"):
        (stage.place / f"server/{name}.py").write_text(text)


@between(
    338, "plant a configuration of Jupyter's where a server is started", Kind.TRUSTED,
    "CVE-2022-39286", variants=("root",), expect="not run", without=run_configured, control="run",
)  # fmt: skip
def start_server_there(stage):
    plant_configuration(stage)
    return run_server(stage)
