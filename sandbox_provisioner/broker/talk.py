"""broker/talk.py - in a server: one question to the broker, and its answer."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

from sandbox_provisioner.broker.frames import BadFrame, Reader, frame
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
_TIME = struct.Struct("@ll")  # struct timeval
_KINDS = {kind.__name__: kind for kind in (SpecError, HostError)}
Answer = dict[str, Any]


async def ask(path: str, message: Answer, fds: Sequence[int] = ()) -> tuple[Answer, int]:
    """What the broker at *path* answers to *message*, and the descriptor that comes with it, which
    is the caller's to close, -1 without one. Raises what it refuses with."""
    with contextlib.closing(_connection()) as made:
        connection = Connection(made)
        try:
            await _connect(made, path)
            await connection.answer(frame(message), fds)
            answer = await connection.message()
        except (OSError, BadFrame) as error:
            _close(connection.fds)
            raise silent(path, error) from None
        return _read(answer, connection.fds)


async def _connect(made: socket.socket, path: str) -> None:
    """unix(7): EAGAIN where its queue is full."""
    while True:
        try:
            made.connect(path)
        except BlockingIOError:
            await asyncio.sleep(0.01)
        else:
            return


def ask_now(path: str, message: Answer, seconds: float) -> tuple[Answer, int]:
    """The same for who has no event loop at hand, and *seconds* at the most."""
    with contextlib.closing(_connection()) as made:
        # Not settimeout, under which connect(2) does not wait where the broker's queue is full.
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            made.setsockopt(socket.SOL_SOCKET, option, _TIME.pack(int(seconds), 0))
        fds: list[int] = []
        try:
            made.connect(path)
            made.sendall(frame(message))
            answer = _message(made, fds)
        except (OSError, BadFrame) as error:
            _close(fds)
            raise silent(path, error) from None
        return _read(answer, fds)


def check_answers(path: str) -> None:
    """HostError where nobody answers at *path*."""
    with contextlib.suppress(SpecError, LaunchError):  # what it says to a question about nobody's
        ask_now(path, {"ask": "look", "sandbox_id": "0" * 12}, _PATIENCE_SECONDS)


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


def silent(path: str, error: Exception) -> HostError:
    """The error of a broker that does not answer, for a user who can only ask for one."""
    told = error.strerror if isinstance(error, OSError) else ""
    return HostError(
        attempt=f"ask the sandbox broker at {path}",
        answer=told or str(error) or type(error).__name__,
        remedy=(
            "Ask whoever administers this machine to start it, which takes root's rights:",
            f"{COMMAND}sudo systemctl enable --now sandbox-broker.socket",
            'Where that is not wanted, set launcher to "local": then kernels start with this '
            "user's own rights.",
        ),
    )
