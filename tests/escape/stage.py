"""stage.py - in the test process: what is attacked, and kernels to attack it from."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import clients
import pytest
from frame import Attempt, Variant, source_of
from jupyter_client.manager import KernelManager
from tools import SECRET

from sandbox_provisioner import gateway_life
from sandbox_provisioner.facilities.rights.plan.syscall_numbers import NUMBERS
from sandbox_provisioner.provisioner import StartRefused
from sandbox_provisioner.unboxed import guarded_command
from sandbox_provisioner.warm import ahead

PATIENCE = 60
# For a cell in which hundreds of attempts are made, each in a process of its own: some seconds.
_MANY_SECONDS = 240
MARKER = "a-process-of-the-host"
_MACHINE = 0 if os.uname().machine == "x86_64" else 1
_ROOM_KEY, _IPC_CREAT, _IPC_RMID = 0x5B0C5, 0o1000, 0
# Where a test has no cgroups, a kernel of an ordinary user goes without: there its caps are not
# what is attacked.
_WAIVED = dict.fromkeys(("memory", "cpu", "cpuset", "pids"), "warn")


def prelude() -> str:
    """`tools`, with the numbers of this machine."""
    numbers = {name: both[_MACHINE] for name, both in NUMBERS.items() if both[_MACHINE] is not None}
    text = (Path(__file__).parent / "tools.py").read_text()
    return text.replace("NUMBERS: dict[str, int] = {}", f"NUMBERS = {numbers}")


class _TellSecret(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        """To whoever comes."""
        self.request.sendall(SECRET.encode())


class Stage:
    """A place with all that an attack is after, a work directory beside it, and the settings of a
    server; kernels start in it, in the way of one variant."""

    def __init__(self, variant: Variant, closing: contextlib.ExitStack) -> None:
        self.variant = variant
        self.place = Path(tempfile.mkdtemp(prefix="sbx-", dir=None if os.geteuid() else "/opt"))
        # However deep it is.
        closing.callback(subprocess.run, ["rm", "-rf", str(self.place)], check=True)
        self.place.chmod(0o755)
        for name in (
            "work",
            "server",
            "run",
            "data",
            "other",
            "open",
            "plain",
            "ipython",
            "jr",
            "config",
        ):
            (self.place / name).mkdir(mode=0o700 if name in {"run", "jr"} else 0o755)
        self.workdir, self.runtime = self.place / "work", self.place / "run"
        (self.place / "other/secret").write_text(SECRET)
        (self.place / "open").chmod(0o777)
        (self.place / "open/moves").mkdir(mode=0o777)
        (self.place / "open/file").write_text("as it was")
        (self.place / "open/file").chmod(0o666)
        for number in range(1, 6):
            (self.place / f"plain/s-{number}").touch()
        patch = closing.enter_context(pytest.MonkeyPatch.context())
        patch.chdir(self.place / "server")
        patch.setenv("JUPYTER_PATH", str(self.place / "data"))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(self.place / "jr"))
        patch.setenv("JUPYTER_CONFIG_DIR", str(self.place / "config"))
        patch.setenv("IPYTHONDIR", str(self.place / "ipython"))
        patch.setenv("JUPYTER_TOKEN", SECRET)
        # What is prepared in the background waits for an idle machine; here a test waits for it.
        patch.setattr(ahead, "_PATIENCE_SECONDS", 0.0)
        self.patch = patch
        self.closing = closing
        self.facts: dict[str, Any] = {}

    def fill(self) -> None:
        """Bring up the processes and sockets that an attack inside is after."""
        environment = {**os.environ, "MARKER": MARKER, "TOKEN": SECRET}
        if os.geteuid() == 0:
            shutil.copy("/usr/bin/id", self.workdir / "set-id")
            (self.workdir / "set-id").chmod(0o4755)
            os.mknod(self.workdir / "device", 0o020666, os.makedev(1, 3))
        victim = subprocess.Popen(["sleep", "1000"], env=environment, stdin=subprocess.DEVNULL)
        self.closing.callback(_end, victim)
        abstract = f"\0{self.place.name}"
        for family, address in (
            (socket.AF_UNIX, str(self.place / "open/socket")),
            (socket.AF_UNIX, str(self.workdir / "daemon")),
            (socket.AF_UNIX, abstract),
            (socket.AF_INET, ("127.0.0.1", 0)),
        ):
            listener = socket.socket(family)
            self.closing.callback(listener.close)
            listener.bind(address)
            listener.listen(64)
        port = listener.getsockname()[1]
        (self.place / "open/socket").chmod(0o777)
        own, own_port = self._serve_secret()
        self.facts |= {
            "place": str(self.place),
            "workdir": str(self.workdir),
            "secret": str(self.place / "other/secret"),
            "other": str(self.place / "other"),
            "open": str(self.place / "open"),
            "socket": str(self.place / "open/socket"),
            "daemon": str(self.workdir / "daemon"),
            "runtime": str(self.runtime),
            "abstract": abstract,
            "port": port,
            "own": own,
            "own_port": own_port,
            "name": socket.gethostname(),
            "pid": victim.pid,
            "server": os.getpid(),
            "marker": MARKER,
            "uid": os.geteuid(),
            "sockets": str(self.place / "plain"),
            "set_id": str(self.workdir / "set-id"),
            "device": str(self.workdir / "device"),
            "boxed": False,
            "python": os.path.realpath(sys.executable),
            # What a box has to show of the environment, wherever that lies.
            "modules": [sys.prefix, *sys.path],
            "release_agent": _release_agent(),
            **self._ipc(),
        }

    def _serve_secret(self) -> tuple[str, int]:
        """A server at an address of this machine that may be no loopback address."""
        server = socketserver.ThreadingTCPServer(
            (socket.gethostbyname(socket.gethostname()), 0), _TellSecret
        )
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.closing.callback(server.server_close)
        self.closing.callback(server.shutdown)
        address, port = server.server_address[:2]
        return str(address), port

    def _ipc(self) -> dict[str, Any]:
        """A shared memory segment, a queue, and a file in /dev/shm."""
        libc = ctypes.CDLL(None, use_errno=True)
        key = _ROOM_KEY + os.getpid()
        segment = libc.shmget(key, 4096, _IPC_CREAT | 0o666)
        self.closing.callback(libc.shmctl, segment, _IPC_RMID, None)
        shared = Path("/dev/shm", self.place.name)
        shared.write_text(SECRET)
        self.closing.callback(shared.unlink)
        name = f"/{self.place.name}".encode()
        os.close(libc.mq_open(name, os.O_CREAT | os.O_RDWR, 0o666, None))
        self.closing.callback(libc.mq_unlink, name)
        return {"shm_key": key, "shm_file": str(shared), "queue": name.decode()[1:]}

    # -- kernels

    def kernelspec(self, **options: Any) -> str:
        """Write one; its name."""
        confined = {**self.variant.options, **options}
        argv = confined.pop("argv", None) or [
            sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}",
        ]  # fmt: skip
        name = "python-landlock" if "confinement" in confined else "python-boxed"
        config: dict[str, Any] = {"runtime_dir": str(self.runtime), "warm": False, **confined}
        if self.variant.group != "root":
            config["on_missing"] = _WAIVED
        folder = self.place / "data/kernels" / name
        folder.mkdir(parents=True, exist_ok=True)
        stanza = {"provisioner_name": "sandbox-provisioner", "config": config}
        spec = {
            "argv": guarded_command(argv, sys.executable),
            "display_name": name,
            "language": "python",
            "metadata": {"kernel_provisioner": stanza},
        }
        (folder / "kernel.json").write_text(json.dumps(spec))
        return name

    @contextlib.contextmanager
    def kernel(self, cwd: str | Path = "", **options: Any) -> Iterator[Kernel]:
        """A running kernel; where the variant is warm, one from what the kernel before it left."""
        cwd, name = str(cwd or self.workdir), self.kernelspec(**options)
        if self.variant.options.get("warm"):
            with self._started(name, cwd):
                ahead.wait()
        with self._started(name, cwd) as kernel:
            assert kernel.came_from == self.variant.options.get("spares", 0) + bool(
                self.variant.options.get("warm")
            )
            yield kernel

    @contextlib.contextmanager
    def _started(self, name: str, cwd: str) -> Iterator[Kernel]:
        manager = KernelManager(kernel_name=name)
        manager.start_kernel(cwd=cwd)
        client = None
        try:
            client = manager.client()
            client.start_channels()
            client.wait_for_ready(timeout=PATIENCE)
            yield Kernel(manager, client)
        finally:
            if client:
                client.stop_channels()
            manager.shutdown_kernel(now=True)

    def tries(self, cwd: str | Path, code: str, **options: Any) -> str:
        """What *code* says in a kernel that was started in *cwd*, or "refused"."""

        def run() -> str:
            with self.kernel(cwd, **options) as kernel:
                return kernel.run(code).strip()

        return self.outcome(run)

    def outcome(self, start: Callable[[], str]) -> str:
        """Its answer, or "refused": by a sentence, and by nothing else."""
        try:
            return start()
        except StartRefused:
            return "refused"

    def guarded_argv(self) -> list[str]:
        """What a front end runs that knows nothing of provisioners."""
        path = self.place / f"data/kernels/{self.kernelspec()}/kernel.json"
        argv: list[str] = json.loads(path.read_text())["argv"]
        return argv

    def packages(self) -> list[str]:
        """Where the kernel's packages lie."""
        return [path for path in sys.path if path.endswith("site-packages")]

    def facts_inside(self, kernel: Kernel) -> dict[str, Any]:
        """The same facts as the kernel meets them."""
        record = kernel.manager.provisioner.handle.record
        shared = self.variant.group == "landlock"
        sockets = f"{self.runtime}/{record.sandbox_id}/sockets" if shared else "/run/kernel"
        return self.facts | {"boxed": True, "sockets": sockets}


