"""askers.py - in the process of a user: kernels of the broker, and what attackers would send."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import uuid
from typing import Any

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager, KernelManager
from jupyter_client.multikernelmanager import AsyncMultiKernelManager
from traitlets.config import LoggingConfigurable

from sandbox_provisioner.broker.frames import frame
from sandbox_provisioner.broker.wishes import Wish, written
from sandbox_provisioner.contract import Labels
from sandbox_provisioner.facilities.workdir.facts.run_by_host import Server
from sandbox_provisioner.spec import Limits, SandboxSpec

place: dict[str, str] = {}


def begin(path: str, runtime: str, home: str) -> None:
    place.update(socket=path, runtime=runtime, home=home, work=f"{home}/work")


def manager(kind: type[KernelManager] = KernelManager, **options: Any) -> Any:
    """Of a kernel that is not started."""
    config = {"launcher": "broker", "broker_socket": place["socket"],
              "runtime_dir": place["runtime"], "mem_limit": "256M", **options}  # fmt: skip
    stanza = {"provisioner_name": "sandbox-provisioner", "config": config}
    made = kind(shutdown_wait_time=200.0)  # on a busy machine too nobody is terminated
    made._kernel_spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        display_name="boxed", language="python", metadata={"kernel_provisioner": stanza},
    )  # fmt: skip
    return made


class Kernel:
    """One that runs in *cwd*, which is the work directory by default."""

    def __init__(self, cwd: str = "", **options: Any) -> None:
        self.manager = manager(**options)
        self.manager.start_kernel(cwd=cwd or place["work"])
        self._meet()

    def _meet(self) -> None:
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def __call__(self, code: str) -> str:
        """What *code* prints."""
        told: list[str] = []

        def hear(message: Any) -> None:
            content = message["content"]
            told.append(content.get("text") or "\n".join(content.get("traceback", [])))

        self.client.execute_interactive(code, output_hook=hear, timeout=60)
        return "".join(told).strip()

    def told_until(self, word: str, code: str) -> str:
        """What *code* prints, and what comes after it until *word* is there: what the sandbox says
        of a network that refuses comes by another way, and later than an answer."""
        told = self(code)
        while word not in told.lower():
            message = self.client.get_iopub_msg(timeout=60)
            told += message["content"].get("text", "")
        return told

    @property
    def nursery(self) -> str:
        """The id of the one that it comes from, "" of a cold one."""
        return str(self.manager.provisioner.handle.labels.nursery)

    def restart(self) -> None:
        self.manager.restart_kernel()
        self.client.stop_channels()
        self._meet()

    def end(self) -> str:
        """Shut it down; how it ended."""
        self.client.stop_channels()
        self.manager.shutdown_kernel()
        return str(self.manager.provisioner.end.kind)


async def said_in_a_server(*cells: str, **options: Any) -> list[str]:
    """What stands under each of *cells* of a kernel that a server has started; the first one
    is over when anything is said."""
    made = manager(AsyncKernelManager, **options)
    made.parent = AsyncMultiKernelManager(parent=LoggingConfigurable())
    await made.start_kernel(cwd=place["work"])
    client = made.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=60)
        said = []
        for cell in cells:
            asked, said_here, state = client.execute(cell), "", "busy"
            while state != "idle" or not (said or said_here):
                message = await client.get_iopub_msg(timeout=60)
                if message["parent_header"].get("msg_id") == asked:
                    state = message["content"].get("execution_state", state)
                    said_here += message["content"].get("text", "")
            said.append(said_here)
        return said
    finally:
        client.stop_channels()
        await made.shutdown_kernel()


def prepare(cwd: str = "", *, own: bool = True, **options: Any) -> int:
    """Have ready now what a `Kernel` would be started from, for this process alone unless it is
    not our *own*, which *options* have to say, too; how many nurseries and spares were made."""
    made = manager(**options)

    async def fill() -> int:
        command, more = await made._async_pre_start_kernel(cwd=cwd or place["work"])
        try:
            count: int = await made.provisioner.fill(command, own=own, **more)
            return count
        finally:
            made.cleanup_connection_file()

    return asyncio.run(fill())


# -- by hand


def wish(**fields: Any) -> dict[str, Any]:
    """A message that asks for a start, with some *fields* of its own."""
    work = place["work"]
    made = Wish(
        sandbox_id=uuid.uuid4().hex[:12],
        spec=SandboxSpec(workdir=work, limits=Limits(memory_bytes=256 << 20)),
        argv=(sys.executable, "-c", "import time; time.sleep(600)"),
        environment=dict(os.environ),
        cwd=work,
        connection_file=("kernel.json", "{}"),
        home=place["home"],
        here=work,
        umask=0o022,
        inherited={},
        server=Server(),
        labels=Labels(),
    )
    message: dict[str, Any] = json.loads(json.dumps(written(made)))
    message["start"] |= fields
    return message


def send(message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """What the broker answers to *message*, which comes with *fds*."""
    return exchange(frame(message), fds)


def exchange(text: bytes, fds: list[int]) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.connect(place["socket"])
        answer = b""
        with contextlib.suppress(ConnectionError):  # who is refused at once is not read
            sent = socket.send_fds(made, [text], fds) if fds else 0
            made.sendall(text[sent:])
            made.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while chunk := made.recv(1 << 16):
                answer += chunk
    return json.loads(answer[4:]) if answer else {}


def streams() -> list[int]:
    """Three for a kernel, in place of our own."""
    return [os.open("/dev/null", os.O_RDWR) for _ in range(3)]


def directory(path: str = "") -> int:
    return os.open(path or place["work"], os.O_PATH | os.O_DIRECTORY)


def start(fds: list[int] | None = None, **fields: Any) -> dict[str, Any]:
    """What the broker answers to a wish that nobody of ours would make."""
    return send(wish(**fields), [*streams(), directory()] if fds is None else fds)
