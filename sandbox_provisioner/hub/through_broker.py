"""hub/through_broker.py - in a hub that is not root: has the servers of people started by the
broker, whose daemon has them (`for_hub.py`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import socket
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sandbox_provisioner.broker.launcher import BrokeredHandle, server_of
from sandbox_provisioner.broker.server_wish import ServerWish
from sandbox_provisioner.broker.talk import Answer, Silent, ask, ask_now
from sandbox_provisioner.broker.wishes import Question, written
from sandbox_provisioner.caller import Caller
from sandbox_provisioner.contract import Stdio
from sandbox_provisioner.errors import COMMAND, HostError, LaunchError, SandboxError
from sandbox_provisioner.hub.doors import url_of
from sandbox_provisioner.launch import Warn
from sandbox_provisioner.off_loop import Gate, off_loop

_SECONDS = 5.0
# The broker hears so many of one user at once, and somebody has to be left to ask how they are.
_gate = Gate(16)
_AGAIN_SECONDS = 1.0
_closing: set[asyncio.Task[None]] = set()


class ServerHandle(BrokeredHandle):
    """The box of a server that the broker has."""

    def _question(self, what: str, **more: Any) -> Answer:
        return super()._question(f"server-{what}", **more)


class BrokeredServer:
    """That of one person, as `servers.Server`."""

    def __init__(self, path: str, end: int, told: Answer, warn: Warn) -> None:
        self._path = path
        self._warn = warn
        self.handle = ServerHandle(path, told["id"], end, told, [])
        self.entrance = Path(told["entrance"])
        self._id = str(told["id"])

    @property
    def url(self) -> str:
        """Where the hub, and its proxy, reach it."""
        return url_of(self.entrance)

    async def listen(self) -> socket.socket:
        """What listens for the hub's API, whose caller accepts: in place of who did before."""
        async with _gate.passed():
            _, fd = await ask(self._path, self._about("listen"))
        return socket.socket(fileno=fd)

    async def keep(self) -> None:
        """Called when it is written down where it is found."""
        async with _gate.passed():
            await ask(self._path, self._about("keep"))

    def _about(self, what: str) -> Answer:
        return written(Question(ask=f"server-{what}", sandbox_id=self._id))

    async def close(self) -> None:
        """End all in the box and beside it, and leave nothing. Where the broker does not do that
        just now it is asked again: jupyterhub forgets a server whose end it has asked for."""
        try:
            await self._close()
        except SandboxError as error:
            self._warn(f"The server ends as soon as that can be asked for: {error}")
            _go_on(self._close_later())

    async def _close(self) -> None:
        async with _gate.passed():
            await self.handle.close()

    async def _close_later(self) -> None:
        """Whatever became of it meanwhile: a broker may have been killed that was ending it."""
        is_closed = False
        while not is_closed:
            await asyncio.sleep(_AGAIN_SECONDS)  # no event tells that there is a broker again
            with contextlib.suppress(SandboxError):
                async with _gate.passed():
                    with contextlib.suppress(LaunchError):  # it has been removed already
                        await ask(self._path, self._about("close"))
                is_closed = True


class BrokeredServers:
    """Starts and finds them, through the broker at *path*; as `servers.Servers`."""

    def __init__(self, path: str, warn: Warn) -> None:
        self._path = path
        self._warn = warn

    async def start(self, wish: ServerWish, stdio: Stdio) -> BrokeredServer:
        """Start what *wish* asks for; SandboxError."""
        wish = await off_loop(_with_what_we_run, wish)
        async with _gate.passed():
            with _told_to_hub(self._path):
                streams = [_descriptor(stdio.stdout, 1), _descriptor(stdio.stderr, 2)]
                told, end = await ask(self._path, written(wish), streams)
        for text in told["warnings"]:
            self._warn(text)
        return BrokeredServer(self._path, end, told, self._warn)

    def find(self, card: Mapping[str, Any]) -> BrokeredServer:
        """That of which another hub's handle has left *card*; LaunchError if it has ended, and
        Silent where nobody can tell."""
        init = int(card["init_pid"]), int(card["init_start"])
        question = Question(ask="server-find", sandbox_id=card["id"], init=init)
        with _told_to_hub(self._path):
            told, end = ask_now(self._path, written(question), _SECONDS)
        return BrokeredServer(self._path, end, told, self._warn)

    def close_later(self, card: Mapping[str, Any]) -> None:
        """End that of *card* as soon as the broker tells where it is: as `BrokeredServer.close`."""
        self._warn("The server ends as soon as the sandbox broker answers.")
        _go_on(self._find_and_close(card))

    async def _find_and_close(self, card: Mapping[str, Any]) -> None:
        while True:
            try:
                found = await off_loop(self.find, card)
            except LaunchError:
                return  # it has ended
            except SandboxError:
                await asyncio.sleep(_AGAIN_SECONDS)
            else:
                return await found.close()

    def sweep(self) -> None:
        """The broker does."""


def _go_on(closing: Coroutine[Any, Any, None]) -> None:
    """When whoever has asked for it waits no more."""
    task = asyncio.ensure_future(closing)
    _closing.add(task)
    task.add_done_callback(_closing.discard)


def _descriptor(stream: Any, usual: int) -> int:
    if stream is None:
        return usual
    return stream if isinstance(stream, int) else int(stream.fileno())


def _with_what_we_run(wish: ServerWish) -> ServerWish:
    """So that no server can change what we run."""
    try:
        home = pwd.getpwnam(wish.person).pw_dir
    except KeyError:
        return wish  # the broker tells
    return replace(wish, server=server_of(Caller.this_process(), os.path.realpath(home)))


@contextlib.contextmanager
def _told_to_hub(path: str) -> Iterator[None]:
    """Where nobody answers, who reads of it waits for a server."""
    try:
        yield
    except Silent as error:
        raise Silent(
            attempt=f"ask the sandbox broker at {path} for a server",
            answer=error.answer,
            remedy=(
                "The hub does not run as root, so this daemon starts the servers. For the "
                "administrator of this machine:",
                f"{COMMAND}systemctl enable --now sandbox-broker.socket",
            ),
        ) from None


def check_serves(path: str) -> None:
    """SandboxError unless the broker at *path* answers, and starts servers for the account that we
    are: it has none of this name."""
    question = written(Question(ask="server-look", sandbox_id="0" * 12))
    with contextlib.suppress(LaunchError), _told_to_hub(path):
        _, fd = ask_now(path, question, _SECONDS)
        if fd >= 0:
            os.close(fd)


def check_account() -> None:
    """HostError where we are root, whom no broker serves."""
    if os.geteuid() == 0:
        raise HostError(
            attempt="have servers started by the sandbox broker",
            answer="this hub runs as root, which needs no broker",
            remedy="Leave c.SandboxSpawner.launcher out, or run the hub as an account of its own.",
        )
