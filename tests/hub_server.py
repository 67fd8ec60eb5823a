"""hub_server.py - in the test process, as root: a real JupyterHub with its real proxy, and people.

The hub runs in a mount namespace of its own, in which the machine has more users. All else is the
machine's: processes, groups, ports.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import requests
import websocket
from clients import text_of
from facilities import roots_python

from sandbox_provisioner.descriptors import is_readable
from sandbox_provisioner.facilities.caps.cgroup import CgroupTree, open_existing
from sandbox_provisioner.records import SERVER, Record, all_records, cgroup_facts, open_init
from sandbox_provisioner.sweeping import sweep
from sandbox_provisioner.warm.found import leads_to

TOKEN = "a-token-of-the-tests-0123456789"
PATIENCE_SECONDS = 200
_PAUSE_MS = 50
_PORTS = 20000, 32000
UID = 61234  # of the first one
# It does not heed the interrupt that comes just before its cap.
GREEDY = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
kept = [bytearray(b'x' * (8 << 20)) for _ in range(1000)]
"""
_WITH_USERS = """
for name in passwd group; do mount --bind "$1/$name" "/etc/$name" || exit; done
config="$1/jupyterhub_config.py" && shift && exec "$@" -m jupyterhub -f "$config"
"""
_CONFIG = """
c.JupyterHub.spawner_class = "sandbox"
c.JupyterHub.bind_url = "http://127.0.0.1:{ports[0]}"
c.JupyterHub.hub_bind_url = "http://127.0.0.1:{ports[1]}"
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{ports[2]}"
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.cleanup_servers = False
c.JupyterHub.init_spawners_timeout = {patience}  # it runs when it has looked after all servers
c.JupyterHub.services = [{{"name": "tests", "api_token": "{token}"}}]
c.JupyterHub.load_roles = [{{"name": "tests", "services": ["tests"], "scopes": [
    "admin:users", "admin:servers", "access:servers", "list:users", "read:users:activity"]}}]
c.Spawner.poll_interval = 1
c.JupyterHub.tornado_settings = {{"slow_spawn_timeout": 0}}  # whoever asks hears of all events
c.Spawner.start_timeout = c.Spawner.http_timeout = {patience}
c.Spawner.environment = {{"JUPYTERHUB_SINGLEUSER_APP": "jupyter_server.serverapp.ServerApp"}}
"""
_OF_ROOT = """
c.SandboxSpawner.runtime_dir = "{runtime}"
c.SandboxSpawner.state_dir = "{folder}/state"
"""


