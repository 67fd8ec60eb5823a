"""broker/launcher.py - in a server: a `contract.Launcher` that asks the broker.

What a kernel is given of the host is opened here, with this user's rights, and handed over. The
broker has the kernel; we have a descriptor of its end, and a name to ask by.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from sandbox_provisioner.broker.talk import Answer, ask, ask_now
from sandbox_provisioner.broker.values import of_json
from sandbox_provisioner.broker.wishes import Question, Wish, sources_of, written
from sandbox_provisioner.caller import Caller
from sandbox_provisioner.confinement import confiner
from sandbox_provisioner.contract import Labels, Stdio, Warmth, WarmUnavailable
from sandbox_provisioner.descriptors import is_readable
from sandbox_provisioner.errors import HostError, LaunchError, SandboxError, SpecError
from sandbox_provisioner.facilities.workdir.facts.run_by_host import (
    Server,
    look_there_last,
    this_server,
)
from sandbox_provisioner.handle import readable
from sandbox_provisioner.launch import Warn
from sandbox_provisioner.meeting import SocketFolder
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.places import Asker, Place, find_shown
from sandbox_provisioner.plan import LaunchRequest, Plan
from sandbox_provisioner.spec import NO_WORKDIR, Confinement, relative
from sandbox_provisioner.story import ExitStory
from sandbox_provisioner.streams import Streams
from sandbox_provisioner.told import EndKind

RUNTIME = "/run/sandbox-provisioner"
_SECONDS = 5.0
_COLD = "the sandbox broker starts each kernel anew"


class BrokerLauncher:
    """Has sandboxes started by the broker that listens at *path*."""

    def __init__(self, path: str, warn: Warn, runtime_dir: str = "") -> None:
        """*runtime_dir* is the broker's, where that is not the usual one."""
        self._path = path
        self._warn = warn
        self._runtime = Path(runtime_dir or RUNTIME)

    def meeting_place(self, sandbox_id: str, confinement: Confinement) -> SocketFolder:
        """Below the broker's folder, where this user may connect to what is theirs."""
        return _meeting(self._runtime / sandbox_id, confinement)

    def sweep(self) -> list[str]:
        """The broker does, at each start."""
        return []

    def explain(self, request: LaunchRequest) -> Plan:
        """The plan is the broker's."""
        raise SpecError(
            attempt="explain a start that the sandbox broker does",
            answer="its plan is made there, and told to nobody",
            remedy='Set launcher to "local" to see what this user\'s own rights would do.',
        )

    async def start(
        self, request: LaunchRequest, labels: Labels | None = None, stdio: Stdio | None = None
    ) -> BrokeredHandle:
        """Start *request* and return when its program has been executed."""
        with ExitStack() as undo:
            streams = Streams(stdio or Stdio())
            undo.callback(streams.close)
            with ExitStack() as opened:
                wish, places = await off_loop(_wish, request, labels or Labels(), opened)
                fds = [*streams.theirs, *(place.fd for place in places)]
                answer, end = await ask(self._path, written(wish), fds)
            undo.callback(os.close, end)
            streams.sent()
            for text in answer["warnings"]:
                self._warn(text)
            handle = BrokeredHandle(self._path, request.sandbox_id, end, answer, streams.pipes)
            undo.pop_all()
            return handle

    def find(self, card: Mapping[str, Any]) -> BrokeredHandle:
        """The sandbox that a handle's card tells of; LaunchError if it has ended."""
        init = int(card["init_pid"]), int(card["init_start"])
        question = Question(ask="find", sandbox_id=card["id"], init=init)
        answer, end = ask_now(self._path, written(question), _SECONDS)
        return BrokeredHandle(self._path, card["id"], end, answer, [])

    def why_cold(self, request: LaunchRequest) -> str:
        """Nothing is prepared there."""
        return _COLD

    async def start_prepared(
        self, request: LaunchRequest, labels: Labels, stdio: Stdio, warmth: Warmth
    ) -> BrokeredHandle:
        """See `why_cold`."""
        raise WarmUnavailable(_COLD, never=True)

    def prepare(self, request: LaunchRequest, labels: Labels, warmth: Warmth) -> None:
        """See `why_cold`."""

    async def fill(self, request: LaunchRequest, labels: Labels, warmth: Warmth) -> int:
        """See `why_cold`."""
        return 0


def _meeting(folder: Path, confinement: Confinement) -> SocketFolder:
    return SocketFolder(folder / "sockets", *confiner(confinement).places(str(folder)))


# -- what is asked for


def _wish(request: LaunchRequest, labels: Labels, opened: ExitStack) -> tuple[Wish, list[Place]]:
    """The wish for *request*, and what comes with it, open until *opened* closes."""
    caller = Caller.this_process()
    asker = Asker.of(caller.uid, ())
    places = [
        Place.open(path, asker, opened, attempt=f"open {path!r} for the sandbox broker")
        for path in sources_of(request.spec)
    ]
    source = "" if request.spec.workdir == NO_WORKDIR else places[0].source
    if source:
        look_there_last(source, sys.path)
    if request.connection_file is None:
        raise SpecError(
            attempt="start a command through the sandbox broker",
            answer="it starts kernels only",
            remedy='Set launcher to "local".',
        )
    wish = Wish(
        sandbox_id=request.sandbox_id,
        spec=replace(request.spec, workdir=places[0].path) if source else request.spec,
        argv=_argv(request.argv),
        environment=dict(request.environment),
        cwd=request.cwd,
        connection_file=request.connection_file,
        home=_plain(caller.home),
        here=_plain(caller.cwd),
        umask=caller.umask,
        inherited=caller.environment,
        server=_server(caller, source),
        labels=labels,
        env_keep=request.env_keep,
        survive_server=request.survive_server,
        logged=request.logged,
        extra_files=request.extra_files,
        server_places=request.server_places,
    )
    return wish, places


