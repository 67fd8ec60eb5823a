"""What the outer tests share: Jupyter programs as real processes, and what they read.

Every program gets directories of its own for settings, data and runtime files, so that nothing of
the person who runs the tests is read or left behind. Nobody sleeps: a program's log is read by a
thread, and whoever waits for a line of it waits for that thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import requests
import websocket
from clients import text_of

from sandbox_provisioner.records import Record, all_records, open_init
from sandbox_provisioner.sweeping import sweep

REPOSITORY = Path(__file__).parents[1]
MODEL = REPOSITORY / "kernelspecs/python3-sandbox/kernel.json"
PATIENCE_SECONDS = 60.0
TOKEN = "a-token-of-the-tests"

# A line at a time, so that the cap is reached while the cell runs and not by one refused mapping.
EAT_MEMORY = "hoard = []\nwhile True:\n    hoard.append(bytearray(b'x' * (8 << 20)))\n"

_ADDRESS = r"http://127\.0\.0\.1:\d+(?=/)"
_LOOK_AGAIN_MS = 20
_STRAGGLER_SECONDS = 3.0
_ASK_AGAIN = 20
_KERNEL_JSON = {"argv", "display_name", "language", "env", "interrupt_mode"}

Json = dict[str, Any]


class Home:
    """A short-named folder for one run of a Jupyter program: its settings, notebooks and kernels.

    Its kernelspecs name a runtime directory in it, so that its sandboxes are told from all others;
    their kernels start cold, unless a test asks for something else.
    """

    # How a Python is started here.
    python: tuple[str, ...] = (sys.executable,)

    def __init__(self, place: str = "/tmp") -> None:
        self.path = Path(tempfile.mkdtemp(prefix="sbx-", dir=place))
        self.config = self._folder("config")
        self.notebooks = self._folder("notebooks")
        self.runtime = self.path / "run"
        self.places = {
            "HOME": str(self._folder("home")),
            "JUPYTER_CONFIG_DIR": str(self.config),
            "JUPYTER_DATA_DIR": str(self._folder("user-data")),
            "JUPYTER_RUNTIME_DIR": str(self._folder("runtime")),
            "JUPYTER_PATH": str(self._folder("data")),
            "IPYTHONDIR": str(self._folder("ipython")),
        }

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        folder.mkdir()
        return folder

    def __enter__(self) -> Home:
        return self

    def __exit__(self, *_: object) -> None:
        left = self.records()
        if self.runtime.is_dir():
            sweep(self.runtime)
        shutil.rmtree(self.path)
        assert left == []

    def environment(self, **more: str) -> dict[str, str]:
        """The variables of a program that lives here."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("JUPYTER")}
        return {**kept, **self.places, **more}

    def add_kernel(self, name: str, *, without: Sequence[str] = (), **changes: Any) -> str:
        """A twin of the repository's kernelspec; *changes* are options of ours, and what stands
        in `_KERNEL_JSON` keys of any kernel.json."""
        spec = json.loads(MODEL.read_text())
        for key in _KERNEL_JSON & changes.keys():
            spec[key] = changes.pop(key)
        options = spec["metadata"]["kernel_provisioner"]["config"]
        options |= {"runtime_dir": str(self.runtime), "warm": False, **changes}
        for key in without:
            del options[key]
        folder = self.path / "data/kernels" / name
        folder.mkdir(parents=True)
        (folder / "kernel.json").write_text(json.dumps(spec))
        return name

    def records(self) -> list[Record]:
        """The sandboxes that have a record here."""
        return [record for _, record in all_records(self.runtime)]

    def prepare(self, name: str, env: Mapping[str, str]) -> None:
        """Have a nursery for the kernel *name* and programs with the environment *env*."""
        command = [sys.executable, "-m", "sandbox_provisioner.app", "warm", name]
        subprocess.run(command, cwd=self.notebooks, env=env, check=True)

    def end_nurseries(self) -> None:
        """End what `prepare` has made, which is nobody's, and all that came of it."""
        for record in self.records():
            pidfd = open_init(record)
            if pidfd is not None:
                signal.pidfd_send_signal(pidfd, record.end_signal)
                select.select([pidfd], [], [])
                os.close(pidfd)
        sweep(self.runtime)


