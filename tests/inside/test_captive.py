"""What a program in a box with a gateway sees of the network, with somebody in the gateway's place
who tells what has come out. Nothing can leave but by the listeners."""

from __future__ import annotations

import pytest
from stand_in import in_place_of_the_gateway

from sandbox_provisioner.spec import Network, NetworkWish

pytestmark = pytest.mark.requires("userns")

GATEWAY = NetworkWish(mode=Network.GATEWAY)


@pytest.fixture
def captive(sandbox, monkeypatch):
    """A box, and who has its listeners."""
    with in_place_of_the_gateway(monkeypatch) as outside:
        with sandbox(network=GATEWAY) as box:
            outside.take()
            yield box, outside


def connect_and_talk(host, port):
    import socket

    with socket.create_connection((host, port), 10) as connection:
        connection.sendall(b"from inside")
        return connection.recv(100).decode(), connection.getpeername()[0]


@pytest.mark.parametrize(
    ("host", "kind", "wanted"),
    [
        ("93.184.216.34", "tcp4", "93.184.216.34"),
        ("198.18.3.7", "tcp4", "198.18.3.7"),
        ("10.0.0.1", "tcp4", "10.0.0.1"),
        ("169.254.169.254", "tcp4", "169.254.169.254"),
        ("::ffff:1.2.3.4", "tcp4", "1.2.3.4"),
        ("2130706434", "tcp4", None),
        ("2001:db8::7", "tcp6", "2001:db8::7"),
        ("fd53:616e:6462:6f78::9", "tcp6", "fd53:616e:6462:6f78::9"),
    ],
)
def test_a_connection_to_any_address_and_port_comes_out_as_what_it_was(captive, host, kind, wanted):
    box, outside = captive
    if wanted is None:  # 127.0.0.2 as a decimal number: that is the box itself
        with pytest.raises(ConnectionRefusedError):
            box.call(connect_and_talk, host, 8443)
        return
    box.send(connect_and_talk, host, 8443)
    connection, meant_for = outside.accept(kind)
    with connection:
        assert connection.recv(100) == b"from inside"
        connection.sendall(b"from outside")
        assert meant_for == (wanted, 8443)
        assert box.receive()[0] == "from outside"
