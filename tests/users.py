"""users.py - in the test process, as root: programs that an ordinary user runs, with our code.

They have a name, a home and a range of ids, in files that they find in the places of the machine's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from facilities import public_python

USER, NAME = 4321, "sbxuser"
FIRST_UID, FIRST_GID = 400_000, 500_000
IDENTITY = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
# What the machine tells of users, in a mount namespace of this test's own.
_WITH_FILES = """
cd "$1" && shift
for name in passwd group subuid subgid; do
    ! [ -f "$name" ] || mount --bind "$name" "/etc/$name" || exit
done
! [ -e fuse ] || mount --bind fuse /dev/fuse || exit
cd / && exec "$@"
"""


def make_home(folder: Path) -> Path:
    """Make *folder*, in which our code is, their home directory."""
    for name in ("work", "run", "base"):
        (folder / name).mkdir()
        os.chown(folder / name, USER, USER)
    write_files(folder, f"{NAME}:{FIRST_UID}:65536\n", f"{USER}:{FIRST_GID}:65536\n")
    return folder


def write_files(home: Path, subuid: str, subgid: str) -> None:
    """Who they are, and which ranges of ids they have."""
    line = f"{NAME}:x:{USER}:{USER}::{home}:/bin/sh\n"
    (home / "passwd").write_text(Path("/etc/passwd").read_text() + line)
    (home / "subuid").write_text(subuid)
    (home / "subgid").write_text(subgid)


def with_files(home: Path) -> list[str]:
    """The words of a command before which it finds who they are in the machine's files."""
    return ["unshare", "--mount", "sh", "-c", _WITH_FILES, "sh", str(home)]


def as_user(home: Path, *words: str, **variables: str) -> str:
    """The output of Python with *words* as they run it, with more *variables*; it must end well."""
    done = try_as_user(home, *words, variables=variables)
    assert done.returncode == 0, done.stdout
    return done.stdout


def try_as_user(
    home: Path, *words: str, variables: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """The same, however it ends."""
    with start_as_user(home, *words, variables=variables) as process:
        output = process.communicate()[0]
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def start_as_user(home: Path, *words: str, variables: Mapping[str, str]) -> subprocess.Popen[str]:
    """The same while it runs: it is the very process."""
    code = home / "code"
    modules = [str(code), f"{code}/tests", f"{code}/tests/inside", *sys.path]
    environment = {
        "PYTHONPATH": os.pathsep.join(modules),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(home),
        "PATH": os.defpath,
        # A test with a HOME of its own would have packages of its own, and so a nursery.
        "PYTHONUSERBASE": f"{home}/python",
        **variables,
    }
    return subprocess.Popen(
        [*with_files(home), *IDENTITY, public_python(), *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