class LoggedProgram:
    """A program whose stdout and stderr are collected as it writes them; its stdin is ours."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        python: Sequence[str] = (sys.executable,),
    ) -> None:
        self.process = subprocess.Popen(
            [*python, "-Xfaulthandler", "-m", *command],
            env=env,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as stream:
            for line in stream:
                with self._changed:
                    self._lines.append(line.decode(errors="replace"))
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    @property
    def log(self) -> str:
        """All that it has written."""
        return "".join(self._lines)

    def await_line(self, pattern: str, seconds: float = PATIENCE_SECONDS) -> str:
        """Wait until it has written a line that *pattern* is found in."""
        found: list[str] = []

        def looked() -> bool:
            found[:] = [line for line in self._lines if re.search(pattern, line)]
            return bool(found) or not self._reader.is_alive()

        with self._changed:
            self._changed.wait_for(looked, seconds)
        assert found, f"no line has {pattern!r}:\n{self.log}"
        return found[0]

    def end(self, *, kindly: bool = True) -> None:
        """Stop it, with SIGTERM or at once, and wait for its end and that of its log."""
        if self.process.poll() is None:
            (self.process.terminate if kindly else self.process.kill)()
        try:
            self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # it says first where each thread stands
            self.process.wait(PATIENCE_SECONDS)
            self._reader.join(PATIENCE_SECONDS)
            raise AssertionError(f"it has not ended:\n{self.log}") from None
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(PATIENCE_SECONDS)
            assert self.process.stdin
            self.process.stdin.close()


class Server:
    """A Jupyter server on a loopback port, asked over REST."""

    def __init__(
        self, home: Home, *, module: str = "jupyter_server", more: Mapping[str, str] | None = None
    ) -> None:
        options = {
            "ServerApp.root_dir": str(home.notebooks),
            "ServerApp.port": "0",
            "ServerApp.ip": "127.0.0.1",
            "ServerApp.open_browser": "False",
            "ServerApp.allow_root": "True",
            "IdentityProvider.token": TOKEN,
            **(more or {}),
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        self.home = home
        words = [module, *words]
        self.program = LoggedProgram(words, home.environment(), home.notebooks, home.python)
        try:
            line = self.program.await_line(_ADDRESS)
            self.url = re.findall(_ADDRESS, line)[0]
            self._await_listening()
        except BaseException:
            self.program.end(kindly=False)
            raise

    def _await_listening(self) -> None:
        """It tells its address a moment before it listens there, and of that it tells nobody."""
        port = int(self.url.rpartition(":")[2])
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS).close()
                return
            assert self.program.process.poll() is None, self.log
            select.poll().poll(_LOOK_AGAIN_MS)
        raise AssertionError(f"{self.url} does not listen:\n{self.log}")

    @property
    def log(self) -> str:
        """What it has logged."""
        return self.program.log

    def ask(self, method: str, path: str, body: Json | None = None) -> requests.Response:
        """One request to its REST interface."""
        headers = {"Authorization": f"token {TOKEN}"}
        return requests.request(
            method, f"{self.url}/api/{path}", json=body, headers=headers, timeout=PATIENCE_SECONDS
        )

    def post_session(self, kernel: str, path: str = "notebook.ipynb") -> requests.Response:
        """What JupyterLab asks for when a notebook is opened."""
        body = {"path": path, "name": path, "type": "notebook", "kernel": {"name": kernel}}
        return self.ask("POST", "sessions", body)

    @contextlib.contextmanager
    def session(self, kernel: str, path: str = "notebook.ipynb") -> Iterator[KernelSocket]:
        """A notebook's kernel with one client on its websocket; both gone afterwards."""
        answer = self.post_session(kernel, path)
        assert answer.status_code == 201, answer.text
        found = answer.json()
        try:
            with contextlib.closing(KernelSocket(self, found["kernel"]["id"])) as client:
                yield client
        finally:
            gone = self.ask("DELETE", f"sessions/{found['id']}")
            assert gone.status_code == 204, f"{gone.text}\n{self.log}"

    def end(self, *, kindly: bool = True) -> None:
        """Stop it; unkindly is kill -9."""
        self.program.end(kindly=kindly)


