"""gpu.py - what a GPU costs in a box, beside plain kernels: starts up to a first result, and work.

Needs torch, a GPU of NVIDIA's and a specification that names it (docs/devices.md). The kernels that
work live through the whole run, and take turns at each piece of work.
"""

from __future__ import annotations

import ast
import contextlib
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import common, start
from sandbox_provisioner.warm import ahead

_TIMEOUT_SECONDS = 120
_BASE = "plain ipc"
_FIRST = "import torch; shown = torch.ones(64, 64, device='cuda').sum().item()"
_WORK_TEXT = """
import time, torch
big = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
small = torch.zeros(64, device="cuda")
pinned = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
paged = torch.empty(256 << 20, dtype=torch.uint8).fill_(1)
room = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
def multiply():
    for _ in range(10): torch.mm(big, big)
def launch():
    for _ in range(1000): small.add_(1)
def copy_pinned(): room.copy_(pinned, non_blocking=True)
def copy_paged(): room.copy_(paged)
def make():
    torch.empty(1 << 30, dtype=torch.uint8, device="cuda"); torch.cuda.empty_cache()
def microseconds(name):
    torch.cuda.synchronize()
    begin = time.perf_counter()
    globals()[name]()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e6
"""
_WORK = {
    "multiply": "10 products of 8192 x 8192, bf16",
    "launch": "1000 launches of a small kernel",
    "copy_pinned": "256 MiB to the GPU, pinned",
    "copy_paged": "256 MiB to the GPU, paged",
    "make": "1 GiB of its memory taken and given back",
}

Samples = dict[tuple[str, str], list[float]]


def variants(device: str) -> list[start.Variant]:
    """The first is what the others are held against."""
    boxed = {"mem_limit": "16G", "network": "none", "warm": False, "devices": [device]}
    warm = boxed | {"warm": True, "preload": ["torch"], "mem_limit": "17G"}
    return [
        start.Variant(_BASE, transport="ipc"),
        start.Variant("sandbox", config=boxed),
        start.Variant("nursery", config=warm),
        start.Variant("spare", config=warm | {"spares": 1, "mem_limit": "18G"}),
    ]


@contextlib.contextmanager
def _running(variant: start.Variant, found: start.Place, specs: Any) -> Iterator[tuple[Any, float]]:
    """A client of a new kernel, and when it was asked for."""
    ahead.wait()
    manager = start.new_manager(variant, found, specs)
    begin = time.perf_counter()
    start.start_quietly(manager, found)
    with start.client_of(manager, _TIMEOUT_SECONDS) as client:
        yield client, begin


def _value(client: Any, code: str, expression: str) -> Any:
    message = client.execute(code, user_expressions={"value": expression})
    while True:
        reply = client.get_shell_msg(timeout=_TIMEOUT_SECONDS)
        if reply["parent_header"].get("msg_id") == message:
            break
    if reply["content"]["status"] != "ok":
        raise RuntimeError(reply["content"])
    return ast.literal_eval(reply["content"]["user_expressions"]["value"]["data"]["text/plain"])


def starts(rounds: int, found: start.Place, specs: Any, listed: list[start.Variant]) -> Samples:
    """Milliseconds from the call to the reply, and to the first result of the GPU."""
    shuffled, samples = random.Random(start.SEED), Samples()
    for number in range(rounds + 2):
        for variant in shuffled.sample(listed, len(listed)):
            with _running(variant, found, specs) as (client, begin):
                ready = (time.perf_counter() - begin) * 1e3
                _value(client, _FIRST, "shown")
                first = (time.perf_counter() - begin) * 1e3
            if number >= 2:
                samples.setdefault(("ready, ms", variant.name), []).append(ready)
                samples.setdefault(("first result, ms", variant.name), []).append(first)
        print(f"\rstarts {number} of {rounds + 1}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return samples


def work(rounds: int, found: start.Place, specs: Any, listed: list[start.Variant]) -> Samples:
    """Microseconds of each piece of work."""
    shuffled, samples = random.Random(start.SEED), Samples()
    with contextlib.ExitStack() as stack:
        clients = {v.name: stack.enter_context(_running(v, found, specs))[0] for v in listed}
        for client in clients.values():
            _value(client, _WORK_TEXT, "1")
        for number in range(rounds + 1):
            for name, about in _WORK.items():
                for kernel in shuffled.sample(list(clients), len(clients)):
                    taken = _value(clients[kernel], "", f"microseconds({name!r})")
                    samples.setdefault((about, kernel), []).extend([taken] if number else [])
    return samples


def _table(samples: Samples, listed: list[start.Variant]) -> list[list[str]]:
    names = [variant.name for variant in listed]
    rows = [["", names[0], *(word for name in names[1:] for word in (name, ""))]]
    for about in dict.fromkeys(about for about, _ in samples):
        base = samples[about, names[0]]
        row = [about, common.format_spread(common.spread(base))]
        for name in names[1:]:
            mine = samples.get((about, name), [])
            ratio = common.paired_ratio(mine, base) if mine else None
            row += [common.format_spread(common.spread(mine)), common.format_ratio(ratio)]
        rows.append(row)
    return rows


def main(rounds: int, work_rounds: int, device: str, json_path: str | None) -> None:
    """Measure, print, and save the samples if *json_path* says where."""
    facts, listed = common.machine(), variants(device)
    with start.place() as found, contextlib.ExitStack() as stack:
        stack.callback(ahead.end_own)
        specs = start.write_kernels(found, listed)
        begun = starts(rounds, found, specs, listed)
        # A kernel of a nursery works as any other; its start is what differs.
        worked = work(work_rounds, found, specs, listed[:3])
    print(common.format_machine(facts))
    print(f"rounds:   {rounds} of starts, {work_rounds} of work (us); median (10th-90th "
          f"percentile), and the ratio to {_BASE}\n")  # fmt: skip
    print(common.format_table(_table(begun, listed)))
    print()
    print(common.format_table(_table(worked, listed[:3])))
    if json_path:
        told = {f"{about} / {name}": values for (about, name), values in (begun | worked).items()}
        common.save_json(json_path, {"machine": facts, "samples": told})