class Hub:
    """A hub with *people*, who have homes, and with *more* lines of configuration; all of it lies
    in *place*."""

    def __init__(self, people: Sequence[str], more: str = "", place: str = "/tmp") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sbx-", dir=place))
        self.folder.chmod(0o755)
        self.runtime = self._make_runtime()
        self.ports = [_free_port() for _ in range(3)]
        config = (_CONFIG + self.own).format(
            ports=self.ports,
            patience=PATIENCE_SECONDS,
            token=TOKEN,
            runtime=self.runtime,
            folder=self.folder,
        )
        (self.folder / "jupyterhub_config.py").write_text(config + more)
        for name in ("passwd", "group"):
            shutil.copy(f"/etc/{name}", self.folder / name)
        for number, name in enumerate(people, UID):
            self.add(name, number)
        self.pid = self._pidfd = -1
        self.log = self.folder / "hub.log"

    @property
    def own(self) -> str:
        """Lines of its configuration that a hub of root's has."""
        return _OF_ROOT

    def _make_runtime(self) -> Path:
        """Where records are; who starts boxes makes it."""
        return self.folder / "run"

    def add(self, name: str, number: int) -> None:
        """Make the user *name*, with a home."""
        home = self.home(name)
        home.mkdir(mode=0o700, parents=True)
        os.chown(home, number, number)
        with (self.folder / "passwd").open("a") as file:
            file.write(f"{name}:x:{number}:{number}::{home}:/bin/bash\n")
        with (self.folder / "group").open("a") as file:
            file.write(f"{name}:x:{number}:\n")

    def home(self, name: str) -> Path:
        """Of that person."""
        return self.folder / "home" / name

    # -- the hub

    def start(self) -> None:
        """Return when it serves: it says so."""
        users = ["unshare", "--mount", "sh", "-c", _WITH_USERS, "sh", str(self.folder)]
        self.pid = start_apart(
            [*users, *self._python()], self.log, b"JupyterHub is now running",
            cwd=self._works_in(), env=self._environment(),
        )  # fmt: skip
        self._pidfd = os.pidfd_open(self.pid)

    def _python(self) -> list[str]:
        return [sys.executable]

    def _works_in(self) -> Path:
        """Where its database and its secrets are."""
        return self.folder

    def _environment(self) -> dict[str, str]:
        """Also that of servers (env_keep). A grammar that jsonschema builds at each import, if it
        can, takes more than half of the time of a hub's or a server's start."""
        package = self.folder / "path/rfc3987_syntax"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("raise ImportError\n")
        path = os.environ["PATH"]
        return {"PATH": path, "HOME": "/root", "PYTHONPATH": str(package.parent)}

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it by *number*, and its proxy, which a killed one leaves."""
        signal.pidfd_send_signal(self._pidfd, number)
        self.await_end()

    def await_end(self) -> None:
        """It has been killed: end its proxy."""
        assert is_readable(self._pidfd, PATIENCE_SECONDS)
        os.close(self._pidfd)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """End all, whatever the tests have left; what is left then is told by who looks."""
        for name in self.people():
            with contextlib.suppress(requests.RequestException):
                self.api("DELETE", f"/users/{name}/server")
        self.end()
        for _, record in all_records(self.runtime):
            self.tree_of(record).kill()
        sweep(self.runtime, seconds=PATIENCE_SECONDS)
        shutil.rmtree(self.folder, ignore_errors=True)

    def people(self) -> list[str]:
        """Who has a server."""
        return [user["name"] for user in self.api("GET", "/users").json() if user["servers"]]

    def api(self, method: str, path: str, **options: Any) -> requests.Response:
        """Ask the hub's REST API."""
        url = f"http://127.0.0.1:{self.ports[1]}/hub/api{path}"
        return _ask(method, url, **options)

    # -- a person's server

    def begin(self, name: str) -> list[dict[str, Any]]:
        """Start the server of *name*; the events of its start, of which the last one tells how it
        went."""
        self.api("POST", f"/users/{name}")
        path = f"/users/{name}/server"
        answer = self.api("POST", path)
        if answer.status_code >= 400:
            return [{"failed": True, "message": answer.json()["message"]}]
        with self.api("GET", f"{path}/progress", stream=True) as stream:
            lines = (line for line in stream.iter_lines() if line.startswith(b"data:"))
            events = []
            for line in lines:
                events.append(json.loads(line.removeprefix(b"data:")))
                if events[-1].get("ready") or events[-1].get("failed"):
                    break
        return events

    def stop(self, name: str) -> None:
        """Return when it has ended: 202 is "not yet"."""
        answer = self.api("DELETE", f"/users/{name}/server")
        assert answer.status_code in {202, 204}, answer.text
        until(lambda: not self.api("GET", f"/users/{name}").json()["servers"])

    def record(self, name: str) -> Record:
        """Of the box of *name*'s server."""
        records = [r for _, r in all_records(self.runtime) if r.user == name]
        (found,) = [record for record in records if record.kind == SERVER]
        return found

    def kernels(self, name: str) -> dict[str, Record]:
        """Those of *name*'s kernels that have boxes, by their ids."""
        records = [r for _, r in all_records(self.runtime) if r.user == name]
        return {record.kernel_id: record for record in records if record.kind == "kernel"}

    def tree_of(self, record: Record) -> CgroupTree:
        """Its groups."""
        return open_existing(cgroup_facts(record), record.tree)

    def ask(self, name: str, method: str, path: str, **options: Any) -> requests.Response:
        """Ask the server of *name*, through the proxy."""
        url = f"http://127.0.0.1:{self.ports[0]}/user/{name}/api{path}"
        return _ask(method, url, **options)

    @contextlib.contextmanager
    def kernel(self, name: str, kernel_id: str = "", spec: str = "python3") -> Iterator[Kernel]:
        """A new kernel of *name*'s, which ends with this, or the one with that id."""
        if is_new := not kernel_id:
            answer = self.ask(name, "POST", "/kernels", json={"name": spec})
            assert answer.status_code == 201, answer.text
            kernel_id = answer.json()["id"]
        path = f"api/kernels/{kernel_id}/channels"
        with contextlib.closing(self.connect(name, path)) as connection:
            yield Kernel(kernel_id, connection)
        # jupyter_client fails where it is just being restarted; its server may have ended, too.
        if is_new:
            until(lambda: self.ask(name, "DELETE", f"/kernels/{kernel_id}").status_code != 500)

    def in_server(self, name: str, code: str, *words: str) -> str:
        """What the Python program *code*, with *words*, shows in the box of *name*'s server."""
        program, shown = (self.home(name) / f"told.{kind}" for kind in ("py", "txt"))
        program.write_text(code)
        terminal = self.ask(name, "POST", "/terminals").json()["name"]
        connection = self.connect(name, f"terminals/websocket/{terminal}")
        with contextlib.closing(connection):
            type_at(connection, f"python3 {program} {' '.join(words)} >{shown} 2>&1")
        self.ask(name, "DELETE", f"/terminals/{terminal}")
        return shown.read_text()

    def connect(self, name: str, path: str) -> websocket.WebSocket:
        """A websocket of the server of *name*, through the proxy."""
        url = f"ws://127.0.0.1:{self.ports[0]}/user/{name}/{path}"
        header = [f"Authorization: token {TOKEN}"]
        return websocket.create_connection(url, header=header, timeout=PATIENCE_SECONDS)


