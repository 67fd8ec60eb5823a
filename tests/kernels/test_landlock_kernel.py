"""A kernel's ordinary life under the confinement "landlock", as an ordinary user."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager
from warmth import came_from, nurseries

from sandbox_provisioner.app import SandboxApp
from sandbox_provisioner.app.command import SandboxCommand
from sandbox_provisioner.app.listing import console, drawn
from sandbox_provisioner.app.running import look
from sandbox_provisioner.provisioner import StartRefused
from sandbox_provisioner.warm import ahead

pytestmark = [
    pytest.mark.requires("landlock", "ordinary-user"),
    pytest.mark.ordinary_user,
]

NAME = "python-landlock"


@pytest.fixture
def place(new_folder: Callable[[], Path]) -> Path:
    """A work directory in which no server runs: what such a one holds cannot be covered."""
    return new_folder()


@pytest.fixture
def landlocked(kernel: Any, kernelspec: Any, place: Path) -> Any:
    """``with landlocked() as k: k.run("1 + 1")``."""

    def start(**options: Any) -> Any:
        waived = dict.fromkeys(("memory", "cpu", "cpuset", "pids"), "warn")
        name = kernelspec(NAME, confinement="landlock", on_missing=waived, **options)
        manager = KernelManager(kernel_name=name)
        return kernel(manager, {"cwd": str(place)})

    return start


def test_a_kernel_runs_and_leaves_nothing(landlocked: Any, runtime_dir: Path, place: Path) -> None:
    with landlocked() as k:
        assert k.run("6 * 7") == "42"
        assert k.run("import os; os.getcwd()") == repr(str(place))
        assert "PermissionError" in k.run("os.listdir('/tmp')")
        assert "OSError" in k.run("import socket; socket.socket()")
        assert k.run("%%bash\necho said").strip() == "said"
        (found,) = look(runtime_dir)
        assert (found.state, found.as_json()["confinement"]) == ("running", "landlock")
        assert found.record.name == NAME
        with (out := console()).capture() as told:
            out.print(drawn([found], out.width))
        assert "landlock" in told.get().splitlines()[-1].split()
        k.run("import subprocess; subprocess.Popen(['setsid', 'sleep', '1000'])")
    assert os.listdir(runtime_dir) == ["lock"]


@pytest.mark.parametrize("warm", ["auto", True])
def test_it_is_never_made_by_a_nursery_which_namespaces_hold(
    landlocked: Any, runtime_dir: Path, warm: Any
) -> None:
    for _ in range(3):
        with landlocked(warm=warm) as k:
            assert came_from(k) == ""
        ahead.wait()
        assert not nurseries(runtime_dir)


def test_an_interrupt_stops_the_cell_and_keeps_the_variables(landlocked: Any) -> None:
    with landlocked() as k:
        k.run("kept = 41")
        for code in ("import time; time.sleep(60)", "while True: pass"):
            request = k.start(code)
            k.manager.interrupt_kernel()
            k.until(lambda m: m["content"].get("execution_state") == "idle", request)
            assert k.run("kept + 1") == "42"


def test_a_restart_forgets_the_variables_and_ends_what_was_started(landlocked: Any) -> None:
    with landlocked() as k:
        k.run("x = 1; import subprocess; p = subprocess.Popen(['setsid', 'sleep', '1000'])")
        pidfd = os.pidfd_open(int(k.run("p.pid")))
        k.manager.restart_kernel()
        k.client.wait_for_ready(timeout=60)
        with pytest.raises(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, 0)
        os.close(pidfd)
        assert k.run("'x' in dir()") == "False"
        k.manager.restart_kernel(now=True)
        k.client.wait_for_ready(timeout=60)
        assert k.run("1 + 1") == "2"


def test_a_cell_can_ask_for_input(landlocked: Any) -> None:
    with landlocked() as k:

        def answer(_: object) -> None:
            k.client.input("Ada")

        said = k.run("print(input('who? ').upper())", stdin_hook=answer, allow_stdin=True)
        assert "ADA" in said


def test_the_end_of_a_kernel_is_told(landlocked: Any) -> None:
    with landlocked() as k:
        k.client.execute("import os; os._exit(7)")
        assert asyncio.run(k.provisioner.handle.wait()).code == 7


def test_explain_tells_what_is_lost(kernelspec: Any, place: Path, capsys: Any) -> None:
    waived = dict.fromkeys(("memory", "cpu", "cpuset", "pids"), "warn")
    name = kernelspec(NAME, confinement="landlock", on_missing=waived)
    try:
        app = SandboxApp(log_level=50)
        app.initialize(["explain", name, "--cwd", str(place)])
        app.start()
    finally:
        SandboxApp.clear_instance()
        for application in SandboxCommand.__subclasses__():
            application.clear_instance()
    said = capsys.readouterr().out
    assert "weaker than namespaces" in said
    assert "landlock-restrict" in said


def test_a_display_name_that_hides_it_is_refused(kernelspec: Any, place: Path) -> None:
    manager = KernelManager(kernel_name=kernelspec("python-sandboxed", confinement="landlock"))
    with pytest.raises(StartRefused, match="does not tell that it is weaker"):
        manager.start_kernel(cwd=str(place))


def test_the_server_s_own_directory_is_refused(kernelspec: Any, workdir: Path) -> None:
    waived = dict.fromkeys(("memory", "cpu", "cpuset", "pids"), "warn")
    name = kernelspec(NAME, confinement="landlock", on_missing=waived)
    with pytest.raises(StartRefused, match="Use a directory below it"):
        KernelManager(kernel_name=name).start_kernel(cwd=str(workdir))
