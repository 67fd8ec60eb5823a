"""last_words.py - in the server: tells the person at the notebook why the kernel is gone.

A server reports a death with nothing but "restarting". But its clients still hold their iopub
sockets open, and reconnect to whoever binds the dead kernel's address::

    kernel  ✝ its iopub socket is gone
    server  binds an XPUB socket at the same path, and to each client that subscribes
            sends one signed stderr message with the cell that ran as its parent
    server  reports the death, when no more clients come

so that the sentence stands under the cell, in every front end, without a change to any of them. A
blocking client subscribes anew only when it is read from again: the socket stays until the kernel
is cleaned up.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.session import Session

# ZeroMQ tries to connect again every 100 to 200 ms, by chance; this is how long after the first of
# them the others may come, and how long we wait for the first.
_STRAGGLERS_MS = 250
_FIRST_MS = 1000
_LINGER_MS = 500
_TOPIC = b"stream.stderr"
# The topics of status messages: ipykernel's, and those of kernels built on xeus.
_STATUS_TOPICS = (b"kernel.", b"kernel_core.")


class LastWords:
    """Listens to one kernel's status messages, so that it knows which cell runs; can speak once."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._session = Session(
            key=manager.session.key, signature_scheme=manager.session.signature_scheme
        )
        self._running: dict[str, Any] = {}
        self._speech: _Speech | None = None
        self._context: zmq.Context[Any] = zmq.Context.instance()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.linger = 0
        for topic in _STATUS_TOPICS:
            self._socket.subscribe(topic)
        if manager.curve_publickey is not None:
            self._socket.curve_secretkey = manager.curve_secretkey
            self._socket.curve_publickey = manager.curve_publickey
            self._socket.curve_serverkey = manager.curve_publickey
        self._socket.connect(self._address())

    def _address(self) -> str:
        return f"ipc://{self._manager.ip}-{self._manager.iopub_port}"

    def drain(self) -> None:
        """Take in what has come; called at each poll, so that the queue stays short."""
        if self._socket.closed:
            return
        with contextlib.suppress(zmq.Again):
            while True:
                self._note(self._socket.recv_multipart(zmq.NOBLOCK))

    def _note(self, parts: list[bytes]) -> None:
        with contextlib.suppress(Exception):  # a kernel may send what it likes
            _, body = self._session.feed_identities(parts)
            message = self._session.deserialize(body)
            parent = message["parent_header"]
            if parent.get("msg_type") == "execute_request":
                state = message["content"].get("execution_state")
                if state == "busy":
                    self._running = parent
                elif state == "idle" and parent["msg_id"] == self._running.get("msg_id"):
                    self._running = {}

    def speak(self, text: str) -> None:
        """Send *text* to stderr of the cell that ran. Blocks for a moment: call it in a thread."""
        self.drain()
        self._socket.close()
        message = self._session.msg(
            "stream",
            content={"name": "stderr", "text": f"\n{text}\n"},
            parent={"header": self._running} if self._running else None,
        )
        self._speech = _Speech(self._bind(), self._session, message)
        self._speech.start()
        self._speech.heard.wait()

    def _bind(self) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.XPUB)
        socket.linger = _LINGER_MS
        # What is sent goes to the last subscriber only: each hears it once.
        socket.setsockopt(zmq.XPUB_MANUAL_LAST_VALUE, 1)
        if self._manager.curve_secretkey is not None:
            socket.curve_server = True
            socket.curve_secretkey = self._manager.curve_secretkey
        # The path may be a link to the kernel's socket; bind(2) does not follow one.
        Path(f"{self._manager.ip}-{self._manager.iopub_port}").unlink(missing_ok=True)
        socket.bind(self._address())
        return socket

    def close(self) -> None:
        """Stop listening, and speaking."""
        self._socket.close()
        if self._speech:
            self._speech.stop()
            self._speech = None


class _Speech(threading.Thread):
    """Says one message to whoever subscribes, until `stop`; *heard* is set when nobody more comes
    for a while."""

    def __init__(self, socket: zmq.Socket[bytes], session: Session, message: Any) -> None:
        super().__init__(name="sandbox-last-words", daemon=True)
        self.heard = threading.Event()
        self._socket = socket
        self._session = session
        self._message = message
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
        """XPUB reads a subscription as the byte 1 and the topic's prefix."""
        wish, topic = subscription[:1], subscription[1:]
        if wish == b"\1" and _TOPIC.startswith(topic):
            self._socket.setsockopt(zmq.SUBSCRIBE, topic)
            self._session.send(self._socket, self._message, ident=_TOPIC)

    def stop(self) -> None:
        """End the thread, and wait for it."""
        os.write(self._stop_write, b"1")
        self.join()
        os.close(self._stop_read)
        os.close(self._stop_write)
