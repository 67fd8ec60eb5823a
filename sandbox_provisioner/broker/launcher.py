"""broker/launcher.py - in a server: a `contract.Launcher` that asks the broker.

What a kernel is given of the host is opened here, with this user's rights, and handed over. The
broker has the kernel; we have a descriptor of its end, and a name to ask by.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from sandbox_provisioner.broker import box
from sandbox_provisioner.broker.talk import Answer, Call, ask, ask_now
from sandbox_provisioner.broker.values import of_json
from sandbox_provisioner.broker.wishes import (
    FILL,
    MOST_SAID,
    PREPARE,
    START_READY,
    Ahead,
    Question,
    Wish,
    sources_of,
    written,
)
from sandbox_provisioner.caller import Caller
from sandbox_provisioner.confinement import confiner
from sandbox_provisioner.contract import Labels, Stdio, Warmth, WarmUnavailable
from sandbox_provisioner.descriptors import is_readable
from sandbox_provisioner.errors import HostError, LaunchError, SandboxError, SpecError
from sandbox_provisioner.facilities.caps.cgroup import Usage
from sandbox_provisioner.facilities.workdir.facts.run_by_host import (
    Server,
    look_there_last,
    this_server,
)
from sandbox_provisioner.handle import readable
from sandbox_provisioner.images.store import store_of
from sandbox_provisioner.launch import Warn, root_path
from sandbox_provisioner.meeting import SocketFolder
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.places import Asker, find_shown, open_for_another
from sandbox_provisioner.plan import LaunchRequest, Plan
from sandbox_provisioner.records import Record
from sandbox_provisioner.spec import NO_WORKDIR, Confinement
from sandbox_provisioner.story import ExitStory
from sandbox_provisioner.streams import Streams
from sandbox_provisioner.told import EndKind
from sandbox_provisioner.warm.why_cold import why_no_nursery_anywhere

RUNTIME = "/run/sandbox-provisioner"
_SECONDS = 5.0
_AFTER_SECONDS = 0.2  # for the client that now connects
_SILENT = Stdio(subprocess.DEVNULL, subprocess.DEVNULL, subprocess.DEVNULL)
_STOP_SECONDS = 30  # more than it takes: `handle.LocalHandle.stop`
# Without a broker no kernel starts anyway: what has ended the last one is worth waiting for.
_NEXT_BROKER_SECONDS = 60.0
_AGAIN_SECONDS = 0.2


class BrokerLauncher:
    """Has sandboxes started by the broker that listens at *path*."""

    def __init__(self, path: str, warn: Warn, runtime_dir: str = "") -> None:
        """*runtime_dir* is the broker's, where that is not the usual one."""
        self._path = path
        self._warn = warn
        self._is_ready = False  # what the next start such as the last one needs
        self._keeps: set[str] = set()
        self._runtime = Path(runtime_dir or (box.KERNELS if path == box.SOCKET else RUNTIME))

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
            remedy=(
                'Set launcher to "local" to see what this user\'s own rights would do.',
                "Or ask the administrator: root's jupyter sandbox explain shows what such a start "
                "does, with root's own work directory.",
            ),
        )

    async def start(
        self, request: LaunchRequest, labels: Labels | None = None, stdio: Stdio | None = None
    ) -> BrokeredHandle:
        """Start *request* and return when its program has been executed."""
        return await self._start(request, labels or Labels(), stdio or Stdio())

    async def _start(
        self, request: LaunchRequest, labels: Labels, stdio: Stdio, **act: Any
    ) -> BrokeredHandle:
        with ExitStack() as undo:
            streams = Streams(stdio)
            undo.callback(streams.close)
            act["no_input"] = stdio.stdin == subprocess.DEVNULL
            await _close_lost(self._path)

            def wish() -> None:
                call.connect()
                message, places = _message(request, labels, opened, act)
                call.say(message, [*streams.theirs, *places])

            with ExitStack() as opened, contextlib.closing(Call(self._path)) as call:
                await off_loop(wish)
                with _lost_if_silent(self._path, request.sandbox_id):
                    answer, end = await call.answer()
            if "cold" in answer:
                why, failed, never = answer["cold"]
                raise WarmUnavailable(why, failed=failed, never=never)
            undo.callback(os.close, end)
            streams.sent()
            for text in answer["warnings"]:
                self._warn(text)
            handle = BrokeredHandle(self._path, request.sandbox_id, end, answer, streams.pipes)
            undo.pop_all()
        if answer["keeps"]:
            self._keeps.add(request.sandbox_id)
        if Path(answer["folder"]) != self._runtime / request.sandbox_id:
            await handle.close()
            raise self._kept_elsewhere(Path(answer["folder"]).parent)
        return handle

    def _kept_elsewhere(self, folder: Path) -> SpecError:
        return SpecError(
            attempt="start a kernel through the sandbox broker",
            answer=f"the broker at {self._path} has its kernels in {folder}, and runtime_dir says "
            f"{self._runtime}: nobody would find the kernel's sockets",
            remedy=f'Leave runtime_dir out, or set it to "{folder}".',
        )

    def forget(self, sandbox_id: str) -> None:
        """Have what was kept for restarts removed; where nobody answers, that goes with us."""
        if sandbox_id in self._keeps:
            self._keeps.discard(sandbox_id)
            with contextlib.suppress(SandboxError):
                ask_now(
                    self._path, written(Question(ask="forget", sandbox_id=sandbox_id)), _SECONDS
                )

    def find(self, card: Mapping[str, Any]) -> BrokeredHandle:
        """The sandbox that a handle's card tells of; LaunchError if it has ended."""
        init = int(card["init_pid"]), int(card["init_start"])
        question = Question(ask="find", sandbox_id=card["id"], init=init)
        answer, end = ask_now(self._path, written(question), _SECONDS)
        return BrokeredHandle(self._path, card["id"], end, answer, [])

    def why_cold(self, request: LaunchRequest) -> str:
        """As far as that can be told here."""
        return why_no_nursery_anywhere(request)

    async def start_prepared(
        self, request: LaunchRequest, labels: Labels, stdio: Stdio, warmth: Warmth
    ) -> BrokeredHandle:
        """Start *request* from what the broker has ready; see the contract."""
        self._is_ready = False
        if why := why_no_nursery_anywhere(request):
            raise WarmUnavailable(why, never=True)
        handle = await self._start(request, labels, stdio, act=START_READY, ahead=_ahead(warmth))
        self._is_ready = not warmth.spares
        return handle

    def prepare(self, request: LaunchRequest, labels: Labels, warmth: Warmth) -> None:
        """Ask for it in a moment, in a thread; what goes wrong is told with the next start."""
        if self._is_ready or why_no_nursery_anywhere(request):
            return
        timer = threading.Timer(_AFTER_SECONDS, self._ask_ahead, (request, labels, warmth))
        timer.daemon = True
        timer.start()

    def _ask_ahead(self, request: LaunchRequest, labels: Labels, warmth: Warmth) -> None:
        with contextlib.suppress(SandboxError, OSError), ExitStack() as opened:
            act = {"act": PREPARE, "ahead": _ahead(warmth), "no_input": True}
            message, places = _message(request, labels, opened, act)
            streams = Streams(_SILENT)
            opened.callback(streams.close)
            ask_now(self._path, message, _SECONDS, [*streams.theirs, *places])

    async def fill(self, request: LaunchRequest, labels: Labels, warmth: Warmth) -> int:
        """Have it prepared now."""
        if why := why_no_nursery_anywhere(request):
            self._warn(f"Nothing can be prepared: {why}.")
            return 0
        with ExitStack() as opened:
            act = {"act": FILL, "ahead": _ahead(warmth), "no_input": True}
            message, places = await off_loop(_message, request, labels, opened, act)
            streams = Streams(_SILENT)
            opened.callback(streams.close)
            answer, _ = await ask(self._path, message, [*streams.theirs, *places])
        for text in answer["warnings"]:
            self._warn(text)
        return int(answer["made"])


