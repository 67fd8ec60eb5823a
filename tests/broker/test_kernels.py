"""Kernels of an ordinary user's server, through the broker: their life, and what ends them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import users
from brokers import Broker, Refused, User
from facilities import packages, public_python

from sandbox_provisioner import doctor
from sandbox_provisioner.checks import Findings
from sandbox_provisioner.descriptors import is_readable
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.storage.facts import STORAGE
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.spec import NO_WORKDIR, Limits, SandboxSpec

pytestmark = pytest.mark.requires("userns", "root", "cgroup-memory", "setpriv", "public-python")

IDENTITY = """
import json, os
uid = os.getuid(), int(open("/proc/self/uid_map").read().split()[1])
with open("made", "w") as file:
    file.write("by the kernel")
print(json.dumps([uid, os.getcwd(), open("/sys/fs/cgroup/memory.max").read().strip()]))
"""
INTERRUPTED = """
asked = "import time; print(0, flush=True); time.sleep(600)"
kernel.client.execute(asked, stop_on_error=False)
while kernel.client.get_iopub_msg(timeout=60)['msg_type'] != 'stream':
    pass
kernel.manager.interrupt_kernel()
answer = kernel.client.get_shell_msg(timeout=60)['content'].get('ename')
"""
HOWS = "cold", "nursery", "spare"
GROW = "grown = []\nwhile True: grown.append(bytearray(10 << 20))"


def test_a_kernel_of_an_ordinary_user_lives_in_a_box_of_roots(broker: Broker, user: User) -> None:
    told = json.loads(user("kernel = Kernel(); answer = kernel(code)", code=IDENTITY))
    work = broker.home / "work"
    (inside, first), cwd, cap = told
    assert (inside, cwd, cap) == (1000, str(work), str(256 << 20))
    assert first >= 0x70000000  # ids that no user has
    assert (work / "made").stat().st_uid == users.USER
    assert broker.heard("start")["user"] == users.NAME
    assert user(INTERRUPTED) == "KeyboardInterrupt"
    user("kernel.restart(); answer = kernel('print(1 + 1)')")
    assert user("answer = kernel('print(1 + 1)')") == "2"
    assert user("answer = kernel.end()") == "exit"
    assert not broker.records()


def test_a_cap_that_ends_a_kernel_is_told_its_server(broker: Broker, user: User) -> None:
    code = f"""
kernel = Kernel(mem_interrupt=None)
kernel.client.execute({GROW!r})
story = kernel.manager.provisioner.handle.wait()
import asyncio
story = asyncio.run(story)
name = kernel.manager.provisioner.sandbox_id
import socket
handle = kernel.manager.provisioner.handle
with socket.socket(fileno=handle.listen_in_place()) as publisher, socket.socket(1) as client:
    client.connect(str(handle.meeting.outside / "s-2"))
    publisher.accept()[0].send(b"told")
    said = client.recv(4).decode()
