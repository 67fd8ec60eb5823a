"""A gateway of a server finds names as the machine does now, not as it did when it began."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from boxes import Boxes
from card_hosts import PUBLIC, apart, eventually, listening, play_host
from world import Dns

from sandbox_provisioner import gateway_life
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.spec import Network, NetworkWish
from sandbox_provisioner.stem import stem

pytestmark = pytest.mark.requires("root")
NAME = "data.example.org"
NOBODY, SERVER = "127.0.0.53", "127.0.0.54"


def replace_file(path: str, new: Path, text: str) -> None:
    """In this process's mount namespace alone."""
    new.write_text(text)
    subprocess.run(["mount", "--bind", str(new), os.path.realpath(path)], check=True)


def ask_by(folder: Path, server: str) -> None:
    """Let this machine ask *server* for names."""
    text = f"nameserver {server}\noptions timeout:1 attempts:1\n"
    replace_file("/etc/resolv.conf", folder / server, text)


def serve_names() -> None:
    listener = socket.socket(type=socket.SOCK_DGRAM)
    listener.bind((SERVER, 53))
    dns = Dns(zone={NAME: [PUBLIC]})
    threading.Thread(target=dns.serve, args=(listener,), daemon=True).start()


def reach(name: str) -> str:
    """Inside: "" where it can be."""
    import socket

    try:
        socket.create_connection((name, 80), 10).close()
    except OSError as error:
        return str(error)
    return ""


def test_a_name_server_that_the_machine_has_got_since_is_asked(
    sandbox: Boxes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def host() -> None:
        kernel_calls.unshare(kernel_calls.CLONE_NEWNS)
        kernel_calls.make_mounts_private()
        world = play_host()
        serve_names()
        replace_file("/etc/nsswitch.conf", tmp_path / "nsswitch", "hosts: files dns\n")
        ask_by(tmp_path, NOBODY)
        wish = NetworkWish(mode=Network.GATEWAY, allow=(f"{NAME}:80",))
        with sandbox(network=wish) as box, listening(world):
            assert "name resolution" in box.call(reach, NAME)
            ask_by(tmp_path, SERVER)
            eventually(lambda: box.call(reach, NAME) == "")
        gateway_life.end_own()
        stem.end()

    monkeypatch.setattr(gateway_life, "_NAMES_SECONDS", 0.05)
    apart(host)
