"""A gateway that a box asks for more connections than there can be, while another box works."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from test_gateway_for_real import echoes
from world import ECHO, HTTP, UNHEARD, WEB, Box, Gateway, World, when

from sandbox_provisioner.gateway.seats import Seats

pytestmark = pytest.mark.requires("root", "ordinary-user", "openssl")
NAME = "data.example.org"
NOBODY = "93.184.216.77"  # what is sent there is lost
DESCRIPTORS = 20_000
PROCESSES, OF_EACH = 4, 5_000
ALL = PROCESSES * OF_EACH
MOST_BYTES = 96 << 20
OTHER_DESCRIPTORS = 200  # of two boxes: listeners, pipes, what the other one has now
PIPES = 8  # that a gateway may have made for good

# Connects to one target after the other, says there what is to be said, and holds the connections;
# to each line it answers how many were reset, and ends with its input.
CLIENT = """
import json, resource, select, socket, sys
targets, count = json.loads(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (count + 100,) * 2)
held, poll = {}, select.poll()
lost = 0
for number in range(count):
    address, port, said = targets[number % len(targets)]
    one = socket.socket()
    try:
        one.connect((address, port))
        one.sendall(said.encode())
        held[one.fileno()] = one
        poll.register(one, 0)
    except ConnectionError:
        lost += 1
print("all", flush=True)
while sys.stdin.readline():
    for fd, _ in poll.poll(0):
        poll.unregister(fd)
        held.pop(fd).close()
        lost += 1
    print(lost, flush=True)
"""
# Takes what comes, and says nothing.
SILENT = """
import resource, socket
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
listener, held = socket.socket(fileno=0), []
while True:
    held.append(listener.accept())
"""


class Crowd:
    """Processes in *inside* that hold connections to *targets*: addresses, ports, and what is said
    there first."""

    def __init__(self, inside: Box, targets: list[tuple[str, int, str]]) -> None:
        command = [sys.executable, "-c", CLIENT, json.dumps(targets), str(OF_EACH)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._processes = inside.place.call(
            lambda: [subprocess.Popen(command, **pipes) for _ in range(PROCESSES)]
        )

    def _lines(self) -> list[str]:
        return [process.stdout.readline().strip() for process in self._processes]

    def wait(self) -> None:
        """Until each of them has tried all."""
        assert self._lines() == ["all"] * PROCESSES

    def lost(self) -> int:
        """How many connections were reset."""
        for process in self._processes:
            process.stdin.write("\n")
            process.stdin.flush()
        return sum(map(int, self._lines()))

    def close(self) -> None:
        """All connections."""
        for process in self._processes:
            process.communicate()


@pytest.fixture
def silent(world: World) -> Iterator[None]:
    """Who listens at UNHEARD."""
    with world.listen(UNHEARD) as listener:
        process = world.place.call(
            lambda: subprocess.Popen([sys.executable, "-c", SILENT], stdin=listener)
        )
    yield
    process.kill()
    process.wait()


@pytest.fixture
def gateway(world: World) -> Iterator[Gateway]:
    made = Gateway(world, DESCRIPTORS)
    yield made
    assert "Traceback" not in made.log()
    made.close()


def test_of_20_000_connections_a_box_has_its_share_and_another_box_works(
    world: World, gateway: Gateway, silent: None
) -> None:
    """Some say nothing, some never end their request, some are dialed where nobody answers."""
    before, share = gateway.descriptors(), Seats.of(DESCRIPTORS).most // 2
    crowded, working = Box(gateway, "crowded", allow=["all"]), Box(gateway, "working", allow=[NAME])
    address = working.address_of(NAME)
    slow = (crowded.address_of(NAME), UNHEARD, "GET / HT")
    crowd = Crowd(crowded, [(WEB, UNHEARD, ""), (NOBODY, HTTP, ""), slow])
    waiter = threading.Thread(target=crowd.wait)
    waiter.start()
    while waiter.is_alive():
        assert echoes(working.connect(address, ECHO))
        assert gateway.descriptors() - before <= 2 * share + OTHER_DESCRIPTORS
        waiter.join(0.02)
    when(crowd.lost, lambda lost: lost >= ALL - share)  # they were refused, and none of them hangs
    assert gateway.resident_bytes() < MOST_BYTES
    assert "has its share of the connections" in crowded.sentence()
    for one in [working.connect(address, ECHO) for _ in range(share // 4)]:
        assert echoes(one)
    crowd.close()
    for box in (crowded, working):
        box.close()
    when(gateway.descriptors, lambda now: now <= before + PIPES)
