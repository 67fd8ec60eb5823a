"""A client that knows nothing of provisioners: it runs a kernelspec's argv by itself, over tcp."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import clients
import psutil
import pytest
import zmq
from clients import text_of
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_programs import EAT_MEMORY

from sandbox_provisioner.meeting import PORTS
from sandbox_provisioner.records import all_records, open_init
from sandbox_provisioner.sweeping import sweep

pytestmark = pytest.mark.requires("userns")
PATIENCE = 60


def free_ports() -> dict[str, int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in PORTS]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return {n: s.getsockname()[1] for n, s in zip(PORTS, sockets, strict=True)}


class FrontEnd:
    """Writes a connection file, runs argv, connects."""

    def __init__(self, folder: Path, kernel: str, **changes: Any) -> None:
        self.info: dict[str, Any] = {
            "transport": "tcp", "ip": "127.0.0.1", "key": "of-the-front-end",
            "signature_scheme": "hmac-sha256", **free_ports(), **changes,
        }  # fmt: skip
        path = folder / "connection.json"
        path.write_text(json.dumps(self.info))
        argv = KernelSpecManager().get_kernel_spec(kernel).argv
        self.process = subprocess.Popen(
            self.command(argv, str(path)),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.client = BlockingKernelClient()
        self.client.load_connection_info(self.info)
        self.client.start_channels()

    def command(self, argv: list[str], path: str) -> list[str]:
        return [word.replace("{connection_file}", path) for word in argv]

    def await_kernel(self) -> None:
        """wait_for_ready gives up when no heart beats after a second, and returns before what the
        kernel publishes arrives: of a cell that is run then nobody would hear that it is done."""
        while self.process.poll() is None:
            self.client.kernel_info()
            with contextlib.suppress(queue.Empty):
                self.client.get_shell_msg(timeout=5)
                self.client.get_iopub_msg(timeout=1)
                return
        raise AssertionError(self.end())

    def end(self) -> tuple[int, str]:
        """Its exit status, and what it wrote to stderr."""
        _, written = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, written

    def close(self) -> None:
        self.client.stop_channels()
        with self.process as process:  # which closes what it wrote to
            process.kill()


class VsCode(FrontEnd):
    """As its Jupyter extension starts and ends a kernel of Python's (kernelProcess.node.ts)."""

    def command(self, argv: list[str], path: str) -> list[str]:
        """The interpreter that it has found, without ``-f {connection_file}``, with the file behind
        all: in quotes where it has blanks, and no shell takes them off."""
        place = argv.index("{connection_file}")
        file = f'"{path}"' if " " in path else path
        return [sys.executable, *argv[1 : place - 1], *argv[place + 1 :], f"--f={file}"]

    def await_ports(self) -> None:
        """It connects to two of them, and sends nothing, before it speaks with the kernel."""
        for name in ("shell_port", "iopub_port"):
            while not self.is_taken(self.info[name]):
                assert self.process.poll() is None, self.end()

    def is_taken(self, port: int) -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", port)) == 0

    def dispose(self) -> None:
        """All that the process has started, and then the process."""
        process = psutil.Process(self.process.pid)
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.terminate()


def interrupt_a_cell(started: FrontEnd) -> None:
    client = started.client
    # The next cell would be aborted if it came early.
    asked = client.execute("print('begun', flush=True)\nwhile True: pass", stop_on_error=False)
    seen: list[Any] = []
    while "begun" not in text_of(seen):
        seen.append(client.get_iopub_msg(timeout=PATIENCE))
    started.process.send_signal(signal.SIGINT)
    reply = client.get_shell_msg(timeout=PATIENCE)
    assert reply["parent_header"]["msg_id"] == asked
    assert reply["content"]["ename"] == "KeyboardInterrupt"


def heart_beats(info: dict[str, Any]) -> bool:
    """By a socket of our own: the client's takes one that comes late for dead."""
    with zmq.Context() as context, context.socket(zmq.REQ) as heart:
        heart.linger = 0
        heart.connect(f"tcp://{info['ip']}:{info['hb_port']}")
        heart.send(b"ping")
        return bool(heart.poll(PATIENCE * 1000)) and heart.recv() == b"ping"


@pytest.fixture
def front_end(kernelspec: Any, new_folder: Callable[[], Path], runtime_dir: Path) -> Iterator[Any]:
    made: list[FrontEnd] = []

    def start(
        connection: dict[str, Any] | None = None,
        kind: type[FrontEnd] = FrontEnd,
        folder: Path | None = None,
        **options: Any,
    ) -> FrontEnd:
        place = folder or new_folder()
        made.append(kind(place, kernelspec(**options), **(connection or {})))
        return made[-1]

    yield start
    for one in made:
        one.close()
    sweep(runtime_dir)