class Kernel:
    """A kernel that runs, and who speaks to it."""

    def __init__(self, manager: Any, client: Any) -> None:
        self.manager = manager
        self.client = client

    @property
    def came_from(self) -> int:
        """0: a launcher, 1: a nursery, 2: a spare."""
        record = self.manager.provisioner.handle.record
        return bool(record.nursery) + bool(record.group and record.group != record.sandbox_id)

    def restart(self) -> None:
        """Anew, at the same place."""
        self.manager.restart_kernel(now=True)
        self.client.wait_for_ready(timeout=PATIENCE)

    def run(self, code: str, **options: Any) -> str:
        """What *code* printed or answered, with the text of an error."""
        return clients.run(self.client, code, **options)

    def answers(self, attempts: Iterable[Attempt], facts: Mapping[str, Any]) -> dict[int, str]:
        """Let it make these *attempts*, all in one cell."""
        self.run(f"exec(compile({prelude()!r}, 'tools', 'exec'))")
        code = f"print(run_jobs({jobs_of(attempts)!r}, {dict(facts)!r}))"
        said = self.run(code, timeout=_MANY_SECONDS)
        # What the gateway has to say stands beside it.
        found = next(line for line in said.splitlines() if line.startswith("{"))
        return {int(number): answer for number, answer in json.loads(found).items()}


