"""A start from a nursery, or of a spare, goes well or says what failed, and leaves nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import golden
import pytest
from boxes import is_reaped, request_for, run
from facilities import missing
from stand_in import in_place_of_the_gateway

from sandbox_provisioner import orders, performer
from sandbox_provisioner.contract import Labels, Stdio, Warmth, WarmUnavailable
from sandbox_provisioner.descriptors import is_readable
from sandbox_provisioner.handle import LocalHandle, readable
from sandbox_provisioner.inside.wire import FAIL_AT
from sandbox_provisioner.launch import LaunchRequest, LocalLauncher
from sandbox_provisioner.performer import Performer
from sandbox_provisioner.plan import NurseryPids, Plan
from sandbox_provisioner.records import Record, RecordFolder
from sandbox_provisioner.spec import Limits, Network, NetworkWish, Volume
from sandbox_provisioner.stem import stem
from sandbox_provisioner.warm import ahead, start_from
from sandbox_provisioner.warm.found import Nursery
from sandbox_provisioner.warm.make_nursery import Told, make_nursery
from sandbox_provisioner.warm.make_spare import make_spare
from sandbox_provisioner.warm.start_from import start_warm

pytestmark = pytest.mark.requires("userns")

QUIET = Stdio(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
SILENT = Stdio(subprocess.DEVNULL, subprocess.DEVNULL, subprocess.DEVNULL)
SERVER_STEPS = ("make-record", "make-image", "create-cgroup", "write-record")


def kernel_request(workdir: Path, volume: Path | None = None) -> LaunchRequest:
    """For a kernel, with nearly every step that a plan can have."""
    name = "/run/jupyter/kernel.json"
    volumes = (Volume(source=str(volume), target="/data"),) if volume else ()
    return request_for(
        workdir, [sys.executable, "-m", "ipykernel_launcher", "-f", name],
        connection_file=("kernel.json", CONNECTION), pump=True, volumes=volumes,
        limits=Limits(
            pids=128, memory_bytes=None if missing("cgroup-memory") else 1 << 30,
            disk_bytes=16 << 20,
        ),
    )  # fmt: skip


CONNECTION = (
    '{"transport": "ipc", "ip": "/run/kernel/s", "key": "k", "signature_scheme": "hmac-sha256",'
    ' "shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5}'
)


@pytest.fixture(scope="module")
def nursery() -> Iterator[LocalLauncher]:
    """A launcher whose nursery is ready for `kernel_request`; all tests here share it."""
    yield from launcher_with_nursery(kernel_request)


def launcher_with_nursery(request_in: Callable[[Path], LaunchRequest]) -> Iterator[LocalLauncher]:
    runtime, workdir = (Path(tempfile.mkdtemp(prefix="sbx-", dir="/run")) for _ in range(2))
    launcher = LocalLauncher(runtime_dir=str(runtime))
    handle = run(make_nursery(launcher, request_in(workdir), Labels(), Warmth(idle_seconds=300)))
    assert handle
    yield launcher
    run(handle.close())
    stem.end()
    shutil.rmtree(workdir)
    shutil.rmtree(runtime)


def names(launcher: LocalLauncher) -> list[str]:
    return sorted(os.listdir(launcher.runtime()))


def verbs_of(launcher: LocalLauncher, request: LaunchRequest) -> set[str]:
    site, _ = launcher.survey(request)
    site.opened.close()
    opening = orders.compile_opening(request, site, NurseryPids(1, 2))
    parts = (opening, orders.compile_fork(request, site))
    return {step.verb for part in parts for step in part.steps}


# Those of devices fail in test_devices.py, where there is one.
VERBS = golden.verbs_of("disk-child-root") - {"make-devices", "attach-devices"}


@pytest.mark.requires("root", "cgroup-pids", "cgroup-memory")
def test_every_step_of_a_warm_start_is_made_to_fail_here(
    nursery: LocalLauncher, workdir: Path, new_folder: Any, monkeypatch: Any
) -> None:
    everything(workdir, monkeypatch)
    assert verbs_of(nursery, kernel_request(workdir, new_folder())) == VERBS


def everything(workdir: Path, monkeypatch: Any) -> None:
    (workdir / ".git").mkdir()
    (workdir / ".git/config").touch()
    monkeypatch.setenv("HOME", str(workdir))
    monkeypatch.chdir(workdir)


@pytest.mark.requires("root", "cgroup-pids")
@pytest.mark.parametrize("step", [*sorted(VERBS), *SERVER_STEPS])
def test_a_failing_step_of_a_warm_start_is_named_and_leaves_nothing(
    nursery: LocalLauncher, workdir: Path, new_folder: Any, monkeypatch: Any, step: str
) -> None:
    everything(workdir, monkeypatch)
    files, records = sorted(workdir.rglob("*")), names(nursery)
    monkeypatch.setenv(FAIL_AT, step)
    with pytest.raises(WarmUnavailable, match=rf"\[{step}( [^]]+)?\].*made to fail"):
        run(start_warm(nursery, kernel_request(workdir, new_folder()), Labels(), QUIET, Warmth()))
    assert sorted(workdir.rglob("*")) == files
    assert names(nursery) == records


@pytest.mark.requires("root", "cgroup-pids")
@pytest.mark.parametrize("step", ["receive", "stay-unclaimed", "pivot", "run-kernel", "hand-over"])
def test_a_failing_step_of_a_spare_is_named_and_leaves_nothing(
    nursery: LocalLauncher, workdir: Path, monkeypatch: Any, step: str
) -> None:
    records = names(nursery)
    monkeypatch.setenv(FAIL_AT, step)
    with pytest.raises(Exception, match=rf"\[{step}( [^]]+)?\].*made to fail"):
        run(
            make_spare(
                nursery, kernel_request(workdir), Labels(), Warmth(spares=1, idle_seconds=60)
            )
        )
    assert names(nursery) == records


def kill_task(*_: Any) -> Any:
    """As the end of the server does with who prepares."""
    task = asyncio.current_task()
    assert task
    task.cancel()
    return asyncio.sleep(0)


def no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "no room")


@pytest.mark.requires("root", "cgroup-pids")
@pytest.mark.parametrize("place", ["LocalHandle.sealed", "spare_link"])
def test_a_spare_that_nobody_will_find_is_not_left(
    nursery: LocalLauncher, workdir: Path, monkeypatch: Any, place: str
) -> None:
    records, is_cancelled = names(nursery), place != "spare_link"
    monkeypatch.setattr(f"{make_spare.__module__}.{place}", kill_task if is_cancelled else no_room)
    warmth = Warmth(spares=1, idle_seconds=60)
    with pytest.raises(asyncio.CancelledError if is_cancelled else OSError):
        run(make_spare(nursery, kernel_request(workdir), Labels(), warmth))
    assert names(nursery) == records


@pytest.mark.requires("root", "cgroup-pids")
@pytest.mark.parametrize("place", ["_ready", "_publish"])
def test_a_nursery_that_nobody_will_find_is_not_left(
    launcher: LocalLauncher, workdir: Path, monkeypatch: Any, place: str
) -> None:
    async def ready(_: LocalHandle) -> Told:
        return Told({}, {})

    is_cancelled = place == "_ready"
    monkeypatch.setattr(f"{make_nursery.__module__}._ready", kill_task if is_cancelled else ready)
    monkeypatch.setattr(f"{make_nursery.__module__}._publish", no_room)
    with pytest.raises(asyncio.CancelledError if is_cancelled else OSError):
        run(make_nursery(launcher, kernel_request(workdir), Labels(), Warmth(idle_seconds=60)))
    assert names(launcher) == ["lock"]


@pytest.mark.requires("root", "cgroup-pids")
@pytest.mark.parametrize("step", ["take-place", "pivot", "run-kernel", "make-record"])
def test_a_mistake_of_ours_in_a_warm_start_is_told_as_one(
    nursery: LocalLauncher, workdir: Path, monkeypatch: Any, step: str
) -> None:
    """By the launcher that opens, the nursery's child and the server."""
    records = names(nursery)
    monkeypatch.setenv(FAIL_AT, f"{step}:mistake")
    with pytest.raises(WarmUnavailable, match="a mistake in sandbox-provisioner") as caught:
        run(start_warm(nursery, kernel_request(workdir), Labels(), QUIET, Warmth()))
    assert caught.value.failed
    assert names(nursery) == records


