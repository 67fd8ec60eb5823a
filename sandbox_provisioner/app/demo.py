"""app/demo.py - a command of its own: `jupyter sandbox demo` asks two kernels the same questions.

One notebook's cells (`QUESTIONS`) run on the plain kernel and on its sandboxed twin, in a folder
that is removed afterwards; a table shows the answers side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import subprocess
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

from sandbox_provisioner.app.command import (
    SandboxCommand,
    find_kernel,
    lend,
    provisioner_name_of,
    silent_log,
)
from sandbox_provisioner.app.tables import table
from sandbox_provisioner.app.twins import twin_of, write_twin
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.inside.printable import printable
from sandbox_provisioner.options import PROVISIONER

_CAP = "256M"
_CAPPED = {"memory": "memory", "pids": "processes"}
_BEYOND_CAP_MIB = 400
_TOKEN = "DEMO_API_TOKEN"
_CELL_SECONDS = 20
_START_SECONDS = 60
_LOOK_SECONDS = 0.25
# The sentence about a cap comes after the death, over the dead kernel's own socket.
_LAST_WORDS_SECONDS = 2.0
_ENDED = "the kernel was ended"
_SET_UP = """
import os, socket
def attempt(action):
    try:
        print(action())
    except Exception as error:
        print(f"no: {getattr(error, 'strerror', None) or error}")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What the demo has laid out on the host for the kernels to find, or not."""

    folder: Path
    secret: str
    port: int

    @property
    def work(self) -> Path:
        """The notebook's folder."""
        return self.folder / "work"

    @property
    def secret_file(self) -> Path:
        """A file that is not in it."""
        return self.folder / "secret.txt"


@dataclass(frozen=True, slots=True)
class Question:
    """One cell. *held* gets both answers: did the sandbox do what it is there to do?"""

    title: str
    code: str
    held: Callable[[str, str], bool]


@dataclass(slots=True)
class Answers:
    """What one kernel said to each question, and what stood under the cell that ended it."""

    start_seconds: float = 0.0
    texts: list[str] = field(default_factory=list)
    last_words: str = ""


def questions(stage: Stage) -> list[Question]:
    """The notebook. An answer that begins with "no:" was refused."""
    home = os.path.expanduser("~")
    return [
        Question(
            "read /etc/shadow", "str(len(open('/etc/shadow').read())) + ' characters'", _is_refused
        ),
        Question(
            f"list your home, {home}", f"str(len(os.listdir({home!r}))) + ' in it'", _sees_less
        ),
        Question(
            "read a file beside the notebook's folder",
            f"open({str(stage.secret_file)!r}).read()",
            _is_refused,
        ),
        Question(
            f"read the server's ${_TOKEN}", f"os.environ.get({_TOKEN!r}, 'no: unset')", _is_refused
        ),
        Question(
            "count processes",
            "sum(name.isdecimal() for name in os.listdir('/proc'))",
            lambda plain, boxed: 0 < _number(boxed) <= 8,
        ),
        Question(
            "find network interfaces",
            "', '.join(name for _, name in socket.if_nameindex())",
            lambda plain, boxed: boxed == "lo",
        ),
        Question(
            "talk to a server on the host's 127.0.0.1",
            f"socket.create_connection(('127.0.0.1', {stage.port}), 2).recv(99).decode()",
            _is_refused,
        ),
        Question("tell its user id", "os.getuid()", lambda plain, boxed: _number(boxed) > 0),
        Question(
            "write into the notebook's folder",
            "open('result.csv', 'w').write('1,2,3') and 'yes'",
            lambda plain, boxed: boxed == "yes",
        ),
        Question(
            f"fill {_BEYOND_CAP_MIB} MiB of memory",
            f"len(b'x' * ({_BEYOND_CAP_MIB} << 20)) and 'yes'",
            lambda plain, boxed: boxed == _ENDED,
        ),
    ]


def _is_refused(plain: str, boxed: str) -> bool:
    return boxed.startswith("no:")


