"""Kernels from a nursery: what they are like. All tests here share one that is there before."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import AsyncKernelManager, KernelManager
from jupyter_programs import Home
from warmth import RANDOM, came_from, nurseries, state_of

from sandbox_provisioner.records import Record
from sandbox_provisioner.unboxed import guarded_command

pytestmark = pytest.mark.requires("userns")


@pytest.fixture(scope="module")
def shared() -> Iterator[Home]:
    """Where the nursery is that all tests here share."""
    with Home() as home:
        program = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        # As `kernelspec` has it.
        argv = guarded_command(program, sys.executable)
        home.add_kernel("boxed", without=("mem_limit", "cpu_limit"), warm=True, argv=argv)
        try:
            home.prepare("boxed", os.environ | {"JUPYTER_PATH": home.places["JUPYTER_PATH"]})
            yield home
        finally:
            home.end_nurseries()


@pytest.fixture
def runtime_dir(shared: Home) -> Path:
    """In place of one of each test's own."""
    return shared.runtime


@pytest.fixture
def nursery(shared: Home) -> Record:
    """In place of one of each test's own, which a cold start makes."""
    (record,) = nurseries(shared.runtime)
    return record


def test_a_warm_kernel_cannot_be_told_from_a_cold_one(
    warm: Any, kernel: Any, nursery: Record
) -> None:
    with kernel(warm=False) as cold, warm() as k:
        assert came_from(cold) == ""
        assert came_from(k) == nursery.sandbox_id
        cold_state, warm_state = state_of(cold), state_of(k)
    for key, value in cold_state.items():
        assert (key, warm_state[key]) == (key, value)


def test_the_shell_of_a_warm_kernel_was_made_in_the_nursery(warm: Any, nursery: Record) -> None:
    """The collector does not list what was frozen before the fork."""
    code = "import gc; [any(o is x for o in gc.get_objects()) for x in (get_ipython(), {})]"
    with warm() as k:
        assert came_from(k) == nursery.sandbox_id
        assert k.run(code.replace("{}", "get_ipython().kernel")) == "[False, True]"


def test_a_warm_kernel_counts_no_references_to_what_it_shares(warm: Any, nursery: Record) -> None:
    """Where Python can: in 3.12 and 3.13."""
    code = "import sys, json; sys.getrefcount(json.dumps.__code__) > 1 << 30"
    with warm() as k:
        assert came_from(k) == nursery.sandbox_id
        assert k.run(code) == str(sys.version_info[:2] in {(3, 12), (3, 13)})


def test_no_two_warm_kernels_share_a_random_number_or_a_secret(warm: Any, nursery: Record) -> None:
    with warm() as one, warm() as other:
        assert came_from(one) == came_from(other) == nursery.sandbox_id
        values = [json.loads(k.run(RANDOM)) for k in (one, other)]
    assert not set(values[0]) & set(values[1])


def test_a_warm_kernel_obeys_its_command_line(
    kernel: Any, kernelspec: Any, nursery: Record
) -> None:
    name = kernelspec(
        "with-lines",
        [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}",
         "--IPKernelApp.exec_lines=marked = 7"],
        warm=True,
    )  # fmt: skip
    with kernel(KernelManager(kernel_name=name)) as k:
        assert came_from(k) == nursery.sandbox_id
        assert k.run("marked") == "7"


def test_a_warm_kernel_can_start_threads_processes_and_loops(warm: Any, nursery: Record) -> None:
    code = (
        "import asyncio, concurrent.futures, multiprocessing, subprocess, threading\n"
        "with concurrent.futures.ThreadPoolExecutor(2) as pool:\n"
        "    one = list(pool.map(abs, [-1, -2]))\n"
        "with multiprocessing.Pool(2) as pool:\n"
        "    two = pool.map(abs, [-3])\n"
        "await asyncio.sleep(0)\n"
        "print(one, two, subprocess.check_output(['echo', 'said']))"
    )
    with warm() as k:
        assert came_from(k) == nursery.sandbox_id
        assert k.run(code) == "[1, 2] [3] b'said\\n'\n"


def test_a_warm_kernels_threads_end_in_order(warm: Any, nursery: Record, workdir: Path) -> None:
    """Else the one that answers may wait for ten seconds for the one that publishes."""
    code = (
        "import threading\n"
        "app, passed = get_ipython().kernel.parent, threading.Event()\n"
        "loop, stop = app.control_thread.io_loop, app.iopub_thread.stop\n"
        "stop_loop = loop.stop\n"
        "def noted():\n"
        "    open('answers-still', 'w').write(str(app.control_thread.is_alive()))\n"
        "    passed.set()\n"
        "    stop()\n"
        "def late():\n"
        "    passed.wait(1)\n"
        "    stop_loop()\n"
        "app.iopub_thread.stop, loop.stop = noted, late\n"
    )
    with warm() as k:
        assert came_from(k) == nursery.sandbox_id
        k.run(code)
        k.manager.shutdown_kernel()
    assert (workdir / "answers-still").read_text() == "False"


@pytest.mark.slow("fifty kernels")
def test_fifty_warm_kernels_start_at_once(warm: Any, nursery: Record, kernelspec: Any) -> None:
    name = kernelspec(warm=True)

    async def all_of_them() -> list[str]:
        managers = [AsyncKernelManager(kernel_name=name) for _ in range(50)]
        try:
            await asyncio.gather(*(m.start_kernel() for m in managers))
            return [m.provisioner.handle.record.nursery for m in managers]
        finally:
            await asyncio.gather(*(m.shutdown_kernel(now=True) for m in managers))

    assert set(asyncio.run(all_of_them())) == {nursery.sandbox_id}