@pytest.mark.requires("root", "cgroup-pids")
def test_a_warm_start_that_is_cancelled_leaves_nothing(
    nursery: LocalLauncher, workdir: Path
) -> None:
    records = names(nursery)

    async def start_and_cancel(turns: int) -> bool:
        request = kernel_request(workdir)
        task = asyncio.ensure_future(start_warm(nursery, request, Labels(), QUIET, Warmth()))
        for _ in range(turns):
            await asyncio.sleep(0)
        if task.done():
            await task.result().close()
            return True
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return False

    for turns in (1, 2, 3, 5, 8, 13, 21, 34):
        run(start_and_cancel(turns))
        assert names(nursery) == records


@pytest.mark.requires("root", "cgroup-pids")
@pytest.mark.parametrize("where", [RecordFolder.finish, Performer.end])
def test_a_warm_start_that_is_cancelled_at_its_end_leaves_nothing(
    nursery: LocalLauncher, workdir: Path, monkeypatch: Any, where: Any
) -> None:
    """Its kernel runs by then; there is a handle for nobody."""
    records = names(nursery)

    async def start() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task

        def cancel() -> None:
            if not task.cancelling():
                task.cancel()

        def cancelled(*words: Any) -> Any:
            loop.call_soon_threadsafe(cancel)
            return where(*words)

        async def cancelled_end(process: Performer) -> None:
            cancel()
            await where(process)

        if where is Performer.end:
            monkeypatch.setattr(Performer, "end", cancelled_end)
        else:
            monkeypatch.setattr(RecordFolder, "finish", cancelled)
        await start_warm(nursery, kernel_request(workdir), Labels(), QUIET, Warmth())

    with pytest.raises(asyncio.CancelledError):
        run(start())
    assert names(nursery) == records


