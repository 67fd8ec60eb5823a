"""Kernels with a network card, started as ever, on a host of the tests' own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from boxes import Boxes, request_for, run, start
from card_hosts import (
    HOST,
    METADATA,
    OTHER,
    PUBLIC,
    PUBLIC_6,
    apart,
    delete_our_table,
    eventually,
    listening,
    names_in_table,
    play_host,
    refusal,
)

from sandbox_provisioner import card_life, stages, sweeping
from sandbox_provisioner.app.leftovers import remove_left_table
from sandbox_provisioner.app.network import as_json
from sandbox_provisioner.app.running import look
from sandbox_provisioner.contract import Labels, Stdio, Warmth
from sandbox_provisioner.errors import HostError, LaunchError
from sandbox_provisioner.facilities.network.card import netlink, ruleset
from sandbox_provisioner.facilities.network.facts.name_servers import name_servers
from sandbox_provisioner.facilities.network.tell.counts import OfName
from sandbox_provisioner.inside import wire
from sandbox_provisioner.launch import LaunchRequest, LocalLauncher
from sandbox_provisioner.spec import Network, NetworkWish
from sandbox_provisioner.stem import stem
from sandbox_provisioner.story import ExitStory
from sandbox_provisioner.sweeping import sweep
from sandbox_provisioner.warm.make_nursery import make_nursery
from sandbox_provisioner.warm.make_spare import make_spare
from sandbox_provisioner.warm.start_from import start_warm

pytestmark = pytest.mark.requires("root")


def card(*allow: str, **more: Any) -> NetworkWish:
    return NetworkWish(mode=Network.CARD, allow=allow, **more)


def connect(address: str, port: int = 80) -> str:
    """Inside: "" where it can be reached."""
    import socket

    try:
        socket.create_connection((address, port), 10).close()
    except OSError as error:
        return str(error.strerror)
    return ""


def connect_until_refused(address: str) -> None:
    """Inside: more often in a second than is allowed."""
    import contextlib
    import socket

    with contextlib.suppress(ConnectionRefusedError):
        while True:
            socket.create_connection((address, 80), 10).close()


def nothing_is_left() -> bool:
    """Of any card: neither in our table nor of interfaces."""
    return not cards() and not any(name.startswith("arrive-") for name in names_in_table())


def test_a_kernel_speaks_with_whom_its_rules_name_and_its_end_tells_how_much(sandbox: Boxes):
    def host() -> ExitStory:
        world = play_host()
        with sandbox(network=card(f"{PUBLIC}:80")) as box, listening(world):
            assert box.call(connect, PUBLIC) == ""
            assert box.call(connect, OTHER) == "Connection refused"
            asked = "".join(f"nameserver {address}\n" for address in name_servers())
            assert box.call(read, "/etc/resolv.conf") == asked
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
    assert story.network.names.keys() == {f"{PUBLIC}:80", f"{OTHER}:80"}
    assert story.network.names[f"{OTHER}:80"] == OfName(refusals=1)
    assert story.network.names[f"{PUBLIC}:80"].up_bytes == story.network.up_bytes


def test_what_is_refused_is_told_once_with_the_rules_and_counted_by_its_name(
    sandbox: Boxes, monkeypatch: pytest.MonkeyPatch
):
    def host() -> tuple[list[str], dict[str, Any], dict[str, int]]:
        world, told = play_host(), note_what_is_told(monkeypatch)
        monkeypatch.setattr(card_life, "_addresses_of", lambda _, family: [IPv4Address(PUBLIC)])
        wish = card("data.example.org:80", new_per_second=1)
        with sandbox(network=wish) as box, listening(world):
            assert box.call(connect, PUBLIC) == ""
            for _ in range(3):
                assert box.call(connect, OTHER, 443) == "Connection refused"
            eventually(lambda: len(told) == 2)
            for address, port in ((PUBLIC, 81), (METADATA, 80)):
                assert box.call(connect, address, port) == "Connection refused"
            eventually(lambda: len(told) == 4)
            (seen,) = look(box.handle.folder.path.parent)
            assert seen.traffic
            refused = seen.as_json()["network_refused"]
            box.call(connect_until_refused, PUBLIC)
            eventually(lambda: len(told) == 5)
        return told, as_json(seen, seen.traffic), refused

    told, seen, refused = apart(host)
    allows = "this kernel's network allows data.example.org:80. Ask for it with network_allow."
    assert told[:2] == ["up", f"say {OTHER}:443 was refused: {allows}"]
    assert {*told[2:4]} == {
        "say data.example.org:81 was refused: of data.example.org this kernel's network allows "
        "port 80. Ask for it with network_allow.",
        f"say {METADATA}:80 was refused: {METADATA} is an address of a cloud's metadata service, "
        "and no rule of network_allow names that address. Ask for it with network_allow.",
    }
    assert told[4].startswith("say data.example.org:80 was refused: network_connections allows")
    assert refused == {f"{OTHER}:443": 3, f"{METADATA}:80": 1, "data.example.org:81": 1}
    assert seen["network_allow"] == ["data.example.org:80"]
    assert seen["network_refused"] == [f"{METADATA}:80", f"{OTHER}:443", "data.example.org:81"]


def read(path: str) -> str:
    with open(path) as file:
        return file.read()


@pytest.mark.parametrize(
    "address",
    [
        PUBLIC,
        pytest.param(f"::ffff:{PUBLIC}", marks=pytest.mark.requires("ipv6")),
        pytest.param(PUBLIC_6, marks=pytest.mark.requires("ipv6")),
    ],
)
def test_a_quota_that_is_used_up_ends_connections_and_the_person_is_told(
    sandbox: Boxes, address: str, monkeypatch: pytest.MonkeyPatch
):
    ipv6 = address == PUBLIC_6

    def host() -> list[str]:
        world, told = play_host(ipv6=ipv6), note_what_is_told(monkeypatch)
        wish = card("all", quota_bytes=50_000, ipv6=ipv6)
        with listening(world, ipv6=ipv6) as listener, sandbox(network=wish) as box:
            box.send(receive, address)
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


def hold(address: str) -> None:
    """Inside: a connection that stays open."""
    import builtins
    import socket

    builtins.held = socket.create_connection((address, 80), 10)  # type: ignore[attr-defined]


def test_a_kernel_that_ends_in_the_middle_of_a_connection_leaves_no_card(sandbox: Boxes):
    def host() -> None:
        world = play_host()
        with listening(world) as listener:
            with sandbox(network=card(f"{PUBLIC}:80")) as box:
                box.call(hold, PUBLIC)
                server = listener.accept()[0]
            with server:
                eventually(nothing_is_left)

    apart(host)


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


def test_a_kernel_loses_its_card_with_the_table_that_holds_it(
    sandbox: Boxes, monkeypatch: pytest.MonkeyPatch
):
    """Whoever reloads a firewall may flush all tables; the host's own services must not be open."""

    def host() -> list[str]:
        world, told = play_host(), note_what_is_told(monkeypatch)
        wish = card("all")
        with listening(world), socket.create_server((HOST, 81)), sandbox(network=wish) as box:
            assert box.call(connect, PUBLIC) == ""
            delete_our_table()
            eventually(lambda: len(told) == 2)
            assert cards() == []
            assert box.call(connect, HOST, 81) == "Network is unreachable"
        return told

    assert "somebody has deleted the rules that held its network card" in apart(host)[1]


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


