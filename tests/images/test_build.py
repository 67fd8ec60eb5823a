"""An image of Debian's and Python's packages, built as a person would, and a kernel in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import clients
import pytest
from jupyter_client.manager import KernelManager

pytestmark = [
    pytest.mark.requires("root", "mmdebstrap", "sqfstar", "userns"),
    pytest.mark.slow("installs Debian and ipykernel anew"),
    pytest.mark.timeout(900),
]
RECIPE = """
pip = ["six"]
[files]
"/srv/course/data.csv" = "data.csv"
"""
COURSE = """
name = "course"
rootfs = "course"
warm = false
"""
# Installed in the layer, as a student does: its own environment is the kernel's to write to.
LOOK = """
import json, os, subprocess, sys, ipykernel, six
made = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, text=True)
open("/opt/kernel/mine", "w").close()
print(json.dumps({
    "python": sys.executable, "pip": made.stdout.split()[0],
    "data": open("/srv/course/data.csv").read(),
    "six": six.__file__, "system": "bookworm" in open("/etc/os-release").read(),
    "machine-id": os.path.exists("/etc/machine-id"), "host": os.path.exists("%s"),
}))
"""


def test_an_image_is_built_and_a_kernel_of_a_course_runs_in_it(
    command: Any, tmp_path: Path, workdir: Path, runtime_dir: Path, capsys: Any
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "data.csv").write_text("a,b\n")
    (tmp_path / "sandbox.toml").write_text(COURSE + f'runtime_dir = "{runtime_dir}"\n')
    command("image", "build", "course", tmp_path / "recipe.toml")
    assert "Its kernel is /opt/kernel/bin/python3" in capsys.readouterr().out
    command("image", "check", "course")
    command("install", "--from", tmp_path / "sandbox.toml", "--prefix", tmp_path / "prefix")
    manager = KernelManager(kernel_name="course")
    manager.start_kernel(cwd=str(workdir))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        found = json.loads(clients.run(client, LOOK % Path(__file__).parent))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert found == {
        "python": "/opt/kernel/bin/python3", "pip": "pip", "data": "a,b\n", "system": True,
        "six": "/opt/kernel/lib/python3.11/site-packages/six.py",
        "machine-id": False, "host": False,
    }  # fmt: skip
    command("image", "remove", "course")
    assert not list((tmp_path / "images/blobs").iterdir())
    assert not list((tmp_path / "images/work").iterdir())
