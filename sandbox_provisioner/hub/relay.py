"""hub/relay.py - two processes run this file: in a hub user's box, before the server's own command,
with nobody's rights; and the hub, which imports it. May import: the standard library alone.

The box has no network but its loopback, so two things are carried over its wall, as bytes that
nobody looks at::

    proxy ──▶ .../s.sock ═══ by descriptor, our stdin ═══▶ 127.0.0.1:PORT, the server   in the box
    server ──▶ 127.0.0.1:API ──▶ /jupyterhub/api.sock ═══▶ the hub's API, and nobody    in the hub

What listens for the proxy was bound by root, in a folder of root's: no name in the box leads to it,
so nobody can put another socket, or a link, in its place. What listens for the server is the hub
itself, and dials one address, whatever it is asked: when the hub is away, so is its API.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import ctypes
import os
import socket
import sys
from collections.abc import Awaitable, Callable

Dial = Callable[[], Awaitable[socket.socket]]

Close = Callable[[Callable[[], object]], asyncio.Future[None]]

_CHUNK = 1 << 16
_PR_SET_DUMPABLE = 4
_SO_PASSRIGHTS = 83  # since Linux 6.16
_ROOM = socket.CMSG_SPACE(253 * array.array("i").itemsize)  # unix(7): all that come at once
# No event tells that a server listens.
_AGAIN_SECONDS = 0.05
_BUSY_SECONDS = 0.2


class Relay:
    """Accepts on *listener*, and carries bytes between each who comes and who is dialled for him;
    *most* at a time, the others wait. It owns the listener.

    Who comes may send descriptors, which nobody here wants, and to close one may take for ever
    (socket(7), SO_LINGER): *close* calls what closes them, and is done when that is. Until then
    they count as one who is carried."""

    def __init__(self, listener: socket.socket, dial: Dial, most: int, close: Close) -> None:
        self._listener = listener
        self._close = close
        with contextlib.suppress(OSError):  # those who connect from here on cannot even send them
            listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
        self._dial = dial
        self._room = asyncio.Semaphore(most)
        self._carried: set[asyncio.Task[None]] = set()
        listener.setblocking(False)

    async def serve(self) -> None:
        """Until it is cancelled; then all connections end."""
        try:
            while True:
                await self._room.acquire()
                client = await self._accepted()
                task = asyncio.ensure_future(self._carry(client))
                self._carried.add(task)
                task.add_done_callback(self._carried.discard)
        finally:
            self._close(self._listener.close)
            for task in self._carried:
                task.cancel()

    async def _accepted(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        while True:
            try:
                return (await loop.sock_accept(self._listener))[0]
            except OSError:  # out of descriptors: it stays in the queue
                await asyncio.sleep(_BUSY_SECONDS)

    async def _carry(self, client: socket.socket) -> None:
        brought: list[int] = []
        try:
            with contextlib.suppress(OSError):
                client.setblocking(False)
                with await self._dial() as server:
                    await asyncio.gather(
                        _one_way(client, server, brought), _one_way(server, client, brought)
                    )
        finally:
            closed = self._close(lambda: _close_all(client, brought))
            closed.add_done_callback(lambda _: self._room.release())


def at_once(close: Callable[[], object]) -> asyncio.Future[None]:
    """Where nobody else has to wait."""
    close()
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    done.set_result(None)
    return done


def _close_all(client: socket.socket, brought: list[int]) -> None:
    client.close()
    for fd in brought:
        with contextlib.suppress(OSError):  # close(2): it is closed all the same
            os.close(fd)


async def _received(source: socket.socket, brought: list[int]) -> bytes:
    """What *source* says next; OSError if there are descriptors with it, which are *brought*."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            data, said, _, _ = source.recvmsg(_CHUNK, _ROOM, socket.MSG_CMSG_CLOEXEC)
            break
        except BlockingIOError:
            ready = asyncio.Event()
            loop.add_reader(source, ready.set)
            try:
                await ready.wait()
            finally:
                loop.remove_reader(source)
    for _, kind, numbers in said:
        if kind == socket.SCM_RIGHTS:
            brought += array.array("i", numbers)
    if brought:
        raise OSError("descriptors are not carried")
    return data


async def _one_way(source: socket.socket, target: socket.socket, brought: list[int]) -> None:
    """Until *source* says no more, which *target* is told; a broken one ends the other way, too."""
    loop = asyncio.get_running_loop()
    try:
        while data := await _received(source, brought):
            await loop.sock_sendall(target, data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


async def dialled(
    family: socket.AddressFamily, address: tuple[str, int] | str, *, patient: bool = False
) -> socket.socket:
    """A connection to *address*; OSError. *patient*: as soon as somebody listens there."""
    while True:
        found = socket.socket(family, socket.SOCK_STREAM)
        try:
            found.setblocking(False)
            await asyncio.get_running_loop().sock_connect(found, address)
            return found
        except BaseException as error:
            found.close()
            if not (patient and isinstance(error, ConnectionRefusedError)):
                raise
        await asyncio.sleep(_AGAIN_SECONDS)


# -- in the box


def main(port: int, api_port: int, api_socket: str, most: int, command: list[str]) -> None:
    """Become the server's *command*; a child of ours carries, as long as the box is there."""
    from_proxy = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    from_server = socket.create_server(("127.0.0.1", api_port))
    _close_to_others()
    if os.fork():
        from_proxy.close()
        from_server.close()
        os.execv(command[0], command)
    os.setsid()  # what is meant for the server is not for us
    asyncio.run(_carry_both(from_proxy, port, from_server, api_socket, most))


def _close_to_others() -> None:
    """prctl(2): who has the same id in the box may neither ptrace us nor read our memory, variables
    and descriptors, through which all goes that the person and the hub tell the server. It is of
    us and of our child; with its execve the server is as any program."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


async def _carry_both(
    from_proxy: socket.socket,
    port: int,
    from_server: socket.socket,
    api_socket: str,
    most: int,
) -> None:
    to_server = Relay(
        from_proxy,
        lambda: dialled(socket.AF_INET, ("127.0.0.1", port), patient=True),
        most,
        at_once,
    )
    to_hub = Relay(from_server, lambda: dialled(socket.AF_UNIX, api_socket), most, at_once)
    await asyncio.gather(to_server.serve(), to_hub.serve())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5:])
