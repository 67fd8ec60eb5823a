"""The broker as a service of systemd, by the units that are shipped, on cgroup v2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from units import Account, installed, systemctl

pytestmark = [
    pytest.mark.requires("root", "cgroup-v2", "systemd-booted", "setpriv"),
    pytest.mark.timeout(600),
]
MIB = 1 << 20
FORWARDS = Path("/proc/sys/net/ipv4/ip_forward")
POLICY = Path("/etc/jupyter/sandbox.toml")
SERVICE = "sandbox-broker.service"
IDENTITY = """
import json, os
first = int(open("/proc/self/uid_map").read().split()[1])
open("made", "w").close()
print(json.dumps([os.getuid(), first, open("/sys/fs/cgroup/memory.max").read().strip()]))
"""
HOLD = "kept = b'x' * ({} << 20)"


@pytest.fixture(scope="module")
def service() -> Iterator[SimpleNamespace]:
    with installed() as found:
        yield found


@pytest.fixture
def alice(service: SimpleNamespace) -> Iterator[Account]:
    """Her server, with `askers.py` at hand."""
    with Account("alice") as made:
        made("import os; os.makedirs(os.path.expanduser('~/work'), exist_ok=True)")
        made.sit_down(service)
        yield made


@pytest.fixture
def policy() -> Iterator[Path]:
    """Where a policy of this machine's stands as long as the test."""
    POLICY.parent.mkdir(exist_ok=True)
    yield POLICY
    POLICY.unlink()


@pytest.fixture
def forwarding() -> Iterator[None]:
    """What a card needs of the machine."""
    before = FORWARDS.read_text()
    FORWARDS.write_text("1")
    yield
    FORWARDS.write_text(before)


def group_of(service: SimpleNamespace, name: str) -> Path:
    """Of the sandbox *name*, by its record."""
    record = json.loads((service.runtime / name / "record.json").read_text())
    return Path(service.group, record["group"] or name)


def caps(group: Path) -> list[str]:
    return [(group / name).read_text().strip() for name in ("memory.max", "pids.max", "cpu.max")]


def sandbox(*words: str) -> subprocess.CompletedProcess[str]:
    """An administrator's `jupyter sandbox`."""
    command = [sys.executable, "-m", "sandbox_provisioner.app", *words]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)


def test_a_kernel_outlives_every_end_of_its_service_and_keeps_its_caps(
    service: SimpleNamespace, alice: Account
) -> None:
    uid, first, cap = json.loads(
        alice("kernel = Kernel(cpu_limit=1.5, warm=False); answer = kernel(code)", code=IDENTITY)
    )
    assert (uid, cap) == (1000, str(256 * MIB))
    assert first >= 0x70000000  # ids that no user has
    assert (service.home / "work/made").stat().st_uid == service.home.stat().st_uid
    name = alice("kernel('x = 41'); answer = kernel.manager.provisioner.sandbox_id")
    group = group_of(service, name)
    held = [str(256 * MIB), "512", "150000 100000"]
    assert caps(group) == held
    systemctl("daemon-reload")
    assert caps(group) == held

    systemctl("restart", SERVICE)  # it returns when the next one answers
    assert alice("kernel.manager.interrupt_kernel(); answer = kernel('print(x)')") == "41"
    os.kill(int(systemctl("show", "--value", "--property=MainPID", SERVICE)), signal.SIGKILL)
    assert alice("answer = kernel('print(x)')") == "41"
    systemctl("start", SERVICE)
    assert alice("answer = kernel.manager.is_alive()")
    systemctl("stop", SERVICE)
    assert alice("answer = kernel('print(x + 1)')") == "42"
    assert caps(group) == held
    # The socket is still there: whoever asks has it started.
    second = alice("second = Kernel(warm=False); answer = second.manager.provisioner.sandbox_id")
    assert group_of(service, second).parent == group.parent
    assert alice("answer = [kernel.end(), second.end()]") == ["exit", "exit"]
    assert not service.group.exists()
    assert not [*service.runtime.glob("*/record.json")]


def test_a_persons_sum_is_told_and_kernels_are_frozen_and_changed_while_they_run(
    service: SimpleNamespace, alice: Account, policy: Path
) -> None:
    policy.write_text('[everyone.sum]\nmem_limit = "280M"\n')
    names = alice(
        "kernels = [Kernel(mem_interrupt=None, warm=False) for _ in range(2)]\n"
        "answer = [kernel.manager.provisioner.sandbox_id for kernel in kernels]"
    )
    group = group_of(service, names[0])
    person = group.parent.parent
    assert person == service.group / "hub/alice"
    assert (person / "memory.max").read_text().strip() == str(280 * MIB)
    assert not person.stat().st_uid

    assert sandbox("limits", names[0], "mem=200M", "pids=77").returncode == 0
    assert caps(group)[:2] == [str(200 * MIB), "77"]
    assert sandbox("freeze", "--user", "alice").returncode == 0
    frozen = [(group_of(service, name) / "cgroup.events").read_text() for name in names]
    assert all("frozen 1" in told for told in frozen)
    assert sandbox("thaw", "--user", "alice").returncode == 0
    assert alice("answer = kernels[0]('print(1 + 1)')") == "2"

    # Each is below its own cap, which both together are not.
    alice("kernels[0](hold)", hold=HOLD.format(130))
    reasons = alice(
        "import asyncio\n"
        "async def first(handles):\n"
        "    tasks = [asyncio.ensure_future(handle.wait()) for handle in handles]\n"
        "    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)\n"
        "    return [task.result().reason for task in done]\n"
        "kernels[1].client.execute(hold)\n"
        "answer = asyncio.run(first([k.manager.provisioner.handle for k in kernels]))",
        hold=HOLD.format(170),
    )
    whose = "all that alice runs here together, for which a limit of 280 MiB is set"
    assert all(whose in reason for reason in reasons), reasons
    alice("for kernel in kernels: kernel.end()")
    assert not service.group.exists()


@pytest.mark.usefixtures("forwarding")
def test_a_kernel_of_the_service_has_a_network_by_a_gateway_or_a_card(alice: Account) -> None:
    """Namespaces, nf_tables, routes, interfaces: all that the unit lets the broker do."""
    connect = "import socket\nsocket.create_connection(('198.51.100.2', 443), 60)"
    for network in ("gateway", "card"):
        told = alice(
            "kernel = Kernel(warm=False, network=network, network_allow=['198.51.100.1:443'])\n"
            "answer = kernel.told_until('refused', connect); kernel.end()",
            network=network, connect=connect,
        )  # fmt: skip
        assert "refused" in told.lower(), (network, told)
