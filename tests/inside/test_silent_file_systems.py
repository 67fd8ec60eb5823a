"""What a kernel is given lies on a file system whose server does not answer."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import roots
from boxes import request_for

from sandbox_provisioner import launch
from sandbox_provisioner.broker import eyes
from sandbox_provisioner.broker.desk import BoxDesk
from sandbox_provisioner.broker.peer import Peer
from sandbox_provisioner.broker.wishes import Wish
from sandbox_provisioner.contract import Labels
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.ids.facts import FIRST_PERSONS_ID
from sandbox_provisioner.facilities.network.wish.network import NetworkWish
from sandbox_provisioner.facilities.workdir.facts.run_by_host import Server
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.plan import HOME
from sandbox_provisioner.records import Record, RecordFolder, start_time
from sandbox_provisioner.spec import NO_WORKDIR, Limits, SandboxSpec, Volume

pytestmark = pytest.mark.requires("userns", "root", "squashfuse", "mksquashfs")


@pytest.fixture
def server(new_folder: Callable[[], Path]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """One, which has been stopped, and a directory on its file system."""
    mount = new_folder() / "mount"
    mount.mkdir()
    image = roots.image("squashfs")
    command = ["squashfuse", "-f", "-o", "allow_other", image, mount]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        while not os.path.ismount(mount):
            assert server.poll() is None
        server.send_signal(signal.SIGSTOP)
        yield server, mount / "usr"
    finally:
        server.kill()
        server.wait()
        let_waiting_end()
        subprocess.run(["umount", "--lazy", mount], check=True)


@pytest.fixture
def silent(server: tuple[subprocess.Popen[bytes], Path]) -> Path:
    """That directory."""
    return server[1]


def let_waiting_end() -> None:
    """Whoever waits for it gets an error now, and closes what was open."""
    for thread in threading.enumerate():
        if thread.name == "sandbox-within":
            thread.join(60)


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


def test_a_kernel_beside_a_server_is_refused_in_time_and_some_take_no_thread_more(
    server: tuple[subprocess.Popen[bytes], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root looks for a volume of that one, which the hub has given it."""
    program, silent = server
    monkeypatch.setattr(eyes, "_PATIENCE_SECONDS", 0.3)
    pid, uid = os.getpid(), 4325
    record = Record(sandbox_id="0123456789ab", init_pid=pid, init_start=start_time(pid))
    folder, _ = RecordFolder.create(tmp_path, record, ids=False)
    given = (Volume(source=str(silent), target=str(silent)),)
    desk = BoxDesk(
        box=record.sandbox_id, name="ann", first_id=FIRST_PERSONS_ID, ways={}, volumes=given,
        shown=(), limits=Limits(), network=NetworkWish(), folder="", runtime=str(tmp_path),
    )  # fmt: skip
    wish = Wish(
        sandbox_id="f" * 12, spec=SandboxSpec(workdir=NO_WORKDIR), argv=("true",), environment={},
        cwd=HOME, connection_file=("k.json", "{}"), home="/", here="/", umask=0o022, inherited={},
        server=Server(), labels=Labels(),
    )  # fmt: skip

    def granted() -> list[str]:
        with ExitStack() as opened:
            peer = Peer("ann", uid, uid, frozenset({uid}), "/")
            asked = desk.judged(peer, wish, [], eyes.Eyes.of(peer), opened)
            return [place.source for place in asked.caller.granted.values()]

    for _ in range(4):
        with pytest.raises(HostError, match=r"it takes more than 0\.3 s"):
            granted()
    threads = threading.active_count()
    with pytest.raises(HostError, match="4 looks before have not ended"):
        granted()
    assert threading.active_count() == threads
    program.send_signal(signal.SIGCONT)
    let_waiting_end()
    assert granted() == [str(silent)]
    folder.remove()
