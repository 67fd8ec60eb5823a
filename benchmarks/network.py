"""network.py - what a network costs: starts, connections, bytes, memory.

What starts cost is in `network_starts.py`. Then one client program runs in three places against a
server on this machine's loopback: outside of any box, in a kernel with the gateway, and, where they
are installed, in network namespaces that pasta(1) and slirp4netns(1) serve.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common, network_starts, start
from benchmarks.start import Place, Variant
from sandbox_provisioner import gateway_life
from sandbox_provisioner.warm import ahead

_PATIENCE_SECONDS = 120
_CONNECTIONS = 500
# This machine by its name: 127.0.0.1 is each box's own.
_NAME = socket.gethostname()
# Where a namespace that they serve finds 127.0.0.1 of this machine, and by which interface.
_LOOPBACK = "127.0.0.1"
_SLIRP_HOST, _TAP = "10.0.2.2", "tap0"

SERVER = """
import os, socket, sys, threading
def echo(c):
    while data := c.recv(1 << 16):
        c.sendall(data)
def source(c):
    block = memoryview(bytes(1 << 20))
    while True:
        c.sendall(block)
def sink(c):
    room = bytearray(1 << 20)
    count = 0
    while got := c.recv_into(room):
        count += got
    c.sendall(str(count).encode())
def one(act, c):
    with c:
        try:
            act(c)
        except OSError:
            pass
def serve(act, listener):
    while True:
        c, _ = listener.accept()
        threading.Thread(target=one, args=(act, c), daemon=True).start()
listeners = [socket.create_server((sys.argv[1], 0), backlog=512) for _ in range(3)]
print(*(l.getsockname()[1] for l in listeners), flush=True)
for act, listener in zip((echo, source, sink), listeners):
    threading.Thread(target=serve, args=(act, listener), daemon=True).start()
