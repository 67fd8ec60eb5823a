"""Kernels that are not IPython: the box is the same for every language.

xeus-python's wheel is not interrupted by a signal, in no box either (it ends); so nothing asks for
that here, and no interrupt comes before its memory cap.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import nbformat
import pytest
from boxes import run
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

from sandbox_provisioner.records import all_records

pytestmark = pytest.mark.requires("userns")
needs_bash = pytest.mark.requires("bash_kernel")
needs_xeus = pytest.mark.requires("xeus")


def argv_of(prefix: Path | str, name: str) -> list[str]:
    """The command of a kernel, as its own installation has written it."""
    text = Path(prefix, "share/jupyter/kernels", name, "kernel.json").read_text()
    argv: list[str] = json.loads(text)["argv"]
    return argv


@pytest.fixture
def bash(kernelspec: Any, kernel: Any, new_folder: Any) -> Iterator[Any]:
    prefix = new_folder()
    command = (sys.executable, "-m", "bash_kernel.install", "--prefix", str(prefix))
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    name = kernelspec("bash", argv_of(prefix, "bash"), mem_limit="256M")
    with kernel(KernelManager(kernel_name=name)) as k:
        yield k


@pytest.fixture
def xpython(kernelspec: Any, kernel: Any) -> Iterator[Any]:
    argv = argv_of(sys.prefix, "xpython")
    name = kernelspec("xpython", argv, mem_limit="512M")
    with kernel(KernelManager(kernel_name=name)) as k:
        yield k


def end_kindly(k: Any, runtime_dir: Path, *codes: int) -> None:
    """Ask it to end, as a person would; no signal should be needed, and nothing stays. *codes* are
    other ends than that which it has without a sandbox, too."""
    k.manager.shutdown_wait_time = 60.0  # on a busy machine a kernel is slow to end
    k.shutdown()
    assert k.provisioner.story.code in {0, *codes}
    assert all_records(runtime_dir) == []


@needs_bash
def test_bash_runs_commands_in_the_box(bash: Any) -> None:
    assert bash.run("echo $((6 * 7)) $(hostname)").strip() == "42 sandbox"
    bash.run("cd /tmp; kept=there")
    assert bash.run("echo $PWD $kept").split() == ["/tmp", "there"]


@needs_bash
def test_bash_is_interrupted_and_goes_on(bash: Any) -> None:
    request = bash.client.execute("echo begun; sleep 600")
    bash.until(lambda m: "begun" in m["content"].get("text", ""), request)
    bash.manager.interrupt_kernel()
    bash.until(lambda m: m["content"].get("execution_state") == "idle", request)
    assert bash.run("echo again").strip() == "again"


# A kernel that makes nothing of an interrupt, as some of other languages: the cell is cut short,
# and answers "ok".
DEAF = """
from ipykernel.kernelapp import IPKernelApp
from ipykernel.kernelbase import Kernel

class Deaf(Kernel):
    implementation = banner = language = "deaf"
    implementation_version = "1"
    language_info = {"name": "deaf", "mimetype": "text/plain", "file_extension": ".txt"}

    def do_execute(self, code, silent, *args, **kwargs):
        kept = []
        try:
            while len(kept) < int(code):
                kept.append(bytearray(b"x" * (1 << 20)))
        except KeyboardInterrupt:
            pass
        self.send_response(
            self.iopub_socket, "stream", {"name": "stdout", "text": f"{len(kept)} rows used"}
        )
        count = self.execution_count
        return {"status": "ok", "execution_count": count, "payload": [], "user_expressions": {}}

IPKernelApp.launch_instance(kernel_class=Deaf)
"""


@pytest.fixture
def deaf(kernelspec: Any, workdir: Path) -> Any:
    """``deaf(**options)`` is the name of its kernelspec."""
    program = workdir / "deaf.py"
    program.write_text(DEAF)
    argv = [sys.executable, str(program), "-f", "{connection_file}"]
    return lambda **options: kernelspec("deaf", argv, mem_limit="200M", **options)


def run_notebook(name: str, rows: int) -> Any:
    cell = nbformat.v4.new_code_cell(str(rows))
    NotebookClient(nbformat.v4.new_notebook(cells=[cell]), kernel_name=name).execute()
    return cell


@pytest.mark.requires("cgroup-memory")
def test_a_cell_of_another_language_is_whole_or_fails_and_never_cut_short(deaf: Any) -> None:
    assert run_notebook(deaf(), 20).outputs[0]["text"] == "20 rows used"
    with pytest.raises(DeadKernelError):
        run_notebook(deaf(), 400)


@pytest.mark.requires("cgroup-memory")
def test_who_asks_for_the_interrupt_of_another_language_gets_it(deaf: Any) -> None:
    told = run_notebook(deaf(mem_interrupt=0.5), 400)
    texts = "".join(output.get("text", "") for output in told.outputs)
    assert "rows used" in texts
    assert "400 rows used" not in texts


@needs_bash
def test_bash_ends_when_it_is_asked_to(bash: Any, runtime_dir: Path) -> None:
    # ipykernel hangs at its own end now and then; SIGTERM comes at half of the time.
    end_kindly(bash, runtime_dir, -signal.SIGTERM)


@needs_xeus
def test_xeus_python_runs_cells_in_the_box(xpython: Any) -> None:
    assert xpython.run("import socket; print(6 * 7, socket.gethostname())") == "42 sandbox\n"
    assert "division by zero" in xpython.run("1 / 0")


@needs_xeus
def test_xeus_python_ends_when_it_is_asked_to(xpython: Any, runtime_dir: Path) -> None:
    end_kindly(xpython, runtime_dir)


@needs_xeus
@pytest.mark.requires("cgroup-memory")
def test_xeus_python_tells_under_its_cell_that_it_was_killed(xpython: Any) -> None:
    request = xpython.client.execute("hoard = [bytearray(b'x' * (8 << 20)) for _ in range(200)]")
    run(xpython.provisioner.handle.wait())
    assert not xpython.manager.is_alive()
    texts = [text for parent, text in shown_until_quiet(xpython.client) if parent == request]
    assert "was killed: it reached its memory limit of 512 MiB" in "".join(texts)


def shown_until_quiet(client: Any) -> Iterator[tuple[str, str]]:
    """What came for which request, of a kernel that says no more. (Xeus has messages for none.)"""
    with contextlib.suppress(Empty):
        while True:
            message = client.get_iopub_msg(timeout=1)
            parent = (message["parent_header"] or {}).get("msg_id", "")
            yield parent, message["content"].get("text", "")
