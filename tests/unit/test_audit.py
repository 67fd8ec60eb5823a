"""What an audit says of starts and ends, and where it goes."""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from sandbox_provisioner import audit
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.policy import current
from sandbox_provisioner.records import Record
from sandbox_provisioner.spec import Limits, Network, NetworkWish, SandboxSpec, Volume
from sandbox_provisioner.story import ExitStory
from sandbox_provisioner.told import EndKind

pytestmark = pytest.mark.requires("root")

GIB = 1 << 30
RECORD = Record(sandbox_id="0123abcd", person="alice", user="hub", name="Python\n3", notebook="/n")
STORY = ExitStory(kind=EndKind.MEMORY_CAP, code=-9, signal=9, stderr_tail="secret")
ERROR = HostError(attempt="start", answer="no room", remedy="Wait.")


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: Any) -> Any:
    """``policy(text)`` writes it, where this process looks for one."""
    path = tmp_path / "sandbox.toml"
    monkeypatch.setattr(current, "_keeper", current.PolicyKeeper(str(path), os.geteuid()))
    return path.write_text


def tell_all() -> None:
    asked = SandboxSpec(
        workdir="/srv",
        limits=Limits(memory_bytes=8 * GIB, pids=64),
        network=NetworkWish(mode=Network.GATEWAY, allow=("all",)),
        untouched=frozenset({"pids_limit"}),
    )
    given = SandboxSpec(workdir="/srv", limits=Limits(memory_bytes=4 * GIB, pids=64))
    audit.started(RECORD, asked, given, seconds=0.25, how="cold")
    audit.refused(ERROR, person="alice", name="R", asked=asked)
    audit.changed(RECORD, "mem_limit = 1 GiB")
    audit.ended(RECORD, STORY)


def check(lines: list[str]) -> None:
    start, refusal, change, end = map(json.loads, lines)
    assert [one["event"] for one in (start, refusal, change, end)] == [
        "start", "refusal", "change", "end",
    ]  # fmt: skip
    assert {one["person"] for one in (start, refusal, change, end)} == {"alice"}
    assert start["sandbox_id"] == change["sandbox_id"] == end["sandbox_id"] == "0123abcd"
    assert start["asked"]["mem_limit"] == "8 GiB"
    assert start["given"]["mem_limit"] == "4 GiB"
    assert (start["seconds"], start["how"]) == (0.25, "cold")
    assert (start["asked"]["network"], start["given"]["network"]) == ("gateway", "none")
    assert "pids_limit" not in start["asked"]
    assert start["given"]["pids_limit"] == "64"
    assert "covered_files" not in start["given"]
    assert refusal["error"] == str(ERROR)
    assert change["given"] == "mem_limit = 1 GiB"
    assert (end["story"]["kind"], end["story"]["signal"]) == ("memory-cap", 9)
    assert "secret" not in lines[3]


def test_each_event_is_a_line_of_json_in_the_file(tmp_path: Path, policy: Any) -> None:
    file = tmp_path / "audit.jsonl"
    policy(f'audit = "{file}"')
    tell_all()
    check(file.read_text().splitlines())
    assert file.stat().st_mode & 0o777 == 0o600


def test_or_one_in_the_log(policy: Any, caplog: Any) -> None:
    policy('audit = "log"')
    with caplog.at_level(logging.INFO, logger=audit.__name__):
        tell_all()
    check(caplog.messages)


def test_or_a_message_to_the_journal(tmp_path: Path, policy: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(audit, "JOURNAL", str(tmp_path / "journal"))
    policy('audit = "journal"')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(audit.JOURNAL)
        tell_all()
        found = [journal.recv(1 << 16).decode() for _ in range(4)]
    for text in found:
        names = [line.partition("=")[0] for line in text.splitlines()]
        # No name of a kernel's makes a field of its own.
        assert names == [
            "PRIORITY", "SYSLOG_IDENTIFIER", "SANDBOX_EVENT", "SANDBOX_PERSON", "MESSAGE",
        ]  # fmt: skip
        assert "\nSANDBOX_PERSON=alice\n" in text
    check([text.splitlines()[4].removeprefix("MESSAGE=") for text in found])
    assert "\nSANDBOX_EVENT=refusal\n" in found[1]


def test_what_no_datagram_can_have_is_left_out_of_the_line(
    tmp_path: Path, policy: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(audit, "JOURNAL", str(tmp_path / "journal"))
    policy('audit = "journal"')
    volumes = tuple(Volume(source=f"/{'x' * 1000}/{n}", target=f"/{n}") for n in range(400))
    long = SandboxSpec(workdir="/", volumes=volumes)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(audit.JOURNAL)
        audit.refused(ERROR, person="alice", name="R", asked=long)
        journal.setblocking(False)
        line = json.loads(journal.recv(1 << 16).decode().partition("MESSAGE=")[2])
    assert line.pop("cut") is True
    assert "asked" not in line
    assert (line["event"], line["person"], line["error"]) == ("refusal", "alice", str(ERROR))


def test_what_cannot_be_written_is_told_and_nothing_else_happens(
    tmp_path: Path, policy: Any, caplog: Any
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for place in (tmp_path, tmp_path / "none/a", tmp_path / "link"):
        policy(f'audit = "{place}"')
        caplog.clear()
        audit.changed(RECORD, "frozen")
        assert f"could not be written to {place}" in caplog.text
    assert not (tmp_path / "elsewhere").exists()


def test_without_a_policy_or_a_word_of_it_nothing_is_written(policy: Any, caplog: Any) -> None:
    with caplog.at_level(logging.DEBUG):
        tell_all()
        policy("[everyone]\nkernels = 3")
        tell_all()
    assert not caplog.messages


def test_with_a_policy_that_is_wrong_the_place_is_the_last_one_that_was_right(
    tmp_path: Path, policy: Any
) -> None:
    """It refuses starts, which is something to be written down."""
    file = tmp_path / "audit.jsonl"
    policy(f'audit = "{file}"')
    audit.changed(RECORD, "frozen")
    policy("audit = 3")
    audit.refused(ERROR, person="alice", name="R", asked=None)
    assert [json.loads(line)["event"] for line in file.read_text().splitlines()] == [
        "change", "refusal",
    ]  # fmt: skip
