"""network_starts.py - what a network adds to starts, and to many kernels that are alive at once.

All of it happens in a child with a network namespace of its own, which plays a host::

    kernels ── gateway, or a card each ── the child ── up0 ──veth── up0: a server at SERVER_ADDRESS

One round starts each kind once; every second round goes backwards, so that what slows the machine
down steadily adds nothing to one kind alone. What a kind adds is the median of the differences
within the rounds, with the interval in which the median of endlessly many lies, 19 times of 20.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import random
import select
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import common, density, start
from benchmarks.start import Place, Sample, Variant
from sandbox_provisioner import gateway_life
from sandbox_provisioner.contract import Stdio
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.launch import LaunchRequest, LocalLauncher
from sandbox_provisioner.spec import Network, NetworkWish, SandboxSpec
from sandbox_provisioner.stem import stem
from sandbox_provisioner.warm import ahead

_Value = TypeVar("_Value")

KINDS = ("none", "gateway", "card")
SERVER_ADDRESS, PORT = "20.1.0.1", 80
_RULE = f"{SERVER_ADDRESS}:{PORT}"
_PART = 20
_LEFT_OVER_SECONDS = 30.0
_HOST = """
link set lo up
link add up0 type veth peer name up0 netns {}
address add 20.0.0.1/24 dev up0
link set up0 up
route add default via 20.0.0.2
"""
_WORLD = f"""
link set lo up
address add {SERVER_ADDRESS}/32 dev lo
address add 20.0.0.2/24 dev up0
link set up0 up
"""
# Greets whoever connects, once its cable is there.
_SERVER = f"""
import socket, subprocess, sys
sys.stdin.readline()
subprocess.run(["ip", "-batch", "-"], input={_WORLD!r}, text=True, check=True)
listener = socket.create_server(({SERVER_ADDRESS!r}, {PORT}), backlog=512)
print("here", flush=True)
while True:
    with listener.accept()[0] as one:
        one.sendall(b"hello")