sys.stdin.read()
"""

# Prints one line of JSON: milliseconds of a connection with one exchange, and bytes a second.
CLIENT = """
def measure(host, ports, connections, seconds):
    import json, socket, statistics, time
    host = socket.gethostbyname(host)  # once: names are looked up in other ways than bytes move
    echo, source, sink = ports
    taken = []
    for _ in range(connections):
        begin = time.perf_counter()
        with socket.create_connection((host, echo), 20) as c:
            c.sendall(b"?!")
            assert c.recv(2) == b"?!"
        taken.append((time.perf_counter() - begin) * 1000)
    room, count = bytearray(1 << 20), 0
    with socket.create_connection((host, source), 20) as c:
        begin = time.perf_counter()
        while (passed := time.perf_counter() - begin) < seconds:
            count += c.recv_into(room)
    down = count / passed
    with socket.create_connection((host, sink), 20) as c:
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            c.sendall(room)
        c.shutdown(socket.SHUT_WR)
        count = int(c.recv(64))
        up = count / (time.perf_counter() - begin)
    print(json.dumps({"connection_ms": taken, "down": down, "up": up}), flush=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """What one client has seen: *connection_ms* of each connection, bytes a second down and up, and
    how many MiB who serves it has. *start_ms* are until a namespace has its network."""

    place: str
    connection_ms: list[float]
    down: float
    up: float
    start_ms: float = 0.0
    server_mib: float = 0.0


def variant(ports: Sequence[int]) -> Variant:
    """A kernel with the gateway that may speak with the server."""
    listed = ",".join(map(str, ports))
    rules = [f"{_NAME}:{listed}", f"{_address()}/32:{listed}"]
    network = {"network": "gateway", "network_allow": rules}
    network |= {"network_connections": {"at_once": 512, "new_per_second": 100_000}}
    return Variant("gateway", config={"mem_limit": "1G", "warm": False} | network)


def _address() -> str:
    return socket.gethostbyname(_NAME)


@contextlib.contextmanager
def server() -> Iterator[list[int]]:
    """Its ports, for echo, source and sink, while it runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, _address()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin and process.stdout
        yield [int(word) for word in process.stdout.readline().split()]
        process.stdin.close()


def call_of(host: str, ports: Sequence[int], seconds: float) -> str:
    """The client's program."""
    return f"{CLIENT}\nmeasure({host!r}, {list(ports)!r}, {_CONNECTIONS}, {seconds!r})\n"


def flow_of(place: str, line: str, **more: float) -> Flow:
    """What the client printed."""
    return Flow(place=place, **json.loads(line), **more)


def directly(ports: Sequence[int], seconds: float) -> Flow:
    """Outside of any box."""
    words = [sys.executable, "-c", call_of(_NAME, ports, seconds)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return flow_of("direct", done.stdout)


def in_kernel(one: Variant, found: Place, specs: Any, run: Callable[[Any], str]) -> Flow:
    """In a kernel with the gateway."""
    manager = start.new_manager(one, found, specs)
    start.start_quietly(manager, found)
    with start.client_of(manager, _PATIENCE_SECONDS) as client:
        line = run(client)
        gateway = gateway_memory()
    return flow_of("gateway", line, server_mib=gateway)


def gateway_memory() -> float:
    """Of the gateways of this process, in MiB."""
    found: set[common.Process] = set()
    for record in gateway_life.own_records():
        found |= common.descendants(record.init_pid)
    return common.pss_bytes(found) / (1 << 20)


def printed(client: Any, code: str) -> str:
    """What *code* prints in a kernel."""
    told: list[str] = []

    def hook(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
            told.append(message["content"]["text"])
        elif message["msg_type"] == "error":
            raise RuntimeError("\n".join(message["content"]["traceback"]))

    client.execute_interactive(code, output_hook=hook, timeout=_PATIENCE_SECONDS)
    return "".join(told)


# -- others


def with_pasta(ports: Sequence[int], seconds: float) -> Flow:
    """passt's way: a process that moves packets of a tap as sockets of its own. Its name for this
    machine's loopback is the address of the default gateway."""
    told = subprocess.check_output(["ip", "-4", "route", "show", "default"], text=True)
    host = told.split()[2]
    # It would make itself nobody, who may not open /dev/net/tun everywhere.
    words = ["pasta", *(("--runas", "0") if not os.geteuid() else ()), "--config-net", "--quiet"]
    code = f"print('here', flush=True)\n{call_of(host, ports, seconds)}\ninput()"
    began = time.perf_counter()
    with subprocess.Popen(
        [*words, "--", sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        process.stdout.readline()
        took = _milliseconds_since(began)
        line = process.stdout.readline()
        ours = {common.process(process.pid)}
        helpers = {one for one in common.descendants(process.pid) if _runs(one, "passt")}
        memory = common.pss_bytes(ours | helpers) / (1 << 20)
        process.communicate("\n")
    return flow_of("pasta", line, start_ms=took, server_mib=memory)


def _runs(process: common.Process, program: str) -> bool:
    return Path(f"/proc/{process.pid}/comm").read_text().startswith(program)


def with_slirp4netns(ports: Sequence[int], seconds: float) -> Flow:
    """A TCP of its own in user space."""
    code = "print('here', flush=True); input()\n"
    code += f"{call_of(_SLIRP_HOST, ports, seconds)}\ninput()"
    ready, tell = os.pipe()
    began = time.perf_counter()
    with subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        process.stdout.readline()
        words = ["slirp4netns", "--configure", "--mtu=65520", f"--ready-fd={tell}"]
        with subprocess.Popen(
            [*words, str(process.pid), _TAP],
            pass_fds=[tell], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as slirp:  # fmt: skip
            os.close(tell)
            os.read(ready, 1)
            os.close(ready)
            took = _milliseconds_since(began)
            process.stdin.write("\n")
            process.stdin.flush()
            line = process.stdout.readline()
            memory = common.pss_bytes([common.process(slirp.pid)]) / (1 << 20)
            process.communicate("\n")
            slirp.terminate()
    return flow_of("slirp4netns", line, start_ms=took, server_mib=memory)


def _milliseconds_since(began: float) -> float:
    return (time.perf_counter() - began) * 1000


def others(ports: Sequence[int], seconds: float) -> list[Flow]:
    """Those that are installed, where they find the server."""
    if _address() != _LOOPBACK:
        return []
    known = {"pasta": with_pasta, "slirp4netns": with_slirp4netns}
    return [run(ports, seconds) for name, run in known.items() if shutil.which(name)]


# -- a run


def flow_rows(flows: Sequence[Flow]) -> list[list[str]]:
    """One a place."""
    head = ["network", "start ms", "connection ms", "added", "down Gbit/s", "up Gbit/s", "its MiB"]
    base = statistics.median(flows[0].connection_ms)
    rows = [head]
    for flow in flows:
        middle = statistics.median(flow.connection_ms)
        rows.append([
            flow.place,
            f"{flow.start_ms:.0f}" if flow.start_ms else "",
            common.format_spread(common.spread(flow.connection_ms), 3),
            "" if flow is flows[0] else f"{middle - base:+.3f}",
            f"{flow.down * 8 / 1e9:.2f}",
            f"{flow.up * 8 / 1e9:.2f}",
            f"{flow.server_mib:.1f}" if flow.server_mib else "",
        ])  # fmt: skip
    return rows


def flows_of(seconds: float) -> list[Flow]:
    """The client in each place."""
    with start.place() as found, server() as ports:
        one = variant(ports)
        specs = start.write_kernels(found, [one])
        code = call_of(_NAME, ports, seconds)
        try:
            flows = [directly(ports, seconds)]
            flows.append(in_kernel(one, found, specs, lambda client: printed(client, code)))
            flows += others(ports, seconds)
        finally:
            ahead.end_own()
            gateway_life.end_own()
    return flows


def main(rounds: int, pairs: int, alive: int, seconds: float, json_path: str | None) -> None:
    """Measure, print, and save the samples if *json_path* says where."""
    facts = common.machine()
    starts = network_starts.measure(rounds, pairs, alive)
    flows = flows_of(seconds) if seconds else []
    print(common.format_machine(facts))
    print(f"rounds:   {pairs} of boxes, {rounds} of kernels; median (10th-90th percentile)")
    print("added:    median of the differences within the rounds; its interval of 95 %\n")
    tables = [network_starts.box_rows(starts), network_starts.kernel_rows(starts)]
    tables += [network_starts.alive_rows(starts)] if alive else []
    tables += [flow_rows(flows)] if flows else []
    for rows in tables:
        print(common.format_table(rows), end="\n\n")
    if json_path:
        content = {"machine": facts, "rounds": rounds, "starts": starts, "flows": flows}
        common.save_json(json_path, content)
