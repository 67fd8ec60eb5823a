"""What a kernel is given lies on a file system whose server does not answer."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import roots
from boxes import request_for

from sandbox_provisioner import launch
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.spec import Volume

pytestmark = pytest.mark.requires("userns", "root", "squashfuse", "mksquashfs")


@pytest.fixture
def silent(new_folder: Callable[[], Path]) -> Iterator[Path]:
    """A directory on one: a program that has been stopped."""
    mount = new_folder() / "mount"
    mount.mkdir()
    image = roots.image("squashfs")
    command = ["squashfuse", "-f", "-o", "allow_other", image, mount]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        while not os.path.ismount(mount):
            assert server.poll() is None
        server.send_signal(signal.SIGSTOP)
        yield mount / "usr"
    finally:
        server.kill()
        server.wait()
        # Whoever waits for it gets an error now, and closes what was open.
        for thread in threading.enumerate():
            if thread.name == "sandbox-within":
                thread.join(60)
        subprocess.run(["umount", "--lazy", mount], check=True)


@pytest.mark.parametrize("is_volume", [False, True])
def test_a_start_is_refused_in_time_and_the_loop_goes_on(
    silent: Path, launcher: LocalLauncher, workdir: Path, monkeypatch: pytest.MonkeyPatch,
    *, is_volume: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(launch, "_ANSWER_SECONDS", 0.3)
    volumes = (Volume(source=str(silent), target="/data"),) if is_volume else ()
    request = request_for(workdir if is_volume else silent, volumes=volumes)

    async def turns_of_the_loop() -> int:
        turns = 0
        start = asyncio.ensure_future(launcher.start(request))
        while not start.done():
            turns += 1
            await asyncio.sleep(0)
        with pytest.raises(HostError, match=r"has not answered for 0\.3 seconds") as refused:
            await start
        assert str(silent) in str(refused.value)
        return turns

    assert asyncio.run(turns_of_the_loop()) > 100