"""
# Keeps its connection, as a notebook that is in use does.
_REACH = f"""
import socket
reached = socket.create_connection(({SERVER_ADDRESS!r}, {PORT}), 20)
assert reached.recv(5) == b"hello"
"""


@dataclass(slots=True)
class Found:
    """By kind: milliseconds of bare boxes; kernels; of those that were alive together the
    milliseconds of each start, and of each one's first connection; what was left of them."""

    boxes: dict[str, list[float]] = field(default_factory=dict)
    kernels: list[Sample] = field(default_factory=list)
    alive_ms: dict[str, list[float]] = field(default_factory=dict)
    reach_ms: dict[str, list[float]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def kinds() -> tuple[str, ...]:
    """Those that can be had: a card is for a root server."""
    return KINDS if not os.geteuid() else KINDS[:2]


def measure(rounds: int, pairs: int, alive: int) -> Found:
    """All of it, as root in a host of its own; *pairs* rounds of bare boxes, *rounds* of kernels,
    *alive* kernels at once."""
    return apart(lambda: _measure(rounds, pairs, alive))


def apart(function: Callable[[], _Value]) -> _Value:
    """What *function* returns in a child that has a network namespace of its own."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        with contextlib.suppress(BaseException), open(theirs, "wb") as file:
            kernel_calls.die_with_parent()
            kernel_calls.unshare(kernel_calls.CLONE_NEWNET)
            try:
                pickle.dump(function(), file)
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
        os._exit(status)
    os.close(theirs)
    with open(ours, "rb") as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError("the child that measures has failed")
    value: _Value = pickle.loads(text)
    return value


def _measure(rounds: int, pairs: int, alive: int) -> Found:
    found = Found()
    with host(), start.place() as place:
        listed = variants()
        specs = start.write_kernels(place, listed)
        try:
            found.boxes = boxes(pairs, place)
            found.kernels = kernels(rounds, listed, place, specs)
            for kind in (kind for kind in kinds()[1:] if alive):
                crowded(found, kind, alive, place, specs)
        finally:
            ahead.end_own()
            gateway_life.end_own()
            stem.end()
    return found


@contextlib.contextmanager
def host() -> Iterator[None]:
    """Let this process's namespace be a host that forwards, with a server beyond it."""
    with subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        assert server.stdin and server.stdout
        while os.readlink(f"/proc/{server.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            select.poll().poll(10)
        commands = _HOST.format(server.pid)
        subprocess.run(["ip", "-batch", "-"], input=commands, text=True, check=True)
        Path("/proc/sys/net/ipv4/conf/up0/forwarding").write_text("1")
        server.stdin.write("\n")
        server.stdin.flush()
        server.stdout.readline()
        try:
            yield
        finally:
            server.kill()


def wishes(kind: str) -> dict[str, Any]:
    """The options of a network of *kind*."""
    return {"network": kind} | ({} if kind == "none" else {"network_allow": [_RULE]})


def variants() -> list[Variant]:
    """Kernels of each kind: cold, and spares. Caps differ, or one would take another's spares."""
    cold = [
        Variant(kind, config={"mem_limit": "1G", "warm": False} | wishes(kind)) for kind in kinds()
    ]
    spare = [
        Variant(f"spare, {kind}", config={"mem_limit": f"{size}G", "warm": True, "spares": 1}
                | wishes(kind))
        for size, kind in enumerate(kinds(), 2)
    ]  # fmt: skip
    warm = [
        Variant(f"alive, {kind}", config={"mem_limit": f"{size}G", "warm": True} | wishes(kind))
        for size, kind in enumerate(kinds(), 5)
    ]
    return [*cold, *spare, *warm]


def rounds_of(count: int, listed: Sequence[_Value], what: str) -> Iterator[tuple[bool, _Value]]:
    """Each of *listed* in *count* pairs of rounds, the second one backwards; whether it counts:
    the first pair does not."""
    shuffled = random.Random(start.SEED)
    for number in range(-2, count):
        if number % 2 == 0:
            order = shuffled.sample(listed, len(listed))
        else:
            order.reverse()
        print(f"\r{what}: {max(0, number + 1)} of {count}", end="", file=sys.stderr, flush=True)
        yield from ((number >= 0, one) for one in order)
    print(file=sys.stderr)


# -- bare boxes


def boxes(pairs: int, place: Place) -> dict[str, list[float]]:
    """Milliseconds from the call until a shell in a box has said a word. That is all of what a
    network can add to a start; a kernel's imports, which take ten times as long, are left out."""
    launcher = LocalLauncher()
    found: dict[str, list[float]] = {kind: [] for kind in kinds()}
    for counts, kind in rounds_of(pairs, kinds(), "boxes"):
        taken = _box(launcher, kind, place)
        found[kind] += [taken] if counts else []
    return found


def _box(launcher: LocalLauncher, kind: str, place: Place) -> float:
    allow = () if kind == "none" else (_RULE,)
    network = NetworkWish(mode=Network(kind), allow=allow)
    request = LaunchRequest(
        sandbox_id=uuid.uuid4().hex[:12],
        spec=SandboxSpec(workdir=str(place.work), network=network),
        argv=("/bin/sh", "-c", "echo here; read line"),
        environment=dict(os.environ),
        cwd=str(place.work),
        pump=False,
    )
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    begin = time.perf_counter()
    handle = asyncio.run(launcher.start(request, stdio=Stdio(theirs_in, theirs_out, None)))
    os.read(ours_in, 10)
    taken = (time.perf_counter() - begin) * 1000
    for fd in (theirs_in, ours_out, ours_in, theirs_out):
        os.close(fd)
    asyncio.run(handle.close())
    return taken


# -- kernels


def kernels(rounds: int, listed: Sequence[Variant], place: Place, specs: Any) -> list[Sample]:
    """Cold ones and spares."""
    samples = []
    chosen = [variant for variant in listed if not variant.name.startswith("alive")]
    for counts, variant in rounds_of(rounds, chosen, "kernels"):
        sample = start.measure(variant, place, specs)
        samples += [sample] if counts else []
    return samples


# -- many at once


def crowded(found: Found, kind: str, alive: int, place: Place, specs: Any) -> None:
    """*alive* kernels with that network, forked by one nursery; each of them speaks with the
    server, and nothing of any is left."""
    (variant,) = (one for one in variants() if one.name == f"alive, {kind}")

    async def crowd() -> None:
        some = density.Crowd(variant, place, specs)
        try:
            await some.grow(1)
            await asyncio.to_thread(ahead.wait)
            found.alive_ms[kind] = await some.grow(alive)
            found.reach_ms[kind] = [await some.ask(one, _REACH) for one in some.managers]
        finally:
            await some.end()

    asyncio.run(crowd())
    print(file=sys.stderr)
    ahead.end_own()
    common.wait_until(lambda: not _left(place), _LEFT_OVER_SECONDS, time.sleep)
    found.left[kind] = _left(place)


def _left(place: Place) -> str:
    """Interfaces of cards, and folders of kernels; the gateway stays."""
    cards = [name for _, name in socket.if_nameindex() if name.startswith("sbxc-")]
    files = [name for name in os.listdir(place.runtime) if name.startswith("k")]
    told = {"cards": len(cards), "files": len(files)}
    return ", ".join(f"{number} {what}" for what, number in told.items() if number)


# -- tables


def box_rows(found: Found) -> list[list[str]]:
    """Bare boxes of each kind, and what it adds."""
    rows = [["box", "until its first word, ms", "added", "between"]]
    base = found.boxes[KINDS[0]]
    for kind, taken in found.boxes.items():
        rows.append([kind, common.format_spread(common.spread(taken), 1), *added(taken, base)])
    return rows


def kernel_rows(found: Found) -> list[list[str]]:
    """Kernels of each kind, cold ones and spares, and what it adds."""
    rows = [["kernel", "reply ms", "added", "between", "PSS MiB", "added", "left over"]]
    for form in ("", "spare, "):
        for kind in kinds():
            name, base = f"{form}{kind}", f"{form}{KINDS[0]}"
            row = [name]
            for measured, digits in (("reply_ms", 1), ("pss_mib", 2)):
                ours = start.values_of(found.kernels, name, measured)
                theirs = start.values_of(found.kernels, base, measured)
                row.append(common.format_spread(common.spread(ours), digits))
                more, between = added(ours, theirs)
                row += [more, between] if measured == "reply_ms" else [more]
            mine = [sample for sample in found.kernels if sample.variant == name]
            rows.append([*row, start.format_left(mine)])
    return rows


def added(ours: Sequence[float], base: Sequence[float]) -> tuple[str, str]:
    """The median of the differences, and between which two it lies."""
    if ours is base or list(ours) == list(base):
        return "", ""
    differences = [one - other for one, other in zip(ours, base, strict=True)]
    low, high = common.median_interval(differences)
    return f"{statistics.median(differences):+.2f}", f"{low:+.2f} and {high:+.2f}"


def alive_rows(found: Found) -> list[list[str]]:
    """Starts by how many kernels were alive."""
    rows = [["alive", *(f"{kind}: start ms" for kind in found.alive_ms)]]
    most = min((len(taken) for taken in found.alive_ms.values()), default=0)
    for begin in sorted({1, 50, 100, 150, most - _PART} & set(range(1, most))):
        parts = [taken[begin : begin + _PART] for taken in found.alive_ms.values()]
        rows.append([str(begin), *(common.format_spread(common.spread(part)) for part in parts)])
    reached = [common.format_spread(common.spread(taken), 1) for taken in found.reach_ms.values()]
    rows.append(["a connection", *reached])
    rows.append(["left over", *(left or "nothing" for left in found.left.values())])
    return rows
