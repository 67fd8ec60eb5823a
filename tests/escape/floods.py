"""floods.py - on the host: what a kernel sends, writes and names, for those who read it outside.

A control reads the same without our bounds, or as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import zmq
from frame import Kind, between
from jupyter_client.manager import KernelManager
from stage import PATIENCE, Kernel
from tools import SECRET

from sandbox_provisioner import last_words
from sandbox_provisioner.provisioner import StartRefused

MEBIBYTE = 1 << 20
A_GO = last_words._A_GO
STATUS = "crafted status messages, read on the event loop"
# As fast as it can, to whoever listens, from the thread that has the socket. Its high water mark
# stays as it is: where a subscriber goes while it is changed, libzmq 4.3.5 ends the process now and
# then by SIGSEGV.
FLOOD = """
import threading
thread, done = get_ipython().kernel.iopub_thread, threading.Event()
parent = b'{{"msg_type": "execute_request", "msg_id": "%d"}}'
def flood():
    for number in range({count}):
        content = b'{{"execution_state": "idle"}}' + b" " * {size}
        head = [thread.topic_of_status, b"<IDS|MSG>", b"", b"{{}}", parent % number, b"{{}}"]
        thread.socket.send_multipart(head + [content] * {frames})
    done.set()
thread.topic_of_status = get_ipython().kernel._topic("status")
thread.schedule(flood)
assert done.wait(60)
"""
BIG = FLOOD.format(count=40, size=4 * MEBIBYTE, frames=1)
LONG = FLOOD.format(count=10, size=1 << 14, frames=1024)


def answered(kernel, code):
    """Run *code*, and read nothing of what it publishes; the number of the request."""
    request = kernel.client.execute(code)
    while kernel.client.get_shell_msg(timeout=PATIENCE)["parent_header"]["msg_id"] != request:
        pass
    return request


@contextlib.contextmanager
def boxed(stage):
    """A kernel, and who listens to its status messages for the server."""
    with stage.kernel() as kernel:
        yield kernel, kernel.manager.provisioner._tap


def last_words_of(manager):
    tap = last_words.LastWords(manager)
    tap.begin()
    return tap


class ByZeroMQ:
    """Listens as everybody else does."""

    def __init__(self, manager):
        self._last = b""
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.linger, self._socket.rcvhwm = 0, 0
        self._socket.connect(f"ipc://{manager.ip}-{manager.iopub_port}")
        self._socket.subscribe(b"kernel.")

    def drain(self):
        with contextlib.suppress(zmq.Again):
            self._last = self._socket.recv_multipart(zmq.NOBLOCK)

    async def keep_up(self):
        """Nobody reads."""

    def close(self):
        self._socket.close()


@contextlib.contextmanager
def plain(stage, listen=last_words_of):
    """The same without a box and without our bounds."""
    manager = KernelManager(transport="ipc", ip=str(stage.place / "plain/k"))
    manager.start_kernel(cwd=str(stage.workdir))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=PATIENCE)
        with mock.patch.object(last_words, "_A_GO", 1 << 30):
            tap = listen(manager)
            try:
                yield Kernel(manager, client), tap
            finally:
                tap.close()
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def await_heard(kernel, tap):
    """Until what the kernel publishes arrives: a connection is made aside, and a publisher drops
    what nobody has subscribed to."""
    while not tap._last:
        answered(kernel, "1")
        tap.drain()


def most_at_once(found):
    """How much of a flood is read while nobody else has a turn."""
    kernel, tap = found
    await_heard(kernel, tap)
    noted, most, sent, seen, note = 0, 0, set(), set(), tap._note

    def count(frames):
        nonlocal noted
        noted += 1
        note(frames)

    async def read_beside_others():
        nonlocal most
        reading = asyncio.ensure_future(tap.keep_up())
        while not reading.done():
            before = noted
            await asyncio.sleep(0)
            most = max(most, noted - before)

    tap._note, tap._see = count, lambda parent, state: seen.add(parent.get("msg_id"))
    answered(kernel, FLOOD.format(count=5000, size=0, frames=1))
    # What comes behind the flood may have been dropped, so it is sent until it is heard.
    while not sent & seen and most <= A_GO:
        sent.add(answered(kernel, "1"))
        asyncio.run(read_beside_others())
    assert noted > A_GO
    return "bit by bit" if most <= A_GO else "at once"


def by_all(make, look):
    """An attempt's function and its control's."""

    def act(stage, *words):
        with make(stage) as found:
            return look(found, *words)

    return act


@between(
    500, "have the server read status messages without end", Kind.FLOODS, STATUS,
    variants=("root",), expect="bit by bit",
    without=by_all(plain, most_at_once), control="at once",
)  # fmt: skip
def flood_status(stage):
    return by_all(boxed, most_at_once)(stage)


def resident():
    """What this process has in memory, in bytes."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def kept(found, flood):
    """Whether it waits in this process until somebody reads it."""
    kernel, tap = found
    await_heard(kernel, tap)
    kernel.client.iopub_channel.stop()  # which is this process's, too
    before = resident()
    answered(kernel, flood)
    for _ in range(200):  # what comes comes after a moment
        asyncio.run(tap.keep_up())
        if resident() - before > 64 * MEBIBYTE:
            return "kept"
        select.select([], [], [], 0.01)
    return "not kept"


by_zeromq = partial(plain, listen=ByZeroMQ)