def _sees_less(plain: str, boxed: str) -> bool:
    return boxed.startswith("no:") or 0 <= _number(boxed) < max(1, _number(plain))


def _number(text: str) -> int:
    first = text.partition(" ")[0]
    return int(first) if first.isdecimal() else -1


class DemoApp(SandboxCommand):
    """Asks, compares, tells."""

    usage = "jupyter sandbox demo"
    description = (
        "Run the same notebook on the plain Python kernel and on a sandboxed twin of it, and show "
        "side by side what each could see and do. It takes a few seconds, needs no set-up, and "
        "removes what it makes. Exits with 1 if the sandbox did not hold in everything."
    )
    examples = """
    jupyter sandbox demo
    """

    def start(self) -> None:
        """Called once by `main`."""
        self.refuse_words()
        host = HostFacts.probe()
        missing = {name: host.cgroups.missing.get(name) for name in _CAPPED}
        options = {
            "mem_limit": _CAP,
            "mem_interrupt": 0,  # what it shows is the kill
            "workdir": "notebook",
            "runtime_dir": self.provisioner().runtime_dir,
            "on_missing": {name: "warn" for name, reason in missing.items() if reason},
        }
        with tempfile.TemporaryDirectory(prefix="jupyter-sandbox-demo-") as name:
            folder = Path(name)
            (folder / "work").mkdir()
            lend(folder / "work", host)
            kernels = _install(folder, options)
            asked, plain, boxed = asyncio.run(_ask_both(kernels, folder))
        verdicts = [
            question.held(*answers)
            for question, *answers in zip(asked, plain.texts, boxed.texts, strict=True)
        ]
        print(printable(_comparison(asked, verdicts, plain, boxed)))
        if boxed.last_words:
            print("\nThe person who filled the memory read, under the cell:")
            print(textwrap.indent(printable(boxed.last_words), "  "))
        for facility, reason in missing.items():
            if reason:
                print(f"\nNo control group can cap {_CAPPED[facility]} here: {reason}.")
        print(f"\n{self._next_step(held=all(verdicts))}")
        if not all(verdicts):
            raise SystemExit(1)

    def _next_step(self, *, held: bool) -> str:
        if not held:
            return "The sandbox did not hold in everything. Next: jupyter sandbox doctor"
        for found in self.kernels().get_all_specs().values():
            if provisioner_name_of(found["spec"]["metadata"]) == PROVISIONER:
                name = found["spec"]["display_name"]
                return (
                    f'Next: choose "{name}" in JupyterLab; or, for a twin of another kernel, '
                    "jupyter sandbox install --kernel NAME"
                )
        return "Next: jupyter sandbox install"


def _comparison(
    asked: Sequence[Question], verdicts: Sequence[bool], plain: Answers, boxed: Answers
) -> str:
    rows: list[tuple[str, ...]] = [
        ("the notebook tries to", "plain kernel", "sandboxed kernel", "held")
    ]
    for question, held, *texts in zip(asked, verdicts, plain.texts, boxed.texts, strict=True):
        rows.append((question.title, texts[0], texts[1], "yes" if held else "NO"))
    times = (f"{1e3 * answers.start_seconds:.0f} ms" for answers in (plain, boxed))
    rows.append(("(start to first reply)", *times, ""))
    return table(rows, widest=(41, 24, 30))


def _install(folder: Path, options: Mapping[str, Any]) -> KernelSpecManager:
    """Two kernels, "plain" and "boxed", which only the demo sees."""
    kernel = find_kernel(KernelSpecManager(kernel_dirs=[]), "python3")
    stanza = {"provisioner_name": "local-provisioner", "config": {}}
    metadata = {**kernel.metadata, "kernel_provisioner": stanza}
    plain = {**kernel.to_dict(), "metadata": metadata}
    write_twin(kernel, plain, folder / "kernels" / "plain")
    write_twin(kernel, twin_of(kernel, options, name="boxed"), folder / "kernels" / "boxed")
    return KernelSpecManager(kernel_dirs=[str(folder / "kernels")])