# By brokers, the kernels that may be there, and of which nobody here knows any more: the broker was
# killed before it had answered.
_lost: dict[str, set[str]] = {}


@contextlib.contextmanager
def _lost_if_silent(path: str, sandbox_id: str) -> Iterator[None]:
    try:
        yield
    except HostError:
        _lost.setdefault(path, set()).add(sandbox_id)
        raise


async def _close_lost(path: str) -> None:
    """Before the next start, which may be of the same name; HostError where it does not answer."""
    for sandbox_id in list(_lost.get(path, ())):
        with contextlib.suppress(LaunchError):  # there is none
            await ask(path, written(Question(ask="close", sandbox_id=sandbox_id)))
        _lost[path].discard(sandbox_id)


def kernels_through(path: str) -> list[tuple[Record, str, Usage]]:
    """What the broker at *path* has for this user: the record of each, what it does, its use."""
    answer, _ = ask_now(path, written(Question(ask="list")), _SECONDS)
    return [
        (
            of_json(Record, told["record"], "record"),
            str(told["state"]),
            of_json(Usage, told["usage"], "usage"),
        )
        for told in answer["kernels"]
    ]


def stop_through(path: str, sandbox_id: str) -> bool:
    """Have the broker at *path* stop that kernel of this user's; whether it ended by itself when it
    was asked to. LaunchError if it has ended before, HostError if it stays."""
    answer, _ = ask_now(path, written(Question(ask="stop", sandbox_id=sandbox_id)), _STOP_SECONDS)
    return bool(answer["by_itself"])