@between(
    501, "have the server keep big messages that nobody reads", Kind.FLOODS, STATUS, BIG,
    variants=("root",), expect="not kept", without=by_all(by_zeromq, kept), control="kept",
)  # fmt: skip
def flood_memory(stage, flood):
    return by_all(boxed, kept)(stage, flood)


@between(
    508, "have the server keep messages of many frames that nobody reads", Kind.FLOODS, STATUS,
    LONG, variants=("root",), expect="not kept", without=by_all(by_zeromq, kept), control="kept",
)  # fmt: skip
def flood_frames(stage, flood):
    return by_all(boxed, kept)(stage, flood)


# -- what ends up in a log or a terminal

LOG = "the server's own log"
EVIL = f"\x1b]0;{SECRET}\x07\u202e\x9b"
WRITE = """
import os, sys
fd = getattr(sys.stderr, "_original_stdstream_copy", None) or 2
for _ in range({count}):
    os.write(fd, {text!r})
"""
LINE = b"y" * 4095 + b"\n"
LINES = 4096


@contextlib.contextmanager
def own_stderr():
    """A file in place of this process's standard error, as a server has it."""
    saved = os.dup(2)
    with tempfile.TemporaryFile("w+b") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def logged(stage, code):
    with own_stderr() as file:
        with stage.kernel() as kernel:
            assert kernel.run(code) == ""
            await_text(file)
        file.seek(0)
        return file.read()


def await_text(file):
    """Who passes it on is killed with the kernel."""
    until = time.monotonic() + PATIENCE
    while not os.fstat(file.fileno()).st_size and time.monotonic() < until:
        select.select([], [], [], 0.01)


def logged_plainly(stage, code):
    words = [sys.executable, "-c", code]
    return subprocess.run(words, stderr=subprocess.PIPE, check=True).stderr


def amount(text):
    return "all of it" if text.count(b"y") >= LINES * 4095 else "a part of it"


def shown(text):
    """ "raw" if *text* would steer a terminal, or turn its letters around."""
    text = text.decode(errors="surrogateescape") if isinstance(text, bytes) else text
    if SECRET not in text:
        return "nothing"
    return "printable" if all(c.isprintable() or c in "\n\t" for c in text) else "raw"


for number, title, count, text, look, expect, control in (
    (502, "fill the server's log", LINES, LINE, amount, "a part of it", "all of it"),
    (503, "write control characters to the server's log", 1, EVIL.encode(), shown, "printable",
        "raw"),
):  # fmt: skip

    @between(
        number, title, Kind.FLOODS, LOG, WRITE.format(count=count, text=text), look,
        expect=expect, without=lambda stage, code, look: look(logged_plainly(stage, code)),
        control=control,
    )  # fmt: skip
    def write_to_log(stage, code, look):
        return look(logged(stage, code))


def refusal(stage, cwd, **options):
    """The sentence that a person reads."""
    try:
        with stage.kernel(cwd, **options):
            return "it started"
    except StartRefused as error:
        return str(error)


ENDS = f"import os; os.write(2, {EVIL.encode()!r}); os._exit(1)"


@between(
    504, "end with control characters before there are sockets", Kind.FLOODS,
    "the sentence about a failed start", expect="printable", control="raw",
    without=lambda stage: shown(
        subprocess.run([sys.executable, "-c", ENDS], stderr=subprocess.PIPE).stderr
    ),
)  # fmt: skip
def end_with_controls(stage):
    return shown(refusal(stage, "", argv=[sys.executable, "-c", ENDS, "{connection_file}"]))


def names_of(stage, make):
    make(stage)
    return shown("".join(os.listdir(stage.workdir)))


def make_link(stage):
    (stage.workdir / EVIL).symlink_to("../other")


@between(
    505, "give a directory a name of them, where somebody starts then", Kind.FLOODS,
    "the sentence about a refused start", expect="printable",
    without=lambda stage: names_of(stage, make_link), control="raw",
)  # fmt: skip
def name_work_directory(stage):
    make_link(stage)
    return shown(refusal(stage, stage.workdir / EVIL))


def make_folder(stage):
    (stage.workdir / EVIL).mkdir()


@between(
    506, "give a directory a name of them, and be listed", Kind.FLOODS,
    "jupyter sandbox list", expect="printable",
    without=lambda stage: names_of(stage, make_folder), control="raw",
)  # fmt: skip
def name_what_is_listed(stage):
    make_folder(stage)
    words = [sys.executable, "-m", "sandbox_provisioner.app", "list"]
    with stage.kernel(stage.workdir / EVIL):
        words.append(f"--runtime-dir={stage.runtime}")
        return shown(subprocess.run(words, capture_output=True, check=True).stdout)


MAKE_REPOSITORY = f"import os; os.makedirs({EVIL + '/.git'!r})"


def make_repository(stage):
    (stage.workdir / EVIL / ".git").mkdir(parents=True)


@between(
    507, "give a repository a name of them, which is warned of", Kind.FLOODS, LOG,
    landlock=None, expect="printable", without=lambda stage: names_of(stage, make_repository),
    control="raw",
)  # fmt: skip
def name_repository(stage):
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    with stage.kernel() as kernel:
        log = kernel.manager.provisioner.log
        assert kernel.run(MAKE_REPOSITORY) == ""
        log.addHandler(handler)
    log.removeHandler(handler)
    return shown("\n".join(found))
