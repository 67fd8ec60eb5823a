"""Real kernels with a network: what a cell can do, and what its person and the log are told."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peer import NAME, Peer
from warmth import came_from, children_of, made, spares

from sandbox_provisioner.app import network
from sandbox_provisioner.app.running import look
from sandbox_provisioner.gateway_life import KIND
from sandbox_provisioner.records import Record, all_records
from sandbox_provisioner.warm import ahead

pytestmark = pytest.mark.requires("userns")
REFUSED = "example.invalid"
SAY = """
import socket
with socket.create_connection(({name!r}, {port}), 20) as connection:
    connection.sendall(b"\\0hello")
    print(connection.recv(100).decode()[1:])
"""
# All that a quota of 1 KiB has, and until its connections end.
MUCH = """
import contextlib, socket
with contextlib.suppress(OSError), socket.create_connection(({name!r}, {port}), 20) as connection:
    connection.sendall(b"\\0" + b"x" * 4000)
    while connection.recv(4000): pass
"""
# Sends more than its rate has in minutes, and hears it again; goes on while other cells run.
FLOOD = """
import socket, threading
def hear(connection):
    while connection.recv(1 << 16): pass
def flood():
    with socket.create_connection(({name!r}, {port}), 20) as connection:
        connection.settimeout(None)
        threading.Thread(target=hear, args=(connection,), daemon=True).start()
        connection.sendall(b"\\0" + bytes(1 << 30))
threading.Thread(target=flood, daemon=True).start()
"""
MUCH_OUTPUT = 20_000_000


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.close()


@pytest.fixture
def options(peer: Peer) -> dict[str, Any]:
    """Of a kernel that may speak with *peer*."""
    return {"network": "gateway", "network_allow": list(peer.rules)}


def say(k: Any, peer: Peer) -> str:
    text: str = k.run(SAY.format(name=NAME, port=peer.port))
    return text.strip()


def gateway(runtime_dir: Path) -> Record:
    (record,) = [one for _, one in all_records(runtime_dir) if one.kind == KIND]
    return record


WAIT = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: pass"


def until_told(k: Any, code: str, words: str) -> str:
    """The text with *words* that comes while *code* waits, which is interrupted then."""
    request = k.start(code)
    message = k.until(
        lambda one: one["msg_type"] == "stream" and words in one["content"]["text"], request
    )
    k.manager.interrupt_kernel()
    text: str = message["content"]["text"]
    return text


def test_a_cell_that_is_refused_reads_why_and_the_log_has_all_of_it(
    kernel: Any, peer: Peer, options: Any, runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with kernel(**options) as k:
        assert say(k, peer) == "hello"
        code = f"import socket\ntry: socket.getaddrinfo({REFUSED!r}, 443)\nexcept OSError: pass\n"
        told = until_told(k, code + WAIT, REFUSED)
        assert f"{REFUSED} was refused: this kernel's network allows {NAME}" in " ".join(
            told.split()
        )
        provisioner = k.provisioner
    assert provisioner.end and provisioner.end.network
    assert provisioner.end.network["names"][f"{NAME}:{peer.port}"]["connections"] == 1
    (line,) = [text for text in caplog.messages if "1 connection" in text]
    assert f"refused: {REFUSED}" in line


def test_a_gateway_that_is_killed_is_told_of_under_the_cell_and_in_the_log(
    kernel: Any, peer: Peer, options: Any, runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with kernel(**options) as k:
        assert say(k, peer) == "hello"
        request = k.start(WAIT)
        (process,) = children_of(gateway(runtime_dir).init_pid)
        os.kill(process, signal.SIGKILL)
        k.until(lambda one: "network" in one["content"].get("text", ""), request)
        k.manager.interrupt_kernel()
        assert "gaierror" in say(k, peer)
        with kernel(**options) as other:
            assert say(other, peer) == "hello"
    assert "has lost its network" in caplog.text


def test_what_a_kernel_says_to_the_notebook_is_no_matter_of_its_network(
    kernel: Any, peer: Peer, options: Any
) -> None:
    """At this rate the output of the second cell would take longer than a test may."""
    with kernel(**options, network_rate="1M") as k:
        k.run(FLOOD.format(name=NAME, port=peer.port))
        assert len(k.run(f"print('x' * {MUCH_OUTPUT})")) == MUCH_OUTPUT + 1
        provisioner = k.provisioner
    assert provisioner.end and provisioner.end.network
    assert 0 < provisioner.end.network["up_bytes"] < MUCH_OUTPUT


def test_a_restart_brings_no_new_quota(kernel: Any, peer: Peer, options: Any) -> None:
    with kernel(**options, network_quota="1K") as k:
        assert say(k, peer) == "hello"
        k.manager.restart_kernel(now=True)
        k.client.wait_for_ready(timeout=60)
        assert say(k, peer) == "hello"
        k.run(MUCH.format(name=NAME, port=peer.port))
        k.manager.restart_kernel(now=True)
        k.client.wait_for_ready(timeout=60)
        assert "gaierror" in say(k, peer)


def test_a_kernel_from_a_nursery_and_one_that_was_a_spare_have_it_too(
    warm: Any, peer: Peer, options: Any, runtime_dir: Path
) -> None:
    with warm(**options) as cold:
        assert say(cold, peer) == "hello"
    nursery = made(runtime_dir)
    with warm(**options, spares=1) as k:
        assert (came_from(k), k.provisioner.handle.record.group) == (nursery.sandbox_id, "")
        assert say(k, peer) == "hello"
    ahead.wait()
    (spare,) = spares(runtime_dir)
    with warm(**options) as k:
        assert k.provisioner.handle.record.group == spare.sandbox_id
        assert say(k, peer) == "hello"
        provisioner = k.provisioner
    assert provisioner.end and provisioner.end.network
    assert provisioner.end.network["connections"] == 1


def test_a_list_and_a_command_tell_with_whom_a_kernel_speaks(
    kernel: Any, peer: Peer, options: Any, runtime_dir: Path
) -> None:
    with kernel(**options, network_audit=True) as k:
        assert say(k, peer) == "hello"
        k.run(f"import socket\ntry: socket.getaddrinfo({REFUSED!r}, 443)\nexcept OSError: pass")
        sandbox = network.find_sandbox(k.manager.kernel_id[:6], look(runtime_dir))
        told = network.as_json(sandbox, network.traffic_of(sandbox))
        assert (told["network"], sandbox.as_json()["network"]) == ("gateway", "gateway")
        assert json.dumps(told)
        kinds = [one.record.kind for one in look(runtime_dir)]
        assert sorted(kinds) == [KIND, "kernel"]
