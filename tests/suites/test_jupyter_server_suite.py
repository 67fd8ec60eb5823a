"""jupyter_server's own tests of contents, files and nbconvert, with our manager in its place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib.metadata import version

import pytest
from jupyter_programs import Home
from sources import unpacked

_PATIENCE_SECONDS = 300
_WHAT = ("tests/services/contents", "tests/test_files.py", "tests/nbconvert")
# What the suite imports by these names is ours, before any of its modules is loaded.
_PLUGIN = """
from jupyter_server.services.contents import filecheckpoints, filemanager, largefilemanager
from sandbox_provisioner.contents import SandboxContentsManager
from sandbox_provisioner.contents.checkpoints import SandboxCheckpoints

filemanager.AsyncFileContentsManager = SandboxContentsManager
largefilemanager.AsyncLargeFileManager = SandboxContentsManager
filecheckpoints.AsyncFileCheckpoints = SandboxCheckpoints
"""

pytestmark = [
    pytest.mark.requires("network", "jupyter_server", "pytest_jupyter"),
    pytest.mark.timeout(2 * _PATIENCE_SECONDS),
    pytest.mark.slow("hundreds of others' tests"),
]


def test_our_contents_manager_passes_every_test_of_jupyter_servers_own() -> None:
    source = unpacked("jupyter_server", version("jupyter_server"))
    with Home() as home:
        shutil.copytree(source / "tests", home.notebooks / "tests")
        shutil.copy(source / "pyproject.toml", home.notebooks)
        (home.notebooks / "ours_for_theirs.py").write_text(_PLUGIN)
        report = home.path / "report.xml"
        # Warnings, which are errors there, also come of the suite itself and of Python's end.
        settings = ("-o", "addopts=", "-o", "filterwarnings=default", f"--basetemp={home.path}/t")
        options = ("-p", "no:asyncio", "-p", "ours_for_theirs", *settings, "-q")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *_WHAT, *options, f"--junitxml={report}"],
            cwd=home.notebooks,
            env=home.environment(PYTHONPATH=str(home.notebooks)),
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
        )
        assert done.returncode == os.EX_OK, (done.stdout + done.stderr)[-20_000:]
        (found,) = ET.parse(report).iter("testsuite")
        passed = int(found.attrib["tests"]) - int(found.attrib["skipped"])
        assert passed > 450, done.stdout[-5000:]
