"""last_words.py - in the server: tells the person at the notebook why the kernel is gone.

A server reports a death with nothing but "restarting". But its clients still hold their iopub
sockets open, and reconnect to whoever binds the dead kernel's address::

    kernel  ✝ its iopub socket is gone
    server  binds an XPUB socket at the same path, and to each client that subscribes
            sends signed messages with the cell that ran as their parent: the sentence as stderr,
            for people, and a display_data that shows nothing and has the end as data
    server  reports the death, when no more clients come

so that the sentence stands under the cell, in every front end, without a change to any of them. A
blocking client subscribes anew only when it is read from again: the socket stays until the kernel
is cleaned up.

The data is in the metadata of both. A notebook keeps those of display_data only, and front ends
show nothing for one without a MIME type (an unknown one is drawn as a tree, or complained of).

What comes from the kernel is bytes of a stranger's. So none of it waits here to be read, frames
that are kept are small (`subscriber.py`), only so many are read at a time, and sizes are looked at
before anything else. Who sends more makes us lose the cell that runs: the sentence has no parent
then, and the log has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.session import Session

from sandbox_provisioner.handle import readable
from sandbox_provisioner.subscriber import subscriber

# ZeroMQ tries to connect again every 100 to 200 ms, by chance; this is how long after the first of
# them the others may come, and how long we wait for the first.
_STRAGGLERS_MS = 250
_FIRST_MS = 1000
_LINGER_MS = 500
_SENTENCE = b"stream.stderr"
_DATA = b"display_data"
# The topics of status messages: ipykernel's, and those of kernels built on xeus.
_STATUS_TOPICS = (b"kernel.", b"kernel_core.")
_DELIMITER = b"<IDS|MSG>"
# Of the message that a kernel sends for each cell that front ends show: those that they run for
# themselves are silent, and have none.
_INPUT = b".execute_input"
_STATUS = b".status"
# Of what we take apart.
_TOPIC_BYTES = 1 << 7
_HEADER_BYTES = 1 << 12
_CONTENT_BYTES = 1 << 10
_VALUE_LENGTH = 256
# What is read at a time, some 2 ms' worth, and how often before somebody asks again.
_A_GO = 128
_GOES = 8
# What comes until a kernel is told what we listen for comes in two or three pieces.
_WORDS = 16
_ANSWER_SECONDS = 60
# How often we look for the first cell as soon as something has come, and how long not after more
# than was read at a time.
_LOOKS = 1000
_REST_SECONDS = 0.1
_PARENT_FIELDS = ("msg_id", "session", "username", "date", "msg_type", "version", "subshell_id")


class LastWords:
    """Listens to one kernel's status messages, so that it knows which cell runs; can speak once."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._session = Session(
            key=manager.session.key, signature_scheme=manager.session.signature_scheme
        )
        self._running: dict[str, str] = {}
        self._last: dict[str, str] = {}  # that ran, whether it still does or not
        self._lock = threading.Lock()  # `speak` has a thread of its own, a socket only one user
        self._shows = False  # a cell has begun that people see
        # Until we know the kernel's own name for them.
        self._wide: tuple[bytes, ...] = _STATUS_TOPICS
        self._speech: _Speech | None = None
        self._context: zmq.Context[Any] = zmq.Context.instance()
        self._source = subscriber(self._path, manager)
        for topic in self._wide:
            self._source.subscribe(topic)

    @property
    def _path(self) -> str:
        """Of the kernel's iopub socket."""
        return f"{self._manager.ip}-{self._manager.iopub_port}"

    @property
    def busy(self) -> bool:
        """Whether a cell runs, by what has been taken in."""
        return bool(self._running)

    async def keep_up(self) -> None:
        """Take in what has come; called at each poll, so that the queue stays short. The event loop
        does other things meanwhile."""
        for _ in range(_GOES):
            if not self.drain():
                return
            await asyncio.sleep(0)
        self._running = self._last = {}  # of a while ago, if ever

    def begin(self) -> None:
        """Hear from now on; called when the kernel runs, in a thread: it answers before it can be
        told what we want to hear, and nobody may run a loop until it ends."""
        for _ in range(_WORDS):
            if self._is_set_up() or not self._source.wait(_ANSWER_SECONDS):
                return
            self.drain()

    def _is_set_up(self) -> bool:
        with self._lock:
            return self._source.closed or self._source.is_subscribed

    async def shows_a_cell(self) -> bool:
        """Wait for the first cell that people see; False where the kernel says too much else."""
        for _ in range(_LOOKS):
            is_more = self.drain()
            if self._shows:
                return True
            if is_more:
                await asyncio.sleep(_REST_SECONDS)
            else:
                await readable(self._source.fileno())
        return False

    def drain(self) -> bool:
        """Take in some of what has come; whether there may be more."""
        with self._lock:
            for _ in range(_A_GO):
                if self._source.closed:
                    return False
                try:
                    if frames := self._source.receive():
                        self._note(frames)
                except BlockingIOError:
                    return False
        return True

    def _note(self, frames: list[bytes]) -> None:
        """Frames: identities, delimiter, signature, header, parent header, metadata, content.

        The signature tells nothing here: nobody but the kernel has this socket, and it has the key.
        """
        topic = frames[0]
        self._shows |= topic.endswith(_INPUT)
        if self._wide and topic.endswith(_STATUS) and len(topic) < _TOPIC_BYTES:
            self._narrow(topic.removesuffix(_STATUS))
        with contextlib.suppress(ValueError, RecursionError):  # a kernel may send what it likes
            at = frames.index(_DELIMITER)
            _, _, parent_text, _, content_text = frames[at + 1 : at + 6]
            if len(parent_text) > _HEADER_BYTES or len(content_text) > _CONTENT_BYTES:
                return
            parent, content = json.loads(parent_text), json.loads(content_text)
            if isinstance(parent, dict) and isinstance(content, dict):
                self._see(_parent_of(parent), content.get("execution_state"))

    def _narrow(self, kernel: bytes) -> None:
        """Be sent no more of its results, which may be large: *kernel* is how its topics begin."""
        # A letter less: ipykernel says welcome under the very name of what was subscribed to.
        for topic in (kernel + _STATUS[:-1], kernel + _INPUT[:-1]):
            self._source.subscribe(topic)
        for topic in self._wide:
            self._source.unsubscribe(topic)
        self._wide = ()

    def _see(self, parent: dict[str, str], state: Any) -> None:
        if parent.get("msg_type") != "execute_request":
            return
        if state == "busy":
            self._running = self._last = parent
        elif state == "idle" and parent.get("msg_id") == self._running.get("msg_id"):
            self._running = {}

    def finish(self) -> str:
        """Take in what there is of a dead kernel, whose messages have an end, and stop listening:
        the id of the cell that ran, "" if none did."""
        for _ in range(_GOES):
            if not self.drain():
                break
        self._stop_listening()
        return self._running.get("msg_id", "")

    def speak(self, text: str, metadata: dict[str, Any], listener: int = -1) -> None:
        """Send *text*, if there is any, to stderr of the cell that ran, and *metadata*. Blocks for
        a moment: call it in a thread, after `finish`. *listener* is a socket that listens in place
        of the kernel's, and is ours from now on; -1: we make one."""
        messages = {_DATA: self._message("display_data", metadata, data={}, metadata=metadata)}
        if text:
            stream = {"name": "stderr", "text": f"\n{text}\n"}
            messages = {_SENTENCE: self._message("stream", metadata, **stream), **messages}
        self._speech = _Speech(self._bind(listener), self._session, messages)
        self._speech.start()
        self._speech.heard.wait()

    def _message(self, kind: str, metadata: dict[str, Any], /, **content: Any) -> dict[str, Any]:
        # What ended while no cell ran, by a task of its own, is shown where something is shown.
        cell = self._running or self._last
        parent = {"header": cell} if cell else None
        return self._session.msg(kind, content=content, parent=parent, metadata=metadata)

    def _stop_listening(self) -> None:
        with self._lock:
            self._source.close()

    def _bind(self, listener: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.XPUB)
        socket.linger = _LINGER_MS
        # We say who is subscribed to what: see `_Speech._answer`.
        socket.setsockopt(zmq.XPUB_MANUAL, 1)
        if self._manager.curve_secretkey is not None:
            socket.curve_server = True
            socket.curve_secretkey = self._manager.curve_secretkey
        try:
            if listener >= 0:
                socket.setsockopt(zmq.USE_FD, listener)
            else:  # the path may be a link to the kernel's socket; bind(2) does not follow one
                Path(self._path).unlink(missing_ok=True)
            socket.bind(f"ipc://{self._path}")
        except BaseException:  # somebody who found the record may have removed the folder
            socket.close()
            raise
        return socket

    def close(self) -> None:
        """Stop listening, and speaking."""
        self._stop_listening()
        if self._speech:
            self._speech.stop()
            self._speech = None


