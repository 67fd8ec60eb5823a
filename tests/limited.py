"""limited.py - in the test process, as root: what limits by project quotas are held."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox_provisioner.facilities.storage import quotas
from sandbox_provisioner.inside import kernel_calls

MIB = 1 << 20


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def held(folder: Path) -> quotas.Held | None:
    """What limit holds for a work directory."""
    with opened(folder, os.O_PATH) as fd:
        return quotas.look(fd, str(folder))


def project_of(path: Path) -> int:
    with opened(path) as fd:
        return kernel_calls.project_of(fd)[0]
