"""How a start that has failed, or was cancelled, is undone."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sandbox_provisioner.contract import Labels, Stdio, Warmth
from sandbox_provisioner.errors import HostError, LaunchError, SandboxError
from sandbox_provisioner.inside.box import Box
from sandbox_provisioner.inside.mounts import receive
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.ledger import NotUndone, undone_if_it_fails
from sandbox_provisioner.performer import Performer
from sandbox_provisioner.plan import LaunchRequest, Plan
from sandbox_provisioner.records import Record, RecordFolder, start_time
from sandbox_provisioner.spec import SandboxSpec
from sandbox_provisioner.stem import stem
from sandbox_provisioner.warm import found, start_from

FULL = OSError(errno.EMFILE, "no descriptor left")
SILENT = Stdio(subprocess.DEVNULL, subprocess.DEVNULL, subprocess.DEVNULL)
BUSY = OSError(errno.EBUSY, "busy")
STUCK = HostError(attempt="remove the groups", answer="they are busy", remedy="Wait.")


def raise_(error: Exception) -> Any:
    async def undo() -> None:
        raise error

    return undo


@pytest.mark.parametrize("error", [BUSY, STUCK, RuntimeError("busy")])
def test_who_is_cancelled_is_so_also_where_the_undo_fails(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def start() -> None:
        async with undone_if_it_fails() as undo:
            undo.push_async_callback(raise_(error))
            await asyncio.get_running_loop().create_future()

    async def cancel() -> None:
        task = asyncio.ensure_future(start())
        await asyncio.sleep(0)
        task.cancel()
        await task

    with caplog.at_level(logging.WARNING), pytest.raises(asyncio.CancelledError):
        asyncio.run(cancel())
    assert "busy" in caplog.text


@pytest.mark.parametrize("error", [BUSY, STUCK])
def test_a_start_that_is_not_undone_says_so(error: Exception) -> None:
    async def start() -> None:
        async with undone_if_it_fails() as undo:
            undo.push_async_callback(raise_(error))
            raise LaunchError(attempt="start it", answer="no", remedy="", step="perform")

    with pytest.raises(NotUndone, match=r"undo a start that has failed.*busy") as caught:
        asyncio.run(start())
    assert isinstance(caught.value.__cause__, SandboxError)


def test_what_is_left_of_a_warm_start_is_no_reason_for_a_cold_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would have the same names."""

    def begin(_: object, performer: Performer, *rest: object) -> Any:
        performer.is_asked = True
        raise LaunchError(attempt="start it", answer="no", remedy="", step="perform")

    async def end(performer: Performer) -> None:
        if performer.is_asked:
            raise STUCK

    monkeypatch.setattr(start_from._Beginning, "__call__", begin)
    monkeypatch.setattr(Performer, "end", end)
    argv = ("python", "-m", "ipykernel_launcher", "-f", "/run/jupyter/k.json")
    request = LaunchRequest(
        sandbox_id="one",
        spec=SandboxSpec(workdir=str(tmp_path)),
        argv=argv,
        environment={},
        cwd=str(tmp_path),
        connection_file=("k.json", "{}"),
    )
    launcher = LocalLauncher(runtime_dir=str(tmp_path))
    with pytest.raises(NotUndone, match="they are busy"):
        asyncio.run(start_from.start_warm(launcher, request, Labels(), SILENT, Warmth()))


@pytest.mark.parametrize("received", [[], [7, 8]])
def test_too_few_descriptors_or_too_many_are_no_mistake_of_ours(received: list[int]) -> None:
    """Who should have sent them may have ended before."""
    box = Box(-1, -1)
    box.received = received
    with pytest.raises(OSError, match=rf"{len(received)} descriptors have come for 1 names"):
        receive(box, "exit-file")


# -- where descriptors run out, the fixture `watch` looks for those that are left


class Nowhere:
    """A stream that cannot be had."""

    def fileno(self) -> int:
        raise FULL


def no_more(*_: object) -> Any:
    raise FULL


HALF = Stdio(subprocess.PIPE, subprocess.DEVNULL, Nowhere())  # type: ignore[arg-type]


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def test_a_performer_that_cannot_be_given_its_streams_keeps_none() -> None:
    performer, (control, theirs) = Performer(HALF), pair()
    performer.source = stem
    performer.connect(control)
    with theirs, pytest.raises(OSError, match="no descriptor left"):
        performer.begin(Plan(()))
    asyncio.run(performer.end())


# Linux says either of a descriptor that it does not take: unix(7).
@pytest.mark.parametrize("number", [errno.ETOOMANYREFS, errno.EMFILE])
@pytest.mark.parametrize("source", ["stem", "nursery"])
def test_a_fork_that_cannot_be_asked_for_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, source: str, number: int
) -> None:
    performer, (channel, theirs) = Performer(), pair()
    nursery = found.Nursery(channel, Path("/run"), "key", Record(sandbox_id="one"))
    stem.end()
    monkeypatch.setattr(stem, "_spawn", lambda: channel)
    monkeypatch.setattr(socket, "send_fds", no_more_than(number))
    with theirs, channel, pytest.raises(OSError, match=os.strerror(number)):
        performer.ask(stem if source == "stem" else nursery)
    asyncio.run(performer.end())


def no_more_than(number: int) -> Any:
    def send_fds(*_: object) -> Any:
        raise OSError(number, os.strerror(number))

    return send_fds


def test_who_has_too_many_descriptors_under_way_does_not_end_the_stem_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next one could be asked no more than this one."""
    made, performer, (channel, theirs) = [], Performer(), pair()
    stem.end()
    monkeypatch.setattr(stem, "_spawn", lambda: made.append(1) or channel)  # type: ignore[func-returns-value]
    monkeypatch.setattr(socket, "send_fds", no_more_than(errno.ETOOMANYREFS))
    with theirs, channel, pytest.raises(OSError, match=os.strerror(errno.ETOOMANYREFS)):
        performer.ask(stem)
    assert made == [1]
    asyncio.run(performer.end())


@pytest.mark.parametrize("number", [errno.ETOOMANYREFS, errno.EMFILE])
def test_what_cannot_be_passed_on_is_closed(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    performer, (control, theirs) = Performer(), pair()
    performer.source = stem
    performer.connect(control)
    monkeypatch.setattr(socket, "send_fds", no_more_than(number))
    with theirs:
        with pytest.raises(OSError, match=os.strerror(number)):
            performer.begin(Plan(()))
        with pytest.raises(OSError, match=os.strerror(number)):
            performer.give([os.open(os.devnull, os.O_RDONLY)])
    asyncio.run(performer.end())


def test_a_spare_that_cannot_be_claimed_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    performer, (channel, theirs) = Performer(), pair()
    monkeypatch.setattr(found, "open_init", no_more)
    pid = os.getpid()
    ourselves = Record(sandbox_id="one", init_pid=pid, init_start=start_time(pid))
    spare = found.Spare(channel, RecordFolder(Path("/run/one")), ourselves)
    with theirs, pytest.raises(OSError, match="no descriptor left"):
        performer.ask(spare)
    asyncio.run(performer.end())
    assert channel.fileno() < 0