def _parent_of(header: dict[str, Any]) -> dict[str, str]:
    """What front ends need of a parent's *header*, which goes on to them under our signature."""
    found = {name: header.get(name) for name in _PARENT_FIELDS}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, str) and len(value) <= _VALUE_LENGTH
    }


class _Speech(threading.Thread):
    """Says *messages*, by topic, to whoever subscribes, until `stop`; *heard* is set when nobody
    more comes for a while."""

    def __init__(
        self, socket: zmq.Socket[bytes], session: Session, messages: Mapping[bytes, Any]
    ) -> None:
        super().__init__(name="sandbox-last-words", daemon=True)
        self.heard = threading.Event()
        self._socket = socket
        self._session = session
        self._messages = messages
        self._subscribers = 0
        self._stop_read, self._stop_write = os.pipe()

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stop_read, zmq.POLLIN)
        patience: int | None = _FIRST_MS
        try:
            while self._stop_read not in (ready := dict(poller.poll(patience))):
                if self._socket in ready:
                    self._answer(self._socket.recv())
                    patience = None if self.heard.is_set() else _STRAGGLERS_MS
                else:
                    self.heard.set()
                    patience = None
        finally:
            self.heard.set()
            self._socket.close()

    def _answer(self, subscription: bytes) -> None:
        """XPUB reads a subscription as the byte 1 and the topic's prefix. Each subscriber has
        topics of its own, below those that it asked for: it hears everything once."""
        wish, topic = subscription[:1], subscription[1:]
        if wish != b"\1":
            return
        self._subscribers += 1
        for name, message in self._messages.items():
            if name.startswith(topic):
                own = b"%s.%d." % (name, self._subscribers)
                self._socket.setsockopt(zmq.SUBSCRIBE, own)
                self._session.send(self._socket, message, ident=own)

    def stop(self) -> None:
        """End the thread, and wait for it."""
        os.write(self._stop_write, b"1")
        self.join()
        os.close(self._stop_read)
        os.close(self._stop_write)
