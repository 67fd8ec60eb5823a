"""crowd.py - as root: many users of one machine, each with some kernels through one broker, or with
a server of a hub's (`crowd_hub.py`).

Each user is a process of its own, as a Jupyter server is, with ids that nobody has. They come one
after the other, and stay; then all kernels answer, the broker is looked at, and all end. The Python
that runs this has to be one that every user may run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from benchmarks import common
from sandbox_provisioner.records import all_records

_FIRST_UID = 61300
_SECONDS = 300
_MOST_DESCRIPTORS = 4096


def main(users: int, kernels: int, through: str, json_file: str | None) -> None:
    """Called by `python -m benchmarks crowd`."""
    if os.geteuid():
        raise SystemExit("This benchmark starts a broker or a hub, which takes root.")
    if through == "hub":
        from benchmarks import crowd_hub  # which needs jupyterhub and its proxy

        crowd_hub.main(users, kernels, json_file)
        return
    if through != "broker":
        raise SystemExit("--through is broker or hub.")
    root = Path(tempfile.mkdtemp(prefix="sbx-", dir="/run"))
    try:
        root.chmod(0o755)
        with _broker(root) as broker:
            found = _measured(root, broker, users, kernels)
        found["left"] = len(all_records(root / "broker"))
    finally:
        shutil.rmtree(root)
    print(common.format_machine(common.machine()))
    print(common.format_table(_table(found, users * kernels)))
    if json_file:
        common.save_json(json_file, found)


def _measured(root: Path, broker: int, users: int, kernels: int) -> dict[str, Any]:
    found: dict[str, Any] = {"before": _state(broker)}
    crowd: list[_User] = []
    try:
        for number in range(users):
            crowd.append(_User(root, _FIRST_UID + number))
        found["start"] = [ms for user in crowd for ms in user.ask(f"start {kernels}")]
        found["alive"] = _state(broker)
        found["memory"] = [_memory(record.init_pid) for _, record in all_records(root / "broker")]
        found["answer"] = [ms for user in crowd for ms in user.ask("answer")]
        begin = time.perf_counter()
        text = _scraped(f"{root}/metrics")
        found["scrape"] = [1e3 * (time.perf_counter() - begin)]
        found["told"] = sum(line.startswith("sandbox_provisioner_memory") for line in text)
        found["end"] = [ms for user in crowd for ms in user.ask("end")]
        found["after"] = _state(broker)
    finally:
        for user in crowd:
            user.close()
    return found


def _table(found: dict[str, Any], kernels: int) -> list[tuple[str, ...]]:
    rows = [("", "")]
    for name in ("start", "answer", "end", "scrape"):
        rows.append((f"{name}, ms", common.format_spread(common.spread(found[name]))))
    rows.append(("memory of a kernel, MiB", common.format_spread(common.spread(found["memory"]))))
    for when in ("before", "alive", "after"):
        rows.append((f"broker {when}", ", ".join(f"{v} {k}" for k, v in found[when].items())))
    rows.append(("kernels, users told, left", f"{kernels}, {found['told']}, {found['left']}"))
    return rows


def _state(broker: int) -> dict[str, int]:
    status = Path(f"/proc/{broker}/status").read_text()
    resident = int(status.partition("VmRSS:")[2].split()[0]) >> 10
    return {
        "MiB": resident,
        "descriptors": len(os.listdir(f"/proc/{broker}/fd")),
        "threads": int(status.partition("Threads:")[2].split()[0]),
    }


def _memory(pid: int) -> float:
    """MiB of what a sandbox's processes have for themselves, and their part of what others have."""
    return common.pss_bytes(common.descendants(pid) | {common.process(pid)}) / (1 << 20)


def _scraped(path: str) -> list[str]:
    with socket.socket(socket.AF_UNIX) as asks:
        asks.connect(path)
        asks.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        return b"".join(iter(lambda: asks.recv(1 << 16), b"")).decode().splitlines()


@contextlib.contextmanager
def _broker(root: Path) -> Iterator[int]:
    words = [sys.executable, "-m", "sandbox_provisioner.app", "broker"]
    places = ["--socket", f"{root}/socket", "--metrics", f"{root}/metrics"]
    places += ["--SandboxProvisioner.runtime_dir", f"{root}/broker"]
    with (root / "log").open("wb") as log:
        process = subprocess.Popen([*words, *places], stderr=log)
    try:
        assert common.wait_until((root / "metrics").exists, _SECONDS, time.sleep)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


class _User:
    """A fork of ours that has become the user *uid*; each line to it is answered by one."""

    def __init__(self, root: Path, uid: int) -> None:
        place = root / f"home-{uid}"
        place.mkdir()
        os.chown(place, uid, uid)
        here, there = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            own = there.fileno()
            os.closerange(3, own)  # whoever has a copy of our end of another's keeps that one alive
            os.closerange(own + 1, _MOST_DESCRIPTORS)
            _be(uid, place, root, there.makefile("rwb", buffering=0))
        there.close()
        self._channel = here.makefile("rwb", buffering=0)
        here.close()

    def ask(self, word: str) -> list[float]:
        """Milliseconds, of each kernel."""
        self._channel.write(f"{word}\n".encode())
        found: list[float] = json.loads(self._channel.readline())
        return found

    def close(self) -> None:
        """It ends, and all that it has."""
        self._channel.close()
        os.waitpid(self._pid, 0)


def _be(uid: int, place: Path, root: Path, channel: Any) -> None:
    """Does not return."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.chdir(place)
    os.environ.update(HOME=str(place), JUPYTER_RUNTIME_DIR=f"{place}/runtime")
    os.environ.pop("XDG_RUNTIME_DIR", None)
    try:
        asyncio.run(_serve(root, place, channel))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


async def _serve(root: Path, place: Path, channel: BinaryIO) -> None:
    known: list[tuple[AsyncKernelManager, Any]] = []
    for line in iter(channel.readline, b""):
        word, *rest = line.decode().split()
        taken = []
        for number in range(int(rest[0]) if rest else len(known)):
            begin = time.perf_counter()
            if word == "start":
                known.append(await _started(root, place))
            elif word == "answer":
                await _answered(known[number][1])
            else:
                manager, client = known[number]
                client.stop_channels()
                await manager.shutdown_kernel(now=True)
            taken.append(1e3 * (time.perf_counter() - begin))
        channel.write(f"{json.dumps(taken)}\n".encode())


async def _started(root: Path, place: Path) -> tuple[AsyncKernelManager, Any]:
    config = {"launcher": "broker", "broker_socket": f"{root}/socket", "mem_limit": "256M",
              "runtime_dir": f"{root}/broker"}  # fmt: skip
    stanza = {"provisioner_name": "sandbox-provisioner", "config": config}
    manager = AsyncKernelManager()
    manager._kernel_spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        display_name="crowd", language="python", metadata={"kernel_provisioner": stanza},
    )  # fmt: skip
    await manager.start_kernel(cwd=str(place))
    client = manager.client()
    client.start_channels()
    await _answered(client)
    return manager, client


async def _answered(client: Any) -> None:
    asked = client.execute("6 * 7")
    while (await client.get_shell_msg(timeout=_SECONDS))["parent_header"]["msg_id"] != asked:
        pass