answer = [str(story.kind), story.reason, kernel.end(), name, said]
"""
    kind, reason, ended, name, said = user(code)
    assert said == "told"  # where front ends listen
    assert (kind, ended) == ("memory-cap", "memory-cap")
    assert "reached its memory limit of 256 MiB" in reason
    assert broker.heard("end", name)["kind"] == "memory-cap"


def test_who_scrapes_is_told_what_runs_what_it_uses_and_how_it_ended(
    broker: Broker, user: User
) -> None:
    ours = "sandbox_provisioner"
    ended = f'{ours}_ends_total{{cause="exit",kind="kernel"}}'
    before = broker.scraped()
    name = user("kernel = Kernel(); answer = kernel.manager.provisioner.sandbox_id")
    found = broker.scraped()
    whose = f'user="{users.NAME}"'
    assert found[f'{ours}_sandboxes{{kind="kernel",{whose}}}'] == 1
    assert 10 << 20 < found[f"{ours}_memory_bytes{{{whose}}}"] < 256 << 20
    # Whether from a nursery: the kernel of the test before may have had one made.
    starts = [f'{ours}_start_duration_seconds_count{{how="{how}",kind="kernel"}}' for how in HOWS]
    counts = [sum(scrape.get(start, 0) for start in starts) for scrape in (before, found)]
    assert counts[1] == counts[0] + 1
    used = found[f"{ours}_cpu_seconds_total{{{whose}}}"]
    assert used > before.get(f"{ours}_cpu_seconds_total{{{whose}}}", 0)
    with pytest.raises(Refused):
        user("Kernel(cwd='/usr')")
    assert user("answer = kernel.end()") == "exit"
    broker.heard("end", name)
    after = broker.scraped()
    assert f'{ours}_sandboxes{{kind="kernel",{whose}}}' not in after
    assert after[ended] == found[ended] + 1
    refused = [f'{ours}_refusals_total{{reason="{why}"}}' for why in ("options", "host", "start")]
    assert sum(after[each] - found[each] for each in refused) == 1
    assert after[f"{ours}_cpu_seconds_total{{{whose}}}"] >= used


def test_who_asks_for_something_else_or_says_no_more_gets_nothing_of_it(broker: Broker) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(12)]
        for one in slow:
            one.connect(broker.metrics)
            one.settimeout(30)
        # To the first one it listens. It closes before it has heard all of this.
        with contextlib.suppress(ConnectionError):
            slow[0].sendall(b"x" * (1 << 17))
        answers = []
        for one in slow:
            with contextlib.suppress(ConnectionError):
                answers.append(one.recv(100))
    assert set(answers) == {b""}
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(broker.metrics)
        other.sendall(b"POST /metrics HTTP/1.1\r\n\r\n")
        assert other.recv(100).startswith(b"HTTP/1.0 404")
    assert broker.scraped()


def test_a_user_is_shown_their_own_kernels_and_nobody_elses(
    broker: Broker, user: User, other: User
) -> None:
    listed = """
import contextlib, io, json, tempfile
from sandbox_provisioner.app.running import ListApp
told = io.StringIO()
words = ["--json", f"--SandboxProvisioner.broker_socket={place['socket']}"]
with contextlib.redirect_stdout(told), tempfile.TemporaryDirectory() as records:
    ListApp.clear_instance()
    ListApp.launch_instance([*words, f"--SandboxProvisioner.runtime_dir={records}"])
answer = [one for one in json.loads(told.getvalue()) if one["kind"] == "kernel"]
"""
    name = user("kernel = Kernel(); answer = kernel.manager.provisioner.sandbox_id")
    (found,) = user(listed)
    assert (found["sandbox_id"], found["user"]) == (name, users.NAME)
    assert found["state"] in {"running", "idle"}  # as its messages have told by now
    assert found["memory_bytes"] > 1 << 20 and found["workdir"] == str(broker.home / "work")
    asked = "from sandbox_provisioner.broker.launcher import kernels_through\n"
    assert other(asked + "answer = kernels_through(place['socket'])") == []
    user("kernel.end()")
    assert user(listed) == []


def test_a_kernel_lives_on_without_its_broker_and_is_found_by_the_next_one(
    own_broker: Broker, own_user: User
) -> None:
    own_user("kernel = Kernel(); kernel('x = 41')")
    card = own_user("answer = kernel.manager.provisioner.handle.card()")
    own_broker.kill()
    assert own_user("answer = kernel('print(x + 1)')") == "42"
    assert own_user("answer = kernel.manager.is_alive()")
    with pytest.raises(Refused, match="systemctl enable --now sandbox-broker"):
        own_user("kernel.manager.provisioner.handle.signal(2)")
    own_broker.start()
    assert own_broker.lines[-1]["kernels"] == [card["id"]]
    limits = [sys.executable, "-m", "sandbox_provisioner.app", "limits", card["id"], "mem=300M"]
    told = subprocess.run([*limits, "--runtime-dir", own_broker.runtime],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "as no server is left to move it" in told.stdout
    # A cell hears of it: an interrupt that comes late would hit the next one.
    assert own_user(INTERRUPTED) == "KeyboardInterrupt"
    assert own_user("answer = kernel('print(x)')") == "41"
    find = "found = kernel.manager.provisioner.starter.find(card); answer = found.poll()"
    assert own_user(find, card=card) is None
    story = """