async def _ask_both(
    kernels: KernelSpecManager, folder: Path
) -> tuple[list[Question], Answers, Answers]:
    """One after the other, so that neither slows the other's start."""
    async with _staged(folder) as stage:
        asked = questions(stage)
        environment = {**os.environ, _TOKEN: stage.secret}
        # Else the plain kernel would leave its history in the person's home.
        apart = {**environment, "IPYTHONDIR": str(folder / "ipython")}
        plain = await _ask(kernels, "plain", asked, stage, apart)
        boxed = await _ask(kernels, "boxed", asked, stage, environment)
        return asked, plain, boxed


@contextlib.asynccontextmanager
async def _staged(folder: Path) -> AsyncIterator[Stage]:
    """A secret beside the notebook's folder, one in our environment, and a server on loopback."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello from the host")
        writer.close()

    secret = f"secret-{secrets.token_hex(4)}"
    (folder / "secret.txt").write_text(secret)
    os.environ[_TOKEN] = secret
    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        yield Stage(folder=folder, secret=secret, port=server.sockets[0].getsockname()[1])
    del os.environ[_TOKEN]


async def _ask(
    kernels: KernelSpecManager,
    name: str,
    asked: Sequence[Question],
    stage: Stage,
    environment: Mapping[str, str],
) -> Answers:
    manager = AsyncKernelManager(kernel_name=name, kernel_spec_manager=kernels, log=silent_log())
    answers = Answers()
    started = time.monotonic()
    # What a kernel logs is nobody's here; that of a failed start is in the error.
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    await manager.start_kernel(cwd=str(stage.work), env=dict(environment), **silent)
    client = manager.client()
    try:
        client.start_channels()
        await _first_reply(client)
        answers.start_seconds = time.monotonic() - started
        await client.wait_for_ready(timeout=_START_SECONDS)
        notebook = _Notebook(manager, client, answers)
        await notebook.run(_SET_UP)
        for question in asked:
            answers.texts.append(await notebook.run(f"attempt(lambda: {question.code})"))
        return answers
    finally:
        client.stop_channels()
        await manager.shutdown_kernel(now=True)


async def _first_reply(client: Any) -> None:
    client.kernel_info()
    try:
        await client.get_shell_msg(timeout=_START_SECONDS)
    except Empty:
        raise LaunchError(
            attempt="start a kernel for the demo",
            answer=f"it gave no answer within {_START_SECONDS} s",
            remedy="See: jupyter sandbox doctor",
            step="wait-for-kernel",
        ) from None


class _Notebook:
    """Runs cells on one kernel, as a front end does, and notices when it has ended."""

    def __init__(self, manager: AsyncKernelManager, client: Any, answers: Answers) -> None:
        self._manager = manager
        self._client = client
        self._answers = answers
        self._ended = False

    async def run(self, code: str) -> str:
        """What the cell printed, or that the kernel was ended."""
        if self._ended:
            return _ENDED
        message_id = self._client.execute(code, store_history=False)
        text = ""
        deadline = time.monotonic() + _CELL_SECONDS
        while time.monotonic() < deadline:
            message = await self._next(_LOOK_SECONDS)
            if message is None:
                if not await self._manager.is_alive():
                    self._ended = True
                    self._answers.last_words = await self._read_last_words()
                    return _ENDED
            elif message["parent_header"].get("msg_id") == message_id:
                content = message["content"]
                text += content.get("text", "")
                if content.get("execution_state") == "idle":
                    return str(text).strip()
        return f"no: no answer in {_CELL_SECONDS} s"

    async def _next(self, seconds: float) -> Any:
        try:
            return await self._client.get_iopub_msg(timeout=seconds)
        except Empty:
            return None

    async def _read_last_words(self) -> str:
        while (message := await self._next(_LAST_WORDS_SECONDS)) is not None:
            if message["content"].get("name") == "stderr":
                return str(message["content"]["text"]).strip()
        return ""
