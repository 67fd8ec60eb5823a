"""inside/box.py - runs in launcher, PID 1 and kernel: what the steps hand on to one another.

May import: os, mounts, wire.
"""

from __future__ import annotations

import os

from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.mounts import Mounts

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from typing import TypeVar

    _Part = TypeVar("_Part")


class Box:
    """Descriptors, and who the kernel will be. What only one facility's steps know of is a part of
    its own, in its `inside.py`."""

    def __init__(self, report_fd: int, control_fd: int) -> None:
        self.report_fd = report_fd
        self.control_fd = control_fd
        self.server_fd = -1
        # What came with the plan and has no name yet; and what has one.
        self.received: list[int] = []
        self.named: dict[str, list[int]] = {}
        self.mounts = Mounts()
        self.namespaces = True
        self.init_pid = 0
        self.files_as: tuple[int, int] | None = None
        self.environment: dict[bytes, bytes] = {}
        self.kernel_argv: tuple[str, ...] = ()
        self.survives_server = self.ends_with_watched = False
        # Capabilities that PID 1 keeps while the kernel runs, besides the one to signal it; and
        # those until the kernel can be met.
        self.lasting_rights: tuple[int, ...] = ()
        self.rights_until_sealed: tuple[int, ...] = ()
        self._parts: dict[type, object] = {}

    @property
    def exit_fd(self) -> int:
        """Where init tells the end."""
        return self.named.get("exit-file", [-1])[0]

    def part(self, kind: type[_Part]) -> _Part:
        """The part of a facility, made when it is first asked for."""
        found = self._parts.get(kind)
        if found is None:
            found = self._parts[kind] = kind()
        return found  # type: ignore[return-value]

    def report(self, *words: str) -> None:
        """Tell the server one record."""
        os.write(self.report_fd, wire.record(*words))
