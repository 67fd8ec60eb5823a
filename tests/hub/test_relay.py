"""The relay in a hub user's box, beside the server and whatever that one's user runs there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import users
from facilities import public_python

from sandbox_provisioner.hub import relay

pytestmark = pytest.mark.requires("root", "setpriv", "public-python")
# The server, whose child the relay is: what Linux lets it do to that one, and to another child.
SERVER = """
import ctypes, json, os, subprocess
libc = ctypes.CDLL(None, use_errno=True)
own = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
with open("/proc/thread-self/children") as file:
    relay, = (int(pid) for pid in file.read().split() if int(pid) != own.pid)
def tried(pid):
    found = {"traced": libc.ptrace(16, pid, 0, 0) == 0}  # PTRACE_ATTACH
    for name in ("environ", "maps", "mem", "fd", "cwd"):
        try:
            path = f"/proc/{pid}/{name}"
            os.listdir(path) if name in ("fd", "cwd") else open(path, "rb").close()
            found[name] = True
        except OSError:
            found[name] = False
    return found
print(json.dumps([tried(relay), tried(own.pid)]), flush=True)
os.kill(own.pid, 9)  # Popen takes one that is traced for one that has ended
os.kill(relay, 9)
"""


def test_no_process_of_the_same_user_looks_into_it(tmp_path: Path, public_folder: Path) -> None:
    """Its descriptors are the way of the proxy and of the hub."""
    script = public_folder / "relay.py"
    script.write_bytes(Path(relay.__file__).read_bytes())
    script.chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as free:
        api_port = free.getsockname()[1]
    python = public_python()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "door"))
        door.listen()
        done = subprocess.run(
            [*users.IDENTITY, python, "-SI", script, "1", str(api_port), "/none", "4",
             os.path.realpath(python), "-c", SERVER],
            stdin=door, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    of_relay, of_another = json.loads(done.stdout)
    assert set(of_relay.values()) == {False}
    assert set(of_another.values()) == {True}
