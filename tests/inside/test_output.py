"""A kernel that floods its output fills neither the server's log nor its time."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading

import pytest

from sandbox_provisioner.facilities.process.inside.output import (
    BURST_BYTES,
    BYTES_PER_SECOND,
    TAIL_BYTES,
)

pytestmark = pytest.mark.requires("userns")

LOGGED = {"pump": True, "logged": ("stdout", "stderr")}
WRITTEN = 64 << 20
FLOOD = f"""
import os
line = b"y" * 1023 + b"\\n"
for _ in range({WRITTEN} // 1024):
    os.write(2, line)
os.write(2, b"\\x1b[2Jthe last line\\n")
"""
TOLD = re.compile(rb"\[sandbox: (\d+) bytes of the kernel's output were dropped")


class Log:
    """The server's standard error, as somebody reads it."""

    def __init__(self) -> None:
        self.text = b""
        self._read, self.fd = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while chunk := os.read(self._read, 1 << 16):
            self.text += chunk

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self._thread.join()
            os.close(self._read)
            self.fd = -1


@pytest.fixture
def log():
    found = Log()
    yield found
    found.close()


def test_a_flood_is_dropped_counted_and_told_and_does_not_hold_the_kernel(sandbox, log):
    with sandbox([sys.executable, "-c", FLOOD], stderr=log.fd, **LOGGED) as box:
        story = box.wait()
        seconds = 1 + (story.cpu_seconds or 60)
    log.close()
    assert story.code == 0
    # The budget is one of the wall clock, of which a busy machine takes more than of the CPU's.
    assert log.text.count(b"y") < max(WRITTEN / 4, BURST_BYTES + seconds * BYTES_PER_SECOND)
    dropped = sum(int(number) for number in TOLD.findall(log.text))
    lines = [line for line in log.text.split(b"\n") if line.startswith(b"y")]
    assert dropped + sum(len(line) for line in lines) >= WRITTEN * 0.99
    assert story.stderr_tail.endswith("y\n\\x1b[2Jthe last line\n")
    assert len(story.stderr_tail) <= TAIL_BYTES + 3
    assert b"\x1b" not in log.text


def test_what_was_dropped_is_told_while_the_kernel_is_silent(sandbox, log):
    program = FLOOD + "\nimport sys; sys.stdin.read()"
    with sandbox([sys.executable, "-c", program], stderr=log.fd, **LOGGED) as box:
        with contextlib.ExitStack() as stack:
            stack.callback(box.finish)
            told = threading.Event()

            def wait():
                while not log.text.rstrip().endswith(b"KiB a second]"):
                    if told.wait(0.01):
                        return

            watcher = threading.Thread(target=wait)
            watcher.start()
            watcher.join(60)
            told.set()
            assert not watcher.is_alive()
            assert log.text.rstrip().endswith(b"KiB a second]")


def test_what_a_kernel_writes_for_a_log_is_printable(sandbox, log):
    program = "import os; os.write(2, b'\\x1b]0;title\\x07 Gr\\xc3\\xbc\\xc3\\x9fe \\xff\\n')"
    with sandbox([sys.executable, "-c", program], stderr=log.fd, **LOGGED) as box:
        box.wait()
    log.close()
    assert log.text.decode() == "\\x1b]0;title\\x07 Grüße \\xff\n"


def test_who_asked_for_the_output_gets_all_of_it_as_it_is(sandbox, log):
    program = "import os\nfor _ in range(4096): os.write(2, b'\\x1b' * 1024)"
    with sandbox([sys.executable, "-c", program], stderr=log.fd, pump=True) as box:
        box.wait()
    log.close()
    assert log.text == b"\x1b" * (4 << 20)


def test_children_that_write_without_end_do_not_keep_the_box(sandbox, log):
    """PID 1 reads what is left of a dead kernel's output, but not for ever."""
    program = (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: os.write(2, b'z' * 4096)\n"
    )
    with sandbox([sys.executable, "-c", program], stderr=log.fd, **LOGGED) as box:
        assert box.wait().code == 0
