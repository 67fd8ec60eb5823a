"""Ports that lead to a kernel's sockets; the kernel is played by a test."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from sandbox_provisioner import carrier as room
from sandbox_provisioner.carrier import Carrier
from sandbox_provisioner.errors import HostError, SpecError

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(1000):
        writer.write(chunk)
        await writer.drain()
    writer.close()


def carried(folder: Path, kernel: Serve, use: Callable[[int], Awaitable[None]]) -> None:
    async def whole() -> None:
        port, path = free_port(), str(folder / "shell")
        carrier = Carrier("127.0.0.1", {"shell_port": port})
        server = await asyncio.start_unix_server(kernel, path)
        await carrier.serve({"shell_port": path})
        try:
            await use(port)
        finally:
            await carrier.end()
            server.close()

    asyncio.run(whole())


def test_who_comes_before_the_kernel_listens_is_served_then(new_folder):
    async def whole() -> None:
        port, path = free_port(), str(new_folder() / "shell")
        carrier = Carrier("127.0.0.1", {"shell_port": port})
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"early")
        server = await asyncio.start_unix_server(echo, path)
        await carrier.serve({"shell_port": path})
        assert await reader.readexactly(5) == b"early"
        writer.close()
        await carrier.end()
        server.close()

    asyncio.run(whole())


def test_the_last_words_of_a_kernel_are_delivered_before_the_connection_closes(new_folder):
    size = 1 << 20

    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"x" * size)
        writer.close()

    async def use(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert len(await reader.read(-1)) == size
        writer.close()

    carried(new_folder(), speak, use)


def test_a_client_that_reads_nothing_makes_the_kernel_wait(new_folder):
    """What is under way is bounded, by the queues of Linux and ours."""
    written, full = 0, asyncio.Event()

    async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.transport.set_write_buffer_limits(high=0)
        while written < 256 << 20:
            writer.write(b"x" * (1 << 16))
            try:
                async with asyncio.timeout(1):
                    await writer.drain()
            except TimeoutError:
                break
            written += 1 << 16
        full.set()
        writer.transport.abort()

    async def use(port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        await full.wait()
        writer.close()

    carried(new_folder(), flood, use)
    assert written < 32 << 20


def test_more_connections_than_a_front_end_has_are_closed(new_folder, monkeypatch):
    monkeypatch.setattr(room, "_MOST_CONNECTIONS", 2)

    async def use(port: int) -> None:
        ends = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for reader, writer in ends:
            writer.write(b"a")
            assert await reader.readexactly(1) == b"a"
        reader, extra = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read(1) == b""
        for _, writer in (*ends, (reader, extra)):
            writer.close()

    carried(new_folder(), echo, use)


def test_a_client_whose_kernel_is_gone_is_closed_and_may_come_again(new_folder):
    async def whole() -> None:
        port = free_port()
        carrier = Carrier("127.0.0.1", {"shell_port": port})
        await carrier.serve({"shell_port": str(new_folder() / "nothing")})
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.read(1) == b""
            writer.close()
        await carrier.end()

    asyncio.run(whole())


@pytest.mark.parametrize("ip", ["0.0.0.0", "::", "192.0.2.1", "example.org", "*", ""])
def test_nobody_of_another_machine_can_come(ip):
    with pytest.raises(SpecError, match="this machine alone"):
        Carrier(ip, {"shell_port": free_port()})


def test_a_port_that_is_taken_gives_the_others_back():
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"shell_port": port, "hb_port": taken.getsockname()[1]}
        with pytest.raises(HostError, match="in use"):
            Carrier("127.0.0.1", ports)
    Carrier("127.0.0.1", {"shell_port": port}).close()
