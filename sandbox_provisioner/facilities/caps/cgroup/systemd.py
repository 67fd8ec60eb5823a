"""systemd.py - in the launching process: a sandbox's scope, made by systemd.

Where systemd owns the hierarchy it is its only writer (https://systemd.io/CGROUP_DELEGATION), so
that it has to make our group, and delegates what is below::

    user@1000.service/app.slice/        or system.slice, for root
      sandbox-<id>.scope                the manager's; the caps as properties
        <id>/                           ours, by the v2 driver: caps, everything that is counted
        keeper/                         ours: one process that waits

The manager removes a scope when its last process has ended, and with it memory.events and
memory.peak, which tell why. The keeper holds the scope until we have read them. It has a group of
its own, as a sandbox that takes too much memory is ended whole. It ends with the server.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

from sandbox_provisioner.descriptors import keep_from_children
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.caps.cgroup import files, manager
from sandbox_provisioner.facilities.caps.cgroup.tree import kill_listed
from sandbox_provisioner.facilities.caps.cgroup.v2 import V2Tree
from sandbox_provisioner.facilities.caps.wish.cap import Property
from sandbox_provisioner.spec import Limits

PREFIX, SUFFIX = "sandbox-", ".scope"

# The scope's own caps are there for systemd's tools and weights, and leave room for the keeper.
_KEEPER = {"MemoryMax": 4 << 20, "TasksMax": 1}
_LINGER_SECONDS = 1.0


class SystemdTree(V2Tree):
    """The tree of one sandbox in a scope; `open_tree` makes it, `CgroupTree` documents it."""

    _keeper: subprocess.Popen[bytes] | None = None
    _hold = -1
    _emptied: float | None = None

    @property
    def unit(self) -> str:
        """The name by which systemctl knows the sandbox."""
        return f"{PREFIX}{self._name}{SUFFIX}"

    def _make_groups(self, limits: Limits, pid: int, undo: contextlib.ExitStack) -> None:
        self._keeper = self._start_keeper()
        keep_from_children(self)
        undo.callback(self._end_keeper)
        members = [self._keeper.pid, *([pid] if pid else [])]
        properties = [*_properties(limits, members, self._name, self._disk)]
        manager.start_scope(self._facts.manager, self.unit, properties)
        # First all processes go further down: a group with some cannot hand controllers down.
        self._make_below(self._keeper_group, self._keeper.pid)
        self._make_below(self._group, pid)
        undo.callback(files.remove_group, self._group)
        self._hand_down(self._scope)

    def change(self, limits: Limits) -> None:
        """Its caps are the scope's, which systemd would write anew."""
        values = [p for cap in limits.asked for p in cap.properties(limits, self._disk)]
        named = " ".join(f"{name}={value}" for name, (_, value) in values)
        manager_of = "--user " if self._facts.manager == "user" else ""
        raise HostError(
            attempt=f"change limits of sandbox {self._name}",
            answer="systemd has made its group, and holds its limits",
            remedy=(
                "Let systemd change them:",
                f"  systemctl {manager_of}set-property --runtime {self.unit} {named}",
            ),
        )

    def _start_keeper(self) -> subprocess.Popen[bytes]:
        try:
            return _spawn_keeper()
        except OSError as error:
            remedy = "The machine may be out of processes or memory."
            attempt = f"make a scope for sandbox {self._name}"
            raise files.refused("starting its keeper", error, attempt, remedy) from error

    def _make_below(self, group: str, pid: int) -> None:
        attempt = f"make a cgroup for sandbox {self._name}"
        remedy = self._facts.remedy("memory")
        files.make_directory(group, attempt=attempt, remedy=remedy)
        if pid:
            files.write(f"{group}/cgroup.procs", str(pid), attempt=attempt, remedy=remedy)

    def _remove_now(self) -> bool:
        if not files.remove_group(self._group):
            return False
        self._end_keeper()
        if not os.path.exists(self._scope):
            return True
        self._stop_if_it_lingers()
        return False

    @property
    def hold_fd(self) -> int:
        """The write end of the pipe that the keeper waits at the other end of."""
        return self._keeper.stdin.fileno() if self._keeper and self._keeper.stdin else self._hold

    def let_go(self) -> None:
        if self._keeper and self._keeper.stdin:
            self._keeper.stdin.close()
            _left.append(self._keeper)
            self._keeper = None

    def own_by(self, hold: int) -> None:
        self._hold = hold
        keep_from_children(self)

    def forget(self) -> None:
        """In a child that was forked: the hold shall end with us."""
        if self._keeper and self._keeper.stdin:
            self._keeper.stdin.close()
        if self._hold >= 0:
            os.close(self._hold)
            self._hold = -1

    def _end_keeper(self) -> None:
        if self._hold >= 0:
            os.close(self._hold)
            self._hold = -1
        if self._keeper is None:
            # Another process started it.
            kill_listed(self._keeper_group)
            return
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait()

    def _stop_if_it_lingers(self) -> None:
        """The manager removes an empty scope by itself; ask for it, once, if it does not."""
        now = time.monotonic()
        if self._emptied is None:
            self._emptied = now
        elif now - self._emptied > _LINGER_SECONDS:
            self._emptied = float("inf")
            manager.stop_unit(self._facts.manager, self.unit)

    def _above_of(self, controller: str) -> str:
        return os.path.dirname(self._slice)

    @property
    def _slice(self) -> str:
        return self._facts.bases["freezer"]

    @property
    def _scope(self) -> str:
        return f"{self._slice}/{self.unit}"

    @property
    def _group(self) -> str:
        return f"{self._scope}/{self._name}"

    @property
    def _keeper_group(self) -> str:
        return f"{self._scope}/keeper"


# Keepers that end with a hold that somebody else has now; our children all the same.
_left: list[subprocess.Popen[bytes]] = []


def reap_keepers() -> None:
    """Wait for those of the keepers that we have let go of that have ended."""
    _left[:] = [keeper for keeper in _left if keeper.poll() is None]


def scope_names(slice_: str) -> list[str]:
    """The names of the sandboxes that have a scope in the directory of a slice."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        found = (entry.name for entry in os.scandir(slice_) if entry.is_dir())
        return [
            name.removeprefix(PREFIX).removesuffix(SUFFIX)
            for name in found
            if name.startswith(PREFIX) and name.endswith(SUFFIX)
        ]
    return []


def _spawn_keeper() -> subprocess.Popen[bytes]:
    """A process that does nothing until we close its stdin, or end; Ctrl-C does not reach it."""
    program = shutil.which("cat", path="/usr/bin:/bin")
    script = "import sys; sys.stdin.read()"
    return subprocess.Popen(
        [program] if program else [sys.executable, "-SI", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,
    )


def _properties(limits: Limits, pids: list[int], name: str, disk: str) -> Iterator[Property]:
    """systemd.scope(5), with the types of org.freedesktop.systemd1(5).

    Without OOMPolicy: of a delegated scope it is "continue", and the group below ends whole.
    """
    yield "Description", ("s", f"Sandbox {name} of a Jupyter kernel")
    yield "CollectMode", ("s", "inactive-or-failed")
    yield "Delegate", ("b", True)
    yield "PIDs", ("au", pids)
    # Of two caps that set the same, the later one counts.
    caps = {what: value for cap in limits.asked for what, value in cap.properties(limits, disk)}
    for what, (kind, value) in caps.items():
        room = _KEEPER.get(what, 0)
        yield what, (kind, value + room if room else value)
