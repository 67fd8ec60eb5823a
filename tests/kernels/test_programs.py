"""What people run in a cell: compilers, git, pip, and the large libraries of their field."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from facilities import missing

pytestmark = pytest.mark.requires("userns")
# What a machine need not have; tests/allowed_skips.txt has the reasons.
LIBRARIES = {
    "numpy": "float((numpy.arange(10_000.0).reshape(100, 100) @ numpy.eye(100)).sum())",
    "pandas": "float(pandas.DataFrame({'x': range(100)}).groupby(lambda i: i % 3).x.sum().sum())",
    "torch": "float(torch.nn.Linear(4, 2)(torch.ones(3, 4)).sum().backward() is None)",
}
ANSWERS = {"numpy": "49995000.0", "pandas": "4950.0", "torch": "1.0"}
MODULE = "def greet():\n    return 'installed'\n"
METADATA = "Metadata-Version: 2.1\nName: localwheel\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def shell(kernel: Any, script: str) -> str:
    """What a shell writes to both of its outputs, run in a cell as people do."""
    code = (
        "import subprocess\nd = subprocess.run(['sh', '-ec', %r], capture_output=True, text=True)"
    )
    return str(kernel.run(code % script + "\nprint(d.returncode, d.stdout, d.stderr, sep='|')"))


@pytest.mark.requires("gcc")
def test_a_program_is_compiled_and_run(kernel: Any) -> None:
    with kernel() as k:
        k.run("open('p.c', 'w').write('#include <stdio.h>\\nint main(void) { puts(\"hello\"); }')")
        assert shell(k, "gcc -O2 -o p p.c && ./p") == "0|hello\n|\n"


@pytest.mark.requires("git")
def test_a_repository_is_made_committed_to_and_cloned(kernel: Any) -> None:
    script = """
        git init -q -b main repository && cd repository
        git config user.email me@example.org && git config user.name Me
        echo text > file && git add file && git commit -q -m first
        cd .. && git clone -q repository copy && cat copy/file
        git -C copy log --format=%s && git -C copy fsck
    """
    with kernel() as k:
        assert shell(k, script).startswith("0|text\nfirst\n|")


def test_a_wheel_is_installed_and_imported(kernel: Any) -> None:
    """The environment is read-only; where it goes is private to the box, and gone with it."""
    with kernel() as k:
        wheel = Path("localwheel-1.0-py3-none-any.whl")
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("localwheel.py", MODULE)
            archive.writestr("localwheel-1.0.dist-info/METADATA", METADATA)
            archive.writestr("localwheel-1.0.dist-info/WHEEL", WHEEL)
            archive.writestr("localwheel-1.0.dist-info/RECORD", "")
        pip = f"{sys.executable} -m pip install -q --no-index --target /tmp/packages {wheel}"
        assert shell(k, pip).startswith("0|")
        k.run("import sys; sys.path.append('/tmp/packages')")
        assert k.run("import localwheel; print(localwheel.greet())") == "installed\n"
    assert not Path("/tmp/packages").exists()


def test_pip_without_a_network_ends_at_once_and_says_so(kernel: Any) -> None:
    with kernel() as k:
        told = k.run("%pip install a-package-that-is-nowhere")
        assert "this-sandbox-has-no-network" in told
        assert "No matching distribution" in told
        assert "Retrying" not in told


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_large_library_computes(name: str, kernel: Any) -> None:
    if missing(name):
        pytest.skip(missing(name))
    with kernel() as k:
        k.run(f"import {name}")
        assert k.run(LIBRARIES[name]) == ANSWERS[name]
