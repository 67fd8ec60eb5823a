"""broker.py - as root: starts a command in turn by itself, and as a user through the broker.

Both end when the command has been executed, in a box of the same kind: root's ids, mapped mounts,
groups with a cap. So the difference is what asking costs: the message, the descriptors, and eyes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import common
from sandbox_provisioner.broker.launcher import BrokerLauncher
from sandbox_provisioner.contract import Stdio
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.plan import LaunchRequest
from sandbox_provisioner.spec import Limits, SandboxSpec

_USER = "nobody"
_SILENT = Stdio(subprocess.DEVNULL, subprocess.DEVNULL, subprocess.DEVNULL)


def main(rounds: int, json: str | None) -> None:
    """Called by `python -m benchmarks broker`."""
    if os.geteuid():
        raise SystemExit("This benchmark starts a broker, which takes root.")
    with tempfile.TemporaryDirectory(prefix="sbx-", dir="/run") as root:
        times = _measured(Path(root), rounds)
    pairs = zip(times["broker"], times["local"], strict=True)
    shown = {**times, "added": [other - one for other, one in pairs]}
    rows = [[name, common.format_spread(common.spread(shown[name]), 1)] for name in shown]
    print(common.format_table([["", "start, ms"], *rows]))
    if json:
        common.save_json(json, times)


def _measured(root: Path, rounds: int) -> dict[str, list[float]]:
    entry = pwd.getpwnam(_USER)
    for name, owner in (("work", entry.pw_uid), ("own", 0)):
        (root / name).mkdir()
        os.chown(root / name, owner, entry.pw_gid if owner else 0)
    root.chmod(0o755)
    local = LocalLauncher(runtime_dir=str(root / "local"))
    times: dict[str, list[float]] = {"local": [], "broker": []}
    with _broker(root), _as_user(entry, root) as ask:
        for number in range(rounds + 2):
            one = asyncio.run(_timed(local, str(root / "own")))
            other = ask()
            if number > 1:  # the first ones find nothing ready
                times["local"].append(one)
                times["broker"].append(other)
    return times


async def _timed(launcher: Any, workdir: str) -> float:
    """The milliseconds of one start."""
    spec = SandboxSpec(workdir=workdir, limits=Limits(memory_bytes=1 << 30))
    request = LaunchRequest(
        sandbox_id=uuid.uuid4().hex[:12],
        spec=spec,
        argv=("/bin/sleep", "600"),
        environment={"PATH": os.defpath},
        cwd=workdir,
        connection_file=("kernel.json", "{}"),
    )
    begin = time.perf_counter()
    await off_loop(launcher.sweep)  # as a server does, and the broker in its place
    handle = await launcher.start(request, stdio=_SILENT)
    taken = (time.perf_counter() - begin) * 1000
    await handle.close()
    return taken


@contextlib.contextmanager
def _broker(root: Path) -> Iterator[None]:
    words = [sys.executable, "-m", "sandbox_provisioner.app", "broker"]
    places = ["--socket", f"{root}/socket", "--SandboxProvisioner.runtime_dir", f"{root}/broker"]
    process = subprocess.Popen([*words, *places], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        assert "listen" in process.stderr.readline()
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


@contextlib.contextmanager
def _as_user(entry: pwd.struct_passwd, root: Path) -> Iterator[Callable[[], float]]:
    """A fork of ours that has become the user: each call is a start of theirs."""
    there, here = os.pipe()
    back, answers = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(here)
        os.setgroups([])
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
        launcher = BrokerLauncher(f"{root}/socket", print, f"{root}/broker")
        while os.read(there, 1):
            taken = asyncio.run(_timed(launcher, f"{root}/work"))
            os.write(answers, f"{taken}\n".encode())
        os._exit(0)
    os.close(there)

    def ask() -> float:
        os.write(here, b"1")
        return float(os.read(back, 64))

    try:
        yield ask
    finally:
        os.close(here)
        os.waitpid(pid, 0)
        os.close(back)
        os.close(answers)
