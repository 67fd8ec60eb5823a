"""How kernels of a broker end: while there is none, and by `jupyter sandbox stop`."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import users
from brokers import OTHER, Broker, Refused, User

from sandbox_provisioner.descriptors import is_readable

pytestmark = pytest.mark.requires("userns", "root", "cgroup-memory", "setpriv", "public-python")

PATIENCE_SECONDS = 60
GROW = "grown = []\nwhile True: grown.append(bytearray(10 << 20))"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
BEGIN = """
kernel = Kernel(mem_interrupt=0)
handle = kernel.manager.provisioner.handle
answer = kernel.manager.provisioner.sandbox_id, handle.pid
"""
STORY = """
import asyncio
story = asyncio.run(handle.wait())
answer = [str(story.kind), story.reason, kernel.end()]
"""
STOP = """
import contextlib, io, tempfile
from sandbox_provisioner.app.stop import StopApp
said = io.StringIO()
with contextlib.redirect_stdout(said), tempfile.TemporaryDirectory() as records:
    StopApp.clear_instance()
    options = [f"--SandboxProvisioner.broker_socket={place['socket']}", f"--runtime-dir={records}"]
    StopApp.launch_instance([*words, *options])
answer = said.getvalue().strip()
"""


@pytest.fixture
def audit(own_broker: Broker) -> Iterator[Path]:
    """Where the broker writes it."""
    file = own_broker.home / "audit.jsonl"
    (own_broker.home / "policy.toml").write_text(f'audit = "{file}"\n')
    yield file


def lines(audit: Path, event: str, sandbox_id: str) -> list[dict[str, Any]]:
    told = map(json.loads, audit.read_text().splitlines())
    return [line for line in told if (line["event"], line["sandbox_id"]) == (event, sandbox_id)]


def ended(pid: int, act: Any) -> None:
    """Do *act*, and return when process *pid* has ended of it."""
    init = os.pidfd_open(pid)
    try:
        act()
        assert is_readable(init, PATIENCE_SECONDS)
    finally:
        os.close(init)


def stop(broker: Broker, *words: str) -> str:
    """What root's command says."""
    command = [sys.executable, "-m", "sandbox_provisioner.app", "stop", *words]
    done = subprocess.run([*command, f"--runtime-dir={broker.runtime}"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    return done.stdout + done.stderr


def test_a_cap_that_ends_a_kernel_while_there_is_no_broker_is_told_by_the_next_one(
    own_broker: Broker, own_user: User, audit: Path
) -> None:
    name, pid = own_user(BEGIN)
    own_broker.kill()
    ended(pid, lambda: own_user("kernel.client.execute(code)", code=GROW))
    # Who asks before there is one again waits for it.
    assert own_user("answer = handle.poll()") is None
    own_broker.start()
    assert own_broker.lines[-1]["kernels"] == [name]
    kind, reason, end = own_user(STORY)
    assert (kind, end) == ("memory-cap", "memory-cap")
    assert "reached its memory limit of 256 MiB" in reason
    (line,) = lines(audit, "end", name)
    assert line["story"]["kind"] == "memory-cap"
    counted = 'sandbox_provisioner_ends_total{cause="memory-cap",kind="kernel"}'
    assert own_broker.scraped()[counted] == 1
    assert not own_broker.records()


def test_who_has_ended_with_its_server_is_not_called_killed(
    own_broker: Broker, own_user: User, audit: Path
) -> None:
    name, pid = own_user(BEGIN)
    own_broker.kill()
    ended(pid, own_user.process.kill)
    own_broker.start()
    assert not own_broker.records()
    (line,) = lines(audit, "end", name)
    assert (line["story"]["kind"], line["story"]["reason"]) == ("asked", "")


def test_nobody_sweeps_what_its_server_has_not_been_told(
    own_broker: Broker, own_user: User, audit: Path
) -> None:
    name, pid = own_user(BEGIN)
    own_broker.kill()
    ended(pid, lambda: own_user("kernel.client.execute('import os; os._exit(7)')"))
    command = [sys.executable, "-m", "sandbox_provisioner.app", "gc"]
    subprocess.run([*command, f"--runtime-dir={own_broker.runtime}"],
                   stdout=subprocess.DEVNULL, check=True)  # fmt: skip
    assert own_broker.records()
    # Its server is the last who could ask.
    own_user.process.send_signal(signal.SIGKILL)
    own_user.process.wait(PATIENCE_SECONDS)
    own_broker.start()
    assert not own_broker.records()
    assert lines(audit, "end", name)[0]["story"]["code"] == 7


def test_root_stops_kernels_without_a_broker_and_the_next_one_tells_by_whom(
    own_broker: Broker, own_user: User, audit: Path
) -> None:
    name, pid = own_user(BEGIN)
    own_broker.kill()
    ended(pid, lambda: stop(own_broker, "--user", users.NAME))
    own_broker.start()
    kind, reason, end = own_user(STORY)
    assert (kind, end) == ("stopped", "stopped")
    assert "was stopped by the administrator of this machine" in reason
    (line,) = lines(audit, "end", name)
    assert line["story"]["stopped_by"] == "root"
    assert not own_broker.records()


def test_a_user_stops_their_own_kernels_through_the_broker_and_nobody_elses(
    own_broker: Broker, own_user: User, audit: Path
) -> None:
    name, _ = own_user(BEGIN)
    with User(own_broker.home, OTHER) as other:
        other.sit_down(own_broker)
        with pytest.raises(Refused):
            other(STOP, words=[name])
        told = other(f"answer = send(dict(ask='stop', sandbox_id={name!r}), [])")
        assert "was never this user's" in told["error"]["answer"]
        assert own_user("answer = handle.poll()") is None
    assert own_user(STOP, words=["--all"]).endswith("has ended.")
    kind, reason, _ = own_user(STORY)
    assert kind == "stopped" and f"was stopped by {users.NAME} with" in reason
    (change,) = lines(audit, "change", name)
    assert change["given"] == f"stopped by {users.NAME}"


def test_a_broker_that_is_killed_while_it_stops_a_kernel_loses_nothing(
    own_broker: Broker, own_user: User
) -> None:
    name, pid = own_user(BEGIN)
    own_user("kernel(code)", code=DEAF)
    record = own_broker.runtime / name / "record.json"
    asks = "import threading\nfrom sandbox_provisioner.broker.launcher import stop_through\n"
    asks += "threading.Thread(target=stop_through, args=(place['socket'], name)).start()"
    own_user(asks, name=name)
    while not json.loads(record.read_text())["stopped_by"]:
        select.poll().poll(10)
    own_broker.kill()
    own_broker.start()
    assert own_broker.lines[-1]["kernels"] == [name]
    assert own_user("answer = kernel('print(6 * 7)')") == "42"
    ended(pid, lambda: own_user("handle.kill()"))
    assert own_user(STORY)[0] == "stopped"
    assert not own_broker.records()


@pytest.mark.parametrize("moment", ["made", "runs"])
def test_a_broker_that_is_killed_in_a_start_leaves_no_kernel_that_nobody_knows(
    own_broker: Broker, own_user: User, moment: str
) -> None:
    own_user("""
import threading
def begin_one():
    try:
        begun.append(Kernel())
    except Exception as error:
        failed.append(str(error))
begun, failed, starts = [], [], threading.Thread(target=begin_one)
starts.start()
""")
    records: list[Path] = []
    while not records or (moment == "runs" and not json.loads(records[0].read_text())["init_pid"]):
        records = own_broker.records()
    own_broker.kill()
    own_user("starts.join()")
    assert all("broker" in told for told in own_user("answer = failed"))
    own_broker.start()
    own_user("for one in begun: one.end()")  # of who was done before we had seen it
    name = own_user("kernel = Kernel(); answer = kernel.manager.provisioner.sandbox_id")
    assert [record.parent.name for record in own_broker.records()] == [name]
    own_user("kernel.end()")
    assert not own_broker.records()
