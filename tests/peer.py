"""peer.py - in the test process: a server of this machine's own, with whom a box may speak."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

from sandbox_provisioner.spec import Network, NetworkWish

NAME = socket.gethostname()


class Peer:
    """A server that says again what it hears."""

    def __init__(self) -> None:
        self.address = socket.gethostbyname(NAME)
        self.listener = socket.create_server((self.address, 0), backlog=64)
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(client,), daemon=True).start()

    def _echo(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                client.sendall(data)

    @property
    def rules(self) -> tuple[str, str]:
        """What allows it, by the name of this machine, and nobody else."""
        return f"{NAME}:{self.port}", f"{self.address}/32:{self.port}"

    def wish(self, **more: Any) -> NetworkWish:
        """A network in which a box may speak with it, and with nobody else."""
        return NetworkWish(mode=Network.GATEWAY, allow=self.rules, **more)

    def close(self) -> None:
        """It accepts nobody more."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
