"""hub_asking.py - in a process of the hub's account, or of somebody else: asks the broker for
servers as our spawner would, and as it never would."""

from __future__ import annotations

import os
import sys
from typing import Any

from sandbox_provisioner.broker.server_wish import ServerWish
from sandbox_provisioner.broker.talk import ask_now
from sandbox_provisioner.broker.wishes import Question, written
from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.facilities.network.wish.network import NetworkWish
from sandbox_provisioner.spec import Limits, Volume

_SECONDS = 60.0
_WAITS = "import time; time.sleep(1000)"
place: dict[str, str] = {}


def begin(path: str) -> None:
    """Where the broker is."""
    place["socket"] = path


def about(what: str, sandbox_id: str, **more: Any) -> str:
    """What it answers to a question about that box, "" where it does what was asked."""
    try:
        _, fd = ask_now(
            place["socket"], written(Question(ask=what, sandbox_id=sandbox_id, **more)), _SECONDS
        )
    except SandboxError as error:
        return f"{error.attempt}: {error.answer}"
    if fd >= 0:
        os.close(fd)
    return ""


def server_wish(person: str, *volumes: str, program: str = sys.executable) -> dict[str, Any]:
    """A message that asks for a server of that person's."""
    wish = ServerWish(
        person=person,
        user=person,
        argv=(program, "-c", _WAITS),
        environment={"PATH": os.defpath},
        port=8888,
        api_port=8081,
        sum=Limits(memory_bytes=256 << 20),
        box=Limits(),
        network=NetworkWish(),
        volumes=tuple(map(Volume.parse, volumes)),
    )
    message: dict[str, Any] = written(wish)
    return message


def start(person: str, *volumes: str, program: str = sys.executable, **fields: Any) -> str:
    """What it answers to that, with some *fields* of its own; "" for a server, which is ended
    again."""
    message = server_wish(person, *volumes, program=program)
    message["server-start"] |= fields
    null = os.open(os.devnull, os.O_RDWR)
    try:
        told, end = ask_now(place["socket"], message, _SECONDS, [null, null])
    except SandboxError as error:
        return f"{error.attempt}: {error.answer}"
    finally:
        os.close(null)
    os.close(end)
    assert about("server-kill", told["id"]) == about("server-close", told["id"]) == ""
    return ""
