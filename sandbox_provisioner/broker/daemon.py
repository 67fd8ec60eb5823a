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
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from sandbox_provisioner.broker.burials import broken_off
from sandbox_provisioner.broker.early import Early
from sandbox_provisioner.broker.frames import (
    MOST_BYTES,
    RELEASE,
    VERSION,
    BadFrame,
    OtherVersion,
    frame,
)
from sandbox_provisioner.broker.kept import Kept
from sandbox_provisioner.broker.kernels import Kernels
from sandbox_provisioner.broker.patient import patient_stderr
from sandbox_provisioner.broker.peer import Connection, Peer, credentials, watched
from sandbox_provisioner.broker.server_wish import ServerWish
from sandbox_provisioner.broker.values import BadValue
from sandbox_provisioner.broker.wishes import FILL, PREPARE, SERVERS, Question, Wish, read
from sandbox_provisioner.errors import (
    COMMAND,
    HostError,
    LaunchError,
    SandboxError,
    SpecError,
    told_as_host_error,
    told_as_internal_error,
)
from sandbox_provisioner.facilities.caps.cgroup import make_common_scope
from sandbox_provisioner.facilities.ids.facts import first_of_range
from sandbox_provisioner.off_loop import apart, off_loop, widen
from sandbox_provisioner.policy.current import follow
from sandbox_provisioner.policy.read import POLICY_FILE
from sandbox_provisioner.records import Record

SOCKET = "/run/sandbox-broker/socket"
_ATTEMPT = "answer what the sandbox broker was asked"
_FIRST_PASSED = 3  # sd_listen_fds(3)
_BACKLOG = 128
_MOST_CONNECTIONS = 256
_MOST_OF_USER = 32
_MOST_REFUSED = 8  # of a user, that are being closed
_MOST_PARKED = 1 << 14
_MOST_TEXT = 4096
_MOST_TEXTS = 16
_SHORT_BYTES = 1 << 13
_WORD_SECONDS = 10.0
_PAUSE_SECONDS = 0.1
_THREADS = 64


_RESTART = (
    "Let the administrator start it again, with the release that Jupyter has; kernels go on:",
    f"{COMMAND}sudo systemctl restart sandbox-broker.service",
)


def short(value: Any) -> Any:
    """*value*; the beginning of a text that may be as long as a stranger likes."""
    if not isinstance(value, str) or len(value) <= _MOST_TEXT:
        return value
    return value[:_MOST_TEXT] + " ..."


def log(event: str, **told: object) -> None:
    """One line of JSON, which journald keeps."""
    sys.stderr.write(_line(event, **told))
    sys.stderr.flush()


def _line(event: str, **told: object) -> str:
    told = {name: short(value) for name, value in told.items()}
    return json.dumps({"event": event, "time": round(time.time(), 3), **told}) + "\n"


class Servers(Protocol):
    """Those of people, for a hub: what has them stands above this room (`hub/for_hub.py`). As
    `Kernels`, but that `begin` comes when kernels have been adopted, too."""

    async def adopt(self) -> list[str]: ...
    async def begin(self) -> None: ...
    async def start(
        self, peer: Peer, wish: ServerWish, fds: Sequence[int], watched: int
    ) -> tuple[dict[str, Any], int, Any]: ...
    async def undo(self, started: Any) -> None: ...
    async def answer(self, peer: Peer, question: Question) -> tuple[dict[str, Any], int]: ...
    def records(self) -> list[Record]: ...
    async def let_go(self) -> None: ...


# What ends what has started, where who has asked for it never hears of it.
_Undo = Callable[[], Awaitable[None]]


