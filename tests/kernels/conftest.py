"""conftest.py - in the test process: kernelspecs of a test's own, and kernels started from them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import clients
import pytest
from boxes import WARM
from jupyter_client.manager import KernelManager
from warmth import made

from sandbox_provisioner.app import SandboxApp
from sandbox_provisioner.app.change import FreezeApp, LimitsApp, ThawApp
from sandbox_provisioner.app.command import UsageError
from sandbox_provisioner.app.running import ListApp
from sandbox_provisioner.app.stop import StopApp
from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.provisioner import SandboxProvisioner
from sandbox_provisioner.records import Record
from sandbox_provisioner.unboxed import guarded_command
from sandbox_provisioner.warm import ahead

PATIENCE = 60
_COMMANDS = (StopApp, LimitsApp, FreezeApp, ThawApp, ListApp)
Spec = Callable[..., str]


@pytest.fixture
def kernelspec(
    workdir: Path, runtime_dir: Path, new_folder: Callable[[], Path], monkeypatch: Any
) -> Iterator[Spec]:
    """``kernelspec(name, argv, **options)`` writes a sandboxed kernelspec; its name is answered.

    The current directory is the test's work directory.
    """
    data = new_folder()
    monkeypatch.setenv("JUPYTER_PATH", str(data))
    monkeypatch.chdir(workdir)
    # Who waits for a nursery here does so on purpose, whatever else this machine does.
    monkeypatch.setattr(ahead, "_PATIENCE_SECONDS", 0.0)
    for variable in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(new_folder()))

    def write(name: str = "boxed", argv: list[str] | None = None, **options: Any) -> str:
        program = argv or [
            sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}",
        ]  # fmt: skip
        config = {"runtime_dir": str(runtime_dir), "warm": bool(os.environ.get(WARM)), **options}
        folder = data / "kernels" / name
        folder.mkdir(parents=True, exist_ok=True)
        stanza = {"provisioner_name": "sandbox-provisioner", "config": config}
        text = {
            "argv": guarded_command(program, sys.executable),
            "display_name": name,
            "language": "python",
            "metadata": {"kernel_provisioner": stanza, "supported_encryption": ["curve"]},
        }
        (folder / "kernel.json").write_text(json.dumps(text))
        return name

    yield write
    ahead.end_own()


@pytest.fixture
def command(runtime_dir: Path, capsys: Any) -> Callable[..., str]:
    """``command("stop", "134530eb")``: all that it says, on one line, or the error's text. It knows
    the kernels from their records alone."""

    def run(*words: str) -> str:
        app = SandboxApp()
        capsys.readouterr()
        try:
            app.initialize([*words, "--runtime-dir", str(runtime_dir)])
            app.start()
        except (SandboxError, UsageError) as error:
            return str(error)
        finally:
            for application in (SandboxApp, *_COMMANDS):
                application.clear_instance()
        return " ".join("".join(capsys.readouterr()).split())

    return run


class Kernel:
    """A started kernel and a client of it."""

    def __init__(self, manager: Any, cwd: str) -> None:
        self.manager = manager
        self.cwd = cwd
        self.client = manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=PATIENCE)

    @property
    def provisioner(self) -> SandboxProvisioner:
        """Ours."""
        provisioner = self.manager.provisioner
        assert isinstance(provisioner, SandboxProvisioner)
        return provisioner

    def run(self, code: str, **options: Any) -> str:
        """What *code* printed or answered, with the text of an error."""
        return clients.run(self.client, code, **options)

    def start(self, code: str) -> str:
        """Start *code* and return when it runs: the id of the request.

        The cell tells so by a FIFO in the work directory: a loop in C would not let the thread run
        that sends messages. A line for the shell tells so from there: an interrupt that comes while
        IPython starts the shell is lost.
        """
        fifo = Path(self.cwd, f"it-runs-{uuid.uuid4().hex}")
        os.mkfifo(fifo)
        tells = f"open('{fifo.name}', 'w').close()\n"
        if code.startswith("!"):
            tells, code = f"!echo > {fifo.name}; ", code[1:]
        request: str = self.client.execute(tells + code)
        fifo.read_text()
        fifo.unlink()
        return request

    def until(self, wanted: Callable[[dict[str, Any]], bool], request: str) -> dict[str, Any]:
        """The first iopub message of *request* that is *wanted*."""
        while True:
            message: dict[str, Any] = self.client.get_iopub_msg(timeout=PATIENCE)
            if message["parent_header"].get("msg_id") == request and wanted(message):
                return message

    def shutdown(self) -> None:
        """End it as a person would."""
        self.client.stop_channels()
        self.manager.shutdown_kernel()


@pytest.fixture
def kernel(kernelspec: Spec) -> Callable[..., contextlib.AbstractContextManager[Kernel]]:
    """``with kernel(mem_limit="256M") as k: k.run("1 + 1")``."""

    @contextlib.contextmanager
    def start(
        manager: Any = None, start_options: dict[str, Any] | None = None, **options: Any
    ) -> Iterator[Kernel]:
        manager = manager or KernelManager(kernel_name=kernelspec(**options))
        manager.start_kernel(**(start_options or {}))
        started = None
        try:
            started = Kernel(manager, (start_options or {}).get("cwd", os.curdir))
            yield started
        finally:
            if started:
                started.client.stop_channels()
            manager.shutdown_kernel(now=True)

    return start


@pytest.fixture
def warm(kernel: Any, kernelspec: Any) -> Any:
    """``with warm() as k``: a kernel whose kernelspec wants a nursery."""

    def start(**options: Any) -> Any:
        return kernel(KernelManager(kernel_name=kernelspec(**({"warm": True} | options))))

    return start


@pytest.fixture
def nursery(warm: Any, runtime_dir: Path) -> Iterator[Record]:
    """The record of the nursery that a first, cold start has made."""
    with warm():
        pass
    yield made(runtime_dir)
