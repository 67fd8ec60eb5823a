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

from sandbox_provisioner.contract import Labels, Stdio
from sandbox_provisioner.errors import HostError, LaunchError, SandboxError
from sandbox_provisioner.inside.box import Box
from sandbox_provisioner.inside.mounts import receive
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.ledger import NotUndone, undone_if_it_fails
from sandbox_provisioner.plan import LaunchRequest, Plan
from sandbox_provisioner.records import Record, RecordFolder, start_time
from sandbox_provisioner.spawn import LauncherProcess, stem
from sandbox_provisioner.spec import SandboxSpec
from sandbox_provisioner.warm import claim, launch

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

    class Spare:
        end = staticmethod(raise_(STUCK))

    def begin(source: launch.Source, *_: object) -> Any:
        source.spare = Spare()  # type: ignore[assignment]
        raise LaunchError(attempt="start it", answer="no", remedy="", step="perform")

    monkeypatch.setattr(launch.Source, "begin", begin)
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
        asyncio.run(launch.start_warm(launcher, request, Labels(), SILENT, ()))


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


def test_a_launcher_that_cannot_be_given_its_streams_keeps_none() -> None:
    process = LauncherProcess(stem)
    process._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, pytest.raises(OSError, match="no descriptor left"):
        process._go(Plan(()), HALF, ())
    asyncio.run(process.end())


@pytest.mark.parametrize("stdio", [HALF, SILENT])
def test_a_fork_that_cannot_be_asked_for_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, stdio: Stdio
) -> None:
    """Half of its streams, or all of them and no pipe for its report."""
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if stdio is SILENT:
        monkeypatch.setattr(os, "pipe", no_more)
    nursery = launch.Nursery(Path("/run"), "key", Record(sandbox_id="one"))
    with theirs, pytest.raises(OSError, match="no descriptor left"):
        launch.ForkedProcess(channel, stdio, nursery)
    assert channel.fileno() < 0


@pytest.mark.parametrize("place", ["open_init", "os.pipe"])
def test_a_spare_that_cannot_be_claimed_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(f"{claim.__name__}.{place}", no_more)
    pid = os.getpid()
    ourselves = Record(sandbox_id="one", init_pid=pid, init_start=start_time(pid))
    folder = RecordFolder(Path("/run/one"))
    with theirs, pytest.raises(OSError, match="no descriptor left"):
        claim.ClaimedProcess(channel, folder, ourselves, SILENT)
    assert channel.fileno() < 0