def _argv(words: tuple[str, ...]) -> tuple[str, ...]:
    """A relative path of the program is meant from where we are."""
    program = words[0]
    return (os.path.abspath(program) if "/" in program else program, *words[1:])


def _plain(path: str) -> str:
    return os.path.abspath(path or "/")


def _server(caller: Caller, source: str) -> Server:
    """What we run and import, of the thousands of files no more than what can count."""
    server = this_server(caller.cwd, caller.environment)
    imported = tuple(f for f in server.imported if source and relative(f, source) is not None)
    return replace(server, imported=imported)


# -- what runs


class BrokeredHandle:
    """A sandbox that the broker has: a `contract.Handle`. *end* is a descriptor of its PID 1,
    *pipes* are our ends of what the caller asked to be pipes."""

    def __init__(
        self, path: str, sandbox_id: str, end: int, told: Answer, pipes: list[IO[bytes]]
    ) -> None:
        self._path = path
        self._id = sandbox_id
        self._end = end
        self._told = told
        self._pipes = pipes
        self._story: ExitStory | None = None
        self._notices: list[str] = []
        self._closed = False
        self.labels = of_json(Labels, told["labels"], "labels")
        self.meeting = _meeting(Path(told["folder"]), Confinement.NAMESPACES)
        self.unseen = tuple(told["unseen"])
        self.left_behind: tuple[str, ...] = ()

    @property
    def pid(self) -> int:
        """The pid of its PID 1; nobody here may signal it."""
        return int(self._told["init"][0])

    def _question(self, what: str, **more: Any) -> Answer:
        return written(Question(ask=what, sandbox_id=self._id, **more))

    def _ask_now(self, what: str, **more: Any) -> Answer:
        return ask_now(self._path, self._question(what, **more), _SECONDS)[0]

    def _has_ended(self) -> bool:
        return self._story is not None or self._closed or is_readable(self._end)

    async def ready(self) -> str | None:
        """As the contract has it."""
        answer, _ = await ask(self._path, self._question("ready"))
        mistake: str | None = answer["mistake"]
        return mistake

    def poll(self) -> ExitStory | None:
        """How it ended: asked once it has, which takes a moment."""
        if self._story is None and self._has_ended():
            self._look()
        return self._story

    async def look(self) -> ExitStory | None:
        """`poll`, off the event loop."""
        if self._story is None:
            await off_loop(self._look)
        return self._story

    def _look(self) -> None:
        """A broker that does not answer tells nothing new of a kernel that runs, and not how one
        has ended."""
        has_ended = self._has_ended()
        try:
            answer = self._ask_now("look")
        except SandboxError as error:
            if has_ended:
                self._story = self._story or _unknown(self.labels, error)
            return
        self._take_in(answer)

    def _take_in(self, answer: Answer) -> None:
        self._notices += answer["notices"]
        if answer["story"] is not None:
            self._story = self._story or of_json(ExitStory, answer["story"], "story")

    async def wait(self) -> ExitStory:
        """Wait until it has ended."""
        if not self._has_ended():
            await readable(self._end)
        story = await self.look()
        assert story is not None
        return story

    def notices(self) -> list[str]:
        """Those that came with the last look."""
        told, self._notices = self._notices, []
        return told

    def note_activity(self, *, busy: bool) -> None:
        """Let `list` show what the kernel's messages say."""
        with contextlib.suppress(HostError, LaunchError):
            self._ask_now("note", busy=busy)

    def signal(self, number: int) -> None:
        """Send *number* to the kernel and its process group; nothing if it has ended."""
        if number and not self._has_ended():
            with self._unless_ended():
                self._ask_now("signal", signal=number)

    def kill(self) -> None:
        """End everything inside at once; nothing if it has ended."""
        if not self._has_ended():
            with self._unless_ended():
                self._ask_now("kill")

    @contextlib.contextmanager
    def _unless_ended(self) -> Iterator[None]:
        try:
            yield
        except LaunchError:
            if not self._has_ended():
                raise

    def visible(self, path: str) -> str | None:
        """Where we find the kernel's *path*: only the work directory is shared."""
        told = self._told
        device, inode = told["identity"]
        return find_shown(path, told["shown_at"], told["workdir"], (device, inode))

    def card(self) -> dict[str, Any]:
        """What `BrokerLauncher.find` needs."""
        pid, start = self._told["init"]
        return {"id": self._id, "broker": self._path, "init_pid": pid, "init_start": start}

    async def close(self) -> None:
        """Kill what is left, and have every trace removed."""
        if self._closed:
            return
        try:
            answer, _ = await ask(self._path, self._question("close"))
            self._take_in(answer)
            self.left_behind = tuple(answer["left_behind"])
        except LaunchError as error:  # the broker has removed it already
            self._story = self._story or _unknown(self.labels, error)
        finally:
            if self._story is None:
                await off_loop(self._look)
            self._closed = True
            self._close_ours()

    def _close_ours(self) -> None:
        os.close(self._end)
        for pipe in self._pipes:
            pipe.close()
        while self.meeting.links:
            with contextlib.suppress(OSError):
                self.meeting.links.pop().unlink()


def _unknown(labels: Labels, error: SandboxError) -> ExitStory:
    """Of a kernel that has ended while nobody could ask how."""
    reason = f"Kernel {labels.kernel_id[:8]} has ended, and how is not known: {error.answer}."
    return ExitStory(kind=EndKind.OUTSIDE, code=None, reason=reason)
