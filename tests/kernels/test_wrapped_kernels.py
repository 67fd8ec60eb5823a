"""Kernels whose command line is a wrapper's, or whose kernel.json sets where things are found."""

from __future__ import annotations

import os
import shutil
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager

from sandbox_provisioner.provisioner import StartRefused

pytestmark = pytest.mark.requires("userns")

LAUNCHER = ("-m", "ipykernel_launcher", "-f", "{connection_file}")


@pytest.fixture
def environment(new_folder: Callable[[], Path]) -> Path:
    """A virtual environment out of the work directory, whose packages are ours."""
    prefix = new_folder() / "lab"
    venv.create(prefix, symlinks=True)
    (packages,) = prefix.glob("lib/python*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "ours.pth").write_text("\n".join(ours))
    return prefix


@pytest.fixture
def with_spec(kernelspec: Any, kernel: Any) -> Callable[..., Any]:
    """``with with_spec(argv, env, **options) as k``; "{resource_dir}" is that of the kernelspec."""

    def start(argv: list[str], env: dict[str, str] | None = None, **options: Any) -> Any:
        manager = KernelManager(kernel_name=kernelspec("wrapped", argv, **options))
        spec = manager.kernel_spec
        assert spec
        spec.env.update(env or {})
        return kernel(manager)

    return start


PREFIX = "import sys; print(sys.prefix)"


@pytest.mark.parametrize(
    "words",
    [
        ["bash", "-c", "exec {python} -m ipykernel_launcher -f {file}"],
        ["env", "A=b", "nice", "-n", "1", "{python}", *LAUNCHER],
        ["bash", "-c", ". {prefix}/bin/activate; exec python -m ipykernel_launcher -f {file}"],
    ],
    ids=["shell", "prefixes", "activate"],
)  # fmt: skip
def test_the_interpreter_behind_a_wrapper_runs(
    with_spec: Any, environment: Path, words: list[str]
) -> None:
    known = {"{python}": f"{environment}/bin/python", "{prefix}": str(environment)}
    known["{file}"] = "{connection_file}"
    for place, value in known.items():
        words = [word.replace(place, value) for word in words]
    with with_spec(words) as k:
        assert k.run(PREFIX).strip() == str(environment)


@pytest.mark.parametrize("runs", ["its own interpreter", "its arguments"])
def test_a_script_beside_the_kernel_json_runs_its_interpreter(
    with_spec: Any, kernelspec: Any, environment: Path, runs: str
) -> None:
    lines = {
        "its own interpreter": 'exec "$LAB/bin/python" -m ipykernel_launcher "$@"\n',
        "its arguments": 'exec "$@"\n',
    }
    folder = Path(os.environ["JUPYTER_PATH"], "kernels", "wrapped")
    folder.mkdir(parents=True)
    script = folder / "launch.sh"
    script.write_text(
        f'#!/bin/bash\nset -e\nLAB={environment}\nexport SEEN="$(dirname "$0")"\n'
        "PATH=$LAB/bin:$PATH\n" + lines[runs]
    )
    script.chmod(0o755)
    words = ["python", *LAUNCHER] if runs == "its arguments" else LAUNCHER[2:]
    with with_spec(["{resource_dir}/launch.sh", *words]) as k:
        assert k.run(PREFIX).strip() == str(environment)
        assert k.run("import os; print(os.environ['SEEN'])").strip() == str(folder)


def test_variables_of_the_kernel_json_tell_where_to_look(
    with_spec: Any, environment: Path, new_folder: Callable[[], Path]
) -> None:
    """Its program on its PATH, and a library on its LD_LIBRARY_PATH."""
    libraries = new_folder()
    libraries.chmod(0o755)
    shutil.copy(next(Path("/").glob("lib*/**/libm.so.6")), libraries / "libmine.so")
    (environment / "bin/labpython").symlink_to("python")
    env = {"PATH": f"{environment}/bin:${{PATH}}", "LD_LIBRARY_PATH": str(libraries)}
    with with_spec(["labpython", *LAUNCHER], env) as k:
        assert k.run(PREFIX).strip() == str(environment)
        answer = k.run("import ctypes; print(ctypes.CDLL('libmine.so')._name)")
        assert answer.strip() == "libmine.so"


def test_what_a_wrapper_names_and_does_not_get_is_told_with_the_volume(
    with_spec: Any, new_folder: Callable[[], Path]
) -> None:
    data = new_folder()
    start = f"exec {sys.executable} {' '.join(LAUNCHER)}"
    words = ["bash", "-c", f"cd {data} || exit 3; {start}"]
    with pytest.raises(StartRefused, match="ended with status 3") as caught, with_spec([*words]):
        pass
    volume = f"{data}:{data}"
    assert f"names what is not in the box, {data}" in str(caught.value.error)
    assert f'volumes = ["{volume}"]' in str(caught.value.error)
    with with_spec(words, volumes=[volume]) as k:
        assert k.run("print(6 * 7)").strip() == "42"