def _meeting(folder: Path, confinement: Confinement) -> SocketFolder:
    return SocketFolder(folder / "sockets", *confiner(confinement).places(str(folder)))


# -- what is asked for


def _ahead(warmth: Warmth) -> Ahead:
    """Who asks is told by the connection."""
    return Ahead(
        preload=warmth.preload,
        spares=warmth.spares,
        idle_seconds=float(warmth.idle_seconds),
        lonely_seconds=warmth.lonely_seconds,
        alone=bool(warmth.owner),
        waited_for=warmth.waited_for,
    )


def _message(
    request: LaunchRequest, labels: Labels, opened: ExitStack, act: Mapping[str, Any]
) -> tuple[Answer, list[int]]:
    """`_wish` as it is sent."""
    wish, fds = _wish(request, labels, opened, act)
    return written(wish), fds


def _wish(
    request: LaunchRequest, labels: Labels, opened: ExitStack, act: Mapping[str, Any]
) -> tuple[Wish, list[int]]:
    """The wish for *request*, with the fields *act*, and what comes with it, open until *opened*
    closes."""
    caller = Caller.this_process()
    asker = Asker.of(caller.uid, ())
    spec = request.spec
    if spec.has_own_root:
        spec = replace(spec, rootfs=_rootfs(spec.rootfs, caller))
    places = [
        open_for_another(path, asker, opened, attempt=f"open {path!r} for the sandbox broker")
        for path in sources_of(spec)
    ]
    workdir, source, _ = ("", "", -1) if spec.workdir == NO_WORKDIR else places[0]
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
        spec=replace(spec, workdir=workdir) if source else spec,
        argv=_argv(request.argv),
        environment=dict(request.environment),
        cwd=request.cwd,
        connection_file=request.connection_file,
        home=_plain(caller.home),
        here=_plain(caller.cwd),
        umask=caller.umask,
        inherited=caller.environment,
        server=server_of(caller, source),
        labels=labels,
        env_keep=request.env_keep,
        survive_server=request.survive_server,
        logged=request.logged,
        extra_files=request.extra_files,
        server_places=request.server_places,
        **act,
    )
    return wish, [fd for _, _, fd in places]