def end_lab(server: Server) -> None:
    """End a JupyterLab whose pages may still ask for something. Its loop stops with SIGTERM, and
    Python waits for ever then for a thread of anyio's in which somebody reads a file."""
    server.end(kindly=False)


class KernelSocket:
    """One front end of a kernel: the server's websocket."""

    def __init__(self, server: Server, kernel_id: str) -> None:
        self.server = server
        self.kernel_id = kernel_id
        self.seen: list[Json] = []
        self._count = 0
        self._socket = websocket.create_connection(
            f"{server.url.replace('http', 'ws', 1)}/api/kernels/{kernel_id}/channels",
            header=[f"Authorization: token {TOKEN}"],
            timeout=PATIENCE_SECONDS,
        )

    def close(self) -> None:
        """Go away."""
        self._socket.close()

    def send(
        self, kind: str, channel: str = "shell", header: Json | None = None, **content: Any
    ) -> str:
        """Send one message; its id."""
        self._count += 1
        names = {"session": "tests", "username": "tests", "version": "5.4", "date": ""}
        message = {
            "header": {"msg_id": f"message-{self._count}", "msg_type": kind, **names}
            | (header or {}),
            "parent_header": {},
            "metadata": {},
            "content": content,
            "channel": channel,
            "buffers": [],
        }
        self._socket.send(json.dumps(message))
        return str(message["header"]["msg_id"])

    def execute(self, code: str, *, header: Json | None = None, allow_stdin: bool = False) -> str:
        """Run *code* as a front end does; its id."""
        return self.send(
            "execute_request",
            header=header,
            code=code,
            silent=False,
            store_history=True,
            user_expressions={},
            allow_stdin=allow_stdin,
            stop_on_error=True,
        )

    def until(
        self, wanted: Callable[[Json], bool], seconds: float = PATIENCE_SECONDS
    ) -> list[Json]:
        """Receive up to and with the first message that is *wanted*; all that came."""
        came = []
        end = time.monotonic() + seconds
        while True:
            self._socket.settimeout(max(0.1, end - time.monotonic()))
            message = json.loads(self._socket.recv())
            came.append(message)
            self.seen.append(message)
            if wanted(message):
                return came

    def until_status(self, state: str) -> list[Json]:
        """Receive up to a status message that says *state*."""
        return self.until(lambda message: message["content"].get("execution_state") == state)

    def until_idle(self, message_id: str) -> list[Json]:
        """Receive up to the end of what *message_id* asked for; those of it."""
        came = self.until(_is_idle_of(message_id))
        return [message for message in came if parent_of(message) == message_id]

    def await_kernel(self) -> None:
        """Wait until a kernel, perhaps a new one, has answered us and its iopub reaches us.

        A server's sockets find a new kernel one by one, so that an answer on shell may come while
        iopub is still lost: then ask again.
        """
        for _ in range(_ASK_AGAIN):
            asked = self.send("kernel_info_request")
            with contextlib.suppress(websocket.WebSocketTimeoutException):
                self.until(_is_idle_of(asked), _STRAGGLER_SECONDS)
                return
        raise AssertionError(f"iopub is lost:\n{self.server.log}")

    def run(self, code: str) -> str:
        """Run *code* and return what it showed, errors too."""
        return text_of(self.until_idle(self.execute(code)))


def parent_of(message: Json) -> str:
    """The id of the request that *message* answers, "" for none."""
    return str((message.get("parent_header") or {}).get("msg_id", ""))


def _is_idle_of(asked: str) -> Callable[[Json], bool]:
    def is_idle(message: Json) -> bool:
        return parent_of(message) == asked and message["content"].get("execution_state") == "idle"

    return is_idle


def kind_of(message: Json) -> str:
    """The type of *message*."""
    return str(message["header"]["msg_type"])
