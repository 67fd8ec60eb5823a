"""The trusted side: what a kernel is given is mounted by the descriptor that was judged.

strace(1) sees every call by which the server, its launcher and PID 1 name a file; "-y" tells which
file a descriptor stands for.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.requires("root", "userns", "strace")

START = """
import asyncio, sys
from pathlib import Path
import boxes
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.spec import Volume
workdir, given, runtime = sys.argv[1:]
request = boxes.request_for(
    workdir, ["/usr/bin/true"], volumes=(Volume.parse(f"{given}:/given"),), environment={}
)
async def start():
    handle = await LocalLauncher(runtime_dir=runtime).start(request)
    await handle.wait()
    await handle.close()
asyncio.run(start())
"""


@pytest.fixture
def calls(new_folder, runtime_dir):
    """The calls of a start that have to do with its work directory and its volume, and these."""
    workdir, given, trace = new_folder() / "work", new_folder() / "given", new_folder() / "trace"
    for folder in (workdir, given):
        folder.mkdir()
    places = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    path = ":".join(places)
    options = ["-f", "-qq", "-y", "-s", "4096", "-e", "trace=%file,open_tree", "-o", trace]
    subprocess.run(
        ["strace", *options, sys.executable, "-c", START, workdir, given, runtime_dir],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"}, check=True, timeout=60,
    )  # fmt: skip
    lines = trace.read_text().splitlines()
    theirs = [line for line in lines if f"{workdir}" in line or f"{given}" in line]
    assert theirs
    return theirs, (str(workdir), str(given))


def test_what_is_mounted_is_what_was_opened(calls):
    lines, given = calls
    taken = [line for line in lines if "open_tree(" in line]
    for folder in given:
        (line,) = [line for line in taken if f"<{folder}>" in line]
        assert f'<{folder}>, "", ' in line
        assert "AT_EMPTY_PATH" in line
