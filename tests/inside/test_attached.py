"""A box and its gateway, from the start of the first to the end of both.

Whom it speaks with is a server of the test's own on this machine, by this machine's name.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from boxes import Boxes

from sandbox_provisioner import gateway_life
from sandbox_provisioner.records import Record, all_records
from sandbox_provisioner.spec import Network, NetworkWish

pytestmark = pytest.mark.requires("userns")
NAME = socket.gethostname()
REFUSED = "example.invalid"


class Peer:
    """A server that says again what it hears."""

    def __init__(self) -> None:
        self.address = socket.gethostbyname(NAME)
        self.listener = socket.create_server((self.address, 0), backlog=64)
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(client,), daemon=True).start()

    def _echo(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                client.sendall(data)

    def wish(self, **more: Any) -> NetworkWish:
        """A network in which a box may speak with it, and with nobody else."""
        rules = f"{NAME}:{self.port}", f"{self.address}/32:{self.port}"
        return NetworkWish(mode=Network.GATEWAY, allow=rules, **more)


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.listener.shutdown(socket.SHUT_RDWR)
    made.listener.close()


def say(host: str, port: int) -> str:
    import socket

    with socket.create_connection((host, port), 20) as connection:
        connection.sendall(b"\0hello")
        return connection.recv(100).decode()[1:]


def is_refused(host: str, port: int) -> str:
    import socket

    try:
        socket.create_connection((host, port), 20).recv(1)
    except OSError as error:
        return type(error).__name__
    return "not refused"


def gateways(runtime_dir: Path) -> list[Record]:
    return [record for _, record in all_records(runtime_dir) if record.kind == gateway_life.KIND]


def gateway_pid(runtime_dir: Path) -> int:
    """Of the process itself, which PID 1 of its box has forked."""
    (record,) = gateways(runtime_dir)
    children = Path(f"/proc/{record.init_pid}/task/{record.init_pid}/children").read_text()
    return int(children.split()[0])


def test_a_box_speaks_with_whom_its_rules_allow_and_with_nobody_else(sandbox: Boxes, peer: Peer):
    with sandbox(network=peer.wish()) as box:
        assert box.call(say, NAME, peer.port) == "hello"
        assert box.call(is_refused, REFUSED, 443) == "gaierror"
        assert box.call(is_refused, "192.0.2.77", 443) == "ConnectionResetError"
        story = box.finish()
    assert story.network
    assert (story.network.connections, story.network.up_bytes) == (1, 6)
    assert story.network.names[f"{NAME}:{peer.port}"].down_bytes == 6
    assert {REFUSED, "192.0.2.77:443"} < story.network.names.keys()


def test_all_boxes_of_a_server_have_one_gateway(sandbox: Boxes, peer: Peer, runtime_dir: Path):
    with sandbox(network=peer.wish()) as one, sandbox(network=peer.wish()) as other:
        assert len(gateways(runtime_dir)) == 1
        assert one.call(say, NAME, peer.port) == other.call(say, NAME, peer.port) == "hello"
    (record,) = gateways(runtime_dir)
    assert (record.kind, record.workdir, record.network) == ("gateway", "", "host")


def test_a_box_without_a_network_needs_no_gateway(sandbox: Boxes, runtime_dir: Path):
    with sandbox() as box:
        assert box.call(is_refused, NAME, 9) != "not refused"
        assert gateways(runtime_dir) == []
        assert box.finish().network is None
