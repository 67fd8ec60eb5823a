"""density.py - many kernels at once: what each weighs, what a start costs then, how fast they come.

Memory is weighed as growth: the sum of PSS over all processes that belong to kernels and to what
they were forked from, with many kernels less with one, for each kernel. So a nursery's pages that
all of them share count once, as they do on the machine.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.multikernelmanager import AsyncMultiKernelManager
from traitlets.config import Application

from benchmarks import common, nurseries, start
from sandbox_provisioner.records import all_records, runtime_directory
from sandbox_provisioner.stem import stem
from sandbox_provisioner.warm import ahead

_TIMEOUT_SECONDS = 60
_AT_ONCE = 4
_PART = 20


class Crowd:
    """Kernels of one variant that live at once."""

    def __init__(
        self, variant: start.Variant, found: start.Place, specs: KernelSpecManager
    ) -> None:
        self.variant = variant
        self.found = found
        self.specs = specs
        self.server = AsyncMultiKernelManager(parent=Application())
        self.managers: list[AsyncKernelManager] = []

    async def add(self) -> float:
        """Start one more, and wait for its first reply: milliseconds from the call on."""
        manager = AsyncKernelManager(
            kernel_name=start.kernel_name(self.variant),
            kernel_spec_manager=self.specs,
            parent=self.server,  # by that a program is known that lives on
        )
        manager.connection_file = (
            f"{self.found.runtime}/k{len(self.managers)}-{time.monotonic_ns()}.json"
        )
        begin = time.perf_counter()
        await manager.start_kernel(
            cwd=str(self.found.work), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.managers.append(manager)
        await self.ask(manager, "kernel_info")
        return (time.perf_counter() - begin) * 1000

    async def ask(self, manager: AsyncKernelManager, what: str) -> float:
        """Ask for kernel_info, or to run *what*, and wait for the reply: milliseconds."""
        client = manager.client()
        client.start_channels(iopub=False, stdin=False, hb=False, control=False)
        begin = time.perf_counter()
        try:
            message = client.kernel_info() if what == "kernel_info" else client.execute(what)
            while True:
                reply = await client.get_shell_msg(timeout=_TIMEOUT_SECONDS)
                if reply["parent_header"]["msg_id"] == message:
                    if reply["content"]["status"] != "ok":
                        raise RuntimeError("\n".join(reply["content"]["traceback"]))
                    return (time.perf_counter() - begin) * 1000
        finally:
            client.stop_channels()

    async def grow(self, count: int) -> list[float]:
        """Start kernels one after another until there are *count*."""
        taken = []
        while len(self.managers) < count:
            taken.append(await self.add())
            print(
                f"\r{self.variant.name}: {len(self.managers)}", end="", file=sys.stderr, flush=True
            )
        return taken

    async def end(self) -> None:
        """End all of them."""
        while self.managers:
            ending, self.managers = self.managers[-_PART:], self.managers[:-_PART]
            await asyncio.gather(*(manager.shutdown_kernel(now=True) for manager in ending))


def weight() -> int:
    """PSS of everything below this process, in bytes."""
    return common.pss_bytes(common.descendants(os.getpid()))


async def weigh(crowd: Crowd, count: int) -> dict[str, Any]:
    """What each of *count* more kernels weighs, idle."""
    await crowd.grow(1)
    await asyncio.to_thread(ahead.wait)
    await crowd.grow(2)  # the first that a nursery forks
    await asyncio.sleep(1)
    before = weight()
    taken = await crowd.grow(2 + count)
    await asyncio.sleep(1)
    each = (weight() - before) / count / (1 << 20)
    return {"variant": crowd.variant.name, "each_mib": each, "start_ms": taken}


async def few(crowd: Crowd, counts: Sequence[int]) -> list[list[float]]:
    """What so many kernels weigh together, in MiB: with their nursery, and when it has gone."""
    found = []
    for count in counts:
        await crowd.grow(1)
        await asyncio.to_thread(ahead.wait)
        await crowd.grow(count)
        await asyncio.sleep(1)
        weights = [weight() / (1 << 20)]
        _retire_nurseries(crowd.variant.name)
        stem.end()  # by then it has ended, too
        await asyncio.sleep(1)
        found.append([*weights, weight() / (1 << 20)])
        await crowd.end()
        await asyncio.to_thread(ahead.end_own)
    return found


def _retire_nurseries(name: str) -> None:
    """Ours, as they do it by themselves when nobody has come for long enough."""
    for folder, record in all_records(runtime_directory("")):
        if record.kind == "nursery" and record.name == name:
            nurseries.retire(folder.path)


async def many(crowd: Crowd, alive: int) -> dict[str, Any]:
    """Grow to *alive* kernels, and let each compute 1 + 1."""
    taken = await crowd.grow(alive)
    print(file=sys.stderr)
    answers = [await crowd.ask(manager, "1 + 1") for manager in crowd.managers]
    return {"alive": len(crowd.managers), "start_ms": taken, "answer_ms": answers}


async def rate(crowd: Crowd, seconds: float) -> dict[str, Any]:
    """Start kernels, a few at once, for *seconds*: how many had replied."""
    until = time.monotonic() + seconds
    done = 0

    async def keep_starting() -> None:
        nonlocal done
        while time.monotonic() < until:
            await crowd.add()
            done += 1

    begin = time.monotonic()
    await asyncio.gather(*(keep_starting() for _ in range(_AT_ONCE)))
    return {"starts": done, "a_second": done / (time.monotonic() - begin)}


def main(few_kernels: str, each: int, alive: int, seconds: float, json_path: str | None) -> None:
    """Measure, print, and save the samples if *json_path* says where."""
    facts = common.machine()
    warm = {"mem_limit": "1G", "warm": True}
    plain, nursery = start.Variant("plain", transport=""), start.Variant("nursery", config=warm)
    shipped = start.Variant("as shipped", config=start.SHIPPED)
    counts = [int(word) for word in few_kernels.split(",")]
    with start.place() as found:
        specs = start.write_kernels(found, [plain, nursery, shipped])

        def run(
            variant: start.Variant, *parts: Callable[[Crowd], Coroutine[Any, Any, Any]]
        ) -> list[Any]:
            async def all_parts() -> list[Any]:
                crowd = Crowd(variant, found, specs)
                try:
                    return [await part(crowd) for part in parts]
                finally:
                    await crowd.end()

            return asyncio.run(all_parts())

        try:
            (bare,) = run(plain, lambda crowd: few(crowd, counts))
            (warm_ones,) = run(shipped, lambda crowd: few(crowd, counts))
            print(common.format_table(_few_rows(counts, bare, warm_ones)), end="\n\n")
            if not each:
                return
            (light,) = run(plain, lambda crowd: weigh(crowd, each))
            (boxed,) = run(nursery, lambda crowd: weigh(crowd, each))
            (crowded,) = run(nursery, lambda crowd: many(crowd, alive))
            (sustained,) = run(nursery, lambda crowd: rate(crowd, seconds))
        finally:
            ahead.end_own()
    print(common.format_machine(facts), end="\n\n")
    print(common.format_table(_rows(light, boxed)), end="\n\n")
    print(common.format_table(_crowd_rows(crowded)), end="\n\n")
    print(f"{sustained['starts']} starts in {seconds:g} s: {sustained['a_second']:.1f} a second")
    if json_path:
        found_all = {"plain": light, "nursery": boxed, "crowd": crowded, "rate": sustained}
        common.save_json(json_path, {"machine": facts, **found_all})


def _few_rows(
    counts: Sequence[int], bare: list[list[float]], warm: list[list[float]]
) -> list[list[str]]:
    rows = [["kernels", "plain MiB", "with nursery", "", "without", ""]]
    for count, (one, _), (with_it, without) in zip(counts, bare, warm, strict=True):
        ratios = [common.format_ratio(value / one) for value in (with_it, without)]
        rows.append(
            [str(count), f"{one:.0f}", f"{with_it:.0f}", ratios[0], f"{without:.0f}", ratios[1]]
        )
    return rows


def _rows(light: dict[str, Any], boxed: dict[str, Any]) -> list[list[str]]:
    rows = [["kernel", "MiB each", "", "start ms"]]
    for one in (light, boxed):
        ratio = common.format_ratio(one["each_mib"] / light["each_mib"])
        spread = common.format_spread(common.spread(one["start_ms"]))
        rows.append([one["variant"], f"{one['each_mib']:.1f}", ratio, spread])
    return rows


def _crowd_rows(crowded: dict[str, Any]) -> list[list[str]]:
    """Starts by how many were alive, against the first ones; and the answers of all."""
    taken: Sequence[float] = crowded["start_ms"]
    rows = [["alive", "start ms", "to the first"]]
    first = statistics.median(taken[1 : 1 + _PART])  # the very first is cold
    for begin in sorted({1, 50, 100, 200, len(taken) - _PART}):
        part = taken[begin : begin + _PART]
        if part and begin >= 1:
            spread = common.format_spread(common.spread(part))
            rows.append([str(begin), spread, common.format_ratio(statistics.median(part) / first)])
    answers: Sequence[float] = crowded["answer_ms"]
    spread = common.format_spread(common.spread(answers))
    return [*rows, [f"1 + 1 of {len(answers)}", spread, f"at most {max(answers):.0f} ms"]]
