"""broker/server_wish.py - a hub, and the daemon; pure: the server that a hub wishes for a person.

It is data, as the wish for a kernel is. Whoever starts it finds the person, looks for the program
and for what the box is shown, and makes the box: a hub that is root by itself, any other one by the
broker, which looks with that person's rights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sandbox_provisioner.broker.values import BadValue
from sandbox_provisioner.facilities.devices.wish import check as check_devices
from sandbox_provisioner.facilities.network.wish.network import OFFERED
from sandbox_provisioner.facilities.workdir.facts.run_by_host import Server
from sandbox_provisioner.spec import Limits, NetworkWish, Volume

# stdout and stderr.
SERVER_STREAMS = 2
_MOST_WORDS = 1024
_MOST_VOLUMES = 32
_MOST_NAME = 256
_MOST_PORT = 65535
_VARIABLE = re.compile(r"[^=\0]+", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerWish:
    """The server of the system's user *person*, whom the hub calls *user*: *argv*, whose program is
    looked for on the PATH of *environment*, and which listens at *port* of its box's loopback and
    finds the hub's API at *api_port*. *sum* is for all that the person runs; the sizes in *box* are
    for this one. *installed* is the folder of the hub's own programs; *server* is what it runs and
    imports."""

    person: str
    user: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    port: int
    api_port: int
    sum: Limits
    box: Limits
    network: NetworkWish
    volumes: tuple[Volume, ...] = ()
    devices: tuple[str, ...] = ()
    installed: str = ""
    server: Server | None = None

    def __post_init__(self) -> None:
        for name in (self.person, self.user):
            good = 0 < len(name) <= _MOST_NAME and name.isprintable()
            _require(good, f"{name[:_MOST_NAME]!r} is no name of a person")
        self._check_command()
        for port in (self.port, self.api_port):
            _require(0 < port <= _MOST_PORT, "that is no port")
        _require(self.port != self.api_port, "one port is given twice")
        _require(len(self.volumes) <= _MOST_VOLUMES, "there are too many volumes")
        check_devices(self.devices)

    def _check_command(self) -> None:
        _require(0 < len(self.argv) <= _MOST_WORDS, "argv has no words, or too many")
        program = self.argv[0]
        relative = "/" in program and not program.startswith("/")
        _require(bool(program) and not relative, "the program's path is relative")
        _require(not any("\0" in word for word in self.argv), "a word of argv has a NUL")
        for name, value in self.environment.items():
            good = _VARIABLE.fullmatch(name) and "\0" not in value
            _require(bool(good), "a variable has a name or a value that none can have")

    @property
    def program(self) -> str:
        """What lists and logs call it."""
        return self.argv[0].rpartition("/")[2]

    def check_offered(self) -> None:
        """BadValue for what root's hub alone may give its servers."""
        _require(self.network.mode in OFFERED, "nobody can ask for that network")


def _require(good: bool, answer: str) -> None:
    if not good:
        raise BadValue(answer)