import asyncio
kernel.client.execute('import os; os._exit(3)')
story = asyncio.run(kernel.manager.provisioner.handle.wait())
answer = [str(story.kind), story.code, kernel.end()]
"""
    assert own_user(story) == ["exit", 3, "exit"]
    assert not own_broker.records()
    # Also without a broker it ends with its server.
    init = os.pidfd_open(own_user("kernel = Kernel(); answer = kernel.manager.provisioner.pid"))
    own_broker.kill()
    own_user.process.send_signal(signal.SIGKILL)
    assert is_readable(init, 30)
    os.close(init)
    own_broker.start()
    assert not own_broker.records()


def test_a_server_that_ends_after_another_broker_has_come_leaves_nothing(
    own_broker: Broker, own_user: User
) -> None:
    name = own_user("kernel = Kernel(); answer = kernel.manager.provisioner.sandbox_id")
    own_broker.kill()
    own_broker.start()
    own_user.process.send_signal(signal.SIGKILL)
    own_broker.heard("removed", name)
    assert not own_broker.records()


def test_a_kernel_ends_with_the_server_that_asked_for_it(broker: Broker, mortal: User) -> None:
    mortal("kernel = Kernel()")
    (record,) = broker.records()
    mortal.process.send_signal(signal.SIGKILL)
    broker.heard("removed", record.parent.name)
    assert not record.exists()


POLICY = """
[everyone]
kernels = 1
[everyone.ceilings]
mem_limit = "200M"
volumes = ["{home}/course:/course"]
[everyone.forced]
network = "none"
[everyone.sum]
mem_limit = "300M"
"""


@pytest.fixture
def policy(broker: Broker) -> Iterator[None]:
    path = broker.home / "policy.toml"
    path.write_text(POLICY.format(home=broker.home))
    yield
    path.unlink()


@pytest.mark.requires("loop")
@pytest.mark.parametrize("wish", ["disk_limit='16M'", "disk_limit='16M', disk_backend='image'"])
def test_a_limit_of_the_disk_is_kept_on_the_disk_by_the_broker(
    broker: Broker, user: User, wish: str
) -> None:
    launcher = "auto" if "backend" in wish else "broker"
    kind = "print(next(line.split()[2] for line in open('/proc/mounts') if ' /tmp ' in line))"
    told = user(f"kernel = Kernel(launcher='{launcher}', {wish})\nanswer = kernel(code)", code=kind)
    assert told == "ext4"
    (record,) = broker.records()
    image = STORAGE / record.parent.name
    assert image.exists()
    user("kernel.end()")
    assert not image.exists()


@pytest.mark.usefixtures("policy")
def test_what_the_administrator_says_holds_whatever_is_asked_for(
    broker: Broker, user: User
) -> None:
    for name in ("course", "else"):
        (broker.home / name).mkdir(exist_ok=True)
    ask = """
message = wish()
sources = {"/a": home + "/course", "/b": home + "/course/"}  # what is said of them
message["start"]["spec"] |= dict(
    volumes=[dict(source=source, target=target) for target, source in sources.items()],
    network=dict(mode="gateway", allow=["pypi.org:443"]),
)
fds = [*streams(), directory(), directory(home + "/course"), directory(home + "/else")]
answer = [message["start"]["sandbox_id"], send(message, fds)]
"""
    name, told = user(ask, home=str(broker.home))
    told_of = "\n".join(told["warnings"])
    for sentence in (
        "mem_limit is 200 MiB in place of 256 MiB, by the policy",
        "network is none in place of gateway",
        "/else:/b",
    ):
        assert sentence in told_of
    record = json.loads((broker.runtime / name / "record.json").read_text())
    assert (record["memory_limit_bytes"], record["network"]) == (200 << 20, "none")
    assert record["group"] == f"hub/{users.NAME}/kernels/{name}"
    shown = Path(f"/proc/{told['init'][0]}/mountinfo").read_text()
    assert f"{broker.home}/course /a" in shown
    assert f"{broker.home}/else" not in shown
    more = user("answer = start([*streams(), directory()])")
    user("answer = send(dict(ask='close', sandbox_id=name), [])", name=name)
    assert "policy.toml, line 3" in str(more["error"])


@pytest.mark.usefixtures("policy")
def test_what_the_policy_has_taken_stands_under_the_first_cell(user: User) -> None:
    first, second = user("answer = asyncio.run(said_in_a_server('', '6 * 7', mem_limit='1G'))")
    told = " ".join(first.split())
    assert "mem_limit is 200 MiB in place of 1 GiB, by the policy" in told
    assert second == ""


def test_auto_asks_the_broker_for_what_the_server_has_no_rights_to_do(
    broker: Broker, user: User
) -> None:
    ask = "kernel = Kernel(launcher='auto', mem_limit=cap)\nanswer = kernel(code)"
    told = json.loads(user(ask, code=IDENTITY, cap="256M"))
    assert told[0][1] >= 0x70000000
    user("kernel.end()")


def test_a_runtime_directory_that_is_not_the_brokers_is_told_and_leaves_no_kernel(
    broker: Broker, user: User
) -> None:
    with pytest.raises(Refused, match="nobody would find the kernel's sockets"):
        user("Kernel(runtime_dir='/run/elsewhere')")
    assert broker.heard("start")["id"] == broker.heard("end")["id"]


def test_auto_asks_nobody_for_what_the_server_can_do_by_itself(runtime_dir: Path) -> None:
    launcher = LocalLauncher(runtime_dir=str(runtime_dir), warn=pytest.fail)
    spec = SandboxSpec(workdir=NO_WORKDIR, limits=Limits(memory_bytes=256 << 20))
    assert launcher.obstacle(spec) is None


def test_without_a_broker_a_person_is_told_whom_to_ask(user: User) -> None:
    with pytest.raises(Refused) as refused:
        user("Kernel(broker_socket='/run/there-is-none')")
    assert "Ask whoever administers this machine" in str(refused.value)
    assert "sudo systemctl enable --now sandbox-broker.socket" in str(refused.value)


def test_a_kernel_has_a_network_with_a_gateway_of_the_brokers(broker: Broker, user: User) -> None:
    """Whom its rules do not name it does not reach, and that is counted."""
    code = """
