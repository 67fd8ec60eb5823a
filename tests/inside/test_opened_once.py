"""The trusted side: what a kernel is given is mounted by the descriptor that was judged.

strace(1) sees every call by which the server, its launcher and PID 1 name a file; "-y" tells which
file a descriptor stands for.
"""

from __future__ import annotations

import re
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
    """The calls of a start that have to do with its work directory and its volume, and these.

    There is what is looked for in a work directory: a repository, environments, packages."""
    workdir, given, trace = new_folder() / "work", new_folder() / "given", new_folder() / "trace"
    for folder in (workdir, given):
        folder.mkdir()
    for name in (".git", ".venv", "package"):
        (workdir / name).mkdir()
    (workdir / ".venv/pyvenv.cfg").touch()
    (workdir / "package/__init__.py").touch()
    places = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    path = ":".join([*places, str(workdir)])
    options = ["-f", "-qq", "-y", "-s", "4096", "-e", "trace=%file,open_tree", "-o", trace]
    subprocess.run(
        ["strace", *options, sys.executable, "-c", START, workdir, given, runtime_dir],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
        check=True, timeout=60,
    )  # fmt: skip
    lines = whole(trace.read_text().splitlines())
    theirs = [line for line in lines if f"{workdir}" in line or f"{given}" in line or "fd/" in line]
    assert theirs
    return theirs, (str(workdir), str(given))


def whole(lines):
    """*lines* of strace(1), where those of several processes may have cut a call in two."""
    found, begun = [], {}
    for line in lines:
        pid, cut, end = line.split()[0], " <unfinished ...>", " resumed>"
        if line.endswith(cut):
            begun[pid] = line.removesuffix(cut)
        elif end in line and pid in begun:
            found.append(begun.pop(pid) + line.partition(end)[2])
        else:
            found.append(line)
    return found


def test_what_is_mounted_is_what_was_opened(calls):
    lines, given = calls
    taken = [line for line in lines if "open_tree(" in line]
    for folder in given:
        (line,) = [line for line in taken if f"<{folder}>" in line]
        assert f'<{folder}>, "", ' in line
        assert "AT_EMPTY_PATH" in line


# What only asks where a link leads decides nothing about what is there (`links.real_path`); what is
# opened once more, without links, for the clean-up is compared (`places.open_again`).
EXCEPTIONS = re.compile(
    r"readlink\(|newfstatat\(.*AT_SYMLINK_NOFOLLOW|openat2\(.*RESOLVE_NO_SYMLINKS"
)


def only_asks_where(line, after):
    """`real_path` opens a name, and asks nothing of what is open but its path."""
    if EXCEPTIONS.search(line):
        return True
    told = re.search(r"O_RDONLY\|O_CLOEXEC\|O_PATH\) += (?:(-1)|(\d+)<)", line)
    return bool(told and (told[1] or f'readlink("/proc/self/fd/{told[2]}"' in after))


def test_what_is_in_it_is_judged_by_its_descriptor(calls):
    """A name would lead elsewhere if somebody exchanged it: see `run_by_host.py`, `covers.py`."""
    lines, (workdir, _) = calls
    (opened,) = [n for n, line in enumerate(lines) if '"work", ' in line and "O_PATH" in line][:1]
    server = lines[opened].split()[0]
    named = re.compile(rf'"{re.escape(workdir)}(/[^"]*)?"')
    by_descriptor = [line for line in lines[opened:] if line.split()[0] == server]
    pairs = zip(by_descriptor, [*by_descriptor[1:], ""], strict=True)
    looks = [(line, after) for line, after in pairs if named.search(line)]
    assert [line for line, after in looks if not only_asks_where(line, after)] == []
    for name in (".venv/pyvenv.cfg", "package/__init__.py", ".git"):
        assert any(f'/{name}"' in line for line in by_descriptor), name