class Kernel:
    """A client of a kernel over the hub's websocket."""

    def __init__(self, kernel_id: str, connection: websocket.WebSocket) -> None:
        self.id = kernel_id
        self._connection = connection

    def run(self, code: str) -> str:
        """What *code* shows until it is done, errors too."""
        message = self.send(code)
        found = []
        while True:
            told = self.receive()
            if told["parent_header"].get("msg_id") != message:
                continue
            found.append(told)
            state = told["content"].get("execution_state")
            if told["header"]["msg_type"] == "status" and state == "idle":
                return text_of(found)

    def send(self, code: str) -> str:
        """Begin it; the id of the message."""
        message = uuid.uuid4().hex
        header = {
            "msg_id": message, "msg_type": "execute_request", "username": "", "session": "tests",
            "version": "5.3",
        }  # fmt: skip
        content = {"code": code, "silent": False, "user_expressions": {}, "allow_stdin": False}
        whole = {"header": header, "parent_header": {}, "metadata": {}, "content": content}
        self._connection.send(json.dumps({**whole, "channel": "shell"}))
        return message

    def receive(self) -> dict[str, Any]:
        """The next message."""
        told: dict[str, Any] = json.loads(self._connection.recv())
        return told


def start_apart(command: Sequence[str], log: Path, says: bytes, **options: Any) -> int:
    """Start it as a child of nobody's here, since it comes and goes within tests; its pid, when it
    *says* that to *log*."""
    with log.open("ab") as file:
        begins = file.tell()
        told = subprocess.run(
            ["sh", "-c", 'setsid "$@" >&2 & echo $!', "sh", *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file, check=True, **options,
        )  # fmt: skip
    pid = int(told.stdout)
    follow = ["tail", f"--bytes=+{begins + 1}", "-f", f"--pid={pid}", log]
    with subprocess.Popen(follow, stdout=subprocess.PIPE) as tail:
        assert tail.stdout
        found = any(says in line for line in tail.stdout)
        tail.kill()
    assert found, log.read_text()
    return pid


def marks_of_hub(*more: str) -> list[pytest.MarkDecorator]:
    """Of a file of tests with a hub, which needs *more*: it, and two servers, may start in one."""
    needs = (
        "root", "jupyterhub", "jupyter_server", "websocket", "requests", "unshare",
        "configurable-http-proxy",
    )  # fmt: skip
    return [pytest.mark.timeout(2 * PATIENCE_SECONDS), pytest.mark.requires(*needs, *more)]


_AnyHub = TypeVar("_AnyHub", bound=Hub)


@contextlib.contextmanager
def serving(hub: _AnyHub, config: str) -> Iterator[_AnyHub]:
    """*hub* meanwhile, with the lines *config*, in which FOLDER is its own."""
    with (hub.folder / "jupyterhub_config.py").open("a") as file:
        file.write(re.sub(r"\bFOLDER\b", str(hub.folder), config))
    try:
        hub.start()
        yield hub
    finally:
        hub.close()


def running(hub: Hub, name: str) -> str:
    """*name*, whose server runs."""
    if name not in hub.people():
        events = hub.begin(name)
        assert events[-1].get("ready"), (events, hub.log.read_text())
    return name


def person(name: str) -> Any:
    """A fixture: *name*, whose server runs."""

    @pytest.fixture(name=name)
    def one(hub: Hub) -> str:
        return running(hub, name)

    return one


def groups_of(record: Record) -> list[Path]:
    """Of the person, in each hierarchy."""
    name = os.path.dirname(os.path.dirname(record.tree))
    bases = set(record.cgroup_bases.values())
    return [Path(base, "sandbox-provisioner", name) for base in bases]


def is_gone(hub: Hub, record: Record) -> bool:
    """Whether nothing is left of a server: groups, record, and the ways in and out."""
    return not left_of(hub, record)


def left_of(hub: Hub, record: Record) -> list[Path]:
    """What there still is of those."""
    places = [
        hub.runtime / record.sandbox_id,
        Path(f"{hub.runtime}-hub", record.sandbox_id),
        Path(f"{hub.runtime}-ways", record.sandbox_id),
        *groups_of(record),
    ]
    return [path for path in places if path.exists()]


def until(is_so: Callable[[], object], else_told: Callable[[], object] = str) -> None:
    """Return when *is_so*, of which nothing tells; where it never is, with what *else_told*. Who
    asks without a pause takes the CPU that it waits for."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < end, else_told()
        select.poll().poll(_PAUSE_MS)


def until_gone(hub: Hub, record: Record) -> None:
    """Return when nothing is left of a server: groups, record, and the ways in and out."""
    until(lambda: is_gone(hub, record), lambda: left_of(hub, record))


def until_logged(hub: Hub, text: str, times: int = 1) -> None:
    """Return when the hub's log has *text* so often."""
    until(lambda: hub.log.read_text().count(text) >= times, hub.log.read_text)


def check_a_kernel_over_its_cap_ends_alone(hub: Hub, name: str, *others: str) -> None:
    """And is told why under its cell, while kernels of *name* and of *others* go on."""
    server = hub.record(name)
    with contextlib.ExitStack() as ended:
        greedy = ended.enter_context(hub.kernel(name))
        beside = [ended.enter_context(hub.kernel(one)) for one in (name, *others)]
        for kernel in beside:
            kernel.run("x = 42")
        told = greedy.send(GREEDY)
        sentence = ""
        while "memory limit" not in sentence:
            message = greedy.receive()
            if message["parent_header"].get("msg_id") == told:
                sentence = text_of([message])
        assert "reached its memory limit of 384 MiB" in sentence
        assert {kernel.run("print(x)").strip() for kernel in beside} == {"42"}
    assert is_same(hub.record(name), server)
    assert hub.ask(name, "GET", "/status").status_code == 200


def check_a_killed_server_is_noticed_and_leaves_nothing(hub: Hub, name: str) -> None:
    """Nobody has asked for its end."""
    record = hub.record(name)
    os.kill(record.init_pid, signal.SIGKILL)
    await_end(record)
    until(lambda: name not in hub.people())
    assert left_of(hub, record) == []


def check_a_stop_leaves_nothing(hub: Hub, name: str) -> None:
    """Nor of what has left its session."""
    record = hub.record(name)
    with hub.kernel(name) as kernel:
        kernel.run("import subprocess; subprocess.Popen(['setsid', 'sleep', '1000'])")
        assert any(group.exists() for group in groups_of(record))
        hub.stop(name)
    assert left_of(hub, record) == []
    assert hub.home(name).exists()


def is_same(record: Record, before: Record) -> bool:
    """Whether it is of the same box: others leave it what they have made in the home."""
    return (record.sandbox_id, record.init_pid) == (before.sandbox_id, before.init_pid)


def await_end(record: Record) -> None:
    """Return when the box of *record* has ended."""
    pidfd = open_init(record)
    if pidfd is not None:
        assert is_readable(pidfd, PATIENCE_SECONDS)
        os.close(pidfd)


def nurseries_of(hub: Hub, server: Record) -> dict[str, Record]:
    """Those of the box of *server*, once kernels can come from one."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        ready = leads_to(hub.runtime)
        records = [r for _, r in all_records(hub.runtime) if r.kind == "nursery"]
        records = [r for r in records if r.box == server.sandbox_id and r.sandbox_id in ready]
        if records:
            return {record.sandbox_id: record for record in records}
        select.poll().poll(_PAUSE_MS)
    raise AssertionError(hub.log.read_text())


def names_of_nurseries(hub: Hub) -> set[str]:
    """Of all that nurseries have in the runtime directory, which they may get at any time."""
    ids = {record.sandbox_id for _, record in all_records(hub.runtime) if record.kind == "nursery"}
    folder = os.path.realpath(hub.runtime)
    led = {name: os.path.realpath(f"{folder}/{name}") for name in os.listdir(folder)}
    return {name for name, path in led.items() if path.split("/")[folder.count("/") + 1] in ids}


def until_ready(hub: Hub, name: str) -> None:
    """Return when nothing is being made ready for *name*, of whose kernels one has started."""
    if not roots_python():
        nurseries_of(hub, hub.record(name))


def ready_for(hub: Hub, name: str) -> Record:
    """A nursery for the kernels of *name*'s server, which has none of it yet; skips where nothing
    is ready for anybody."""
    if found := roots_python():
        pytest.skip(f"not root's alone: {found}")
    with hub.kernel(name):
        return next(iter(nurseries_of(hub, hub.record(name)).values()))


@contextlib.contextmanager
def held_at_its_end(record: Record) -> Iterator[int]:
    """The box of *record* does not end as long as this lasts, also when it has been killed: its PID
    1 waits for whoever was in its namespace until their parents have (pid_namespaces(7)), and one
    has a parent outside, which is stopped. A descriptor tells when it was killed."""
    words = ["nsenter", f"--target={record.init_pid}", "--pid", "sh", "-c", "echo; exec sleep 1000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as parent:
        assert parent.stdout and parent.stdout.readline()
        parent.send_signal(signal.SIGSTOP)
        (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        pidfd = os.pidfd_open(int(child))
        try:
            yield pidfd
        finally:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
            parent.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def while_it_ends(hub: Hub, name: str) -> Iterator[Future[None]]:
    """The server of *name* is stopped, which is not over as long as this lasts: what was ready for
    it does not end."""
    record = hub.record(name)
    with ThreadPoolExecutor(1) as apart, held_at_its_end(ready_for(hub, name)) as killed:
        stopped = apart.submit(hub.stop, name)
        await_end(record)
        assert is_readable(killed, PATIENCE_SECONDS)
        yield stopped


def environment_of(record: Record, name: str) -> str:
    """A variable of the server in the box of *record*."""
    for pid in Path(f"/proc/{record.init_pid}/task/{record.init_pid}/children").read_text().split():
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        for pair in pairs:
            if pair.startswith(name.encode() + b"="):
                return pair.decode().partition("=")[2]
    raise AssertionError(name)


def type_at(terminal: websocket.WebSocket, command: str) -> str:
    """What *command* shows at a terminal of jupyter_server's."""
    mark = uuid.uuid4().hex
    terminal.send(json.dumps(["stdin", f"{command}; echo {mark[:8]}''{mark[8:]}\r"]))
    shown = ""
    while mark not in shown:
        kind, *text = json.loads(terminal.recv())
        if kind == "stdout":
            shown += text[0]
    return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", shown)


def _ask(method: str, url: str, **options: Any) -> requests.Response:
    headers = {"Authorization": f"token {options.pop('token', TOKEN)}"}
    return requests.request(method, url, headers=headers, timeout=PATIENCE_SECONDS, **options)


def _free_port() -> int:
    """Below those that Linux gives to who connects (ip(7), ip_local_port_range): a hub that is
    started again finds it free."""
    for port in random.sample(range(*_PORTS), len(range(*_PORTS))):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError(f"no port of {_PORTS} is free")