kernel = Kernel(network="gateway", network_allow=["198.51.100.1:443"])
told = kernel.told_until(
    "refused", "import socket\\nsocket.create_connection(('198.51.100.2', 443), 30)"
)
provisioner = kernel.manager.provisioner
kernel.end()
answer = [told, provisioner.end.network is not None]
"""
    told, is_counted = user(code)
    assert "refused" in told.lower(), told
    assert is_counted


def test_doctor_tells_whether_one_answers(broker: Broker, user: User) -> None:
    ask = "from sandbox_provisioner.broker.talk import check_answers; answer = check_answers(path)"
    assert user(ask, path=broker.socket) is None
    with pytest.raises(Refused, match="Ask whoever administers"):
        user(ask, path=f"{broker.home}/passwd")
    error = HostError(attempt="ask it", answer="nobody is there", remedy="Start it.")
    told = {"": [], broker.socket: ["ok"], error: ["missing"]}
    for found, states in told.items():
        rows = doctor._broker(cast(Findings, SimpleNamespace(broker=found)))
        assert [row.state for row in rows] == states


@pytest.mark.parametrize("changeable", [False, True])
def test_units_are_written_that_run_what_only_root_may_change(
    public_folder: Path, changeable: bool
) -> None:
    units = public_folder / "units"
    units.mkdir()
    package = public_folder / "code/sandbox_provisioner"
    package.chmod(0o777 if changeable else 0o755)
    words = [public_python(), "-m", "sandbox_provisioner.app", "broker", "--install"]
    done = subprocess.run(
        [*words, f"--BrokerApp.folder={units}"],
        env={"PATH": os.defpath, "PYTHONPATH": os.pathsep.join([str(package.parent), *packages()])},
        cwd="/", capture_output=True, text=True, check=False,
    )  # fmt: skip
    written = {path.name: path.read_text() for path in units.iterdir()}
    if changeable:
        assert (done.returncode, written) == (1, {})
        assert f"others than root may change {package}" in " ".join(done.stderr.split())
        return
    assert done.returncode == 0, done.stderr
    assert f'ExecStart="{public_python()}" -P -m' in written["sandbox-broker.service"]
    assert "ListenStream=/run/sandbox-broker/socket" in written["sandbox-broker.socket"]
    assert "systemctl enable --now sandbox-broker.socket" in done.stdout


def test_who_may_not_be_root_is_told_so(user_home: Path) -> None:
    done = users.try_as_user(user_home, "-m", "sandbox_provisioner.app", "broker", variables={})
    assert done.returncode == 1
    assert "sudo jupyter sandbox broker" in done.stdout