CONNECTION = (
    '{"transport": "ipc", "ip": "/run/kernel/s", "key": "k", "signature_scheme": "hmac-sha256",'
    ' "shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5}'
)


@pytest.mark.slow("a nursery of its own: one without a network makes no spare with one")
@pytest.mark.requires("cgroup-pids")
def test_a_forked_kernel_and_a_spare_get_a_card_when_they_are_somebodys(
    workdir: Path, runtime_dir: Path
):
    def host() -> None:
        world, launcher = play_host(), LocalLauncher(runtime_dir=str(runtime_dir))
        request = kernel_request(workdir)
        nursery = run(make_nursery(launcher, request, Labels(), Warmth(idle_seconds=300)))
        assert nursery
        with listening(world):
            from_warmth(launcher, request)
            wish = Warmth(spares=1, idle_seconds=300)
            assert run(make_spare(launcher, request, Labels(), wish))
            assert nothing_is_left()  # whoever waits for a start has none yet
            from_warmth(launcher, kernel_request(workdir), spare=True)
        run(nursery.close())
        stem.end()

    apart(host)


def from_warmth(launcher: LocalLauncher, request: LaunchRequest, *, spare: bool = False) -> None:
    """A kernel that is forked, or a spare, with the card that it asks for."""
    handle = run(start_warm(launcher, request, Labels(), SILENT, Warmth()))
    assert handle.record.nursery
    assert bool(handle.record.group) == spare
    namespace = os.open(f"/proc/{handle.record.init_pid}/ns/net", os.O_RDONLY)
    assert refusal(namespace, PUBLIC) == ""
    assert refusal(namespace, OTHER) == "Connection refused"
    os.close(namespace)
    run(handle.close())
    eventually(nothing_is_left)


SILENT = Stdio(subprocess.DEVNULL, subprocess.DEVNULL, subprocess.DEVNULL)


def kernel_request(workdir: Path) -> LaunchRequest:
    name = "/run/jupyter/kernel.json"
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", name]
    wish = card(f"{PUBLIC}:80")
    return request_for(
        workdir, argv, connection_file=("kernel.json", CONNECTION), pump=True, network=wish
    )


@pytest.mark.parametrize("when", ["make-record", "write-record", "later"])
def test_what_a_killed_server_leaves_of_a_card_is_swept(
    workdir: Path, runtime_dir: Path, watch: Any, when: str
):
    def host() -> None:
        play_host()
        ours, theirs = os.pipe()
        pid = os.fork()
        if not pid:
            serve_until_killed(workdir, runtime_dir, when, theirs)
        os.close(theirs)
        os.read(ours, 1)  # "later" tells; whoever is killed before ends it
        if when == "later":
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        eventually(lambda: not cards())
        LocalLauncher(runtime_dir=str(runtime_dir)).sweep()
        assert nothing_is_left()

    apart(host)
    eventually(lambda: not sweep(runtime_dir) and os.listdir(runtime_dir) == ["lock"])


def test_a_server_that_ends_leaves_its_host_as_it_was(workdir: Path, runtime_dir: Path):
    def host() -> None:
        play_host()
        launcher = LocalLauncher(runtime_dir=str(runtime_dir))
        start(launcher, request_for(workdir, network=card("all")))
        assert cards()
        assert not remove_left_table()  # that of a living one is left alone
        sweeping._remove_held()
        assert names_in_table() == []
        assert netlink.rules_where(ruleset.is_guard) == []
        assert not remove_left_table()

    apart(host)


def serve_until_killed(workdir: Path, runtime_dir: Path, when: str, told: int) -> None:
    """In a process of its own, which does not return."""

    def die(step: str) -> None:
        if step == when:
            os.kill(os.getpid(), signal.SIGKILL)

    stages.fail_here = die  # type: ignore[assignment]
    start(LocalLauncher(runtime_dir=str(runtime_dir)), request_for(workdir, network=card("all")))
    os.write(told, b"!")
    signal.pause()


def cards() -> list[str]:
    return [name for _, name in socket.if_nameindex() if name.startswith("sbxc-")]
