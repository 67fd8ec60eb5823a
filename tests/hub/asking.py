"""asking.py - a program in the box of a hub user's server: asks for more than that box has.

Its words are a directory that the box does not show, and the id of somebody else's sandbox. It
writes the hub's answers as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import sys
import uuid
from typing import Any

from sandbox_provisioner.broker.box import SOCKET
from sandbox_provisioner.broker.frames import frame
from sandbox_provisioner.broker.wishes import Wish, written
from sandbox_provisioner.contract import Labels
from sandbox_provisioner.facilities.network.wish.network import Network, NetworkWish
from sandbox_provisioner.facilities.workdir.facts.run_by_host import Server
from sandbox_provisioner.spec import SandboxSpec, Volume

HOME = os.path.dirname(os.path.abspath(__file__))
LOOK = """
import json, os, sys
net = [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line]
print(json.dumps([[p for p in sys.argv[1:] if os.path.exists(p)], net, os.getuid()]), flush=True)
"""


def send(message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.connect(SOCKET)
        answer = b""
        with contextlib.suppress(ConnectionError):  # who is refused at once is not read
            socket.send_fds(made, [frame(message)], fds) if fds else made.sendall(frame(message))
        with contextlib.suppress(ConnectionError):
            while chunk := made.recv(1 << 16):
                answer += chunk
    found: dict[str, Any] = json.loads(answer[4:])
    return found


def start(spec: SandboxSpec, *places: str, out: int = -1, **fields: Any) -> dict[str, Any]:
    null = os.open(os.devnull, os.O_RDWR)
    wish = Wish(
        sandbox_id=uuid.uuid4().hex[:12], spec=spec, cwd=spec.workdir, home=HOME, here=HOME,
        connection_file=("kernel.json", "{}"), umask=0o022, inherited={}, server=Server(),
        labels=Labels(),
        **{"argv": (sys.executable, "-c", LOOK), "environment": dict(os.environ), **fields},
    )  # fmt: skip
    fds = [null, null if out < 0 else out, null]
    fds += [os.open(path, os.O_PATH) for path in (spec.workdir, *places)]
    return send(json.loads(json.dumps(written(wish))), fds)


def crowd() -> None:
    """Many come at once, who say half of something, too much, or nothing; others are listened to
    again when they have gone."""
    made = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(300)]
    for number, one in enumerate(made):
        with contextlib.suppress(ConnectionError):
            one.connect(SOCKET)
            one.sendall((b"\0\0", b"\xff" * 8, b"")[number % 3])
    told = made[-1].recv(1 << 12)
    assert b"too much at once" in told, told
    for one in made:
        one.close()
    while "error" in (found := send({"ask": "list"}, [])):
        assert "too much at once" in found["error"]["answer"]


def main(elsewhere: str, another: str) -> None:
    crowd()
    own = SandboxSpec(workdir=HOME)
    more = SandboxSpec(
        workdir=HOME, network=NetworkWish(mode=Network.GATEWAY, allow=("*.example.org:443",))
    )
    read, write = os.pipe()
    given = start(
        more, out=write, argv=(sys.executable, "-c", LOOK, elsewhere, f"{elsewhere}/program"),
        environment={**os.environ, "JAVA_HOME": elsewhere}, extra_files=(elsewhere,),
    )  # fmt: skip
    os.close(write)
    with open(read) as told:
        seen = json.loads(told.readline())
    writable = Volume(source="/usr/share", target="/data", readonly=False)
    link = f"{HOME}/by-another-name"
    os.symlink("/usr/share", link)
    rooted = SandboxSpec(workdir=HOME, rootfs="/usr/share")
    print(json.dumps({
        "given": [given.get("error"), given.get("warnings"), *seen],
        "program": start(own, argv=(f"{elsewhere}/program",)),
        "another root": start(rooted, "/usr/share", argv=(f"{elsewhere}/program",)),
        "by a link": start(SandboxSpec(workdir=link)),
        "of the box alone": start(SandboxSpec(workdir="/tmp")),
        "read-only": start(SandboxSpec(workdir=HOME, volumes=(writable,)), "/usr/share"),
        "another's": send({"ask": "kill", "sandbox_id": another}, []),
    }))  # fmt: skip


if __name__ == "__main__":
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    main(*sys.argv[1:])
