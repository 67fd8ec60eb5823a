"""carrier.py - a process of the user's, outside: local TCP ports that lead to a kernel's sockets.

::

    client ── tcp 127.0.0.1:PORT ──▶ carrier ── unix socket, sealed ──▶ kernel

It copies bytes, and understands none of them: what ZeroMQ says is the same over both, and who may
speak to the kernel is decided by the key that client and kernel share.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Mapping
from ipaddress import ip_address

from sandbox_provisioner.errors import HostError, SpecError

# A client has five; what it does not read stays where it comes from, which is told to wait.
_MOST_CONNECTIONS = 256
_CHUNK = 1 << 16
_FLUSH_SECONDS = 2.0


class Carrier:
    """Five ports that are ours from the first moment, and served when the kernel listens: who comes
    earlier waits in Linux's queue."""

    def __init__(self, ip: str, ports: Mapping[str, int]) -> None:
        """*ports* by their names in a connection file. SpecError for an *ip* that others reach,
        HostError where a port is taken."""
        _refuse_foreign(ip)
        self._listeners: dict[str, socket.socket] = {}
        self._servers: list[asyncio.Server] = []
        self._carried: set[asyncio.Task[None]] = set()
        try:
            for name, port in ports.items():
                self._listeners[name] = _listener(ip, port)
        except OSError as error:
            self.close()
            raise HostError(
                attempt=f"listen on {ip}:{port} for the kernel's clients",
                answer=error.strerror or str(error),
                remedy="Start the kernel again: the front end chooses other ports.",
            ) from None

    async def serve(self, paths: Mapping[str, str]) -> None:
        """Let each port lead to the unix socket that *paths* has for its name, from now on."""
        for name, listener in self._listeners.items():
            server = await asyncio.start_server(self._carrying_to(paths[name]), sock=listener)
            self._servers.append(server)

    def _carrying_to(self, path: str):  # type: ignore[no-untyped-def]  # a callback of asyncio's
        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task
            if len(self._carried) >= _MOST_CONNECTIONS:
                writer.close()
                return
            self._carried.add(task)
            try:
                await _joined(reader, writer, path)
            finally:
                self._carried.discard(task)

        return carry

    async def end(self) -> None:
        """Deliver what is under way from a kernel that has ended, and close."""
        self._stop_listening()
        if self._carried:
            await asyncio.wait(self._carried, timeout=_FLUSH_SECONDS)
        for task in self._carried:
            task.cancel()

    def _stop_listening(self) -> None:
        for server in self._servers:
            server.close()
        self.close()

    def close(self) -> None:
        """Give the ports back."""
        for listener in self._listeners.values():
            listener.close()


def _refuse_foreign(ip: str) -> None:
    try:
        is_local = ip_address(ip).is_loopback
    except ValueError:
        is_local = ip == "localhost"
    if not is_local:
        raise SpecError(
            attempt=f"let clients come by {ip!r}, as the connection file says",
            answer="a sandboxed kernel that is started by its argv listens on this machine alone",
            remedy="Use 127.0.0.1 and a tunnel, or a front end that connects to a Jupyter server.",
        )


def _listener(ip: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A kernel that is started again may get the ports of the one before it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((ip, port))
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


async def _joined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> None:
    """Carry until one of the two ends: a half of a connection is of no use to ZeroMQ."""
    try:
        theirs, to_kernel = await asyncio.open_unix_connection(path, limit=_CHUNK)
    except OSError:  # the kernel has ended: the client tries again, or hears of the end
        writer.close()
        return
    both = (
        asyncio.ensure_future(_copy(reader, to_kernel)),
        asyncio.ensure_future(_copy(theirs, writer)),
    )
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in both:
            task.cancel()
        to_kernel.close()
        writer.close()  # when what was written is delivered
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As fast as *writer* takes it: the rest stays with whoever sends."""
    writer.transport.set_write_buffer_limits(high=_CHUNK)
    with contextlib.suppress(OSError):
        while chunk := await reader.read(_CHUNK):
            writer.write(chunk)
            await writer.drain()
