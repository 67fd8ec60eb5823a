"""hub/for_hub.py - in the daemon, as root: has the servers of people for a hub that is not root.

The account of that hub, which the administrator's policy names, may start, find and end them, and
nobody else; kernels, which others ask for, are not among them. A server is the hub's when that one
has written down where it is; until then it ends with the hub, and later with nobody: the next hub
finds it, and so does the next daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from sandbox_provisioner import audit
from sandbox_provisioner.broker.kernels import Answer
from sandbox_provisioner.broker.peer import Peer
from sandbox_provisioner.broker.server_wish import SERVER_STREAMS, ServerWish
from sandbox_provisioner.broker.values import as_json
from sandbox_provisioner.broker.wishes import Question
from sandbox_provisioner.contract import Stdio
from sandbox_provisioner.errors import LaunchError, SandboxError, SpecError
from sandbox_provisioner.handle import LocalHandle, readable_within
from sandbox_provisioner.hub.kernels import UNTAKEN
from sandbox_provisioner.hub.persons import as_person, check_person, terms_of_hub
from sandbox_provisioner.hub.ranges import FOLDER
from sandbox_provisioner.hub.servers import Judge, Server, Servers
from sandbox_provisioner.launch import Warn
from sandbox_provisioner.off_loop import Gate, off_loop
from sandbox_provisioner.policy.current import PolicyKeeper
from sandbox_provisioner.policy.hub import HubTerms
from sandbox_provisioner.records import SERVER, UNREADABLE, Record, all_records, pid_of

Log = Callable[..., None]
# How long it is remembered how a server ended whose hub does not ask.
_KEPT_SECONDS = 600.0
# How long a hub that lives has to say that it has written down where a server is: it does when that
# has first answered, for which hubs give some minutes (start_timeout).
_HEARD_SECONDS = 600.0
# So many start together, and of one person; who takes longer makes room for others.
_TOGETHER = 8
_OF_PERSON = 2
_PLACE_SECONDS = 30.0
_MOST_SERVERS = 64  # of a person
_NOT_ROOT = 1  # whose ways are there already


@dataclass(slots=True, kw_only=True)
class Had:
    """One of them: *server* is of that *person*; *hub* is a pidfd of who has asked for it, -1 when
    that one has *heard*."""

    server: Server
    person: str
    hub: int = -1
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    burial: asyncio.Task[None] | None = None

    def release(self) -> None:
        """Wait for that hub no more."""
        hub, self.hub = self.hub, -1
        if hub >= 0:
            os.close(hub)


class ServersOfHub:
    """All of them. *policy* is the path of the administrator's; *log* is told of starts and
    ends."""

    def __init__(
        self, runtime_dir: str, policy: str, log: Log, state_dir: str = str(FOLDER)
    ) -> None:
        self._keeper = PolicyKeeper(policy)
        self._policy = policy
        self._runtime_dir = runtime_dir
        self._state_dir = state_dir
        self._log = log
        self._all: dict[str, Had] = {}
        self._gate = Gate(_TOGETHER, _PLACE_SECONDS)
        self._gates: dict[str, Gate] = {}  # of which person
        self._starting: dict[str, int] = {}  # of which person

    def _found(self) -> Servers:
        """For those that are there already."""
        return self._servers(_NOT_ROOT, lambda text: self._log("warning", text=text))

    def _servers(self, account: int, warn: Warn, judge: Judge | None = None) -> Servers:
        return Servers(
            judge=judge,
            terms_for=self._keeper.terms,
            warn=warn,
            log=self._log,
            runtime_dir=self._runtime_dir,
            state_dir=self._state_dir,
            policy=self._policy,
            account=account,
        )

    # -- what another daemon has left

    async def adopt(self) -> list[str]:
        """Take over their boxes; the ids. Called before anybody sweeps; `begin` when kernels have
        been taken over."""
        servers = self._found()
        launcher = servers.launcher()
        for folder, record in await off_loop(all_records, launcher.runtime()):
            if record.kind != SERVER or not record.uid:  # root's hub has its own
                continue
            handle = None
            with contextlib.suppress(*UNREADABLE):
                handle = await off_loop(launcher.adopt, folder.path)
            if handle is None:
                continue
            doors = servers.doors(record.sandbox_id)
            hub = await off_loop(doors.waiting_hub)
            server = servers.of(handle, doors)
            if hub == -1:  # it ended before it had heard
                await self._close(server)
                continue
            self._all[record.sandbox_id] = Had(
                server=server, person=record.user, hub=-1 if hub is None else hub
            )
        return list(self._all)

    async def begin(self) -> None:
        """Give those that were taken over their kernels, and wait for their ends; what leads to
        boxes that another daemon was making goes."""
        await off_loop(self._found().sweep)
        for sandbox_id, had in list(self._all.items()):  # burials take out of it meanwhile
            try:
                await had.server.kernels.begin()
            except UNTAKEN as error:
                # Of another version: kernels are no reason to end a server.
                self._log("warning", id=sandbox_id, text=f"It starts no kernels: {error}")
            had.burial = asyncio.create_task(self._bury(sandbox_id, had))

    # -- a start

    async def start(
        self, peer: Peer, wish: ServerWish, fds: Sequence[int], watched: int
    ) -> tuple[Answer, int, Had]:
        """Start what *wish* asks for, for the hub that is the process *watched*, with the streams
        *fds*; the answer, a descriptor of its end, and what has started."""
        person = peer.name  # who is not the hub has nothing written down of others
        try:
            hub = await off_loop(self._terms_of, peer)
            person = wish.person
            person = await off_loop(check_person, person, peer.uid, hub)
            return await self._start(peer, hub, replace(wish, person=person), fds, watched)
        except SandboxError as error:
            told = partial(audit.refused, person=person, name=wish.program, asked=None)
            await off_loop(told, error)
            raise

    async def _start(
        self, peer: Peer, hub: HubTerms, wish: ServerWish, fds: Sequence[int], watched: int
    ) -> tuple[Answer, int, Had]:
        if len(fds) != SERVER_STREAMS:
            raise _refused(wish.person, f"{len(fds)} descriptors came for {SERVER_STREAMS} streams")
        told: list[str] = []
        stdout, stderr = fds
        with self._counted(wish.person) as own:
            async with own.passed(), self._gate.passed():
                servers = self._servers(peer.uid, told.append, partial(as_person, hub))
                streams = Stdio(stdout=stdout, stderr=stderr)
                server = await servers.start(wish, streams, pid_of(watched))
        had = Had(server=server, person=wish.person, hub=os.dup(watched))
        sandbox_id = server.handle.record.sandbox_id
        self._all[sandbox_id] = had  # at once: who is cancelled from now on has it here
        had.burial = asyncio.create_task(self._bury(sandbox_id, had))
        self._log("start", of=peer.uid, user=wish.person, id=sandbox_id, argv=wish.program)
        try:
            return _told_of(server) | {"warnings": told}, server.handle.end_descriptor(), had
        except OSError:
            await self.undo(had)
            raise

    def _terms_of(self, peer: Peer) -> HubTerms:
        return terms_of_hub(self._keeper.policy(), self._policy, peer)

    @contextlib.contextmanager
    def _counted(self, person: str) -> Iterator[Gate]:
        """One more of theirs, and where they wait for each other."""
        running = sum(had.person == person for had in self._all.values())
        if running + self._starting.get(person, 0) >= _MOST_SERVERS:
            raise _refused(person, f"{_MOST_SERVERS} servers of theirs run, which is the most")
        self._starting[person] = self._starting.get(person, 0) + 1
        try:
            yield self._gates.setdefault(person, Gate(_OF_PERSON, _PLACE_SECONDS))
        finally:
            self._starting[person] -= 1
            if not self._starting[person]:
                del self._starting[person], self._gates[person]

    async def undo(self, started: Had) -> None:
        """End what has *started*, if its hub never heard of it."""
        sandbox_id = started.server.handle.record.sandbox_id
        if self._all.get(sandbox_id) is started:
            del self._all[sandbox_id]
            await self._end(started)

    # -- while they run

    async def answer(self, peer: Peer, question: Question) -> tuple[Answer, int]:
        """What *question* asks of a server, for the *peer*; and a descriptor, -1 for none."""
        await off_loop(self._terms_of, peer)
        had = self._all.get(question.sandbox_id)
        if had is None:
            raise _no_such(question.sandbox_id)
        server, handle = had.server, had.server.handle
        match question.ask.removeprefix("server-"):
            case "find":
                if (handle.record.init_pid, handle.record.init_start) != tuple(question.init):
                    raise _no_such(question.sandbox_id)
                had.heard.set()
                await server.keep()
                return _told_of(server), handle.end_descriptor()
            case "listen":
                return {}, (await server.listen()).detach()
            case "keep":
                had.heard.set()
                await server.keep()
            case "look":
                story = await handle.look()
                told = None if story is None else as_json(story)
                return {"story": told, "notices": handle.notices()}, -1
            case "signal":
                await off_loop(handle.signal, question.signal)
            case "kill":
                await off_loop(handle.kill)
            case "close":
                self._all.pop(question.sandbox_id)
                return await self._closed(had), -1
        return {}, -1

    async def _closed(self, had: Had) -> Answer:
        handle = had.server.handle
        await self._end(had)
        story = await handle.look()
        return {
            "story": None if story is None else as_json(story),
            "notices": handle.notices(),
            "left_behind": list(handle.left_behind),
        }

    # -- their ends

    async def _bury(self, sandbox_id: str, had: Had) -> None:
        """When it has ended and its hub asks no more, remove what it had."""
        if had.hub >= 0 and not await self._is_heard_of(had):
            self._all.pop(sandbox_id, None)
            await self._close(had.server)
            self._log("removed", id=sandbox_id, text="its hub has never heard of it")
            return
        story = await had.server.handle.wait()
        self._log("end", user=had.person, id=sandbox_id, kind=story.kind.value, reason=story.reason)
        await had.server.kernels.end()
        await asyncio.sleep(_KEPT_SECONDS)
        self._all.pop(sandbox_id, None)
        await self._close(had.server)
        self._log("removed", id=sandbox_id)

    async def _is_heard_of(self, had: Had) -> bool:
        """Whether the hub says so before it ends; or the server has ended by itself."""
        gone = readable_within(had.hub, _HEARD_SECONDS)
        tasks = [
            asyncio.ensure_future(one) for one in (had.heard.wait(), had.server.handle.wait(), gone)
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            had.release()
        return had.heard.is_set() or tasks[1].done()

    async def _end(self, had: Had) -> None:
        if had.burial:
            had.burial.cancel()
            await asyncio.wait([had.burial])  # it may be looking at what is closed then
        await self._close(had.server)
        had.release()

    async def _close(self, server: Server) -> None:
        try:
            await server.close()
        except (OSError, SandboxError) as error:  # of one; the others have to live
            self._log("warning", text=str(error))  # what is left goes with the next sweep

    def records(self) -> list[Record]:
        """Of all that run, and of their kernels; from any thread."""
        found = [had.server for had in list(self._all.values())]
        kernels = [record for server in found for record in server.kernels.records()]
        return [server.handle.record for server in found] + kernels

    async def let_go(self) -> None:
        """All live on, for whoever comes after us."""
        for had in list(self._all.values()):  # starts and ends go on meanwhile
            if had.burial:
                had.burial.cancel()
            had.release()
            await had.server.let_go()
        self._all.clear()


def _told_of(server: Server) -> Answer:
    handle: LocalHandle = server.handle
    record = handle.record
    return {
        "id": record.sandbox_id,
        "init": [record.init_pid, record.init_start],
        "labels": as_json(handle.labels),
        "unseen": list(handle.unseen),
        "shown_at": record.shown_at,
        "workdir": record.workdir,
        "identity": [record.device, record.inode],
        "folder": str(handle.folder.path),
        "entrance": str(server.entrance),
    }


def _refused(person: str, answer: str) -> SpecError:
    return SpecError(
        attempt=f"start a server for {person}", answer=answer, remedy="Try again later."
    )


def _no_such(sandbox_id: str) -> LaunchError:
    return LaunchError(
        attempt=f"find the server in the sandbox {sandbox_id}",
        answer="it has ended, or was never this hub's",
        remedy="Start it anew.",
        step="ask-broker",
    )
