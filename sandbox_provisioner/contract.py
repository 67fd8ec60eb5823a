"""contract.py - any process outside; pure: what the provisioner knows of who starts kernels.

The provisioner uses these, and nothing that stands behind them: a `Launcher` starts a sandbox and
answers with its `Handle`, at whose `MeetingPlace` the kernel and its clients meet. Here that is
`LocalLauncher`, `LocalHandle` and a folder of unix sockets (`meeting.py`). A launcher that asks a
broker, or that starts kernels on another node, has handles and meeting places of its own.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any, Protocol

from sandbox_provisioner.plan import LaunchRequest, Plan
from sandbox_provisioner.spec import Confinement
from sandbox_provisioner.story import ExitStory


@dataclass(frozen=True, slots=True)
class Stdio:
    """The caller's stdin, stdout and stderr for the kernel, as `subprocess.Popen` takes them."""

    stdin: int | IO[Any] | None = subprocess.DEVNULL
    stdout: int | IO[Any] | None = None
    stderr: int | IO[Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What `list` shows of a sandbox besides its use: whose it is and what runs in it."""

    kernel_id: str = ""
    name: str = ""
    notebook: str = ""
    user: str = ""
    kind: str = "kernel"
    nursery: str = ""


@dataclass(frozen=True, slots=True)
class Warmth:
    """What a kernelspec wishes to have ready: modules that a nursery imports besides, kernels that
    wait for a start, and after how many seconds without a start all of it ends; *lonely_seconds* is
    the same for a nursery with so few kernels that it costs more than it saves. *owner* is the one
    process that may use it, and that it ends with; "" for all of this user's. Where somebody waits
    until it is ready, *waited_for*, it gives way to nobody. Who launches for others has *user* tell
    them apart, and a pidfd *watched* of what a nursery of theirs ends with, -1 for nothing."""

    preload: tuple[str, ...] = ()
    spares: int = 0
    idle_seconds: float = 900.0
    lonely_seconds: float | None = None
    owner: str = ""
    waited_for: bool = False
    user: str = ""
    watched: int = -1

    @property
    def owners(self) -> tuple[str, ...]:
        """Whose nurseries serve it, as keys have it; what is made is the first one's."""
        return (f"{self.user}{self.owner}", self.user) if self.owner else (self.user,)


class WarmUnavailable(Exception):
    """No start from what was prepared: the text says why, for a log. A cold start may do.

    *failed*: there was something, and it could not. *never*: there will be nothing for such a
    kernel.
    """

    def __init__(self, why: str, *, failed: bool = False, never: bool = False) -> None:
        super().__init__(why)
        self.failed = failed
        self.never = never


class MeetingPlace(Protocol):
    """Where one kernel and its clients meet. It is known before anything is started."""

    @property
    def for_clients(self) -> Mapping[str, str | int]:
        """Transport, ip and ports by which clients connect, as a connection file names them."""
        ...

    @property
    def for_kernel(self) -> Mapping[str, str | int]:
        """The same as the kernel has to bind them."""
        ...

    def connection_file(self, name: str) -> str:
        """The path at which the kernel reads its connection file *name*."""
        ...

    def mistake(self) -> str:
        """What is wrong with what the kernel has made there, now that it listens; "" if nothing."""
        ...

    def link(self, ip: str, ports: Mapping[str, int]) -> None:
        """Let clients come by an *ip* and by *ports* that the caller chose, as long as it lives."""
        ...


class Handle(Protocol):
    """A running sandbox, wherever it runs.

    *narrowed* is what its person shall read of a policy that counts where it was started, "" where
    that is nothing. *unseen* are paths that the kernel's command names and that are not in its box;
    *left_behind* are sentences, once it is closed, of what the host should be careful with.
    """

    left_behind: tuple[str, ...]
    narrowed: str
    unseen: tuple[str, ...]

    @property
    def pid(self) -> int:
        """A number for people, and for jupyter_client, which shows it; nobody signals by it."""
        ...

    @property
    def labels(self) -> Labels:
        """What it was started with."""
        ...

    @property
    def meeting(self) -> MeetingPlace:
        """Where its clients meet it."""
        ...

    async def ready(self) -> str | None:
        """Wait until the kernel listens at its meeting place: "" then. Another text is what is
        wrong with it there; None: it has ended before."""
        ...

    def poll(self) -> ExitStory | None:
        """How it ended, or None while it runs; does not block."""
        ...

    async def look(self) -> ExitStory | None:
        """`poll`, off the event loop where there is something to read."""
        ...

    async def wait(self) -> ExitStory:
        """Wait until it has ended."""
        ...

    def notices(self) -> list[str]:
        """What has happened to it since the last call, as sentences for a log; does not block."""
        ...

    def note_activity(self, *, busy: bool) -> None:
        """Let `list` show what the kernel's messages say."""
        ...

    def say(self, text: str) -> None:
        """Show *text* under the cell that runs. Takes a while; SandboxError where nobody passes it
        on."""
        ...

    def signal(self, number: int) -> None:
        """Send *number* to the kernel and its process group; nothing if it has ended."""
        ...

    def kill(self) -> None:
        """End everything inside at once; nothing if it has ended."""
        ...

    def visible(self, path: str) -> str | None:
        """Where we find the kernel's *path*, if we can see it at all."""
        ...

    def listen_in_place(self) -> int:
        """A socket that listens where the kernel, which has ended, published; the caller's to
        close. -1 where whoever writes to the folder of its meeting place can make one. Takes a
        while; OSError or SandboxError."""
        ...

    def card(self) -> dict[str, Any]:
        """What `Launcher.find` of another process needs to find it; JSON can hold it."""
        ...

    async def close(self) -> None:
        """Kill what is left, reap, and remove every trace. More than once is fine."""
        ...


class Launcher(Protocol):
    """Who starts sandboxes, any number, one after another or at once."""

    def meeting_place(self, sandbox_id: str, confinement: Confinement) -> MeetingPlace:
        """Where the kernel of *sandbox_id*, which is not there yet, will be met."""
        ...

    def sweep(self) -> list[str]:
        """Remove what killed servers left; the ids of what is gone. Takes a while."""
        ...

    def explain(self, request: LaunchRequest) -> Plan:
        """The plan that `start` would perform; nothing is run. Takes a while."""
        ...

    async def start(
        self, request: LaunchRequest, labels: Labels | None = None, stdio: Stdio | None = None
    ) -> Handle:
        """Start *request* and return when its program has been executed.

        Raises SpecError, HostError or LaunchError; then everything made so far is undone.
        """
        ...

    def find(self, card: Mapping[str, Any]) -> Handle:
        """The sandbox that a `Handle.card` tells of; LaunchError if it has ended. Takes a while."""
        ...

    def forget(self, sandbox_id: str) -> None:
        """The kernel of *sandbox_id* has ended, and will not be started again. Takes a moment."""
        ...

    # -- what is prepared before somebody asks for it

    def why_cold(self, request: LaunchRequest) -> str:
        """Why no start of *request* can be prepared, "" if one can. Takes a while."""
        ...

    async def start_prepared(
        self, request: LaunchRequest, labels: Labels, stdio: Stdio, warmth: Warmth
    ) -> Handle:
        """Start *request* from what is ready for it; WarmUnavailable where nothing is, or it
        failed, SandboxError for what no start could do. In both cases nothing is left of it."""
        ...

    def prepare(self, request: LaunchRequest, labels: Labels, warmth: Warmth) -> None:
        """Prepare a start such as *request*, in the background."""
        ...

    async def fill(self, request: LaunchRequest, labels: Labels, warmth: Warmth) -> int:
        """Prepare now, and return how many nurseries and spares were made for it."""
        ...
