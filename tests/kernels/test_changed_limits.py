"""Kernels that run get other limits, are frozen and go on, by commands of another process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peer import NAME, Peer

from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.records import RecordFolder

pytestmark = pytest.mark.requires("userns", "cgroup-memory", "cgroup-pids")

MIB = 1 << 20


def id_of(k: Any) -> str:
    return str(k.provisioner.handle.record.sandbox_id)


def test_other_limits_hold_at_once_and_the_kernel_is_told_when_it_comes_close_to_the_new_one(
    kernel: Any, command: Any, runtime_dir: Path
) -> None:
    """With the first one, of 200 MiB, the cell would be interrupted, or the kernel killed."""
    with kernel(mem_limit="200M") as k:
        name = k.provisioner.kernel_id[:8]
        told = command("limits", id_of(k), "mem=500M", "pids=77")
        assert told == f"Kernel {name}: has mem_limit = 500 MiB, pids_limit = 77 now."
        assert k.provisioner.handle.usage().memory_limit_bytes == 500 * MIB
        assert RecordFolder(runtime_dir / id_of(k)).read().changed
        # Its server looks at it, as a restarter has it do.
        assert k.manager.is_alive()
        assert k.run("kept = b'x' * (300 << 20); len(kept)") == str(300 * MIB)
        # Below the new cap, and above the share of it.
        said = k.run(
            "used = int(open('/proc/self/statm').read().split()[1]) * 4096\n"
            "more = b'x' * ((475 << 20) - used)\n"
            "import time\nwhile True: time.sleep(1)"
        )
        assert "memory limit of 500 MiB" in " ".join(said.split())
        assert "KeyboardInterrupt" in said
        told = command("limits", id_of(k), "mem=200M")
        assert "which is more than the 200 MiB that it shall have, and nothing was changed" in told
        assert k.provisioner.handle.usage().memory_limit_bytes == 500 * MIB
        k.run("del kept, more")
        command("limits", id_of(k), "mem=250M")
        assert k.provisioner.handle.usage().memory_limit_bytes == 250 * MIB


def test_who_has_nobody_to_tell_pid_1_of_another_cap_is_told_so(
    kernel: Any, command: Any, runtime_dir: Path
) -> None:
    left = "the interrupt before that stays where it was, as no server is left to move it"
    with kernel(mem_limit="200M") as k:
        folder = k.provisioner.handle.folder
        folder.release()  # as when its server has gone
        try:
            assert left in command("limits", id_of(k), "mem=500M")
            assert left not in command("limits", id_of(k), "pids=77")
        finally:
            assert folder.own_if_orphan()
        assert left not in command("limits", id_of(k), "mem=400M")


def test_what_cannot_be_changed_is_said_and_nothing_is(kernel: Any, command: Any) -> None:
    with kernel(mem_limit="200M") as k:
        for words, part in (
            (("network=gateway",), "cannot be changed while a kernel runs"),
            (("volumes=/a:/b",), "cannot be changed while a kernel runs"),
            (("mem=4Q",), "is not a size"),
            ((), "write what to change"),
        ):
            assert part in command("limits", id_of(k), *words)
        assert "nothing that you have started" in command("freeze", "--user", "no-such")
        assert k.provisioner.handle.usage().memory_limit_bytes == 200 * MIB


def test_a_frozen_kernel_goes_on_where_it_was_and_can_be_ended_and_restarted(
    kernel: Any, command: Any
) -> None:
    with kernel() as k:
        user = k.provisioner.handle.record.user
        k.run("x = 41")
        assert "is frozen" in command("freeze", "--user", user)
        request = k.client.execute("x + 1")
        # Who asks about it is answered, and waits for nothing.
        assert k.manager.is_alive()
        assert k.provisioner.handle.usage().memory_bytes
        assert "asleep" in command("list")
        assert "goes on" in command("thaw", "--user", user)
        found = k.until(lambda m: m["msg_type"] == "execute_result", request)
        assert found["content"]["data"]["text/plain"] == "42"
        assert "is frozen" in command("freeze", id_of(k))
        k.manager.restart_kernel(now=True)
        k.client.wait_for_ready(timeout=60)
        assert k.run("'x' in dir()") == "False"
        assert "is frozen" in command("freeze", id_of(k))
        k.manager.shutdown_kernel(now=True)
        assert not k.manager.has_kernel or not k.manager.is_alive()


def test_a_frozen_kernel_of_a_group_is_frozen_with_it(kernel: Any, command: Any) -> None:
    with kernel() as k:
        user = k.provisioner.handle.record.user
        group = Person.find(user).groups[0]
        command("freeze", "--group", group)
        assert k.provisioner.handle._tree.is_frozen()
        command("thaw", "--group", group)
        assert not k.provisioner.handle._tree.is_frozen()


CONNECTED = """
import socket
kept = socket.create_connection(({name!r}, {port}), 20)
kept.sendall(b"\\0hello")
print(kept.recv(100).decode()[1:])
"""
# Of what was connected, of what is tried anew, and of the box's own loopback.
AFTERWARDS = """
def tried(act):
    try: return act()
    except OSError as error: return type(error).__name__
def again():
    kept.sendall(b"hello")
    return kept.recv(100).decode() or "its end"
server = socket.create_server(("127.0.0.1", 0))
own = socket.create_connection(server.getsockname(), 20)
print(tried(again), "|", tried(lambda: socket.create_connection(({name!r}, {port}), 20)), "|", own)
"""


@pytest.mark.requires("root")
def test_a_network_that_is_taken_away_ends_what_was_connected_and_nothing_else_begins(
    kernel: Any, command: Any, runtime_dir: Path
) -> None:
    peer = Peer()
    where = {"name": NAME, "port": peer.port}
    try:
        with kernel(network="gateway", network_allow=list(peer.rules)) as k:
            assert k.run(CONNECTED.format(**where)).strip() == "hello"
            assert "has network = none now" in command("limits", id_of(k), "network=none")
            before, anew, own = k.run(AFTERWARDS.format(**where)).split(" | ")
            assert "hello" not in before
            assert anew in {"OSError", "gaierror"}
            assert "socket.socket" in own
            assert RecordFolder(runtime_dir / id_of(k)).read().network == "none"
    finally:
        peer.close()
