"""loop.py - how long a server's event loop stands still while kernels start, run and end.

One loop serves all users of a server: what holds it is felt by everybody. A task that wants to run
every millisecond notes the longest time that it could not; every ten where many start, since it
takes part of the CPU that they compete for, and only where the loop is free to let it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

from benchmarks import common, start
from sandbox_provisioner.inside.wire import FAIL_AT
from sandbox_provisioner.warm import ahead

_BEAT_SECONDS = 0.001
_CROWD_BEAT_SECONDS = 0.01
_POLLS = 20
_SPARES = 8
_TIMEOUT_SECONDS = 300


@dataclass(slots=True, kw_only=True)
class Sample:
    """Some kernels of one kind, started at once, each until its first reply (a plain one is called
    started long before), asked whether they live, and ended at once."""

    variant: str
    kernels: int
    seconds: dict[str, float] = field(default_factory=dict)
    gap_ms: dict[str, float] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def phase(self, name: str) -> AsyncIterator[None]:
        """Note how long *name* takes, and the longest gap of the loop meanwhile."""
        longest = 0.0
        seconds = _BEAT_SECONDS if self.kernels == 1 else _CROWD_BEAT_SECONDS

        async def beat() -> None:
            nonlocal longest
            last = time.perf_counter()
            while True:
                await asyncio.sleep(seconds)
                now = time.perf_counter()
                longest, last = max(longest, now - last - seconds), now

        begin = time.perf_counter()
        task = asyncio.ensure_future(beat())
        await asyncio.sleep(0)
        yield
        await asyncio.sleep(0)
        task.cancel()
        self.seconds[name] = time.perf_counter() - begin
        self.gap_ms[name] = longest * 1000


def variants() -> list[start.Variant]:
    """What is compared."""
    sandboxed = {"mem_limit": "1G", "network": "none", "warm": False}
    return [
        start.Variant("plain", transport="ipc"),
        start.Variant("sandbox", config=sandboxed),
        start.Variant("nursery", config=sandboxed | {"warm": True}),
        start.Variant("spare", config=sandboxed | {"warm": True, "spares": _SPARES}),
    ]


def new_manager(variant: start.Variant, found: start.Place, specs: KernelSpecManager) -> Any:
    """As `start.new_manager`, for a loop that goes on meanwhile."""
    name = start.kernel_name(variant)
    manager: Any = AsyncKernelManager(kernel_name=name, kernel_spec_manager=specs)
    own = found.runtime / f"k{time.monotonic_ns() % 10**9}"
    manager.connection_file = f"{own}.json"
    if variant.transport:
        manager.transport, manager.ip = variant.transport, str(own)
    return manager


async def begin(manager: Any, found: start.Place, clients: contextlib.ExitStack) -> None:
    """Start a kernel, and return when it has answered."""
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    await manager.start_kernel(cwd=os.fspath(found.work), **quiet)
    client = manager.client()
    client.start_channels(shell=True, iopub=False, stdin=False, hb=False, control=False)
    clients.callback(client.stop_channels)
    client.kernel_info()
    await client.get_shell_msg(timeout=_TIMEOUT_SECONDS)


async def measure(
    variant: start.Variant, kernels: int, found: start.Place, specs: KernelSpecManager
) -> Sample:
    """Start, poll and end *kernels* of *variant*."""
    sample = Sample(variant=variant.name, kernels=kernels)
    managers = [new_manager(variant, found, specs) for _ in range(kernels)]
    with contextlib.ExitStack() as clients:
        async with sample.phase("reply"):
            await asyncio.gather(*(begin(m, found, clients) for m in managers))
    async with sample.phase("poll"):
        for _ in range(_POLLS):
            await asyncio.gather(*(m.is_alive() for m in managers))
    async with sample.phase("shutdown"):
        await asyncio.gather(*(m.shutdown_kernel(now=True) for m in managers))
    with failing(variant):
        async with sample.phase("failure"):
            await asyncio.gather(
                *(fail(new_manager(variant, found, specs), found, variant) for _ in range(kernels))
            )
    return sample


@contextlib.contextmanager
def failing(variant: start.Variant) -> Iterator[None]:
    """Sandboxed starts fail at their last stage meanwhile, when there is most to undo."""
    with contextlib.ExitStack() as stack:
        if variant.config:
            stack.enter_context(mock.patch.dict(os.environ, {FAIL_AT: "write-record"}))
        yield


async def fail(manager: Any, found: start.Place, variant: start.Variant) -> None:
    """A start that fails; a plain one in a directory that is not there."""
    work = found.work if variant.config else found.work / "gone"
    try:
        await manager.start_kernel(cwd=os.fspath(work), stderr=subprocess.DEVNULL)
    except Exception:
        return
    raise AssertionError("it has not failed")


async def run(rounds: int, at_once: int, crowds: int, found: start.Place) -> list[Sample]:
    """*rounds* of one kernel of each kind, then *crowds* of *at_once* of each kind together, each
    time in the reverse order."""
    listed = variants()
    specs = start.write_kernels(found, listed)
    samples = []
    for variant in listed:  # the first is not counted: it starts the stem, and a nursery
        await measure(variant, 1, found, specs)
        await asyncio.to_thread(ahead.wait)
    for _ in range(rounds):
        for variant in listed:
            samples.append(await measure(variant, 1, found, specs))
    for number in range(crowds if at_once else 0):
        for variant in listed[:: -1 if number % 2 else 1]:
            samples.append(await measure(variant, at_once, found, specs))
    return samples


def table(samples: list[Sample]) -> list[list[str]]:
    """A row a kind and number: how long it took, beside plain of the same round until the reply,
    and the median (the most) of the longest gap in each phase."""
    phases = list(samples[0].gap_ms)
    columns = [f"{name} {what}" for name in phases for what in ("s", "gap ms")]
    rows = [["kernels", columns[0], "", *columns[1:]]]
    for kind in dict.fromkeys((sample.variant, sample.kernels) for sample in samples):
        mine = [sample for sample in samples if (sample.variant, sample.kernels) == kind]
        row = [f"{kind[1]} {kind[0]}"]
        for name in phases:
            gaps = [sample.gap_ms[name] for sample in mine]
            row.append(f"{statistics.median(sample.seconds[name] for sample in mine):.2f}")
            if name == phases[0]:
                row.append(common.format_ratio(_beside_plain(mine, samples)))
            row.append(f"{statistics.median(gaps):.1f} ({max(gaps):.0f})")
        rows.append(row)
    return rows


def _beside_plain(mine: list[Sample], samples: list[Sample]) -> float | None:
    def seconds(found: list[Sample]) -> list[float]:
        return [sample.seconds["reply"] for sample in found]

    plain = [s for s in samples if (s.variant, s.kernels) == ("plain", mine[0].kernels)]
    return common.paired_ratio(seconds(mine), seconds(plain))


def main(rounds: int, at_once: int, crowds: int, json_path: str | None) -> None:
    """Measure, print, and save the samples if *json_path* says where."""
    facts = common.machine()
    with start.place() as found:
        try:
            samples = asyncio.run(run(rounds, at_once, crowds, found))
        finally:
            ahead.end_own()
    print(common.format_machine(facts))
    print(f"rounds:   {rounds}; longest gap of the event loop: median (the most)\n")
    print(common.format_table(table(samples)))
    if json_path:
        common.save_json(json_path, {"machine": facts, "rounds": rounds, "samples": samples})
