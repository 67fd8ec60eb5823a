"""binder/: what its notebook shows where sandboxes start, and where a container forbids them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).parents[2]
# user_namespaces(7): the limit of a user namespace holds for all that is made inside of it.
FORBID = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'


@pytest.fixture
def binder(
    monkeypatch: pytest.MonkeyPatch, new_folder: Callable[[], Path], runtime_dir: Path
) -> dict[str, str]:
    """The environment in which Binder would start the notebook server."""
    data = new_folder()
    monkeypatch.setenv("JUPYTER_PATH", str(data))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(new_folder()))
    (data / "kernels").mkdir()
    (data / "kernels/python3-sandbox").symlink_to(REPOSITORY / "kernelspecs/python3-sandbox")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return dict(os.environ)


@pytest.mark.slow("a whole notebook")
@pytest.mark.requires("userns", "cgroup-memory", "cgroup-cpu")
def test_the_notebook_shows_a_sandboxed_kernel_where_one_can_start(
    binder: dict[str, str], workdir: Path
) -> None:
    notebook = nbformat.read(REPOSITORY / "binder/demo.ipynb", 4)
    NotebookClient(notebook, resources={"metadata": {"path": str(workdir)}}).execute()
    texts = [output.text for cell in notebook.cells for output in cell.get("outputs", ())]
    assert "in the sandbox: 1000" in "".join(texts)


@pytest.mark.slow("a whole notebook")
@pytest.mark.requires("userns", "root")
def test_where_user_namespaces_are_forbidden_the_notebook_says_so_and_nothing_starts(
    binder: dict[str, str], workdir: Path
) -> None:
    program = (
        "import nbformat; from nbclient import NotebookClient\n"
        f"notebook = nbformat.read({str(REPOSITORY / 'binder/demo.ipynb')!r}, 4)\n"
        f"resources = {{'metadata': {{'path': {str(workdir)!r}}}}}\n"
        "NotebookClient(notebook, resources=resources).execute()\n"
        "print(''.join(o.text for c in notebook.cells for o in c.get('outputs', ())))\n"
    )
    command = ["unshare", "-Ur", "sh", "-c", FORBID, "sh", sys.executable, "-c", program]
    answer = subprocess.run(command, env=binder, capture_output=True, text=True, check=False)
    assert "refused: Could not" in answer.stdout, answer.stderr
    assert "user.max_user_namespaces is 0" in answer.stdout
    assert "in the sandbox" not in answer.stdout


def test_the_post_build_script_installs_the_kernelspec(tmp_path: Path) -> None:
    target = tmp_path / "bin"
    target.mkdir()
    (target / "jupyter").write_text('#!/bin/sh\necho "$@"\n')
    (target / "jupyter").chmod(0o755)
    path = f"{target}:{os.environ['PATH']}"
    answer = subprocess.run(
        ["bash", "binder/postBuild"],
        cwd=REPOSITORY, env={"PATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "kernelspec install --sys-prefix kernelspecs/python3-sandbox" in answer.stdout