def test_what_a_process_has_given_to_a_handle_it_does_not_close() -> None:
    """Its numbers may be somebody else's by then."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = Performer(SILENT)
    process.source = stem
    process.connect(ours)
    process.meet(os.getpid(), 0, os.pidfd_open(os.getpid()))
    process.begin(Plan(()))
    report = process._report_fd
    pidfd, control = process.detach()
    other = os.open(os.devnull, os.O_RDONLY)
    assert other == report
    run(process.end())
    for fd in (other, pidfd, control):
        os.close(fd)
    theirs.close()


@pytest.mark.requires("root", "cgroup-pids")
@pytest.mark.parametrize("step", ["receive", "join-cgroup", "unshare", "take"])
def test_a_child_that_has_ended_when_the_server_looks_has_said_why(
    nursery: LocalLauncher, workdir: Path, monkeypatch: Any, step: str
) -> None:
    """Its number may be somebody else's by then."""
    records, here = names(nursery), Nursery.here

    async def late(source: Nursery, child: Performer) -> None:
        await readable(child._report_fd)
        await here(source, child)
        await readable(child.pidfd)

    monkeypatch.setenv(FAIL_AT, step)
    monkeypatch.setattr(Nursery, "here", late)
    with pytest.raises(WarmUnavailable, match=rf"\[{step}( [^]]+)?\].*made to fail"):
        run(start_warm(nursery, kernel_request(workdir), Labels(), QUIET, Warmth()))
    assert names(nursery) == records


@pytest.mark.requires("root", "cgroup-pids")
@pytest.mark.parametrize("when", ["before its plan comes", "when its plan has come"])
def test_a_launcher_that_is_killed_before_it_hands_over_is_no_mistake_of_ours(
    nursery: LocalLauncher, workdir: Path, monkeypatch: Any, when: str
) -> None:
    records, begin = names(nursery), Performer.begin

    def killed(process: Performer, *words: Any) -> None:
        if process.source is not stem:
            begin(process, *words)
            return
        early = when == "before its plan comes"
        signal.pidfd_send_signal(process._launcher, signal.SIGKILL if early else signal.SIGSTOP)
        assert not early or is_readable(process._launcher, 60)
        begin(process, *words)
        signal.pidfd_send_signal(process._launcher, signal.SIGKILL)

    monkeypatch.setattr(Performer, "begin", killed)
    with pytest.raises(WarmUnavailable, match="its launcher was killed by signal 9") as caught:
        run(start_warm(nursery, kernel_request(workdir), Labels(), QUIET, Warmth()))
    assert caught.value.failed
    assert names(nursery) == records