class Daemon:
    """Answers on one listening socket, until it is cancelled. *servers* are there where a hub may
    ask for some."""

    def __init__(
        self, listener: socket.socket, kernels: Kernels, servers: Servers | None = None
    ) -> None:
        self._listener = listener
        self._kernels = kernels
        self._servers = servers
        # Connections that are not closed. All ids that subuid(5) gives somebody are one user's.
        self._of_user: Counter[int] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._parked: dict[int, list[Connection]] = {}  # of users whose others do not close

    async def serve(self) -> None:
        """Does not return."""
        loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        while True:
            while sum(map(len, self._parked.values())) >= _MOST_PARKED:
                await asyncio.sleep(_PAUSE_SECONDS)
            try:
                accepted, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}:
                    continue  # of a connection that has gone meanwhile
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            self._take(Connection(accepted))

    async def close(self) -> None:
        """Listen no more, and answer nobody any more."""
        apart(self._listener.close)  # who was not accepted may have sent descriptors
        await broken_off(list(self._tasks))
        for parked in self._parked.values():
            for connection in parked:
                apart(connection.close)
        self._parked.clear()

    def _take(self, connection: Connection) -> None:
        _, uid, gid = credentials(connection.socket)
        user = first_of_range(uid)
        if refused := self._refusal(uid, user):
            with contextlib.suppress(OSError):
                connection.socket.send(frame(_told(refused)))
            self._turn_away(connection, user)
            return
        self._of_user[user] += 1
        task = asyncio.create_task(self._converse(connection, uid, gid, user))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _refusal(self, uid: int, user: int) -> SandboxError | None:
        """Why *uid*, which counts as *user*, is not listened to."""
        if answer := self._kernels.desk.refusal(uid):
            return _refused(answer)
        if self._of_user.total() >= _MOST_CONNECTIONS or self._of_user[user] >= _MOST_OF_USER:
            return _refused("it is asked too much at once")
        return None

    def _turn_away(self, connection: Connection, uid: int) -> None:
        """Close what was refused, at the cost of its user alone where that takes long."""
        if connection.is_empty_for_good():
            connection.close()
        elif self._can_close_more(uid):
            self._of_user[uid] += 1
            self._close(connection, uid)
        else:
            self._parked.setdefault(uid, []).append(connection)

    def _can_close_more(self, uid: int) -> bool:
        most = self._of_user[uid] < _MOST_OF_USER + _MOST_REFUSED
        return most and self._of_user.total() < 2 * _MOST_CONNECTIONS

    def _close(self, connection: Connection, uid: int) -> None:
        """Its user has one less to have when it is closed, and not before: in a thread, unless it
        cannot take long."""
        if connection.is_empty_for_good():
            connection.close()
            self._closed(uid)
        else:
            apart(connection.close).add_done_callback(lambda _: self._closed(uid))

    def _closed(self, uid: int) -> None:
        self._of_user[uid] -= 1
        if not self._of_user[uid]:
            del self._of_user[uid]
        if (one := next(filter(self._can_close_more, self._parked), None)) is not None:
            parked = self._parked[one]
            connection = parked.pop()
            if not parked:
                del self._parked[one]
            self._turn_away(connection, one)

    async def _converse(self, connection: Connection, uid: int, gid: int, user: int) -> None:
        try:
            await self._answer(connection, uid, gid)
        except (OSError, BadFrame):
            return  # who asked has gone
        finally:
            self._close(connection, user)

    async def _answer(self, connection: Connection, uid: int, gid: int) -> None:
        undo: _Undo | None = None
        name, asked = "", None
        fds: tuple[int, ...] = ()
        early = Early()
        is_one_of_few = self._of_user[first_of_range(uid)] <= self._kernels.desk.together

        def starts() -> bool:
            return is_one_of_few and connection.is_quiet()

        who = partial(self._kernels.desk.peer, uid, gid)
        looked = asyncio.ensure_future(off_loop(early.look, who, starts))
        try:
            with told_as_host_error(_ATTEMPT), told_as_internal_error(_ATTEMPT):
                peer, asked = await self._heard(connection, early)
                name = peer.name
                if isinstance(asked, Wish) and asked.act in {PREPARE, FILL}:
                    answer = await self._prepared(connection, peer, asked)
                elif isinstance(asked, Wish | ServerWish):
                    answer, fds, undo = await self._started(connection, peer, asked, early)
                else:
                    whose = self._of_hub() if asked.ask in SERVERS else self._kernels
                    answer, fds = _closed_with(connection, *await whose.answer(peer, asked))
        except TimeoutError:
            answer = _told(_refused("what was asked, or its answer, took too long"))
        except SandboxError as error:
            # Of a kernel that has ended, or never was, is no more than the answer to a question.
            event = "answer" if isinstance(asked, Question) else "refusal"
            if connection.heard_bytes:  # or its wish has failed before it was sent
                log(event, of=uid, user=name, text=str(error))
            answer = _told(error)
        finally:
            if not looked.done():  # it has a thread: the connection counts until that is over
                await asyncio.wait([looked])
            early.close()
        try:
            async with asyncio.timeout(_WORD_SECONDS):
                await connection.answer(_framed(answer), fds)
        except (OSError, TimeoutError, BadFrame):
            if undo:
                await undo()
            raise

    async def _heard(self, connection: Connection, early: Early) -> tuple[Peer, Any]:
        """Who asks, which is looked up while the question is still on its way, and what."""
        async with asyncio.timeout(_WORD_SECONDS):
            message = await _message(connection)
        release = connection.release
        if connection.heard_bytes <= _SHORT_BYTES:  # sooner than a thread would begin
            asked = _understood(message, release)
        else:
            asked = await off_loop(_understood, message, release)
        return await early.peer(), asked

    def _of_hub(self) -> Servers:
        if self._servers is None:
            raise _refused("it starts no servers here")
        return self._servers

    async def _started(
        self, connection: Connection, peer: Peer, wish: Wish | ServerWish, early: Early
    ) -> tuple[dict[str, Any], tuple[int, ...], _Undo | None]:
        server, fds = watched(connection.socket), connection.fds
        undo: _Undo | None = None
        try:
            if isinstance(wish, ServerWish):
                answer, fd, had = await self._of_hub().start(peer, wish, fds, server)
                undo = partial(self._of_hub().undo, had)
            else:
                answer, fd, started = await self._kernels.start(peer, wish, fds, server, early)
                undo = partial(self._kernels.undo, started) if started else None
        finally:
            os.close(server)
        for name in {"warnings", "unseen"} & answer.keys():
            answer[name] = _bounded(answer[name])
        return *_closed_with(connection, answer, fd), undo

    async def _prepared(self, connection: Connection, peer: Peer, wish: Wish) -> dict[str, Any]:
        server = watched(connection.socket)
        try:
            answer = await self._kernels.prepare(peer, wish, connection.fds, server)
        finally:
            os.close(server)
        return answer | {"warnings": _bounded(answer.get("warnings", []))}


