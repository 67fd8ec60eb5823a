"""box.py - in who makes images: what is asked of a box in which others' programs run meanwhile.

The box itself is handed in: who makes images starts no kernels.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from sandbox_provisioner.errors import HostError, Remedy

# Where a box has what it fills, and what it fills it from.
KERNEL, WHEELS, BUILD = "/opt/kernel", "/opt/wheels", "/opt/build"
CACHE, CHANNELS = "/opt/cache", "/opt/channels"
# The kernel's user in the box of a root server: what is installed later goes there too.
KERNELS_ID = 1000
_INTERRUPTED = 128 + signal.SIGINT
_PORTS = {"http": 80, "https": 443}
# Where the files are that an index names, if that is not the host of the index.
_FILES_OF = {"pypi.org": "files.pythonhosted.org", "test.pypi.org": "test-files.pythonhosted.org"}
_CA_FILES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")


class Told(Protocol):
    """Who shows the person what goes on."""

    def step(self, text: str) -> None:
        """Something else begins."""
        ...

    def progress(self, done: int, whole: int) -> None:
        """Of what began last; a *whole* of 0: nobody knows."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxOrder:
    """A command in a box: its *root*, a name or a path, what it may write besides, and whom it may
    speak with."""

    root: str
    argv: Sequence[str]
    volumes: Sequence[str]
    allow: Sequence[str]


# Runs it; the exit status.
Box = Callable[[BoxOrder], int]


def run(box: Box, order: BoxOrder, attempt: str, who: str, remedy: Remedy) -> None:
    """HostError where it ends badly, KeyboardInterrupt where somebody has ended it."""
    status = box(order)
    if status == _INTERRUPTED:
        raise KeyboardInterrupt
    if status != 0:
        raise HostError(
            attempt=attempt,
            answer=f"{who} ended with status {status}, and has said why above",
            remedy=remedy,
        )


def rules_of(url: str) -> tuple[str, ...]:
    """Whom a box has to speak with that gets something from *url*, as `network_allow` has it;
    ValueError where it is no address."""
    found = urlsplit(url)
    host, port = found.hostname or "", found.port or _PORTS[found.scheme]
    shown = f"[{host}]" if ":" in host else host
    files = _FILES_OF.get(host)
    return f"{shown}:{port}", *((f"{files}:{port}",) if files else ())


def certificates(build: Path) -> str:
    """Who is trusted for https is whom this machine trusts: where a box has that, "" for nobody."""
    for path in _CA_FILES:
        if os.path.isfile(path):
            shutil.copyfile(path, build / "ca.crt")
            return f"{BUILD}/ca.crt"
    return ""
