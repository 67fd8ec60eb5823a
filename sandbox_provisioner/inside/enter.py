"""inside/enter.py - runs in the launcher: reads the plan, performs it, reports, becomes the kernel.

Called as ``python -SI -c BOOT FOLDER PLAN REPORT CONTROL FAIL_AT``: a folder to import us from,
three descriptors, and the step that a fault injection wants to fail ("" for none).

The report pipe carries records of words that end in NUL, one a line::

    launcher ──"pid" N──▶ server            the host's pid of PID 1
    PID 1    ──"made" KIND PATH──▶          a stand-in's mount point that did not exist before
    any      ──"failed" STEP ERRNO TEXT──▶  and whoever failed ends
    kernel   ──end of file──▶               execve succeeded: nobody else holds the pipe any more
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal without its enums
import os
import sys

from sandbox_provisioner.inside import init, steps
from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside.steps import Box


def main(argv: list[str]) -> None:
    """Perform the plan; does not return."""
    plan_fd, report_fd, control_fd = (int(word) for word in argv[:3])
    for fd in (plan_fd, report_fd, control_fd):
        os.set_inheritable(fd, False)
    box = Box(report_fd, control_fd)
    # Whatever is imported from here on would come from a root that is about to change.
    sys.meta_path.clear()
    sys.path.clear()
    if os.read(control_fd, 16) != b"go":
        os._exit(0)  # the server has thought better of it
    perform(box, decode(read_all(plan_fd)), argv[3])


def read_all(fd: int) -> bytes:
    """The whole of *fd*, which is closed then."""
    chunks = []
    while chunk := os.read(fd, 1 << 20):
        chunks.append(chunk)
    os.close(fd)
    return b"".join(chunks)


def decode(text: bytes) -> list[list[bytes]]:
    """Read what `plan.Plan.encode` wrote: per step a count, then that many "LENGTH:BYTES"."""
    position = 0

    def number(end: bytes) -> int:
        nonlocal position
        stop = text.index(end, position)
        value = int(text[position:stop])
        position = stop + 1
        return value

    plan = []
    while position < len(text):
        words = []
        for _ in range(number(b"#")):
            length = number(b":")
            words.append(text[position : position + length])
            position += length
        plan.append(words)
    return plan


def perform(box: Box, plan: list[list[bytes]], fail_at: str) -> None:
    """Walk through the plan; the verb ``fork-kernel`` splits PID 1 off, which never comes back.

    Nor does who executes a program; a plan that ends with ``run-kernel`` returns.
    """
    verb = "decode"
    try:
        for name, *words in plan:
            verb = os.fsdecode(name)
            if verb == fail_at:
                raise OSError(5, "made to fail by SANDBOX_FAIL_AT")
            if verb == "fork-kernel":
                fork_kernel(box)
            elif verb == "system-call-filter":
                steps.system_call_filter(box, words[0])
            else:
                steps.VERBS[verb](box, *(os.fsdecode(word) for word in words))
    except BaseException as error:
        number = error.errno if isinstance(error, OSError) else 0
        box.report("failed", verb, str(number or 0), str(error) or repr(error))
        os._exit(init.FAILED)


def fork_kernel(box: Box) -> None:
    """Fork: the parent is PID 1 for good, the child goes on and becomes the kernel."""
    init.block_signals()
    if not box.namespaces:
        kernel.adopt_orphans()
    pid = os.fork()
    if pid:
        os.close(box.report_fd)
        init.run(box, pid)
    os.setsid()
    for number, (_, write_end) in enumerate(box.pumps, 1):
        os.dup2(write_end, number)
    # The interpreter ignores these two; the kernel starts as any program does.
    _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
    _signal.signal(_signal.SIGXFSZ, _signal.SIG_DFL)
    init.unblock_signals()
