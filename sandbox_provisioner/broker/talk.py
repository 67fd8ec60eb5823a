"""broker/talk.py - in a server: one question to the broker, and its answer."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any

from sandbox_provisioner.broker import box
from sandbox_provisioner.broker.frames import VERSION, BadFrame, OtherVersion, Reader, frame
from sandbox_provisioner.broker.peer import Connection
from sandbox_provisioner.errors import (
    COMMAND,
    HostError,
    InternalError,
    LaunchError,
    SandboxError,
    SpecError,
)

_CHUNK = 1 << 16
_PATIENCE_SECONDS = 5.0
# Half of what the broker waits for a question (`daemon.py`).
_FRESH_SECONDS = 5.0
_QUEUE_SECONDS = 0.01
_TIME = struct.Struct("@ll")  # struct timeval
_KINDS = {kind.__name__: kind for kind in (SpecError, HostError)}
Answer = dict[str, Any]


class Silent(HostError):
    """Nobody answers: whether what was asked for is done, only the next broker can tell."""


async def ask(path: str, message: Answer, fds: Sequence[int] = ()) -> tuple[Answer, int]:
    """What the broker at *path* answers to *message*, and the descriptor that comes with it, which
    is the caller's to close, -1 without one. Raises what it refuses with."""
    with contextlib.closing(Call(path)) as call:
        while not call.connect():
            await asyncio.sleep(_QUEUE_SECONDS)
        call.say(message, fds)
        return await call.answer()