def test_a_nursery_that_ends_when_it_is_asked_is_no_error_of_the_start(
    nursery: LocalLauncher, workdir: Path, monkeypatch: Any
) -> None:
    """It has closed what it was sent, and left unread what was said on it."""
    records, begin = names(nursery), Performer.begin
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def lost(child: Performer, *words: Any) -> None:
        begin(child, *words)
        assert child.source is not stem
        _, fds, _, _ = socket.recv_fds(theirs, 64, 1)
        os.close(fds[0])

    monkeypatch.setattr(Performer, "begin", lost)
    gone = Nursery(ours, nursery.runtime(), "key", Record(sandbox_id="gone"))
    monkeypatch.setattr(start_from, "find", lambda *words: gone)
    with theirs, pytest.raises(WarmUnavailable, match="the nursery has ended"):
        run(start_warm(nursery, kernel_request(workdir), Labels(), QUIET, Warmth()))
    assert names(nursery) == records


@pytest.mark.requires("root", "cgroup-pids")
def test_no_plan_is_compiled_and_nobody_is_asked_on_the_loop(
    nursery: LocalLauncher, workdir: Path, monkeypatch: Any
) -> None:
    """It serves all users of a server."""
    threads: dict[str, threading.Thread] = {}

    def noted(where: Any, name: str) -> None:
        real = getattr(where, name)

        def called(*words: Any) -> Any:
            threads[name] = threading.current_thread()
            return real(*words)

        monkeypatch.setattr(where, name, called)

    of_start = {"compile_fork": orders, "compile_opening": orders, "ask": Performer}
    of_start |= {"begin": Performer, "look": LocalLauncher, "find": start_from}
    for name, where in of_start.items():
        noted(where, name)
    run(run_and_close(start_warm(nursery, kernel_request(workdir), Labels(), QUIET, Warmth())))
    assert set(threads) == set(of_start)
    assert threading.current_thread() not in threads.values()


async def run_and_close(start: Any) -> None:
    await (await start).close()


# -- the stem


def new_launcher() -> Performer:
    process = Performer()
    process.ask(stem)
    return process


def test_a_stem_that_was_killed_is_replaced(launcher: LocalLauncher, workdir: Path) -> None:
    def start() -> LocalHandle:
        request = request_for(workdir, [sys.executable, "-c", "pass"])
        handle: LocalHandle = run(launcher.start(request, stdio=QUIET))
        return handle

    run(start().close())
    assert stem._process
    os.kill(stem._process.pid, 9)
    assert is_reaped(stem._process.pid)
    run(start().close())


def test_a_stem_that_is_stopped_is_replaced(
    launcher: LocalLauncher, workdir: Path, monkeypatch: Any
) -> None:
    """The loop goes on meanwhile, and none of several starts ends what another one has made."""
    monkeypatch.setattr(performer, "WORD_SECONDS", 0.3)
    run(new_launcher().end())
    monkeypatch.setattr(stem.last_word, "time", 0.0)
    assert stem._process
    stopped = stem._process
    os.kill(stopped.pid, signal.SIGSTOP)

    async def start() -> set[int]:
        processes = [new_launcher() for _ in range(4)]
        turns = asyncio.ensure_future(count_turns())
        await asyncio.gather(*(process.here() for process in processes))
        turns.cancel()
        assert turned > 10
        for process in processes:
            await process.end()
        return {process.pid for process in processes}

    turned = 0

    async def count_turns() -> None:
        nonlocal turned
        while True:
            await asyncio.sleep(0.01)
            turned += 1

    assert len(run(start())) == 4
    assert stopped.returncode == -signal.SIGKILL


def test_a_stem_is_used_again_until_it_may_be_about_to_end(monkeypatch: Any) -> None:
    run(new_launcher().end())
    assert stem._process
    first = stem._process.pid
    run(new_launcher().end())
    assert stem._process.pid == first
    monkeypatch.setattr(stem, "_good_until", 0.0)
    run(new_launcher().end())
    assert stem._process.pid != first


def test_an_idle_stem_ends(monkeypatch: Any) -> None:
    stem.end()  # which waits for longer
    monkeypatch.setattr(stem, "_wanted_seconds", 0.1)
    run(new_launcher().end())
    assert stem._process
    assert stem._process.wait(10) == 0
    run(new_launcher().end())


def test_an_idle_stem_that_has_ended_is_no_zombie(monkeypatch: Any) -> None:
    stem.end()  # which waits for longer
    monkeypatch.setattr(stem, "_wanted_seconds", 0.1)
    run(new_launcher().end())
    assert stem._process
    assert is_reaped(stem._process.pid)
    run(new_launcher().end())


def test_a_stem_is_out_of_the_terminals_reach() -> None:
    run(new_launcher().end())
    assert stem._process
    assert os.getsid(stem._process.pid) != os.getsid(0)


