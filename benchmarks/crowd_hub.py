"""crowd_hub.py - as root: many people of one hub, each with a server in a box and some kernels.

The hub and its proxy are real, and those of the tests: people are users of the hub's mount
namespace alone. Two at a time come in, start a server and its kernels, each of which runs a cell,
and stay. Who comes when the time is over, or when little memory is left, stays away, and the table
tells how many came.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import common
from sandbox_provisioner.records import SERVER, all_records

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from hub_server import Hub, Kernel

_TOGETHER = 2  # come in at a time
_COMING_SECONDS = 1500
_SPARE_MIB = 1536
_CONFIG = """
c.SandboxSpawner.mem_limit = "2G"
c.JupyterHub.active_server_limit = 0
c.JupyterHub.concurrent_spawn_limit = 0
"""


@dataclass(slots=True)
class _Found:
    """What was measured; times in milliseconds, memory in MiB."""

    server: list[float] = field(default_factory=list)
    kernel: list[float] = field(default_factory=list)
    answer: list[float] = field(default_factory=list)
    stop: list[float] = field(default_factory=list)
    of_kernels: list[float] = field(default_factory=list)
    of_servers: list[float] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)


def main(users: int, kernels: int, json_file: str | None) -> None:
    """Called by `python -m benchmarks crowd --through hub`."""
    people = [f"person{number}" for number in range(users)]
    hub = Hub(people, _CONFIG)
    try:
        hub.start()
        found = _measured(hub, people, kernels)
    finally:
        left = _close(hub)
    found.told["left"] = left
    print(common.format_machine(common.machine()))
    print(common.format_table(list(_table(found))))
    if json_file:
        common.save_json(json_file, {name: getattr(found, name) for name in found.__slots__})


def _measured(hub: Hub, people: list[str], kernels: int) -> _Found:
    found, until = _Found(), time.monotonic() + _COMING_SECONDS
    found.told["before"] = _hub_state(hub)
    alive: dict[str, list[str]] = {}

    def come(name: str) -> None:
        if time.monotonic() < until and _available_mib() > _SPARE_MIB:
            alive[name] = list(_arrived(hub, name, kernels, found))

    with ThreadPoolExecutor(_TOGETHER) as entrance:
        list(entrance.map(come, people))
    found.told |= {"people": len(alive), "alive": _hub_state(hub)}
    for name, kernel_id in ((name, one) for name, ids in alive.items() for one in ids):
        with _met(hub, name, kernel_id) as kernel, _timed(found.answer):
            assert kernel.run("6 * 7").strip() == "42"
    for _, record in all_records(hub.runtime):
        weights = found.of_servers if record.kind == SERVER else found.of_kernels
        weights.append(_memory(record.init_pid))
    found.told["available MiB"] = _available_mib()
    for name in alive:
        with _timed(found.stop):
            hub.stop(name)
    found.told["after"] = _hub_state(hub)
    return found


class _timed:
    """Adds to *samples* how long it took."""

    def __init__(self, samples: list[float]) -> None:
        self._samples = samples

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, failed: object, *_: object) -> None:
        if not failed:
            self._samples.append(1e3 * (time.perf_counter() - self._begin))


@contextlib.contextmanager
def _met(hub: Hub, name: str, kernel_id: str) -> Iterator[Kernel]:
    """That kernel of *name*'s. A websocket that nobody reads from is closed after a while, as its
    pings are not answered."""
    path = f"api/kernels/{kernel_id}/channels"
    with contextlib.closing(hub.connect(name, path)) as connection:
        yield Kernel(kernel_id, connection)


def _arrived(hub: Hub, name: str, kernels: int, found: _Found) -> Iterator[str]:
    """The ids of the kernels of *name*, each of which has run a cell; they stay."""
    with _timed(found.server):
        events = hub.begin(name)
    assert events[-1].get("ready"), events
    for _ in range(kernels):
        with _timed(found.kernel):
            answer = hub.ask(name, "POST", "/kernels", json={"name": "python3"})
            assert answer.status_code == 201, answer.text
            kernel_id = answer.json()["id"]
            with _met(hub, name, kernel_id) as kernel:
                assert kernel.run("6 * 7").strip() == "42"
        yield kernel_id


def _close(hub: Hub) -> int:
    """How many records are there when all servers have been stopped; then the hub ends."""
    left = len(all_records(hub.runtime))
    hub.close()
    return left


def _available_mib() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    return 0


def _memory(pid: int) -> float:
    return common.pss_bytes(common.descendants(pid) | {common.process(pid)}) / (1 << 20)


def _hub_state(hub: Hub) -> str:
    """What the hub and its proxy take together, and have open."""
    pids = {hub.pid} | {process.pid for process in common.descendants(hub.pid)}
    ours = [pid for pid in pids if _is_outside(pid)]
    memory = sum(common.pss_bytes([common.process(pid)]) for pid in ours) / (1 << 20)
    opened = len(list(Path(f"/proc/{hub.pid}/fd").iterdir()))
    return f"{memory:.0f} MiB, {opened} descriptors"


def _is_outside(pid: int) -> bool:
    """Whether it is in no box: those are the hub's children as well."""
    try:
        ids = Path(f"/proc/{pid}/status").read_text().partition("NSpid:")[2].splitlines()[0].split()
    except OSError:
        return False
    return len(ids) == 1


def _table(found: _Found) -> Iterator[tuple[str, ...]]:
    yield ("", "")
    yield ("people, kernels", f"{found.told['people']}, {len(found.kernel)}")
    for name, about in (
        ("server", "a server, until it answers, ms"),
        ("kernel", "a kernel, until its first cell has run, ms"),
        ("answer", "a cell, with all of them alive, ms"),
        ("stop", "a server's stop with its kernels, ms"),
        ("of_servers", "memory of a server, MiB"),
        ("of_kernels", "memory of a kernel, MiB"),
    ):
        yield (about, common.format_spread(common.spread(getattr(found, name))))
    for when in ("before", "alive", "after"):
        yield (f"hub and proxy {when}", found.told[when])
    yield ("memory left with all of them, MiB", str(found.told["available MiB"]))
    yield ("left", str(found.told["left"]))
