"""jupyter_kernel_test: the Jupyter project's own check that a kernel speaks the protocol."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from jupyter_programs import Home
from sources import unpacked

VERSION = "0.7.0"
_PATIENCE_SECONDS = 300

pytestmark = [
    pytest.mark.requires("userns", "network"),
    pytest.mark.timeout(2 * _PATIENCE_SECONDS),
    pytest.mark.slow("others' tests, with a kernel"),
]


def test_the_sandboxed_ipython_passes_every_check_of_jupyter_kernel_test() -> None:
    source = unpacked("jupyter_kernel_test", VERSION)
    with Home() as home:
        home.add_kernel("boxed")
        # Its own example: all checks, for IPython under the name that its author knows it by.
        text = (source / "test_ipykernel.py").read_text()
        assert text.count('kernel_name = "python3"') == 1
        suite = home.notebooks / "test_boxed.py"
        suite.write_text(text.replace('kernel_name = "python3"', 'kernel_name = "boxed"'))
        report = home.path / "report.xml"
        command = ["pytest", suite.name, "-p", "no:asyncio", "-o", "addopts=", "-q"]
        done = subprocess.run(
            [sys.executable, "-m", *command, f"--junitxml={report}"],
            cwd=home.notebooks,
            env=home.environment(PYTHONPATH=str(source)),
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
        )
        assert done.returncode == os.EX_OK, done.stdout + done.stderr
        (found,) = ET.parse(report).iter("testsuite")
        # The one that is skipped is a part: its example leaves out history by range.
        assert (int(found.attrib["skipped"]), int(found.attrib["tests"]) >= 13) == (1, True)
