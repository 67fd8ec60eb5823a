"""broker/daemon.py - the daemon `sandbox-broker`, as root: listens, bounds, answers.

A connection is one message and its answer. Who sends too much, too slowly, or has too many of them
open is told so, or not listened to; that costs nobody else anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import resource
import signal
import socket
import stat
import sys
import time
from pathlib import Path
from typing import Any

from sandbox_provisioner.broker.frames import BadFrame, frame
from sandbox_provisioner.broker.kernels import Kernels
from sandbox_provisioner.broker.peer import Connection, Peer, credentials, watched
from sandbox_provisioner.broker.values import BadValue
from sandbox_provisioner.broker.wishes import Wish, read
from sandbox_provisioner.errors import (
    HostError,
    LaunchError,
    SandboxError,
    SpecError,
    told_as_host_error,
    told_as_internal_error,
)
from sandbox_provisioner.facilities.ids.facts import FIRST_ID, LAST_ID
from sandbox_provisioner.off_loop import off_loop, widen
from sandbox_provisioner.policy.read import POLICY_FILE

SOCKET = "/run/sandbox-broker/socket"
_ATTEMPT = "answer what the sandbox broker was asked"
_FIRST_PASSED = 3  # sd_listen_fds(3)
_BACKLOG = 128
_MOST_CONNECTIONS = 256
_MOST_OF_USER = 32
_WORD_SECONDS = 10.0
_PAUSE_SECONDS = 0.1
_THREADS = 64


def log(event: str, **told: object) -> None:
    """One line of JSON, which journald keeps."""
    sys.stderr.write(json.dumps({"event": event, "time": round(time.time(), 3), **told}) + "\n")
    sys.stderr.flush()


class Daemon:
    """Answers on one listening socket, until it is cancelled."""

    def __init__(self, listener: socket.socket, kernels: Kernels) -> None:
        self._listener = listener
        self._kernels = kernels
        self._of_user: dict[int, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Does not return."""
        loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        while True:
            try:
                accepted, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}:
                    continue  # of a connection that has gone meanwhile
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            self._take(Connection(accepted))

    def _take(self, connection: Connection) -> None:
        _, uid, gid = credentials(connection.socket)
        if refused := self._refusal(uid):
            with contextlib.suppress(OSError):
                connection.socket.send(frame(_told(refused)))
            connection.close()
            return
        self._of_user[uid] = self._of_user.get(uid, 0) + 1
        task = asyncio.create_task(self._converse(connection, uid, gid))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _refusal(self, uid: int) -> SandboxError | None:
        if uid == 0 or FIRST_ID <= uid <= LAST_ID:
            return _refused("it serves ordinary users, who are neither root nor a sandbox")
        full = len(self._tasks) >= _MOST_CONNECTIONS
        if full or self._of_user.get(uid, 0) >= _MOST_OF_USER:
            return _refused("it is asked too much at once")
        return None

    async def _converse(self, connection: Connection, uid: int, gid: int) -> None:
        try:
            await self._answer(connection, await off_loop(Peer.of, uid, gid))
        except (OSError, BadFrame):
            return  # who asked has gone
        finally:
            connection.close()
            self._of_user[uid] -= 1
            if not self._of_user[uid]:
                del self._of_user[uid]

    async def _answer(self, connection: Connection, peer: Peer) -> None:
        sandbox_id, fd = "", -1
        try:
            with told_as_host_error(_ATTEMPT), told_as_internal_error(_ATTEMPT):
                async with asyncio.timeout(_WORD_SECONDS):
                    asked = _understood(await _message(connection))
                if isinstance(asked, Wish):
                    answer, fd = await self._started(connection, peer, asked)
                    sandbox_id = asked.sandbox_id
                else:
                    answer, fd = await self._kernels.answer(peer, asked)
        except TimeoutError:
            answer = _told(_refused("what was asked, or its answer, took too long"))
        except SandboxError as error:
            log("refusal", of=peer.uid, user=peer.name, text=str(error))
            answer = _told(error)
        try:
            async with asyncio.timeout(_WORD_SECONDS):
                await connection.answer(frame(answer), (fd,) if fd >= 0 else ())
        except (OSError, TimeoutError):
            if sandbox_id:
                await self._kernels.undo(sandbox_id)
            raise
        finally:
            if fd >= 0:
                os.close(fd)

    async def _started(
        self, connection: Connection, peer: Peer, wish: Wish
    ) -> tuple[dict[str, Any], int]:
        server = watched(connection.socket)
        try:
            return await self._kernels.start(peer, wish, connection.fds, server)
        finally:
            os.close(server)


async def _message(connection: Connection) -> dict[str, Any]:
    try:
        return await connection.message()
    except BadFrame as error:
        raise _refused(f"what came is no question: {error}") from None


def _understood(message: dict[str, Any]) -> Any:
    try:
        return read(message)
    except BadValue as error:
        raise _refused(f"what came cannot be meant: {error}") from None


def _refused(answer: str) -> SpecError:
    return SpecError(
        attempt="ask the sandbox broker",
        answer=answer,
        remedy="Try again; if that does not help, its client may be of another version.",
    )


def _told(error: SandboxError) -> dict[str, Any]:
    """*error* as the client raises it again."""
    answer, more = error.answer, {}
    if isinstance(error, LaunchError):
        where = f"{error.step} {error.places}" if error.places else error.step
        answer = answer.removeprefix(f"[{where}] ")
        more = {"step": error.step, "places": error.places, "stderr_tail": error.stderr_tail}
    told = {"attempt": error.attempt, "answer": answer, "remedy": list(error.steps), **more}
    kind = next(c.__name__ for c in type(error).__mro__ if c.__module__ == SpecError.__module__)
    return {"error": {"kind": kind, **told}}


# -- where it listens


def listener(path: str) -> socket.socket:
    """What systemd has passed on (sd_listen_fds(3)), or a socket at *path*, for every user."""
    passed = os.environ.pop("LISTEN_FDS", "0"), os.environ.pop("LISTEN_PID", "")
    if passed == ("1", str(os.getpid())):
        os.set_inheritable(_FIRST_PASSED, False)
        return socket.socket(fileno=_FIRST_PASSED)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        Path(path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _refuse_folder_of_others(path)
        _remove_old(path)
        made.bind(path)
        os.chmod(path, 0o666)
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise HostError(
            attempt=f"listen at {path}",
            answer=error.strerror or str(error),
            remedy="Name another path with --socket, in a folder that only root writes to.",
        ) from None
    return made


def _refuse_folder_of_others(path: str) -> None:
    status = os.stat(os.path.dirname(path))
    if status.st_uid or status.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "others than root can write to its folder")


def _remove_old(path: str) -> None:
    """The socket of a broker that has ended; EADDRINUSE if one answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, "a broker listens there already", path)


async def run(path: str, runtime_dir: str = "", policy: str = POLICY_FILE) -> None:
    """Be the broker until SIGTERM or SIGINT; its kernels live on."""
    os.umask(0o077)  # what it makes is root's, unless it says otherwise
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    widen(_THREADS)
    with listener(path) as listening:
        kernels = Kernels(runtime_dir, policy, log)
        adopted = await kernels.adopt()
        log("listen", path=path, kernels=adopted)
        serving = asyncio.ensure_future(Daemon(listening, kernels).serve())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, serving.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        kernels.let_go()
        log("stop")
