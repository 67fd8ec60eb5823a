"""launcher/claim.py - PID 1 of a spare: keeps a kernel ready and stopped until somebody claims it.

A spare is a kernel from a nursery that has done everything up to waiting for its first message, in
a box that has everything but what only one start knows (for the words see `wire.py`)::

    kernel   "ready": it is initialised, and waits to be bound
    PID 1    stops it, seals its sockets, and says so as of any kernel; who made it may end now
    server   connects, the first one only: PID 1 closes the claims socket then
    server   "go": PID 1 attaches its work directory and its volumes, and places its files
    PID 1    binds the kernel, which goes on (`Spare.wake`)

Nobody's code has run inside before the binding, so PID 1 keeps its rights over the box until then.
The kernel is stopped by SIGSTOP, and not by the cgroup freezer, which would stop PID 1 as well: it
has to notice that the nursery has ended, that nobody came for too long, or that memory is short.
Then it ends, and with it the spare.
"""

from __future__ import annotations

import os
import select
import time

from sandbox_provisioner.facilities.caps.inside import Caps
from sandbox_provisioner.facilities.caps.inside.memory import available_bytes
from sandbox_provisioner.facilities.process.inside import Spare
from sandbox_provisioner.facilities.sockets.inside import Seal, Sockets
from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside import orders, wire
from sandbox_provisioner.inside.box import Box

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Callable

    Perform = Callable[[Box, bytes, str], None]

_SIGSTOP = 19
_SIGCHLD = 17
_LOOK_SECONDS = 5.0  # at the machine's memory, which no event tells of


def await_claim(box: Box, kernel_pid: int, perform: Perform) -> None:
    """Return when the spare has been bound to a start; end it if it never is."""
    spare = box.part(Spare)
    os.close(spare.binding[0])
    os.close(spare.ready[1])
    children = kernel.signal_fd((_SIGCHLD,))
    _await_ready(box, children)
    os.kill(kernel_pid, _SIGSTOP)
    os.write(box.control_fd, wire.message(wire.SEALED))
    _await_server(box, kernel_pid, children)
    os.close(children)
    found = orders.receive(box.control_fd)
    if found is None:
        os._exit(0)
    box.received, box.report_fd, box.server_fd = found.fds, found.report_fd, found.server_fd
    perform(box, found.plan, found.fail_at)
    os.close(box.report_fd)
    box.report_fd = -1


def _await_ready(box: Box, children: int) -> None:
    """Until the kernel listens on all sockets and has nothing left to do."""
    spare = box.part(Spare)
    ready = spare.ready[0]
    poll = _poll(ready, box.control_fd, spare.nursery_fd, children)
    if [fd for fd, _ in poll.poll()] != [ready] or not os.read(ready, 1):
        os._exit(wire.FAILED_STATUS)  # the kernel has died, or who wanted it has gone
    os.close(ready)
    seal = Seal(box)
    if not (seal.bound() and seal.listening()):
        os._exit(wire.FAILED_STATUS)
    seal.close()
    if seal.misused():
        os._exit(wire.FAILED_STATUS)
    os.close(seal.events)
    box.part(Sockets).names = box.rights_until_sealed = ()
    memory = box.part(Caps).memory
    if memory:
        memory.arm()


def _await_server(box: Box, kernel_pid: int, children: int) -> None:
    """Until one connects; from then on it is the one whom we serve, and end with."""
    spare = box.part(Spare)
    assert spare.unclaimed
    idle_seconds, least_bytes = spare.unclaimed
    until = time.monotonic() + idle_seconds
    (meminfo,) = box.named.get("machine", [-1])
    poll = _poll(spare.claims_fd, spare.nursery_fd, children)
    while True:
        left = min(_LOOK_SECONDS, max(until - time.monotonic(), 0.0))
        ready = [fd for fd, _ in poll.poll(int(left * 1000))]
        if spare.nursery_fd in ready or (children in ready and _has_ended(children, kernel_pid)):
            os._exit(0)
        if spare.claims_fd in ready:
            break
        if not ready and (time.monotonic() >= until or available_bytes(meminfo) < least_bytes):
            os._exit(0)
    server = kernel.accept(spare.claims_fd)
    for fd in (spare.claims_fd, spare.nursery_fd, box.control_fd, box.server_fd):
        os.close(fd)
    box.control_fd = server
    if spare.hold_fd >= 0:
        kernel.send_descriptors(server, wire.message(wire.HOLD), [spare.hold_fd])
        os.close(spare.hold_fd)


def _poll(*fds: int) -> select.poll:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return poll


def _has_ended(children: int, kernel_pid: int) -> bool:
    """SIGCHLD also tells that it was stopped."""
    os.read(children, 128)
    return os.waitpid(kernel_pid, os.WNOHANG)[0] == kernel_pid
