"""launcher/enter.py - runs in the stem and in launchers: performs the plan, reports, becomes the
kernel.

Called as ``python -SI -c BOOT FOLDER REQUESTS IDLE``: a folder to import us from, the socket that
the server's requests come through, and for how many seconds. That process is the *stem*: it forks
a launcher for each request, so that no start but the first has to wait for an interpreter. A
launcher is a child of the server's, takes its orders from a socket of its own (`orders.py`), and
ends when it has forked PID 1. What they say and hear is drawn in `wire.py`.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal without its enums
import errno
import gc
import os
import select
import sys

from sandbox_provisioner.facilities.figures.inside import Told
from sandbox_provisioner.facilities.process.inside import Output, Spare
from sandbox_provisioner.facilities.rights.inside import system_call_filter
from sandbox_provisioner.facilities.sockets.inside import Sockets
from sandbox_provisioner.facilities.workdir.inside import Workdir
from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside import orders, wire
from sandbox_provisioner.inside.box import Box
from sandbox_provisioner.inside.printable import with_place
from sandbox_provisioner.inside.say import say_who
from sandbox_provisioner.launcher import claim, init, watchers
from sandbox_provisioner.launcher.verbs import VERBS


def main(argv: list[str]) -> None:
    """Be the stem, or, in a fork of it, a launcher; does not return."""
    requests_fd, idle_seconds = int(argv[0]), float(argv[1])
    os.set_inheritable(requests_fd, False)
    # A server's standard error may be closed: nothing that we get may lie there.
    while (fd := os.open("/dev/null", os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    # A server may ignore it; execve(2) keeps that, and waitpid(2) then tells nothing.
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    # Whatever is imported from here on would come from a root that is about to change.
    sys.meta_path.clear()
    sys.path.clear()
    # The collector writes to each object that it looks at, and so makes a process's own what PID 1
    # of every sandbox shares with us.
    gc.freeze()
    poll = select.poll()
    poll.register(requests_fd, select.POLLIN)
    while poll.poll(int(idle_seconds * 1000)):
        _, fds = kernel.receive_descriptors(requests_fd)
        if not fds:
            break  # the server has ended
        if kernel.fork_as_sibling() == 0:
            os.close(requests_fd)
            _be_launcher(fds[0])
        os.close(fds[0])
    os._exit(0)


def _be_launcher(control_fd: int) -> None:
    """Does not return. A server that was killed meanwhile has nobody who would read why."""
    try:
        say_who(control_fd, wire.HERE)
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise
        os._exit(0)
    obey(control_fd)


def obey(control_fd: int, nursery_fd: int = -1) -> Box:
    """Perform the plan that comes with the server's word; ends here if the server has thought
    better of it. Returns as `perform` does. *nursery_fd* ends when the nursery does."""
    found = orders.receive(control_fd)
    if found is None:
        os._exit(0)
    box = Box(found.report_fd, control_fd)
    box.received, box.server_fd = found.fds, found.server_fd
    box.part(Spare).nursery_fd = nursery_fd
    perform(box, found.plan, found.fail_at)
    return box


def perform(box: Box, plan: bytes, fail_at: str) -> None:
    """Walk through the plan; the verb ``fork-kernel`` splits PID 1 off, which never comes back.

    Nor does who executes a program; a plan that ends with ``run-kernel`` returns.
    """
    number, verb = 0, "decode"
    try:
        for name, *words in wire.decode(plan):
            number, verb = number + 1, os.fsdecode(name)
            wire.fail_as_wished(fail_at, verb)
            if verb == "fork-kernel":
                fork_kernel(box)
            elif verb == "system-call-filter":
                system_call_filter(box, words[0])
            else:
                VERBS[verb](box, *(os.fsdecode(word) for word in words))
    except BaseException as error:
        _tell_failure(box, str(number), verb, error)
        os._exit(wire.FAILED_STATUS)


def _tell_failure(box: Box, number: str, verb: str, error: BaseException) -> None:
    """What the machine refuses is an OSError, or a MemoryError; anything else is our mistake."""
    if box.report_fd < 0:  # PID 1 of a spare: who made it may have gone
        init.tell_failure(box, error)
    elif isinstance(error, MemoryError):
        box.report(wire.FAILED, number, verb, str(errno.ENOMEM), os.strerror(errno.ENOMEM))
    elif isinstance(error, OSError):
        box.report(wire.FAILED, number, verb, str(error.errno or 0), str(error) or repr(error))
    else:
        box.report(wire.MISTAKE, number, verb, with_place(error))


def fork_kernel(box: Box) -> None:
    """Fork: the parent is PID 1 for good, the child goes on and becomes the kernel."""
    watchers.block_signals()
    if not box.namespaces:
        kernel.adopt_orphans()
    # Both before anything of the kernel's runs.
    sockets, workdir = box.part(Sockets), box.part(Workdir)
    sockets.watch()
    unclaimed = box.part(Spare).unclaimed
    # It ends when another program runs, or what is loaded is one.
    workdir.begun, kept = os.pipe()
    if not unclaimed:
        workdir.watch_covers(box)
    box.part(Told).begin(is_served=not unclaimed)
    pid = os.fork()
    if pid:
        os.close(kept)
        os.close(box.report_fd)
        box.report_fd = -1
        if unclaimed:  # stopped by then, until `init.run` lets it go on
            claim.await_claim(box, pid, perform)
            workdir.watch_covers(box)
        init.run(box, pid)
    os.setsid()
    for number, (_, write_end) in enumerate(box.part(Output).pipes, 1):
        os.dup2(write_end, number)
    # The interpreter ignores these two; the kernel starts as any program does.
    _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
    _signal.signal(_signal.SIGXFSZ, _signal.SIG_DFL)
    watchers.unblock_signals()
