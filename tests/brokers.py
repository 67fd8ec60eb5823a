"""brokers.py - in the test process, as root: a broker, and users of the machine who ask it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import users
from facilities import public_python

from sandbox_provisioner.inside import wire
from sandbox_provisioner.warm.found import call

OTHER = 4322
# Reads code and writes its `answer`, until its input ends.
OBEY = """
import json, sys, traceback
known = {"__name__": "told"}
for line in sys.stdin:
    try:
        exec(json.loads(line), known)
        told = ["answer", known.pop("answer", None)]
    except BaseException as error:
        told = ["error", f"{type(error).__name__}: {error}", traceback.format_exc()]
    sys.stdout.write(json.dumps(told) + "\\n")
    sys.stdout.flush()
"""


def copy_code(home: Path) -> None:
    """Put our code and tests where every user may read them, in *home*."""
    home.chmod(0o755)
    repository, ours = Path(__file__).parents[1], shutil.ignore_patterns("__pycache__", ".*")
    for name in ("sandbox_provisioner", "tests"):
        shutil.copytree(repository / name, home / "code" / name, ignore=ours)


class Refused(Exception):
    """What the code of a user has raised."""


class User:
    """A Python of the user *uid*, who has no rights; it does what it is told."""

    def __init__(self, home: Path, uid: int, *sees: str) -> None:
        code = home / "code"
        modules = [str(code), f"{code}/tests", f"{code}/tests/broker", *sys.path]
        self.process = subprocess.Popen(
            [*users.with_files(home), *sees, "setpriv", f"--reuid={uid}", f"--regid={uid}",
             "--clear-groups", public_python(), "-u", "-c", OBEY],
            env={
                "PYTHONPATH": os.pathsep.join(modules), "PYTHONDONTWRITEBYTECODE": "1",
                "HOME": str(home), "PATH": os.defpath, "PYTHONUSERBASE": f"{home}/python",
            },
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, code: str, /, **values: Any) -> Any:
        """What *code* leaves as `answer`, where it has *values*; `Refused` with what it raised."""
        assert self.process.stdin and self.process.stdout
        given = "\n".join(f"{name} = {value!r}" for name, value in values.items())
        self.process.stdin.write(json.dumps(f"{given}\n{code}") + "\n")
        self.process.stdin.flush()
        kind, told, *more = json.loads(self.process.stdout.readline())
        if kind == "error":
            raise Refused(told + "\n" + "".join(more))
        return told

    def sit_down(self, broker: Broker) -> None:
        """Have `askers.py` at hand, for kernels through *broker*."""
        places = {"path": broker.socket, "runtime": str(broker.runtime), "home": str(broker.home)}
        self("from askers import *; begin(path, runtime, home)", **places)

    def __enter__(self) -> User:
        return self

    def __exit__(self, *_: object) -> None:
        """Let it end."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


class Broker:
    """The daemon, at a place of this test's own, run by *python*, which has *packages* besides its
    own, and told *more*; *lines* are what it has told."""

    def __init__(
        self,
        home: Path,
        runtime: Path,
        *more: str,
        python: str = sys.executable,
        packages: Sequence[str] = (),
    ) -> None:
        self.home, self.runtime, self.layers = home, runtime, home / "layers"
        self._words = [python, "-m", "sandbox_provisioner.app", "broker", *more]
        self._modules = os.pathsep.join([f"{home}/code", *packages])
        self.socket, self.metrics = f"{runtime}/socket", f"{runtime}/metrics"
        self.lines: list[dict[str, Any]] = []
        self.start()

    def command(self) -> list[str]:
        """That of the daemon."""
        options = ["--socket", self.socket, "--policy", f"{self.home}/policy.toml"]
        options += ["--metrics", self.metrics]
        options += ["--SandboxProvisioner.runtime_dir", str(self.runtime)]
        options += ["--SandboxProvisioner.layer_dir", str(self.layers)]
        return [*users.with_files(self.home), *self._words, *options]

    def environment(self) -> dict[str, str]:
        """The same."""
        return {"PATH": os.defpath, "PYTHONPATH": self._modules, "HOME": "/nonexistent"}

    def start(self) -> None:
        """Start it, and wait until it listens."""
        self.process = subprocess.Popen(
            self.command(), env=self.environment(),
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stderr
        self.heard("listen")

    def heard(self, event: str, sandbox_id: str = "") -> dict[str, Any]:
        """The next of what it tells that is *event*, of *sandbox_id* if that is given."""
        assert self.process.stderr
        for line in self.process.stderr:
            if not line.startswith("{"):
                self.process.kill()  # or what it says more would not end
                raise AssertionError(line + self.process.stderr.read())
            self.lines.append(json.loads(line))
            if self.lines[-1]["event"] == event and self.lines[-1].get("id", "").startswith(
                sandbox_id
            ):
                return self.lines[-1]
        raise AssertionError(f"it ended before {event}: {self.lines}")

    def kill(self) -> None:
        """As a crash would."""
        self._end(self.process.kill)

    def close(self) -> None:
        """Let it end in order."""
        if self.process.returncode is None:
            self._end(self.process.terminate)

    def _end(self, how: Callable[[], None]) -> None:
        how()
        self.process.wait(30)
        assert self.process.stderr
        self.process.stderr.close()

    def records(self) -> list[Path]:
        """Those of its kernels; links to them lie beside. Nurseries come and go meanwhile."""
        kinds = {}
        for path in self.runtime.glob("*/record.json"):
            with contextlib.suppress(FileNotFoundError):
                kinds[path] = json.loads(path.read_text())["kind"]
        kernels = [path for path, kind in kinds.items() if kind == "kernel"]
        return [path for path in kernels if not path.parent.is_symlink()]

    def nothing_is_left(self, *, retire: bool = True) -> bool:
        """Whether all sandboxes are gone before long, when nurseries that are for all servers of a
        user were asked to *retire*; no event tells of the last file."""
        end = time.monotonic() + 30
        while (found := list(self.runtime.glob("*/owner"))) and time.monotonic() < end:
            for path in self.runtime.glob("*/requests") if retire else ():
                with contextlib.suppress(BlockingIOError):  # so many of ours wait there already
                    if channel := call(path):
                        with channel:
                            channel.send(wire.message(wire.RETIRE))
            select.poll().poll(20)
        return not found

    def scraped(self) -> dict[str, float]:
        """What Prometheus gets: numbers by names with their labels."""
        with socket.socket(socket.AF_UNIX) as asks:
            asks.connect(self.metrics)
            asks.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b"".join(iter(lambda: asks.recv(1 << 16), b"")).decode()
        head, _, body = answer.partition("\r\n\r\n")
        assert head.startswith("HTTP/1.0 200 OK"), answer
        lines = [line.rpartition(" ") for line in body.splitlines() if not line.startswith("#")]
        return {name: float(number) for name, _, number in lines}

    def descriptors(self) -> int:
        """How many it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))
