"""broker/scrape.py - the daemon: answers whoever scrapes metrics, at an address of this machine.

What comes is the head of a request, and the answer is the same whatever else it says. Who is slow,
or one of too many, is not listened to.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
from functools import partial

from prometheus_client import CollectorRegistry, generate_latest

from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.metrics import Metrics, Running
from sandbox_provisioner.off_loop import off_loop

_ATTEMPT = "answer whoever scrapes metrics"
_MOST_BYTES = 8192
_MOST_AT_ONCE = 8
_SECONDS = 5.0
_END_OF_HEAD = b"\r\n\r\n"
_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_UNHEARD = (OSError, EOFError, asyncio.LimitOverrunError)


async def serve(address: str, running: Running) -> asyncio.Server:
    """Answer at *address*, a path or HOST:PORT of this machine, with what is *running*."""
    registry = CollectorRegistry()
    Metrics(running, registry)
    answer = partial(_converse, registry, asyncio.Semaphore(_MOST_AT_ONCE))
    try:
        if address.startswith("/"):
            return await asyncio.start_unix_server(answer, address, limit=_MOST_BYTES)
        host, port = _of_this_machine(address)
        return await asyncio.start_server(answer, host, port, limit=_MOST_BYTES)
    except OSError as error:
        raise HostError(
            attempt=f"{_ATTEMPT} at {address}",
            answer=error.strerror or str(error),
            remedy="Name another address with --metrics.",
        ) from None


def _of_this_machine(address: str) -> tuple[str, int]:
    """Names of users are nobody's business elsewhere, and there is no password here."""
    found = re.fullmatch(r"\[?([0-9a-f.:]+?)\]?:(\d{1,5})", address)
    with contextlib.suppress(ValueError):
        if found and ipaddress.ip_address(found[1]).is_loopback and int(found[2]) < 1 << 16:
            return found[1], int(found[2])
    raise SpecError(
        attempt=f"{_ATTEMPT} at {address!r}",
        answer="that is no path, and no address and port of this machine's loopback",
        remedy="Write /run/sandbox-broker/metrics, or 127.0.0.1:9185; who scrapes from elsewhere "
        "needs a proxy in front of it that knows whom to let in.",
    )


async def _converse(
    registry: CollectorRegistry,
    seats: asyncio.Semaphore,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    try:
        with contextlib.suppress(*_UNHEARD):
            if seats.locked():
                return
            async with seats, asyncio.timeout(_SECONDS):
                head = await reader.readuntil(_END_OF_HEAD)
                writer.write(await off_loop(_answer, registry, head))
                writer.close()
                await writer.wait_closed()  # until all of it is read
    finally:
        writer.transport.abort()  # or it would keep the answer as long as nobody reads it


def _answer(registry: CollectorRegistry, head: bytes) -> bytes:
    """What an HTTP request that begins with *head* gets."""
    if re.match(rb"GET /(metrics)?(\?\S*)? HTTP/1\.[01]\r\n", head):
        return _response("200 OK", generate_latest(registry))
    return _response("404 Not Found", b"See /metrics.\n")


def _response(status: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.0 {status}\r\nContent-Type: {_TEXT}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