def _closed_with(
    connection: Connection, answer: dict[str, Any], fd: int
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """*answer* and what goes with it. A socket that listens for a user may have descriptors in its
    queue before it is sent: so it is closed as what came is."""
    if fd < 0:
        return answer, ()
    connection.fds.append(fd)
    return answer, (fd,)


def _bounded(texts: list[str]) -> list[str]:
    left_out = len(texts) - _MOST_TEXTS
    more = [f"... and {left_out} more."] if left_out > 0 else []
    return [short(text) for text in texts[:_MOST_TEXTS]] + more


def _framed(answer: dict[str, Any]) -> bytes:
    """As many kernels of a list as one message has room for, and how many it has not. Each is
    encoded once to be counted: the loop serves everybody."""
    if not (kernels := answer.get("kernels")):
        return frame(answer)
    left_bytes = MOST_BYTES - len(frame(answer | {"kernels": [], "left_out": len(kernels)}))
    for count, kernel in enumerate(kernels):
        left_bytes -= len(json.dumps(kernel)) + len(", ")
        if left_bytes < 0:
            return frame(answer | {"kernels": kernels[:count], "left_out": len(kernels) - count})
    return frame(answer)


async def _message(connection: Connection) -> dict[str, Any]:
    try:
        return await connection.message()
    except OtherVersion as error:
        raise _of_other_version(error.version) from None
    except BadFrame as error:
        raise _refused(f"what came is no question: {error}") from None


def _understood(message: dict[str, Any], release: str) -> Any:
    """What *message* means, which somebody of another *release* may have written."""
    try:
        return read(message)
    except BadValue as error:
        answer = f"what came cannot be meant: {error}"
        if release in {"", RELEASE}:
            raise _refused(answer) from None
        raise SpecError(
            attempt="ask the sandbox broker",
            answer=f"{answer}; who asks is of release {release}, and the broker of {RELEASE}",
            remedy="Let both be of one release: the package that Jupyter has, and the broker's.",
        ) from None


def _of_other_version(version: int) -> SpecError:
    is_newer = version > VERSION
    who = "the broker is" if is_newer else "who asks is"
    return SpecError(
        attempt="ask the sandbox broker",
        answer=f"what came is of version {version} of its language, and the broker speaks version "
        f"{VERSION}: {who} of an older release",
        remedy=_RESTART if is_newer else "Install the broker's release for Jupyter, and start it.",
    )


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


@contextlib.asynccontextmanager
async def _scraped(address: str, kernels: Kernels, servers: Servers | None) -> AsyncIterator[None]:
    """Tell what happens and what runs to whoever scrapes *address*; "": to nobody."""
    if not address:
        yield
        return
    try:
        # prometheus_client is there only for whom it was asked for.
        from sandbox_provisioner.broker import scrape  # noqa: PLC0415
    except ImportError as error:
        raise HostError(
            attempt=f"tell metrics at {address}",
            answer=str(error),
            remedy=f"{COMMAND}pip install 'sandbox-provisioner[metrics]'",
        ) from None

    def records() -> list[Record]:
        return kernels.records() + (servers.records() if servers else [])

    async with await scrape.serve(address, records):
        yield


async def _have_groups() -> None:
    """A place for those of people's sums; a start that needs one tells what is missing."""
    try:
        await off_loop(make_common_scope)
    except HostError as error:
        log("warning", text=str(error))


def _tell_systemd(text: str) -> None:
    """sd_notify(3): `systemctl start` and `restart` return when we answer."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return
    name = "\0" + address[1:] if address.startswith("@") else address
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.sendto(text.encode(), name)


async def run(
    path: str,
    runtime_dir: str = "",
    policy: str = POLICY_FILE,
    metrics: str = "",
    kept: Kept | None = None,
    servers: Servers | None = None,
) -> None:
    """Be the broker until SIGTERM or SIGINT; its kernels live on, and so do *servers*. At *metrics*
    it tells them; *kept* is what outlives them."""
    os.umask(0o077)  # what it makes is root's, unless it says otherwise
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    widen(_THREADS)
    follow(policy)  # where lines of the audit go stands there as well
    with contextlib.ExitStack() as ended:
        ended.enter_context(patient_stderr(lambda count: _line("unread", left_out=count)))
        listening = listener(path)
        # Linux closes it when we end: who was not accepted may have sent what does not close.
        ended.callback(listening.detach)
        await _have_groups()
        kernels = Kernels(runtime_dir, policy, log, kept=kept)
        async with _scraped(metrics, kernels, servers):  # which hears of what ended meanwhile, too
            adopted, of_hub = await _adopted(kernels, servers)
            log("listen", path=path, kernels=adopted, servers=of_hub)
            _tell_systemd("READY=1")
            await _until_told(Daemon(listening, kernels, servers))
        await kernels.stop()
        kernels.let_go()
        if servers:
            await servers.let_go()
        log("stop")


async def _adopted(kernels: Kernels, servers: Servers | None) -> tuple[list[str], list[str]]:
    """The ids of what another broker has left: whoever adopts kernels sweeps away what nobody has
    adopted."""
    of_hub = await servers.adopt() if servers else []
    adopted = await kernels.adopt()
    if servers:
        await servers.begin()
    return adopted, of_hub


async def _until_told(daemon: Daemon) -> None:
    serving = asyncio.ensure_future(daemon.serve())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, serving.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await serving
