"""broker.py - as root: starts a kernel in turn by itself, and as a user through the broker.

Both end when its program runs, in a box of the same kind: root's ids, mapped mounts, groups with a
cap. So the difference is what asking costs: the message, the descriptors, and eyes. Each round has
a cold start, one from a nursery and one from a spare, of each of both, one right after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import common, nurseries
from sandbox_provisioner.broker.launcher import BrokeredHandle, BrokerLauncher
from sandbox_provisioner.broker.talk import ask
from sandbox_provisioner.broker.wishes import Question, written
from sandbox_provisioner.contract import Labels, Stdio, Warmth
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.plan import CONNECTIONS, LaunchRequest
from sandbox_provisioner.spec import Limits, SandboxSpec
from sandbox_provisioner.warm import ahead
from sandbox_provisioner.warm.launcher import WarmLauncher

_USER = "nobody"
# The machine's own, with the packages of ours: a user may not be able to run ours.
_PROGRAM = "/usr/bin/python3"
_PACKAGES = sysconfig.get_path("purelib")
_SILENT = Stdio(subprocess.DEVNULL, subprocess.DEVNULL, subprocess.DEVNULL)
_WARMTH = {"cold": None, "nursery": Warmth(), "spare": Warmth(spares=1)}
# CPUCLOCK_SCHED of a process (clock_getcpuclockid(3)).
_CLOCK_OF_PROCESS = 2
# Milliseconds until it ran, of CPU time in who asked and launched, and of one question about it.
Sample = tuple[float, float, float]


def main(rounds: int, json: str | None) -> None:
    """Called by `python -m benchmarks broker`."""
    if os.geteuid():
        raise SystemExit("This benchmark starts a broker, which takes root.")
    with tempfile.TemporaryDirectory(prefix="sbx-", dir="/run") as root:
        samples = _measured(Path(root), rounds)
    rows = []
    for kind, pairs in samples.items():
        for what, number in (("start, ms", 0), ("CPU time, ms", 1)):
            local, broker = ([one[side][number] for one in pairs] for side in (0, 1))
            added = [other - one for one, other in zip(local, broker, strict=True)]
            shown = (
                common.format_spread(common.spread(values), 1) for values in (local, broker, added)
            )
            rows.append([kind, what, *shown, _between(added)])
    print(common.format_table([["", "", "local", "broker", "added", "between"], *rows]))
    questions = [broker[2] for pairs in samples.values() for _, broker in pairs]
    print(f"A question about a kernel, ms: {common.format_spread(common.spread(questions), 2)}")
    if json:
        common.save_json(json, samples)


def _between(added: list[float]) -> str:
    """Where the median of endlessly many rounds lies, 19 times of 20, by their order."""
    ordered, half = sorted(added), 0.98 * len(added) ** 0.5
    low, high = int(len(added) / 2 - half), int(len(added) / 2 + half)
    return f"{ordered[max(low, 0)]:+.1f} and {ordered[min(high, len(added) - 1)]:+.1f}"


def _measured(root: Path, rounds: int) -> dict[str, list[tuple[Sample, Sample]]]:
    entry = pwd.getpwnam(_USER)
    for name, owner in (("work", entry.pw_uid), ("home", entry.pw_uid), ("own", 0)):
        (root / name).mkdir()
        os.chown(root / name, owner, entry.pw_gid if owner else 0)
    root.chmod(0o755)
    local = WarmLauncher(runtime_dir=str(root / "local"))
    samples: dict[str, list[tuple[Sample, Sample]]] = {kind: [] for kind in _WARMTH}
    with _broker(root) as pid, _as_user(entry, root, pid) as timed, contextlib.ExitStack() as stack:
        stack.callback(ahead.end_own)
        for number in range(rounds + 2):
            for kind in _WARMTH:
                pair = asyncio.run(_timed(local, str(root / "own"), kind, 0)), timed(kind)
                if number > 1:  # the first ones find nothing ready
                    samples[kind].append(pair)
    return samples


def _cpu_seconds(pid: int) -> float:
    """What the process *pid* has used, 0 for no process."""
    return time.clock_gettime(~pid << 3 | _CLOCK_OF_PROCESS) if pid else 0.0


def _request(workdir: str) -> LaunchRequest:
    spec = SandboxSpec(workdir=workdir, limits=Limits(memory_bytes=1 << 30))
    names = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
    info = {"transport": "ipc", "ip": "/run/kernel/s", "key": uuid.uuid4().hex,
            "signature_scheme": "hmac-sha256"}  # fmt: skip
    info |= {name: number for number, name in enumerate(names, 1)}
    return LaunchRequest(
        sandbox_id=uuid.uuid4().hex[:12],
        spec=spec,
        argv=(_PROGRAM, "-m", "ipykernel_launcher", "-f", f"{CONNECTIONS}/kernel.json"),
        environment={"PATH": os.defpath, "PYTHONPATH": _PACKAGES},
        cwd=workdir,
        connection_file=("kernel.json", json.dumps(info)),
    )


async def _timed(launcher: Any, workdir: str, kind: str, broker: int) -> Sample:
    """One start. What it is made from is ready before."""
    warmth, labels, request = _WARMTH[kind], Labels(name="timed"), _request(workdir)
    if warmth:
        await launcher.fill(request, labels, warmth)
    used = time.process_time() + _cpu_seconds(broker)
    begin = time.perf_counter()
    if warmth:
        handle = await launcher.start_prepared(request, labels, _SILENT, warmth)
    else:
        await off_loop(launcher.sweep)  # as a server does, and the broker in its place
        handle = await launcher.start(request, labels, _SILENT)
    taken = time.perf_counter() - begin
    used = time.process_time() + _cpu_seconds(broker) - used
    await handle.ready()  # a kernel that begins takes from the next start's time
    question = await _question(handle) if broker else 0.0
    await handle.close()
    return taken * 1000, used * 1000, question * 1000


async def _question(handle: BrokeredHandle) -> float:
    """What is the least of any start: to call, and to hear with a descriptor of a kernel."""
    card = handle.card()
    init = card["init_pid"], card["init_start"]
    begin = time.perf_counter()
    _, end = await ask(
        card["broker"], written(Question(ask="find", sandbox_id=card["id"], init=init))
    )
    taken = time.perf_counter() - begin
    os.close(end)
    return taken


@contextlib.contextmanager
def _broker(root: Path) -> Iterator[int]:
    words = [sys.executable, "-m", "sandbox_provisioner.app", "broker"]
    places = ["--socket", f"{root}/socket", "--SandboxProvisioner.runtime_dir", f"{root}/broker"]
    process = subprocess.Popen([*words, *places], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        assert "listen" in process.stderr.readline()
        yield process.pid
    finally:
        is_over = nurseries.end_all(root / "broker")  # or it leaves them to the next broker
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert is_over


@contextlib.contextmanager
def _as_user(
    entry: pwd.struct_passwd, root: Path, broker: int
) -> Iterator[Callable[[str], Sample]]:
    """A fork of ours that has become the user: each call is a start of theirs."""
    there, here = os.pipe()
    back, answers = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(here)
        os.setgroups([])
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
        os.environ["HOME"] = f"{root}/home"  # ours is one that the user cannot look into
        launcher = BrokerLauncher(f"{root}/socket", print, f"{root}/broker")
        try:
            while kind := os.read(there, 16).decode():
                sample = asyncio.run(_timed(launcher, f"{root}/work", kind, broker))
                os.write(answers, json.dumps(sample).encode())
        finally:
            os._exit(0)  # nothing of its parent's is to be undone here
    os.close(there)

    def timed(kind: str) -> Sample:
        os.write(here, kind.encode())
        taken, used, question = json.loads(os.read(back, 256))
        return taken, used, question

    try:
        yield timed
    finally:
        os.close(here)
        os.waitpid(pid, 0)
        os.close(back)
        os.close(answers)
