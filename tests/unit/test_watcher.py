"""What speaks against giving a kernel a module that a nursery has imported."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox_provisioner.nursery import preload
from sandbox_provisioner.nursery.preload import WHY, Watcher, empty_home, put_in_home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of a nursery, which has a file already; and a /tmp of its own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(preload, "_TEMPORARY", (str(tmp_path / "tmp"),))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "before").write_text("there")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(preload, "_has_children", lambda: False)  # pytest's own are no matter
    monkeypatch.setattr(preload, "is_one_thread", lambda: True)
    return tmp_path / "home"


def opens(_: Path) -> object:
    return open(os.devnull)


def shares(_: Path) -> object:
    return mmap.mmap(-1, mmap.PAGESIZE)


def leaves(home: Path) -> object:
    return (home.parent / "tmp" / "left").write_text("x")


def fills(home: Path) -> object:
    return (home / "big").write_bytes(bytes(preload._MOST_HOME_BYTES + 1))


def scatters(home: Path) -> object:
    return [(home / str(number)).touch() for number in range(preload._MOST_HOME_FILES + 1)]


@pytest.mark.parametrize(
    ("act", "why"),
    [(opens, "files"), (shares, "memory"), (leaves, "temporary"), (fills, "home"),
     (scatters, "home")],
)  # fmt: skip
def test_what_is_done_is_noticed(home: Path, act: Callable[[Path], object], why: str) -> None:
    watcher = Watcher()
    assert watcher.why_not() == ""
    kept = act(home)
    assert watcher.why_not() == why
    assert WHY[why].startswith("it ")
    if hasattr(kept, "close"):
        kept.close()


def test_who_asks_for_the_directory_is_noticed_and_whom_python_asks_for_is_not(home: Path) -> None:
    watcher = Watcher()
    with watcher.asked_for_directory():
        tempfile._candidate_tempdir_list()
    assert watcher.why_not() == ""
    with watcher.asked_for_directory():
        os.path.abspath("relative")
    assert watcher.why_not() == "directory"


def test_threads_and_processes_are_noticed() -> None:
    script = (
        "import subprocess, sys, threading\n"
        "from sandbox_provisioner.nursery.preload import _has_children, is_one_thread\n"
        "print(is_one_thread(), _has_children())\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "print(is_one_thread(), _has_children())\n"
        "child.communicate(b'\\n')\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "False", "True"], done.stderr


def test_what_imports_leave_in_the_home_is_made_again_in_that_of_a_kernel(home: Path) -> None:
    watcher = Watcher()
    (home / ".cache" / "lib").mkdir(parents=True)
    (home / ".cache" / "lib" / "index").write_text("made")
    (home / ".cache" / "lib" / "index").chmod(0o640)
    left = watcher.left_in_home()
    empty_home(["before"])
    assert [path.name for path in home.iterdir()] == ["before"]
    put_in_home(left)
    assert (home / ".cache" / "lib" / "index").read_text() == "made"
    assert (home / ".cache" / "lib" / "index").stat().st_mode & 0o777 == 0o640
    put_in_home(left)  # what is there stays