def jobs_of(attempts: Iterable[Attempt], *, plain: bool = False) -> list[Any]:
    """What `tools.run_jobs` takes."""
    found = []
    for attempt in attempts:
        act = attempt.without if plain and attempt.without else attempt.act
        found.append([attempt.number, act.__name__, source_of(act), attempt.arguments])
    return found


def plain_answers(attempts: Iterable[Attempt], facts: Mapping[str, Any]) -> dict[int, str]:
    """The same from a process without a box, which has inherited a descriptor of the root."""
    root = os.open("/", os.O_RDONLY)
    try:
        done = subprocess.run(
            ["unshare", "--mount", "--uts", sys.executable, "-c", prelude() + "\nserve()"],
            input=repr((jobs_of(attempts, plain=True), dict(facts))) + "\n",
            cwd=facts["workdir"], pass_fds=[root], capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        os.close(root)
    assert done.returncode == 0, done.stderr
    return {int(number): answer for number, answer in json.loads(done.stdout).items()}


@contextlib.contextmanager
def stage_for(variant: Variant) -> Iterator[Stage]:
    """One, which is gone at the end, with all that was started in it."""
    with contextlib.ExitStack() as closing:
        stage = Stage(variant, closing)
        closing.callback(gateway_life.end_own)
        closing.callback(ahead.end_own)
        yield stage


def host_of(stage: Stage) -> SimpleNamespace:
    """Its facts, for functions that look from outside."""
    return SimpleNamespace(**stage.facts)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _release_agent() -> str:
    """A file of cgroup v1 that names a program to run as root."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup" and os.path.exists(f"{place}/release_agent"):
            return f"{place}/release_agent"
    return "/sys/fs/cgroup/memory/release_agent"