def test_the_kernel_runs_in_the_box_of_its_kernelspec_and_is_used_as_ever(
    front_end: Any, runtime_dir: Path
) -> None:
    started = front_end(shm_limit="32M")
    started.await_kernel()
    client = started.client
    where = "import os, socket; s = os.statvfs('/dev/shm')\n" \
        "print(socket.gethostname(), s.f_blocks * s.f_bsize >> 20, os.getcwd())"  # fmt: skip
    assert clients.run(client, where) == f"sandbox 32 {os.getcwd()}\n"
    assert [record.kind for _, record in all_records(runtime_dir)] == ["kernel"]
    assert heart_beats(started.info)
    interrupt_a_cell(started)
    told = clients.run(client, "print(input('Name? '))", stdin_hook=lambda _: client.input("Ada"))
    assert told == "Ada\n"
    size = 8 << 20
    assert len(clients.run(client, f"print('x' * {size})")) == size + 1
    client.shutdown()
    assert started.end() == (0, "")
    assert not list(all_records(runtime_dir))


def test_vs_codes_jupyter_extension_starts_a_kernel_in_its_box_interrupts_and_ends_it(
    front_end: Any, new_folder: Callable[[], Path], runtime_dir: Path
) -> None:
    folder = new_folder() / "with blanks"
    folder.mkdir()
    started = front_end(kind=VsCode, folder=folder, shm_limit="32M")
    started.await_ports()
    started.await_kernel()
    client = started.client
    where = "import os; s = os.statvfs('/dev/shm'); print(s.f_blocks * s.f_bsize >> 20)"
    assert clients.run(client, where) == "32\n"
    interrupt_a_cell(started)
    started.dispose()
    started.end()
    assert not list(all_records(runtime_dir))


def test_a_front_end_may_choose_unix_sockets_of_its_own(
    front_end: Any, new_folder: Callable[[], Path], runtime_dir: Path
) -> None:
    place = new_folder()
    numbers = {name: number for number, name in enumerate(PORTS, 1)}
    started = front_end({"transport": "ipc", "ip": f"{place}/kernel", **numbers})
    started.await_kernel()
    assert clients.run(started.client, "import os; print(os.uname().nodename)") == "sandbox\n"
    assert sorted(path.name for path in place.iterdir()) == [f"kernel-{n}" for n in range(1, 6)]
    started.client.shutdown()
    assert started.end() == (0, "")
    assert not list(all_records(runtime_dir))
    assert not list(place.iterdir())


def test_the_kernel_ends_with_a_process_that_is_killed(front_end: Any, runtime_dir: Path) -> None:
    started = front_end()
    started.await_kernel()
    [(_, record)] = all_records(runtime_dir)
    pidfd = open_init(record)
    assert pidfd is not None
    started.process.kill()
    try:
        assert select.select([pidfd], [], [], PATIENCE)[0]
    finally:
        os.close(pidfd)


def test_who_stops_the_process_stops_the_kernel_and_is_told_nothing(
    front_end: Any, runtime_dir: Path
) -> None:
    started = front_end()
    started.await_kernel()
    started.process.terminate()
    assert started.end() == (128 + signal.SIGTERM, "")
    assert not list(all_records(runtime_dir))


@pytest.mark.requires("cgroup-memory")
def test_a_cap_is_told_under_the_cell_on_stderr_and_by_the_status(front_end: Any) -> None:
    sentence = "was killed: it reached its memory limit of 150 MiB"
    started = front_end(mem_limit="150M", mem_interrupt=0)
    started.await_kernel()
    clients.run(started.client, "1")
    started.client.execute(EAT_MEMORY)
    seen: list[Any] = []
    while sentence not in text_of(seen):
        seen.append(started.client.get_iopub_msg(timeout=PATIENCE))
    status, written = started.end()
    assert status == 128 + signal.SIGKILL
    assert sentence in written


def test_two_kernels_with_one_command_are_told_apart_by_name_or_refused(
    front_end: Any, kernelspec: Any
) -> None:
    kernelspec("other", shm_limit="1G")
    status, written = front_end(shm_limit="32M").end()
    assert status == 1
    assert "it may be any of boxed, other, whose sandboxes differ" in " ".join(written.split())


def test_what_cannot_be_meant_is_refused_with_a_sentence(
    front_end: Any, kernelspec: Any, workdir: Path
) -> None:
    status, written = front_end({"ip": "192.0.2.1"}).end()
    assert status == 1
    assert "listens on this machine alone" in written
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, written = front_end({"hb_port": taken.getsockname()[1]}).end()
    assert status == 1
    assert "Address already in use" in written
    command = [sys.executable, "-P", "-m", "sandbox_provisioner.unboxed", "--", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no installed sandboxed kernel has this argv" in done.stderr
