"""A box and its gateway, from the start of the first to the end of both.

Whom it speaks with is a server of the test's own on this machine, by this machine's name.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from boxes import Box, Boxes, run
from leaks import Watch
from peer import NAME, Peer

from sandbox_provisioner import gateway_life
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.inside import wire
from sandbox_provisioner.records import Record, all_records, open_init
from sandbox_provisioner.spec import Network
from sandbox_provisioner.sweeping import sweep

pytestmark = pytest.mark.requires("userns")
REFUSED = "example.invalid"


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.close()


def say(host: str, port: int) -> str:
    import socket

    with socket.create_connection((host, port), 20) as connection:
        connection.sendall(b"\0hello")
        return connection.recv(100).decode()[1:]


def send_much(host: str, port: int) -> str:
    import socket

    with socket.create_connection((host, port), 20) as connection:
        try:
            for _ in range(100):
                connection.sendall(bytes(1024))
                if not connection.recv(1 << 16):
                    return "ended"
        except OSError:
            return "ended"
    return "goes on"


def is_refused(host: str, port: int) -> str:
    import socket

    try:
        socket.create_connection((host, port), 20).recv(1)
    except OSError as error:
        return type(error).__name__
    return "not refused"


def gateways(runtime_dir: Path) -> list[Record]:
    return [record for _, record in all_records(runtime_dir) if record.kind == gateway_life.KIND]


def gateway_of(record: Record) -> int:
    """The process itself, which PID 1 of its box has forked."""
    init = record.init_pid
    return int(Path(f"/proc/{init}/task/{init}/children").read_text().split()[0])


def wait_for_end(record: Record) -> None:
    pidfd = open_init(record)
    if pidfd is not None:
        assert select.select([pidfd], [], [], 30)[0]
        os.close(pidfd)


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
        (record,) = gateways(runtime_dir)
        assert (record.workdir, record.network) == ("", Network.HOST)
        assert one.call(say, NAME, peer.port) == other.call(say, NAME, peer.port) == "hello"
    with (
        sandbox(network=peer.wish()) as one,
        sandbox(network=replace(peer.wish(), allow=())) as other,
    ):
        assert one.call(say, NAME, peer.port) == "hello"
        assert other.call(is_refused, NAME, peer.port) == "gaierror"
    assert gateways(runtime_dir) == [record]


def test_a_box_without_a_network_needs_no_gateway(sandbox: Boxes, runtime_dir: Path):
    with sandbox() as box:
        assert box.call(is_refused, NAME, 9) != "not refused"
        assert gateways(runtime_dir) == []
        assert box.finish().network is None


def test_the_gateway_has_no_rights_and_sees_no_files_of_anybody(
    sandbox: Boxes, peer: Peer, runtime_dir: Path, workdir: Path
):
    with sandbox(network=peer.wish()):
        (record,) = gateways(runtime_dir)
        gateway = Path(f"/proc/{gateway_of(record)}")
        status = dict(
            line.split(":\t", 1) for line in (gateway / "status").read_text().splitlines()
        )
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[name], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        for name in ("user", "mnt", "pid", "ipc", "uts"):
            assert os.readlink(gateway / f"ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
        assert os.readlink(gateway / "ns/net") == os.readlink("/proc/self/ns/net")
        if not os.geteuid():
            assert int(status["Uid"].split()[0]) == record.first_id + 1000
        assert not os.path.exists(f"{gateway}/root{workdir}")
        assert not os.path.exists(f"{gateway}/root{runtime_dir}")


def test_a_gateway_that_is_killed_takes_the_network_along_and_the_next_start_has_a_new_one(
    sandbox: Boxes, peer: Peer, runtime_dir: Path
):
    with sandbox(network=peer.wish()) as box:
        assert box.call(say, NAME, peer.port) == "hello"
        (first,) = gateways(runtime_dir)
        os.kill(gateway_of(first), signal.SIGKILL)
        wait_for_end(first)
        assert box.call(is_refused, NAME, peer.port) != "not refused"
        assert box.call(is_refused, peer.address, peer.port) != "not refused"
        with sandbox(network=peer.wish()) as other:
            assert other.call(say, NAME, peer.port) == "hello"
            (second,) = gateways(runtime_dir)
            assert second.sandbox_id != first.sandbox_id
            assert box.call(is_refused, NAME, peer.port) != "not refused"
        notices = box.handle.notices()
    assert [text for text in notices if "has lost its network" in text]


def test_a_gateway_that_hangs_is_replaced_and_nobody_waits_for_ever(
    sandbox: Boxes, peer: Peer, runtime_dir: Path, warnings: list[str]
):
    with sandbox(network=peer.wish()):
        (first,) = gateways(runtime_dir)
        os.kill(gateway_of(first), signal.SIGSTOP)
        with sandbox(network=peer.wish()) as other:
            assert other.call(say, NAME, peer.port) == "hello"
        assert open_init(first) is None
    assert [text for text in warnings if "gateway is replaced: it has not answered" in text]


def test_a_start_that_fails_leaves_nothing_with_the_gateway(
    sandbox: Boxes, peer: Peer, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    with sandbox(network=peer.wish()):
        (record,) = gateways(runtime_dir)
        open_files = Path(f"/proc/{gateway_of(record)}/fd")
        with sandbox(network=peer.wish()) as other:  # whatever is opened once is open by now
            other.finish()
        ask_again(sandbox, peer)
        before = len(os.listdir(open_files))
        for step in ("hand-out-listeners", "execute", "join-network"):
            monkeypatch.setenv(wire.FAIL_AT, step)
            with pytest.raises(LaunchError), sandbox(network=peer.wish()):
                pass
        monkeypatch.delenv(wire.FAIL_AT)
        ask_again(sandbox, peer)
        assert len(os.listdir(open_files)) <= before


def ask_again(sandbox: Boxes, peer: Peer) -> None:
    """The gateway answers in turn: when this box is served, the ends of others are seen."""
    with sandbox(network=peer.wish()) as box:
        assert box.call(say, NAME, peer.port) == "hello"
        box.finish()


def test_many_starts_leave_nothing_with_the_gateway(sandbox: Boxes, peer: Peer, runtime_dir: Path):
    with sandbox(network=peer.wish()) as box:
        (record,) = gateways(runtime_dir)
        open_files = Path(f"/proc/{gateway_of(record)}/fd")
        assert box.call(say, NAME, peer.port) == "hello"
        ask_again(sandbox, peer)
        before = len(os.listdir(open_files))
        for _ in range(15):
            with sandbox([sys.executable, "-c", "pass"], network=peer.wish()) as other:
                assert other.wait().code == 0
        ask_again(sandbox, peer)
        assert len(os.listdir(open_files)) <= before
        assert gateways(runtime_dir) == [record]


def told_of(box: Box) -> list[str]:
    """What the log is told when a server looks the next time."""
    assert run(box.handle.look()) is None
    return box.handle.notices()


def test_a_quota_that_is_used_up_ends_connections_and_the_log_tells_of_it(
    sandbox: Boxes, peer: Peer
):
    with sandbox(network=peer.wish(quota_bytes=2048), stderr=subprocess.DEVNULL) as box:
        assert box.call(say, NAME, peer.port) == "hello"
        assert box.call(send_much, NAME, peer.port) == "ended"
        assert box.call(is_refused, NAME, peer.port) != "not refused"
        while not (told := told_of(box)):  # what is counted stands in the file a moment later
            select.poll().poll(10)
        assert "has used up its network_quota" in " ".join(told)
        story = box.finish()
    assert story.network and story.network.quota_used_up


def test_a_gateway_that_cannot_start_refuses_the_kernel_and_says_why(
    sandbox: Boxes, peer: Peer, monkeypatch: pytest.MonkeyPatch, runtime_dir: Path
):
    monkeypatch.setattr(gateway_life, "_BOOT", "raise SystemExit('it has no dnslib')")
    with pytest.raises(LaunchError, match="gateway") as caught, sandbox(network=peer.wish()):
        pass
    assert "it has no dnslib" in caught.value.stderr_tail
    assert all_records(runtime_dir) == []


def test_a_gateway_that_refuses_a_kernel_says_why(
    sandbox: Boxes, peer: Peer, monkeypatch: pytest.MonkeyPatch
):
    """Its PID 1 knows no more than that the channel has ended."""
    with sandbox(network=peer.wish()):  # from here on the gateway answers first
        monkeypatch.setattr(gateway_life, "_rules_of", lambda *_: {"what": 1})
        for _ in range(5):
            with pytest.raises(LaunchError) as caught, sandbox(network=peer.wish()):
                pass
            assert "the network gateway refused: nobody knows 'what'" in caught.value.answer


def test_a_child_that_is_forked_during_a_start_keeps_no_box_in_the_gateway(
    sandbox: Boxes, peer: Peer, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    children, alive = [], os.pipe()
    register = gateway_life.GatewayAttachment.register

    def forked(attachment: gateway_life.GatewayAttachment, *words: Any) -> None:
        for step in (lambda: None, lambda: register(attachment, *words)):
            step()
            if not (child := os.fork()):
                os.close(alive[1])
                os.read(alive[0], 1)
                os._exit(0)
            children.append(child)

    with sandbox(network=peer.wish()):
        (record,) = gateways(runtime_dir)
        open_files = Path(f"/proc/{gateway_of(record)}/fd")
        ask_again(sandbox, peer)
        before = len(os.listdir(open_files))
        monkeypatch.setattr(gateway_life.GatewayAttachment, "register", forked)
        with sandbox(network=peer.wish()):
            pass
        monkeypatch.undo()
        ask_again(sandbox, peer)
        assert len(os.listdir(open_files)) <= before
    for fd in alive[::-1]:
        os.close(fd)
    for child in children:
        os.waitpid(child, 0)


SERVER = """
import asyncio, json, os, sys
from boxes import request_for
from sandbox_provisioner.contract import Stdio
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.spec import Network, NetworkWish
runtime, workdir, rules, survives, hold = json.loads(sys.argv[1])
wish = NetworkWish(mode=Network.GATEWAY, allow=tuple(rules))
request = request_for(workdir, network=wish, survive_server=survives)
handle = asyncio.run(LocalLauncher(runtime_dir=runtime).start(request, stdio=Stdio(0, 1, 2)))
os.close(1)
os.read(hold, 1)
"""


@contextlib.contextmanager
def server(
    runtime_dir: Path, workdir: Path, peer: Peer, *, survives: bool
) -> Iterator[tuple[Box, subprocess.Popen[bytes], Callable[[], object]]]:
    """One that has started a box, with which one speaks here; and what lets the server end."""
    hold, let_go = os.pipe()
    told = json.dumps([str(runtime_dir), str(workdir), peer.rules, survives, hold])
    places = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, told], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        pass_fds=[hold], env=os.environ | {"PYTHONPATH": places},
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        os.close(hold)
        box = Box(None, os.dup(process.stdin.fileno()), os.dup(process.stdout.fileno()))  # type: ignore[arg-type]
        process.stdin.close()
        process.stdout.close()
        closer = contextlib.ExitStack()
        closer.callback(os.close, let_go)
        with closer, contextlib.closing(box._stdin), contextlib.closing(box._stdout):
            yield box, process, closer.close


@pytest.mark.parametrize("how", ["orderly", "killed"])
def test_a_server_that_ends_takes_its_gateway_along(
    how: str, peer: Peer, runtime_dir: Path, workdir: Path, watch: Watch
):
    with server(runtime_dir, workdir, peer, survives=False) as (box, process, let_go):
        assert box.call(say, NAME, peer.port) == "hello"
        (record,) = gateways(runtime_dir)
        watch.expect_gone(record, runtime_dir)
        if how == "killed":
            process.kill()
        let_go()
        process.wait(30)
        wait_for_end(record)
        sweep(runtime_dir)
        assert all_records(runtime_dir) == []


def test_a_server_whose_lasting_kernels_have_ended_leaves_nothing(
    peer: Peer, runtime_dir: Path, workdir: Path, watch: Watch
):
    with server(runtime_dir, workdir, peer, survives=True) as (box, process, let_go):
        assert box.call(say, NAME, peer.port) == "hello"
        (record,) = gateways(runtime_dir)
        watch.expect_gone(record, runtime_dir)
        (kernel,) = (one for _, one in all_records(runtime_dir) if one != record)
        box._stdin.close()
        wait_for_end(kernel)
        let_go()
        process.wait(30)
        assert all_records(runtime_dir) == []


def test_a_kernel_that_outlives_its_server_keeps_its_network(
    peer: Peer, runtime_dir: Path, workdir: Path, watch: Watch
):
    with server(runtime_dir, workdir, peer, survives=True) as (box, process, let_go):
        assert box.call(say, NAME, peer.port) == "hello"
        (record,) = gateways(runtime_dir)
        watch.expect_gone(record, runtime_dir)
        let_go()
        process.wait(30)
        sweep(runtime_dir)
        assert len(all_records(runtime_dir)) == 2
        assert box.call(say, NAME, peer.port) == "hello"
        box._stdin.close()  # which ends its program
        wait_for_end(record)
        sweep(runtime_dir)
        assert all_records(runtime_dir) == []
