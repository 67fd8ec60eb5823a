"""overhead.py - gives the same work to plain and to sandboxed kernels, and compares the times.

The kernels live through the whole run. A round is one piece of work after the other, each of them
done by all kernels in an order of its own.
"""

from __future__ import annotations

import ast
import contextlib
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpecManager

from benchmarks import common, start, work
from sandbox_provisioner.warm import ahead

ROUND_TRIP = "message, execute to idle"
_ROUND_TRIPS = 20
_TIMEOUT_SECONDS = 120
_COMPARED = ("plain ipc", "sandbox", "nursery")

Samples = dict[tuple[str, str], list[float]]
"""Microseconds of (piece of work, kernel), a value a round."""


@contextlib.contextmanager
def kernels(found: start.Place) -> Iterator[dict[str, Any]]:
    """A client of one running kernel of each kind, which has the text of work.py."""
    listed = [variant for variant in start.variants(found) if variant.name in _COMPARED]
    specs = start.write_kernels(found, listed)
    with contextlib.ExitStack() as stack:
        stack.callback(ahead.end_own)
        clients = {v.name: stack.enter_context(_kernel(v, found, specs)) for v in listed}
        for client in clients.values():
            _await_reply(client, client.execute(Path(work.__file__).read_text()))
        yield clients


@contextlib.contextmanager
def _kernel(variant: start.Variant, found: start.Place, specs: KernelSpecManager) -> Iterator[Any]:
    if variant.name == "nursery":  # its first start makes it
        with _running(variant, found, specs):
            ahead.wait()
    with _running(variant, found, specs) as client:
        yield client


@contextlib.contextmanager
def _running(variant: start.Variant, found: start.Place, specs: KernelSpecManager) -> Iterator[Any]:
    manager = start.new_manager(variant, found, specs)
    start.start_quietly(manager, found)
    with start.client_of(manager, _TIMEOUT_SECONDS) as client:
        yield client


def _await_reply(client: Any, message: str) -> dict[str, Any]:
    while True:
        reply: dict[str, Any] = client.get_shell_msg(timeout=_TIMEOUT_SECONDS)
        if reply["parent_header"].get("msg_id") == message:
            if reply["content"]["status"] != "ok":
                raise RuntimeError(reply["content"])
            return reply


def _measure(client: Any, name: str) -> float:
    """Microseconds of one piece of work in the client's kernel."""
    if name == ROUND_TRIP:
        return min(_round_trip(client) for _ in range(_ROUND_TRIPS))
    asked = {"taken": f"microseconds({name!r})"}
    reply = _await_reply(client, client.execute("", user_expressions=asked))
    return float(
        ast.literal_eval(reply["content"]["user_expressions"]["taken"]["data"]["text/plain"])
    )


def _round_trip(client: Any) -> float:
    """Microseconds until the kernel has said that it is idle again."""
    begin = time.perf_counter()
    message = client.execute("1")
    while True:
        told = client.get_iopub_msg(timeout=_TIMEOUT_SECONDS)
        if told["parent_header"].get("msg_id") != message or told["msg_type"] != "status":
            continue
        if told["content"]["execution_state"] == "idle":
            break
    taken = (time.perf_counter() - begin) * 1e6
    _await_reply(client, message)
    return taken


def run(rounds: int, clients: dict[str, Any]) -> Samples:
    """All work in all kernels, *rounds* times, after one round that does not count."""
    shuffled = random.Random(start.SEED)
    samples: Samples = {}
    for number in range(rounds + 1):
        for name in (*work.WORK, ROUND_TRIP):
            for kernel in shuffled.sample(list(clients), len(clients)):
                taken = _measure(clients[kernel], name)
                samples.setdefault((name, kernel), []).extend([taken] if number else [])
        print(f"\rround {number} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return samples


def table(samples: Samples, kernels: Sequence[str]) -> list[list[str]]:
    """A row for each piece of work; the first kernel is what the others are held against."""
    rows = [["work", f"{kernels[0]} us", *(word for name in kernels[1:] for word in (name, ""))]]
    for name in dict.fromkeys(name for name, _ in samples):
        base = samples[name, kernels[0]]
        row = [name, common.format_spread(common.spread(base), _digits(base))]
        for kernel in kernels[1:]:
            mine = samples[name, kernel]
            row.append(common.format_spread(common.spread(mine), _digits(base)))
            row.append(common.format_ratio(common.paired_ratio(mine, base)))
        rows.append(row)
    return rows


def _digits(values: Sequence[float]) -> int:
    return 3 if min(values) < 10 else 0


def main(rounds: int, json_path: str | None) -> None:
    """Measure, print, and save the samples if *json_path* says where."""
    facts = common.machine()
    with start.place() as found, kernels(found) as clients:
        samples = run(rounds, clients)
        names = list(clients)
    print(common.format_machine(facts))
    print(f"rounds:   {rounds}; median (10th-90th percentile), and the ratio to {names[0]}\n")
    print(common.format_table(table(samples, names)))
    if json_path:
        plain = {f"{name} / {kernel}": values for (name, kernel), values in samples.items()}
        common.save_json(json_path, {"machine": facts, "rounds": rounds, "samples": plain})