def _rootfs(wish: str, caller: Caller) -> str:
    """What *wish* names, as the broker can have it: a directory in place of an image of this user's
    own, which root neither mounts nor looks for; any other name is one of root's."""
    if wish.startswith("/") or store_of(caller).image(wish):
        return root_path(wish, caller)
    return wish


def _argv(words: tuple[str, ...]) -> tuple[str, ...]:
    """A relative path of the program is meant from where we are."""
    program = words[0]
    return (os.path.abspath(program) if "/" in program else program, *words[1:])


def _plain(path: str) -> str:
    return os.path.abspath(path or "/")


def server_of(caller: Caller, source: str) -> Server:
    """What we, for the *caller*, run and import; of the thousands of files no more than what can
    count for a box that works in *source*."""
    return this_server(caller.cwd, caller.environment, source=source)


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
        self._since = 0.0  # we ask how it has ended, and nobody answers
        self.labels = of_json(Labels, told["labels"], "labels")
        self.meeting = _meeting(Path(told["folder"]), Confinement.NAMESPACES)
        self.narrowed = str(told.get("narrowed", ""))
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

    def _look(self, *, patient: bool = True) -> None:
        """A broker that does not answer tells nothing new of a kernel that runs. How one has ended
        the next broker tells, if it comes soon enough for who is *patient*."""
        has_ended = self._has_ended()
        try:
            answer = self._ask_now("look")
        except SandboxError as error:
            comes_late = isinstance(error, LaunchError) or not patient or self._has_waited()
            if has_ended and comes_late:
                self._story = self._story or _unknown(self.labels, error)
            return
        self._take_in(answer)

    def _has_waited(self) -> bool:
        """Since it was first asked for in vain."""
        self._since = self._since or time.monotonic()
        return self._closed or time.monotonic() - self._since >= _NEXT_BROKER_SECONDS

    def _take_in(self, answer: Answer) -> None:
        self._notices += answer["notices"]
        if answer["story"] is not None:
            self._story = self._story or of_json(ExitStory, answer["story"], "story")

    async def wait(self) -> ExitStory:
        """Wait until it has ended."""
        if not self._has_ended():
            await readable(self._end)
        while (story := await self.look()) is None:
            await asyncio.sleep(_AGAIN_SECONDS)  # no event tells that there is a broker again
        return story

    def notices(self) -> list[str]:
        """Those that came with the last look."""
        told, self._notices = self._notices, []
        return told

    def note_activity(self, *, busy: bool) -> None:
        """Let `list` show what the kernel's messages say."""
        with contextlib.suppress(HostError, LaunchError):
            self._ask_now("note", busy=busy)

    def say(self, text: str) -> None:
        """Show *text* under the cell that runs; SandboxError where the broker does not."""
        self._ask_now("say", text=text[:MOST_SAID])

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

    def listen_in_place(self) -> int:
        """The folder of its sockets is not ours: the broker binds one there."""
        return ask_now(self._path, self._question("listen"), _SECONDS)[1]

    def card(self) -> dict[str, Any]:
        """What `BrokerLauncher.find` needs."""
        pid, start = self._told["init"]
        return {"id": self._id, "broker": self._path, "init_pid": pid, "init_start": start}

    async def close(self) -> None:
        """Kill what is left, and have every trace removed."""
        if self._closed:
            return
        try:
            with _lost_if_silent(self._path, self._id):
                answer, _ = await ask(self._path, self._question("close"))
            self._take_in(answer)
            self.left_behind = tuple(answer["left_behind"])
        except LaunchError as error:  # the broker has removed it already
            self._story = self._story or _unknown(self.labels, error)
        finally:
            if self._story is None:
                await off_loop(partial(self._look, patient=False))
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
