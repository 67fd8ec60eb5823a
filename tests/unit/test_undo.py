"""How a start that has failed, or was cancelled, is undone."""

from __future__ import annotations

import asyncio
import errno
import logging
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
from sandbox_provisioner.plan import LaunchRequest
from sandbox_provisioner.spec import SandboxSpec
from sandbox_provisioner.warm import launch

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
