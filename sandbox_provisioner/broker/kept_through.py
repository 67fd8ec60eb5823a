"""broker/kept_through.py - in a user's command: what the broker keeps of that user's kernels.

Root keeps it. What a kernel has written comes as a descriptor, and is looked at and kept by this
process, with this user's rights.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import Any

from sandbox_provisioner.broker import box
from sandbox_provisioner.broker.talk import Answer, ask_now
from sandbox_provisioner.broker.wishes import Question, written
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.layers.folders import About, read_about

_SECONDS = 60.0  # to look for changes, or to remove very many, takes a while
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class BrokeredFolder:
    """Where the changes of one kernel lie: a `layers.review.Folder`, of what the broker at *path*
    has *told*."""

    told = ""

    def __init__(self, path: str, told: Answer) -> None:
        self._path = path
        self._told = told
        self._lock = -1

    def _ask(self, what: str) -> int:
        question = Question(ask=what, sandbox_id=self._told["sandbox_id"])
        return ask_now(self._path, written(question), _SECONDS)[1]

    @property
    def is_running(self) -> bool:
        """When the broker was asked."""
        return bool(self._told["running"])

    @property
    def ended(self) -> float:
        """When its last box began, or ended."""
        return float(self._told["ended"])

    def read(self) -> About:
        """What it is about; `UNREADABLE`, SandboxError. In a box of a hub's its work directory is
        where the kernel had it, as its server has."""
        about = read_about(self._ask("review-about"))
        return replace(about, workdir=about.shown_at) if self._path == box.SOCKET else about

    def open_upper(self) -> int:
        """A descriptor of what the kernel has written, which nothing leads out of."""
        mount = self._ask("review-upper")
        try:
            return os.open(".", _FOLDER, dir_fd=mount)
        finally:
            os.close(mount)

    def take(self) -> bool:
        """Lock it, until `forget`; whether it is ours now."""
        with contextlib.suppress(HostError):
            self._lock = self._ask("review-take")
        return self._lock >= 0

    def forget(self) -> None:
        """Let go of it; more than once is fine."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def discard(self) -> None:
        """Have it thrown away, by who has it."""
        self.forget()
        self._ask("discard")

    def settle(self) -> None:
        """The same where nothing is left, which the broker finds out as well."""
        self.forget()
        self._ask("settle")


def reviews_through(path: str) -> list[tuple[BrokeredFolder, About]]:
    """Whose changes wait at the broker that listens at *path*, with what lists tell of each."""
    answer, _ = ask_now(path, written(Question(ask="reviews")), _SECONDS)
    return [(BrokeredFolder(path, told), _about(told)) for told in answer["kernels"]]


def _about(told: Answer) -> About:
    return About(
        sandbox_id=str(told["sandbox_id"]),
        kernel_id=str(told["kernel_id"]),
        name=str(told["name"]),
        notebook=str(told["notebook"]),
        workdir=str(told["workdir"]),
        since_ns=int(told["since_ns"]),
        covers={},
    )


def layers_through(path: str) -> list[dict[str, Any]]:
    """What that broker keeps of what this user's kernels install."""
    answer, _ = ask_now(path, written(Question(ask="layers")), _SECONDS)
    found: list[dict[str, Any]] = answer["kernels"]
    return found


def reset_through(path: str, name: str) -> None:
    """Have the layer *name* of these removed."""
    ask_now(path, written(Question(ask="layer-reset", name=name)), _SECONDS)