def test_launchers_are_told_apart_by_their_own_sockets() -> None:
    """Many threads may start sandboxes at once, all through one stem."""
    made: list[Performer] = []
    lock = threading.Lock()

    def ask() -> None:
        process = new_launcher()
        run(process.here())
        with lock:
            made.append(process)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({process.pid for process in made}) == 8
    for process in made:
        run(process.end())


def test_a_forked_process_has_a_stem_of_its_own() -> None:
    run(new_launcher().end())
    assert stem._process
    pid = os.fork()
    if pid == 0:
        os._exit(0 if stem._process is None else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_forked_process_waits_for_no_thread_that_prepares() -> None:
    with ahead._burial, ahead._lock:
        pid = os.fork()
        if pid == 0:
            ahead.end_own()
            os._exit(0)
    pidfd = os.pidfd_open(pid)
    ended = select.select([pidfd], [], [], 30)[0]
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    assert os.waitpid(pid, 0)[1] == 0
    assert ended


CALL = """
import os, socket, sys
from sandbox_provisioner.inside import kernel_calls
fd = os.open(f"/proc/{sys.argv[1]}/ns/net", os.O_RDONLY)
kernel_calls.setns(fd, kernel_calls.CLONE_NEWNET)
with socket.create_connection(("93.184.216.34", 443), 10) as connection:
    sys.exit(connection.recv(100) != b"from outside")
"""


def networked_request(workdir: Path) -> LaunchRequest:
    request = kernel_request(workdir)
    return replace(request, spec=replace(request.spec, network=NetworkWish(mode=Network.GATEWAY)))


@pytest.fixture(scope="module")
def networked() -> Iterator[LocalLauncher]:
    """A launcher whose nursery is ready for `networked_request`: one whose kernels have no network
    allows them less."""
    yield from launcher_with_nursery(networked_request)


NETWORK_STEPS = ("netlink", "listen", "hand-out-listeners")


@pytest.mark.requires("root", "cgroup-pids")
@pytest.mark.parametrize("step", NETWORK_STEPS)
def test_a_failing_step_of_a_warm_starts_network_is_named_and_leaves_nothing(
    networked: LocalLauncher, workdir: Path, monkeypatch: Any, step: str
) -> None:
    records = names(networked)
    monkeypatch.setenv(FAIL_AT, step)
    with in_place_of_the_gateway(monkeypatch):
        with pytest.raises(WarmUnavailable, match=rf"\[{step}( [^]]+)?\].*made to fail"):
            run(start_warm(networked, networked_request(workdir), Labels(), QUIET, Warmth()))
    assert names(networked) == records


@pytest.mark.requires("root", "cgroup-pids")
def test_a_spare_has_its_network_ahead_and_hands_it_out_when_it_is_claimed(
    networked: LocalLauncher, workdir: Path, monkeypatch: Any
) -> None:
    request, warmth = networked_request(workdir), Warmth(spares=1, idle_seconds=300)
    assert run(make_spare(networked, request, Labels(), warmth))
    with in_place_of_the_gateway(monkeypatch) as outside:
        handle = run(start_warm(networked, request, Labels(), SILENT, Warmth()))
        outside.take()
        assert handle.record.group  # of the spare
        site, _ = networked.survey_closed(request)
        steps = {step.verb for step in orders.compile_claim(request, site)[1].steps}
        assert steps & {*NETWORK_STEPS} == {"hand-out-listeners"}
        with subprocess.Popen([sys.executable, "-c", CALL, str(handle.record.init_pid)]) as caller:
            connection, meant_for = outside.accept()
            with connection:
                connection.sendall(b"from outside")
        assert (caller.returncode, meant_for) == (0, ("93.184.216.34", 443))
        run(handle.close())


@pytest.mark.requires("root", "cgroup-pids")
def test_a_spare_that_cannot_hand_out_its_network_is_nobodys_kernel(
    networked: LocalLauncher, workdir: Path, monkeypatch: Any
) -> None:
    records = names(networked)
    request, warmth = networked_request(workdir), Warmth(spares=1, idle_seconds=300)
    assert run(make_spare(networked, request, Labels(), warmth))
    monkeypatch.setenv(FAIL_AT, "hand-out-listeners")
    with in_place_of_the_gateway(monkeypatch):
        with pytest.raises(WarmUnavailable, match=r"\[hand-out-listeners\].*made to fail"):
            run(start_warm(networked, request, Labels(), SILENT, Warmth()))
    assert names(networked) == records
