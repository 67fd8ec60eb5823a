"""soak.py - starts and ends one kernel after the other, and looks at what stays of them.

The server is this process; the kernels are cold ones, and those of a nursery, in turn. What grows
with the cycles is a leak. The first tenth warms up: modules, sockets of ZeroMQ, the nursery.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common, start
from sandbox_provisioner.records import runtime_directory
from sandbox_provisioner.warm import ahead

_LOOKS = 100
_COLD_EVERY = 10
MEASURES = (
    "descriptors", "threads", "memory MiB", "processes", "groups", "mounts", "files",
)  # fmt: skip
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#17becf")

Look = dict[str, float]


def look(found: start.Place) -> Look:
    """What this process holds, and what there is on the machine on its behalf."""
    gc.collect()
    ours = common.descendants(os.getpid())
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "memory MiB": int(status["VmRSS"].split()[0]) / 1024,
        "processes": len(ours),
        "groups": len(common.own_cgroups({common.process(os.getpid())} | ours)),
        "mounts": common.mount_count(),
        "files": sum(len(files) for _, _, files in os.walk(found.runtime))
        + len(os.listdir(runtime_directory())),
    }


def run(cycles: int, found: start.Place) -> list[tuple[int, Look]]:
    """(cycles done, what was there): some hundred looks."""
    listed = [v for v in start.variants(found) if v.name in {"sandbox", "nursery"}]
    cold, warm = listed
    specs = start.write_kernels(found, listed)
    looks = []
    for number in range(1, cycles + 1):
        variant = warm if number % _COLD_EVERY else cold
        manager = start.new_manager(variant, found, specs)
        start.start_quietly(manager, found)
        client = manager.client()
        client.start_channels()
        try:
            start.await_reply(client)
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
        if number % max(1, cycles // _LOOKS) == 0:
            ahead.wait()
            looks.append((number, look(found)))
            print(f"\rcycle {number} of {cycles}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return looks


def settled(looks: Sequence[tuple[int, Look]]) -> list[tuple[int, Look]]:
    """Without the first tenth."""
    return list(looks[len(looks) // 10 :])


def table(looks: Sequence[tuple[int, Look]]) -> list[list[str]]:
    """A row for each measure: at the beginning, at the end, least, most."""
    rows = [["of the server", "first", "last", "least", "most"]]
    for name in MEASURES:
        values = [found[name] for _, found in settled(looks)]
        shown = (values[0], values[-1], min(values), max(values))
        rows.append([name, *(f"{value:.{int('MiB' in name)}f}" for value in shown)])
    return rows


def svg(looks: Sequence[tuple[int, Look]], width: int = 720, row: int = 70) -> str:
    """A small plot for each measure, one below the other, each from 0 to its most."""
    last = looks[-1][0]
    parts = []
    for place, (name, colour) in enumerate(zip(MEASURES, _COLOURS, strict=True)):
        most = max(found[name] for _, found in looks) or 1.0
        bottom = (place + 1) * row - 8
        across, up = (width - 200) / last, (row - 24) / most
        points = " ".join(
            f"{130 + number * across:.1f},{bottom - found[name] * up:.1f}"
            for number, found in looks
        )
        parts += [
            f'<text x="8" y="{bottom - row / 2 + 12:.0f}">{name}</text>',
            f'<line x1="130" x2="{width - 70}" y1="{bottom}" y2="{bottom}" stroke="#ccc"/>',
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}"/>',
            f'<text x="{width - 62}" y="{bottom - row + 36}">{most:.0f}</text>',
        ]
    height = len(MEASURES) * row + 24
    caption = f'<text x="130" y="{height - 6}">0 to {last} kernels, started and ended</text>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    style = 'font-family="sans-serif" font-size="13">'
    return "\n".join([f"{head} {style}", *parts, caption, "</svg>", ""])


def main(cycles: int, plot: str, json_path: str | None) -> None:
    """Run, print, draw where *plot* says, and save the looks if *json_path* says where."""
    facts = common.machine()
    with start.place() as found:
        try:
            looks = run(cycles, found)
        finally:
            ahead.end_own()
    print(common.format_machine(facts))
    print(f"cycles:   {cycles}; the first tenth is left out\n")
    print(common.format_table(table(looks)))
    if plot:
        Path(plot).write_text(svg(looks))
    if json_path:
        common.save_json(json_path, {"machine": facts, "cycles": cycles, "looks": looks})