class Call:
    """One call of the broker at *path*, for one question."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection = Connection(_connection())
        self._until = 0.0  # it waits for us
        self._message: Answer = {}
        self._text = b""
        self._fds: Sequence[int] = ()
        self._sent_bytes: int | None = None

    def close(self) -> None:
        """Hear no more."""
        self._connection.socket.close()

    def connect(self) -> bool:
        """Connect, and tell whether it has room for us (unix(7): EAGAIN where its queue is full);
        HostError where none is there. It looks up who we are while the question is thought of."""
        with self._told(), contextlib.suppress(BlockingIOError):
            self._connection.socket.connect(self._path)
            self._until = time.monotonic() + _FRESH_SECONDS
        return self._until > 0

    def say(self, message: Answer, fds: Sequence[int] = ()) -> None:
        """Ask *message* with *fds*, which stay the caller's until there is the answer, as far as
        that is waited for by nobody. So the thread that thinks of a question asks it, too."""
        self._message, self._fds = message, fds
        with self._told():
            self._text = frame(message)
            if time.monotonic() < self._until:
                self._sent_bytes = 0
                with contextlib.suppress(BlockingIOError):
                    self._sent_bytes = _sent_at_once(self._connection.socket, self._text, fds)

    async def answer(self) -> tuple[Answer, int]:
        """As `ask` of this module, which asks anew where the broker waits no more for us."""
        if self._sent_bytes is None:
            return await ask(self._path, self._message, self._fds)
        connection = self._connection
        with self._told():
            with _refused_before_heard():
                if not self._sent_bytes:
                    await connection.answer(self._text, self._fds)
                elif rest := self._text[self._sent_bytes :]:
                    await asyncio.get_running_loop().sock_sendall(connection.socket, rest)
            answer = await connection.message()
        return _read(answer, connection.fds)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, BadFrame) as error:
            _close(self._connection.fds)
            raise silent(self._path, error) from None


def _sent_at_once(made: socket.socket, text: bytes, fds: Sequence[int]) -> int:
    """How many bytes of *text* have gone, the first with *fds*."""
    with _refused_before_heard():
        return socket.send_fds(made, [text], fds) if fds else made.send(text)
    return len(text)


def _refused_before_heard() -> contextlib.suppress:
    """Who is refused for what he is gets that told, and is not listened to: it is there to be read
    all the same, though nobody is there to send to (unix(7): EPIPE)."""
    return contextlib.suppress(BrokenPipeError, ConnectionResetError)


def ask_now(
    path: str, message: Answer, seconds: float, given: Sequence[int] = ()
) -> tuple[Answer, int]:
    """The same for who has no event loop at hand, and *seconds* at the most."""
    with contextlib.closing(_connection()) as made:
        # Not settimeout, under which connect(2) does not wait where the broker's queue is full.
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            made.setsockopt(socket.SOL_SOCKET, option, _TIME.pack(int(seconds), 0))
        fds: list[int] = []
        try:
            made.connect(path)
            text = frame(message)
            with _refused_before_heard():
                sent = socket.send_fds(made, [text], given) if given else 0
                made.sendall(text[sent:])
            answer = _message(made, fds)
        except (OSError, BadFrame) as error:
            _close(fds)
            raise silent(path, error) from None
        return _read(answer, fds)


def check_answers(path: str) -> None:
    """HostError where nobody answers at *path*."""
    with contextlib.suppress(SpecError):  # what it says to root, who has no kernels there
        ask_now(path, {"ask": "list"}, _PATIENCE_SECONDS)


def _connection() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def _message(made: socket.socket, fds: list[int]) -> Answer:
    reader, room = Reader(), socket.CMSG_SPACE(array.array("i").itemsize)
    while True:
        most = min(reader.wanted_bytes, _CHUNK)
        chunk, ancillary, _, _ = made.recvmsg(most, room, socket.MSG_CMSG_CLOEXEC)
        for _, kind, data in ancillary:
            if kind == socket.SCM_RIGHTS:
                fds += array.array("i", data)
        if not chunk:
            raise BadFrame("it ended in the middle")
        if (found := reader.take(chunk)) is not None:
            return found


def _read(answer: Answer, fds: list[int]) -> tuple[Answer, int]:
    if "error" in answer:
        _close(fds)
        raise _error(answer["error"])
    fd = fds.pop(0) if fds else -1
    _close(fds)
    return answer, fd


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _error(told: Answer) -> SandboxError:
    kind = told.pop("kind")
    remedy = tuple(told.pop("remedy"))
    if kind == "LaunchError":
        return LaunchError(remedy=remedy, **told)
    if kind in _KINDS:
        return _KINDS[kind](remedy=remedy, **told)
    return InternalError(attempt=told["attempt"], answer=f"in the broker, {told['answer']}")


def of_other_version(path: str, version: int) -> HostError:
    """The error of a broker at *path* that speaks in another *version*."""
    who = "the hub" if path == box.SOCKET else f"the sandbox broker at {path}"
    older = ("this server", "Install that release for Jupyter, and start the server again.")
    if version < VERSION:
        older = (who, "Ask whoever administers this machine to start it again with this release.")
    return HostError(
        attempt=f"ask {who}",
        answer=f"it speaks version {version} of its language, and this server version {VERSION}: "
        f"{older[0]} is of an older release",
        remedy=older[1],
    )


def silent(path: str, error: Exception) -> HostError:
    """The error of a broker that does not answer, or not in our words, for a user who can only ask
    for one."""
    if isinstance(error, OtherVersion):
        return of_other_version(path, error.version)
    told = error.strerror if isinstance(error, OSError) else ""
    if isinstance(error, BlockingIOError):  # EAGAIN: socket(7), SO_RCVTIMEO
        told = "it has not answered in time"
    if path == box.SOCKET:
        return Silent(
            attempt="ask the hub, which starts the kernels of its servers",
            answer=told or str(error) or type(error).__name__,
            remedy="It does not answer: wait until it runs again, or tell whoever administers it.",
        )
    return Silent(
        attempt=f"ask the sandbox broker at {path}",
        answer=told or str(error) or type(error).__name__,
        remedy=(
            "Ask whoever administers this machine to start it, which takes root's rights:",
            f"{COMMAND}sudo systemctl enable --now sandbox-broker.socket",
            'Where that is not wanted, set launcher to "local": then kernels start with this '
            "user's own rights.",
        ),
    )
