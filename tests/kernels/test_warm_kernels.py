"""Kernels from a nursery: that they are, when they are not, and what ends a nursery."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from boxes import is_reaped
from jupyter_client.manager import KernelManager
from jupyter_client.multikernelmanager import AsyncMultiKernelManager
from warmth import (
    came_from,
    children_of,
    made,
    nurseries,
    status_of,
    wait_for_end,
)

from sandbox_provisioner import performer
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.records import Record
from sandbox_provisioner.sweeping import sweep
from sandbox_provisioner.warm import ahead, make_nursery, start_from
from sandbox_provisioner.warm.found import SOCKET, call

pytestmark = pytest.mark.requires("userns")


def test_the_first_start_is_cold_and_the_next_ones_come_from_a_nursery(
    warm: Any, runtime_dir: Path
) -> None:
    with warm() as k:
        assert came_from(k) == ""
        nursery = made(runtime_dir)
        with warm() as second, warm() as third:
            assert came_from(second) == came_from(third) == nursery.sandbox_id
            assert second.run("6 * 7") == third.run("6 * 7") == "42"
        k.manager.restart_kernel()
        k.client.wait_for_ready(timeout=60)
        assert came_from(k) == nursery.sandbox_id


def test_without_the_option_no_nursery_is_made(kernel: Any, runtime_dir: Path) -> None:
    with kernel():
        assert not nurseries(runtime_dir)


OUT_OF_DESCRIPTORS = """
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
try:
    while True:
        os.open("/dev/null", os.O_RDONLY)
except OSError as error:
    print(error.strerror)
