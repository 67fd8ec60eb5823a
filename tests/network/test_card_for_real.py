"""Kernels with a network card, started as ever, on a host of the tests' own."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

import pytest
from boxes import Boxes
from card_hosts import OTHER, PUBLIC, apart, eventually, listening, names_in_table, play_host

from sandbox_provisioner import card_life
from sandbox_provisioner.errors import HostError, LaunchError
from sandbox_provisioner.inside import wire
from sandbox_provisioner.spec import Network, NetworkWish
from sandbox_provisioner.story import ExitStory

pytestmark = pytest.mark.requires("root")


def card(*allow: str, **more: Any) -> NetworkWish:
    return NetworkWish(mode=Network.CARD, allow=allow, **more)


def connect(address: str) -> str:
    """Inside: "" where it can be reached."""
    import socket

    try:
        socket.create_connection((address, 80), 10).close()
    except OSError as error:
        return str(error.strerror)
    return ""


def nothing_is_left() -> bool:
    """Of any card: neither in our table nor of interfaces."""
    interfaces = [name for _, name in socket.if_nameindex() if name.startswith("sbxc-")]
    return not interfaces and not any(name.startswith("arrive-") for name in names_in_table())


def test_a_kernel_speaks_with_whom_its_rules_name_and_its_end_tells_how_much(sandbox: Boxes):
    def host() -> ExitStory:
        world = play_host()
        with sandbox(network=card(f"{PUBLIC}:80")) as box, listening(world):
            assert box.call(connect, PUBLIC) == ""
            assert box.call(connect, OTHER) == "Connection refused"
            assert "nameserver" in box.call(read, "/etc/resolv.conf")
            assert box.call(read, "/proc/net/if_inet6").split()[-1] == "lo"
            traffic = box.handle.folder.read_counts()
            assert traffic
            assert (traffic.connections, traffic.refusals) == (1, 1)
            story = box.finish()
        eventually(nothing_is_left)
        return story

    story = apart(host)
    assert story.network
    assert story.network.is_last
    assert (story.network.connections, story.network.refusals) == (1, 1)
    assert 100 < story.network.up_bytes < 1000


def read(path: str) -> str:
    with open(path) as file:
        return file.read()


def test_a_quota_that_is_used_up_ends_connections_and_the_person_is_told(
    sandbox: Boxes, monkeypatch: pytest.MonkeyPatch
):
    def host() -> list[str]:
        world, told = play_host(), note_what_is_told(monkeypatch)
        wish = card("all", quota_bytes=50_000)
        with listening(world) as listener, sandbox(network=wish) as box:
            box.send(receive, PUBLIC)
            with listener.accept()[0] as server:
                assert server.recv(5) == b"begin"
                with contextlib.suppress(ConnectionError):  # it is told at once
                    server.sendall(bytes(100_000))
                assert box.receive() == "Software caused connection abort"
            assert box.call(connect, PUBLIC) == "Connection refused"
            eventually(lambda: len(told) == 2)
        return told

    up, sentence = apart(host)
    assert up == "up"
    assert sentence.startswith("say This kernel has sent and received 48.83 KiB, which is all that")


def note_what_is_told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What PID 1 hears from now on."""
    told: list[str] = []
    tell = card_life._CardServer._tell

    def noted(server: Any, *words: str) -> None:
        told.append(" ".join(words))
        tell(server, *words)

    monkeypatch.setattr(card_life._CardServer, "_tell", noted)
    return told


def receive(address: str) -> str:
    """Inside: why a program that only reads gets no more."""
    import socket

    with socket.create_connection((address, 80), 10) as connection:
        connection.settimeout(30)
        connection.sendall(b"begin")
        try:
            while connection.recv(1 << 16):
                pass
        except OSError as error:
            return str(error.strerror or error)
    return "the other side has ended it"


@pytest.mark.parametrize("step", ["await-card", "execute", "write-record"])
def test_a_start_that_fails_leaves_no_card(
    sandbox: Boxes, step: str, monkeypatch: pytest.MonkeyPatch
):
    def host() -> None:
        play_host()
        monkeypatch.setenv(wire.FAIL_AT, step)
        with pytest.raises(LaunchError, match="made to fail"), sandbox(network=card("all")):
            pass
        eventually(nothing_is_left)

    apart(host)


def test_a_host_that_cannot_have_cards_is_told_of_before_anything_is_made(
    sandbox: Boxes, runtime_dir: Any
):
    def host() -> None:
        with open("/proc/sys/net/ipv4/conf/all/forwarding") as file:
            assert file.read() == "0\n"  # as it is with Linux
        play_host()
        with open("/proc/sys/net/ipv4/conf/up0/forwarding", "w") as file:
            file.write("0")
        with (
            pytest.raises(HostError, match=r"sysctl -w net.ipv4.conf.up0.forwarding=1"),
            sandbox(network=card("all")),
        ):
            pass
        assert nothing_is_left()
        assert not [name for name in os.listdir(runtime_dir) if len(name) == 12]

    apart(host)