"""


def test_the_first_cell_of_a_kernel_prints_though_no_descriptor_is_left(
    warm: Any, runtime_dir: Path
) -> None:
    with warm() as cold:
        assert cold.run(OUT_OF_DESCRIPTORS) == "Too many open files\n"
        nursery = made(runtime_dir)
        with warm() as k:
            assert came_from(k) == nursery.sandbox_id
            assert k.run(OUT_OF_DESCRIPTORS) == "Too many open files\n"


def test_a_kernel_with_another_command_or_with_other_variables_starts_cold(
    kernel: Any, kernelspec: Any, nursery: Record, monkeypatch: Any
) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    with kernel(KernelManager(kernel_name=kernelspec(warm=True))) as k:
        assert came_from(k) == ""


@pytest.mark.slow("two nurseries and five kernels")
def test_a_nursery_ends_when_what_it_has_imported_changes(
    warm: Any, runtime_dir: Path, new_folder: Callable[[], Path], monkeypatch: Any
) -> None:
    folder = new_folder()
    folder.chmod(0o755)
    (folder / "mine.py").write_text("answer = 1\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with warm(preload=["mine"]):
        before = made(runtime_dir)
    with warm(preload=["mine"]) as k:
        assert came_from(k) == before.sandbox_id
        assert k.run("import mine; mine.answer") == "1"
    (folder / "unrelated.py").write_text("")
    (folder / "unrelated").mkdir()
    with warm(preload=["mine"]) as k:
        assert came_from(k) == before.sandbox_id
        assert k.run("import unrelated; mine = 0") == ""
    (folder / "mine.py").write_text("answer = 22\n")
    wait_for_end(before)
    with warm(preload=["mine"]) as k:
        assert came_from(k) == ""
        assert k.run("import mine; mine.answer") == "22"
        after = made(runtime_dir)
    with warm(preload=["mine"]) as k:
        assert came_from(k) == after.sandbox_id != before.sandbox_id
        assert k.run("import mine; mine.answer") == "22"


def test_what_was_preloaded_is_there_at_once(warm: Any, runtime_dir: Path) -> None:
    with warm(preload=["decimal", "no_such_module"]):
        nursery = made(runtime_dir)
    assert status_of(nursery, runtime_dir)["preloaded"] == ["decimal"]
    assert "no_such_module" in status_of(nursery, runtime_dir)["failed"]
    with warm(preload=["decimal", "no_such_module"]) as k:
        assert came_from(k) == nursery.sandbox_id
        assert k.run("import sys; 'decimal' in sys.modules") == "True"


def test_a_module_that_starts_threads_is_left_out_and_reported_once(
    warm: Any, runtime_dir: Path, new_folder: Callable[[], Path], monkeypatch: Any, caplog: Any
) -> None:
    folder = new_folder()
    folder.chmod(0o755)
    (folder / "busy.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    (folder / "calls.py").write_text("import socket\nkept = socket.socket()\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with warm(preload=["busy", "decimal", "calls"]):
        nursery = made(runtime_dir)
    told = status_of(nursery, runtime_dir)
    assert (told["preloaded"], [*told["refused"]]) == (["decimal"], ["busy", "calls"])
    with warm(preload=["busy", "decimal", "calls"]) as k:
        assert caplog.text.count("busy is not preloaded: it starts threads") == 1
        assert caplog.text.count("calls is not preloaded") == 1
        assert came_from(k) == nursery.sandbox_id
        assert k.run("import busy, calls, threading; calls.kept.family.name") == "'AF_INET'"


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_nursery_that_hangs_or_dies_is_no_reason_not_to_start(
    warm: Any, nursery: Record, monkeypatch: Any, how: int
) -> None:
    """The kernels that it has forked live on."""
    monkeypatch.setattr(performer, "WORD_SECONDS", 0.5)
    with warm() as before:
        assert came_from(before) == nursery.sandbox_id
        (pid, *_) = children_of(nursery.init_pid)
        pidfd = os.pidfd_open(pid)
        signal.pidfd_send_signal(pidfd, how)
        with warm() as k:
            assert came_from(k) == ""
            assert k.run("6 * 7") == "42"
        assert before.run("1 + 1") == "2"
        assert select.select([pidfd], [], [], 10)[0]  # one that hangs is ended
        os.close(pidfd)


def test_a_nursery_at_which_too_many_wait_is_not_waited_for(
    warm: Any, nursery: Record, runtime_dir: Path
) -> None:
    (pid, *_) = children_of(nursery.init_pid)
    os.kill(pid, signal.SIGSTOP)
    with contextlib.ExitStack() as stack:
        with pytest.raises(BlockingIOError):
            while channel := call(runtime_dir / nursery.sandbox_id / SOCKET):
                stack.enter_context(channel)
        with warm() as k:
            assert came_from(k) == ""
        wait_for_end(nursery)


def test_starts_at_once_that_fail_in_a_nursery_go_on_cold(
    nursery: Record, kernelspec: Any, monkeypatch: Any
) -> None:
    """Each under the names that it had: nothing of the first try is in the way of the second."""

    def fail(*_: Any) -> None:
        raise LaunchError(attempt="start", answer="it failed", remedy="None.", step="test")

    monkeypatch.setattr(start_from, "check", fail)
    name = kernelspec(warm=True)

    async def live() -> list[str]:
        manager = AsyncMultiKernelManager()
        ids = await asyncio.gather(*(manager.start_kernel(kernel_name=name) for _ in range(6)))
        kernels = [manager.get_kernel(each).provisioner for each in ids]
        found = [each.handle.record.nursery for each in kernels]
        await manager.shutdown_all(now=True)
        manager.context.destroy(linger=0)
        return found

    assert asyncio.run(live()) == [""] * 6


def test_a_nursery_that_fails_is_told_with_its_words_and_not_tried_after_every_start(
    warm: Any, workdir: Path, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(make_nursery, "_BOOT", "raise SystemExit('this nursery is broken')")
    told = "this nursery is broken"
    with warm() as k:
        k.manager.log.propagate = True
        ahead.wait()
        assert caplog.text.count(told) == 1
        assert "it ended with status 1" in caplog.text
    with warm():
        ahead.wait()
        assert caplog.text.count(told) == 1


REHEARSE = """
import select
from sandbox_provisioner.nursery import main
init = main.initialized
{change}
print(bool(main._rehearse().modules))
"""


def rehearsed(change: str) -> str:
    """Whether a rehearsal has found what a kernel imports, after a *change* of our code."""
    words = [sys.executable, "-c", REHEARSE.format(change=change)]
    found = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    return found.stdout.strip()


def test_a_rehearsal_waits_for_a_kernel_on_a_busy_machine() -> None:
    """Longer than a heart may miss a beat."""
    late = "main.initialized = lambda words: select.poll().poll(2500) or init(words)"
    assert rehearsed(late) == "True"


@pytest.mark.parametrize("who", ["initialized", "_visit"])
def test_a_rehearsal_ends_with_who_of_it_ends_first(who: str) -> None:
    assert rehearsed(f"main.{who} = lambda *words: exit()") == "False"


def test_an_idle_nursery_ends_and_leaves_its_kernels(warm: Any, runtime_dir: Path) -> None:
    with warm(warm_idle_timeout=1.0):
        nursery = made(runtime_dir)
        with warm() as k:
            assert came_from(k) == nursery.sandbox_id
            (program, *_) = [p for p in children_of(nursery.init_pid) if is_nursery(p)]
            pidfd = os.pidfd_open(program)
            assert select.select([pidfd], [], [], 30)[0]
            os.close(pidfd)
            assert k.run("1 + 1") == "2"
    wait_for_end(nursery)
    assert is_reaped(nursery.init_pid)


def test_an_idle_nursery_that_was_let_go_is_no_zombie(warm: Any, runtime_dir: Path) -> None:
    with warm(warm_idle_timeout=1.0):
        nursery = made(runtime_dir)
        ahead.let_go()
    assert is_reaped(nursery.init_pid)
    assert sweep(runtime_dir) == [nursery.sandbox_id]


def is_nursery(pid: int) -> bool:
    """Inside it is PID 2 of the nursery's namespace, and of no other."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("NSpid:")]
    return line.split()[-1] == "2" and len(line.split()) == 3 + nested()


def nested() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("NSpid:")]
    return len(line.split()) - 2
