"""broker/kernels.py - the daemon: starts kernels for users, and has them.

Each kernel is a `LocalHandle` as a server has one for its own; who asks hears of none but that
user's. A kernel ends with the server that asked for it, and not with us: PID 1 watches that one.
Who comes after us finds the kernels by their records.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any
from weakref import WeakValueDictionary

from sandbox_provisioner import audit
from sandbox_provisioner.broker.ahead import Job, Prepared, why_not_ahead
from sandbox_provisioner.broker.burials import Burials
from sandbox_provisioner.broker.desk import Desk
from sandbox_provisioner.broker.early import Early
from sandbox_provisioner.broker.eyes import Eyes
from sandbox_provisioner.broker.kept import Kept
from sandbox_provisioner.broker.peer import Peer, close_all
from sandbox_provisioner.broker.values import as_json
from sandbox_provisioner.broker.wishes import (
    FILL,
    LAYERS,
    PREPARE,
    REVIEWS,
    START_READY,
    STREAMS,
    Ahead,
    Question,
    Wish,
)
from sandbox_provisioner.contract import Stdio, Warmth, WarmUnavailable
from sandbox_provisioner.descriptors import at_its_end, is_readable
from sandbox_provisioner.errors import LaunchError, SandboxError, SpecError
from sandbox_provisioner.handle import LocalHandle, readable, readable_within
from sandbox_provisioner.launch import LocalLauncher, start_cold
from sandbox_provisioner.layers.folders import REVIEW_DAYS
from sandbox_provisioner.off_loop import apart, off_loop
from sandbox_provisioner.plan import LaunchRequest, Site
from sandbox_provisioner.policy.current import PolicyKeeper
from sandbox_provisioner.policy.narrow import for_person, narrow
from sandbox_provisioner.policy.person import Person
from sandbox_provisioner.records import (
    OF_NOBODY,
    UNREADABLE,
    Record,
    RecordFolder,
    all_records,
    has_ended,
    pid_of,
)
from sandbox_provisioner.spec import Layer
from sandbox_provisioner.stem import stem
from sandbox_provisioner.story import ExitStory
from sandbox_provisioner.warm.ahead import fill
from sandbox_provisioner.warm.found import is_any
from sandbox_provisioner.warm.start_from import NO_NURSERY, start_warm_as

Answer = dict[str, Any]
Log = Callable[..., None]
# How long it is remembered how a kernel ended whose server does not ask.
_KEPT_SECONDS = 600.0
_READY_SECONDS = 600.0
_MOST_KERNELS = 64  # of a user
_MOST_STARTING = 8  # of a user: who waits for a turn has no thread
_TOGETHER = 32
_MOST_WHY = 4096
_STEM_SECONDS = 3600.0
# An image file stays mounted so long after the last start over it, whose ever that was.
_IMAGE_SECONDS = 900.0
_MOST_LEFT = _MOST_KERNELS  # of a user
_MOST_LISTED = 256  # of a label


@dataclass(slots=True, kw_only=True)
class Kernel:
    """One, *of* that user; *watched* is a pidfd of its server, -1 if that is not known."""

    of: int
    handle: LocalHandle
    watched: int = -1
    adopted: bool = False
    burial: asyncio.Task[None] | None = None

    def release(self) -> None:
        """Close what is ours of the server's."""
        if self.watched >= 0:
            os.close(self.watched)
            self.watched = -1


class Kernels:
    """All that were asked for at one *desk*. *log* is told of starts, refusals and ends."""

    def __init__(
        self,
        runtime_dir: str,
        policy: str,
        log: Log,
        desk: Desk | None = None,
        kept: Kept | None = None,
    ) -> None:
        """*policy* is the path of the administrator's; the public desk, unless another is named;
        *kept* is what outlives kernels, in the usual place."""
        self.desk = desk or Desk()
        self._kept = kept or Kept("", REVIEW_DAYS, self.desk.kept_where)
        self._collects = kept is not None  # for all people: a hub has one of us for each
        self._runtime_dir = runtime_dir
        self._terms = PolicyKeeper(policy).terms
        self._log = log
        self._all: dict[str, Kernel] = {}
        self._burials = Burials()
        self._starting: dict[int, int] = {}  # how many, of which user
        self._turns: dict[int, asyncio.Semaphore] = {}  # of whom some start
        self._gate = asyncio.Semaphore(_TOGETHER)
        # Of whose questions some are answered by what takes a thread for long.
        self._asking: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()
        self._told: dict[int, set[str]] = {}  # of which user
        self._ahead = Prepared(self.desk.has, log)
        # Those that have ended, of which user, and what waits for the end of their servers.
        self._left: dict[str, tuple[int, asyncio.Task[None]]] = {}
        self._again: dict[str, asyncio.Event] = {}  # that start, or wait for their turn

    def _launcher(self, warn: Callable[[str], None], **more: Any) -> LocalLauncher:
        own: dict[str, Any] = {"runtime_dir": self._runtime_dir, "keep_seconds": _IMAGE_SECONDS}
        return LocalLauncher(warn=warn, **own, **more)

    async def adopt(self) -> list[str]:
        """Take over what another broker has left; the ids."""
        launcher = self._launcher(lambda text: self._log("warning", text=text))
        runtime = launcher.runtime()
        await off_loop(os.chmod, runtime, 0o711)  # the sockets below it are for their users
        found = await off_loop(all_records, runtime)
        for folder, record in found:
            if record.survives_server and record.kind not in OF_NOBODY and self.desk.has(record):
                kernel = await off_loop(_adopted, launcher, folder, record)
                if kernel:
                    await off_loop(self._kept.adopt, kernel.of, record)
                    self._add(record.sandbox_id, kernel)
        await self._ahead.adopt(launcher, found)
        await off_loop(launcher.sweep)
        if self._collects:
            await off_loop(self._kept.collect)
        self.desk.keep_alone(list(self._all))
        return list(self._all)

    def _add(self, sandbox_id: str, kernel: Kernel) -> None:
        self._all[sandbox_id] = kernel
        kernel.handle.settle = partial(self._settle, kernel.of)
        kernel.burial = asyncio.create_task(self._bury(sandbox_id, kernel))

    async def _bury(self, sandbox_id: str, kernel: Kernel) -> None:
        """When a kernel has ended and its server asks no more, remove what it had."""
        if kernel.watched >= 0 and not kernel.adopted:  # nobody waits for that
            await off_loop(_note_server, kernel.handle, kernel.watched)
        story = await kernel.handle.wait()
        self._log("end", of=kernel.of, id=sandbox_id, kind=story.kind.value, reason=story.reason)
        if kernel.watched >= 0:
            await readable_within(kernel.watched, _KEPT_SECONDS)
        else:
            await asyncio.sleep(_KEPT_SECONDS)
        self._all.pop(sandbox_id, None)
        await self._burials.begin(self._close(kernel))
        self._log("removed", of=kernel.of, id=sandbox_id)

    def _settle(self, uid: int, path: str) -> None:
        """By the machine's files the user is who asked; without a name there, with no group."""
        self._kept.settle(self.desk.peer(uid, uid), path)

    async def _close(self, kernel: Kernel) -> None:
        name = kernel.handle.folder.path.name
        try:
            await kernel.handle.close()
        except SandboxError as error:
            self._log("warning", text=str(error))  # what is left goes with the next sweep
        if await off_loop(self._kept.ended, kernel.of, name):
            await self._leave(name, kernel)
        kernel.release()
        await off_loop(self.desk.leave, name)

    # -- what may be started again

    async def _leave(self, name: str, kernel: Kernel) -> None:
        """What it has installed stays as long as its server may start it again; of very many of one
        user's that which has stayed longest goes."""
        server, kernel.watched = kernel.watched, -1
        of_user = [one for one, (uid, _) in self._left.items() if uid == kernel.of]
        others = [one for one in of_user if one not in self._again]
        task = asyncio.create_task(self._forget_in_time(kernel.of, name, server))
        self._left[name] = kernel.of, task
        if len(others) >= _MOST_LEFT:
            await self._forget(kernel.of, others[0])

    async def _forget_in_time(self, uid: int, name: str, server: int) -> None:
        try:
            if server >= 0:
                await readable(server)
            else:
                await asyncio.sleep(_KEPT_SECONDS)
        finally:
            if server >= 0:
                os.close(server)
        while name in self._again:  # where it starts, we are cancelled
            await self._again[name].wait()
        self._left.pop(name, None)
        await off_loop(self._kept.forget, uid, name)
        self._log("forgotten", of=uid, id=name)

    async def _forget(self, uid: int, name: str) -> None:
        """That user's kernel will not be started again."""
        if name not in self._all:
            self._is_awaited_no_more(name, uid)
            await off_loop(self._kept.forget, uid, name)

    def _is_awaited_no_more(self, name: str, uid: int) -> None:
        if self._left.get(name, (-1,))[0] == uid:
            self._left.pop(name)[1].cancel()

    async def end(self) -> None:
        """All end, and nothing is left of them."""
        kernels = list(self._all.values())
        self._all.clear()
        await asyncio.gather(self._ahead.end(), *map(self._end, kernels))
        await self._burials.over()
        for name, (uid, _) in list(self._left.items()):
            await self._forget(uid, name)
        await off_loop(self._launcher(lambda _: None).sweep)  # of spares, which are nobody's

    async def stop(self) -> None:
        """Make nothing ready any more: what is half made is undone."""
        await self._ahead.stop()

    def records(self) -> list[Record]:
        """Of all that run; from any thread."""
        return [kernel.handle.record for kernel in list(self._all.values())]

    def let_go(self) -> None:
        """All live on, for whoever comes after us."""
        for kernel in self._all.values():
            if kernel.burial:
                kernel.burial.cancel()
            kernel.release()
            kernel.handle.let_go()
        self._all.clear()
        self._ahead.let_go()
        for _, task in self._left.values():
            task.cancel()
        self._left.clear()

    # -- a start

    async def start(
        self,
        peer: Peer,
        wish: Wish,
        fds: Sequence[int],
        watched: int,
        early: Early | None = None,
    ) -> tuple[Answer, int, Kernel | None]:
        """Start what *wish* asks for, with *fds* that came with it, which stay the caller's, as
        *watched* and *early* do; the answer, a descriptor of its end, which is the caller's to
        close, and what has started: -1 and None where nothing is ready for it."""
        _check_descriptors(wish, fds)
        try:
            return await self._start_in_turn(peer, wish, fds, watched, early or Early())
        except WarmUnavailable as error:
            return {"cold": [str(error)[:_MOST_WHY], error.failed, error.never]}, -1, None

    def _check_any(self, peer: Peer, wish: Wish, warmth: Warmth) -> None:
        """WarmUnavailable where this user has no nursery at all: then nobody looks at the host."""
        if not is_any(self._launcher(_unheard).runtime(), warmth.owners):
            raise self._ahead.why_not(peer.uid, _name_of(wish)) or WarmUnavailable(NO_NURSERY)

    async def _start_in_turn(
        self, peer: Peer, wish: Wish, fds: Sequence[int], watched: int, early: Early
    ) -> tuple[Answer, int, Kernel | None]:
        with self._counted(peer.uid), self._starts_again(wish.sandbox_id):
            async with self._turns[peer.uid], self._gate:
                try:
                    return await self._start(peer, wish, fds, watched, early)
                except SandboxError as error:
                    told = partial(audit.refused, person=peer.name, name=wish.labels.name)
                    await off_loop(partial(told, error, asked=wish.spec))
                    raise

    @contextlib.contextmanager
    def _starts_again(self, name: str) -> Iterator[None]:
        """Nothing that it has installed is dropped meanwhile."""
        over = self._again.setdefault(name, asyncio.Event())
        try:
            yield
        finally:
            if self._again.get(name) is over:
                del self._again[name]
            over.set()

    @contextlib.contextmanager
    def _counted(self, uid: int) -> Any:
        running = sum(kernel.of == uid for kernel in self._all.values())
        if self._starting.get(uid, 0) >= _MOST_STARTING:
            raise SpecError(
                attempt="start a kernel through the sandbox broker",
                answer=f"{_MOST_STARTING} kernels of this user start at this moment",
                remedy="Try again in a moment.",
            )
        if running + self._starting.get(uid, 0) >= _MOST_KERNELS:
            raise SpecError(
                attempt="start a kernel through the sandbox broker",
                answer=f"{_MOST_KERNELS} kernels of this user run, which is the most",
                remedy="End some kernels that you do not need.",
            )
        self._starting[uid] = self._starting.get(uid, 0) + 1
        self._turns.setdefault(uid, asyncio.Semaphore(self.desk.together))
        try:
            yield
        finally:
            self._starting[uid] -= 1
            if not self._starting[uid]:
                del self._starting[uid], self._turns[uid]

    async def _start(
        self, peer: Peer, wish: Wish, fds: Sequence[int], watched: int, early: Early
    ) -> tuple[Answer, int, Kernel | None]:
        server, keeps, narrowed, told = -1, False, "", list[str]()
        with ExitStack() as opened, ExitStack() as kept_open:
            warmth = self.desk.warmth(peer, wish.ahead, watched, opened) if wish.ahead else None
            prepare = partial(self._prepared, peer, wish, fds[STREAMS:], watched, opened, early)

            def begin() -> tuple[LocalLauncher, LaunchRequest]:
                nonlocal server, keeps, narrowed, told
                launcher, request, told = prepare(warmth)
                keeps, narrowed = request.spec.layer is Layer.KERNEL, request.narrowed
                if request.watched >= 0:  # before: what runs has to be had by somebody
                    server = os.dup(watched)
                    kept_open.callback(os.close, server)
                return launcher, request

            labels = replace(wish.labels, user=peer.name)
            stdin, stdout, stderr = fds[:STREAMS]
            stdio = Stdio(subprocess.DEVNULL if wish.no_input else stdin, stdout, stderr)
            if warmth:
                handle = await start_warm_as(begin, labels, stdio, warmth)
            else:
                handle = await start_cold(*await off_loop(begin), labels, stdio)
            kept_open.pop_all()
        kernel = Kernel(of=peer.uid, handle=handle, watched=server)
        self._is_awaited_no_more(wish.sandbox_id, peer.uid)
        self._add(wish.sandbox_id, kernel)  # at once: who is cancelled from now on has it here
        self._kept.started(peer.uid, wish.sandbox_id)
        told_later = {"user": peer.name, "id": wish.sandbox_id, "argv": wish.argv[0]}
        note = partial(self._log, "start", of=peer.uid, **told_later)
        asyncio.get_running_loop().call_soon(note)  # nothing waits until the answer has gone
        told += self._ahead.told(peer.uid)
        more = {"warnings": told, "keeps": keeps, "narrowed": narrowed}
        try:
            return self._told_of(handle) | more, handle.end_descriptor(), kernel
        except OSError:
            await self.undo(kernel)
            raise

    def _prepared(
        self,
        peer: Peer,
        wish: Wish,
        fds: Sequence[int],
        watched: int,
        opened: ExitStack,
        early: Early,
        warmth: Warmth | None = None,
    ) -> tuple[LocalLauncher, LaunchRequest, list[str]]:
        """Who starts what *wish* is allowed to be, that, and a list of what its server is told.
        *opened* closes what is opened for it. With *warmth* something has to be ready for it."""
        if warmth:
            self._check_any(peer, wish, warmth)
        eyes = early.eyes(peer)
        opened.enter_context(eyes.open())
        asked = self.desk.judged(peer, wish, fds, eyes, opened)
        told = list(asked.told)
        launcher = self._launcher(
            told.append,
            layer_dir=str(self._kept.base(peer.uid)),
            told=self._told.setdefault(peer.uid, set()),
            caller=lambda: asked.caller,
            ground=early.ground,
            seen_by=asked.seen_by,
            found_by=asked.found_by,
            why_not_ahead=partial(self._why_not_ahead, peer.uid, watched, asked.seen_by),
        )
        if wish.act != START_READY:
            launcher.sweep()
        terms = self._terms(Person(peer.name, peer.uid, peer.group_names))
        spec, notices = narrow(asked.spec, terms) if terms else (asked.spec, ())
        told += notices
        spec = replace(spec, volumes=(*spec.volumes, *asked.volumes))
        self._kept.check(peer.uid, wish.sandbox_id, spec)
        request = self.desk.request(wish.request(spec, watched, terms), peer, watched)
        request = launcher.settled(request)
        less = (*asked.told, *notices)
        narrowed = for_person(less, terms.ask) if terms else for_person(less)
        request = replace(request, asked=wish.spec if terms else None, narrowed=narrowed)
        return launcher, request, told

    # -- what is made before somebody asks for it

    async def prepare(self, peer: Peer, wish: Wish, fds: Sequence[int], watched: int) -> Answer:
        """Have ready what *wish* asks for, when there is time for it, or, to "fill", now; *fds* and
        *watched* stay the caller's."""
        _check_descriptors(wish, fds)
        own, told = _copies((watched, *fds)), list[str]()
        job = Job(
            of=peer.uid,
            name=_name_of(wish),
            make=partial(self._fill, peer, wish, own, told),
            drop=partial(_close_apart, own),
        )
        if wish.act == PREPARE:
            self._ahead.want(job)
            return {}
        try:
            return {"made": await self._ahead.now(job), "warnings": told}
        except WarmUnavailable as error:
            raise SpecError(
                attempt="prepare starts through the sandbox broker",
                answer=str(error),
                remedy="Kernels start cold meanwhile.",
            ) from None

    async def _fill(self, peer: Peer, wish: Wish, fds: Sequence[int], told: list[str]) -> int:
        """How many nurseries and spares were made; *told* is what there was to say to the user."""
        watched, *fds = fds
        if is_readable(watched):  # meanwhile the server has ended, and another one has its own
            return 0
        stem.stay(_STEM_SECONDS)
        with ExitStack() as opened:
            warmth = self.desk.warmth(peer, wish.ahead or Ahead(), watched, opened)
            places = fds[STREAMS:]
            begun = await off_loop(self._prepared, peer, wish, places, watched, opened, Early())
            launcher, request, said = begun
            known = len(said)
            labels = replace(wish.labels, user=peer.name)
            keep = partial(self._ahead.keep, peer.uid)
            made = await fill(launcher, request, labels, warmth, keep=keep)
        if wish.act == FILL:
            told += said
        else:  # of the rest the start before it has told
            for text in said[known:]:
                self._ahead.tell(peer.uid, text)
        return made

    def _why_not_ahead(
        self, uid: int, server: int, seen_by: Eyes, site: Site, variables: Mapping[str, str]
    ) -> str:
        if is_readable(server):  # it was waited until the machine is idle
            raise WarmUnavailable("the server that asked for it has ended")
        return self._ahead.why_no_more(uid) or seen_by(why_not_ahead, site, variables)

    async def undo(self, started: Kernel) -> None:
        """End what has *started*, if its server never heard of it: that one, whoever else has had
        its id since. Its user chooses the id."""
        sandbox_id = started.handle.record.sandbox_id
        if self._all.get(sandbox_id) is started:
            del self._all[sandbox_id]
            await self._end(started)

    def _end(self, kernel: Kernel) -> asyncio.Future[None]:
        return self._burials.begin(self._bury_now(kernel))

    async def _bury_now(self, kernel: Kernel) -> None:
        if kernel.burial:
            kernel.burial.cancel()
            await asyncio.wait([kernel.burial])  # it may be looking at what is closed then
        await self._close(kernel)

    # -- while it runs

    async def answer(self, peer: Peer, question: Question) -> tuple[Answer, int]:
        """What *question* asks, of a kernel of the *peer*'s; and a descriptor, -1 for none."""
        if question.ask == "forget":
            await self._forget(peer.uid, question.sandbox_id)
            return {}, -1
        if question.ask in {"list", *REVIEWS, *LAYERS}:
            usual = asyncio.Semaphore(self.desk.together)
            async with self._asking.setdefault(peer.uid, usual):
                return await off_loop(self._answer_of_all, peer, question)
        kernel = self._all.get(question.sandbox_id)
        if kernel is None or kernel.of != peer.uid:
            raise _no_such(question.sandbox_id)
        return await self._answer_of(kernel, peer, question)

    def _answer_of_all(self, peer: Peer, question: Question) -> tuple[Answer, int]:
        if question.ask == "list":
            return {"kernels": self._listed(peer)}, -1
        return self._kept.answer(peer, question, self.desk.seen_as)

    async def _answer_of(
        self, kernel: Kernel, peer: Peer, question: Question
    ) -> tuple[Answer, int]:
        handle = kernel.handle
        match question.ask:
            case "find":
                if (handle.record.init_pid, handle.record.init_start) != tuple(question.init):
                    raise _no_such(question.sandbox_id)
                return self._told_of(handle), handle.end_descriptor()
            case "listen":
                if await handle.look() is None:
                    raise _no_such(question.sandbox_id)
                return {}, await off_loop(self.desk.listen_in_place, handle.folder, peer)
            case "ready":
                told: Answer = {"mistake": await self._ready(kernel, peer)}
            case "look":
                told = {"story": _story(await handle.look()), "notices": handle.notices()}
            case "stop":
                told = {"by_itself": await self._stopped(handle, peer)}
            case "close":
                self._all.pop(question.sandbox_id)
                told = await self._closed(kernel)
            case _:
                told = {}
                await off_loop(_act, handle, question)
        return told, -1

    async def _stopped(self, handle: LocalHandle, peer: Peer) -> bool:
        if await handle.look() is not None:
            raise _no_such(handle.record.sandbox_id)
        await off_loop(audit.changed, handle.record, f"stopped by {peer.name}")
        return await handle.stop(peer.name)

    def _listed(self, peer: Peer) -> list[Answer]:
        """All of the *peer*'s: what their records tell of them, and their use."""
        found = []
        kernels = [kernel.handle for kernel in list(self._all.values()) if kernel.of == peer.uid]
        for handle in (*kernels, *self._ahead.handles(peer.uid)):
            state, usage = handle.seen()
            workdir = self.desk.workdir(handle.record)
            record = replace(handle.record, workdir=workdir, made=(), planned=(), repositories=())
            record = _shortened(replace(record, later={}))
            told = {"record": record, "state": state, "usage": usage}
            found.append({name: as_json(one, whole=False) for name, one in told.items()})
        return found

    async def _closed(self, kernel: Kernel) -> Answer:
        handle = kernel.handle
        await self._end(kernel)
        story = await handle.look()
        return {
            "story": _story(story),
            "notices": handle.notices(),
            "left_behind": list(handle.left_behind),
        }

    def _told_of(self, handle: LocalHandle) -> Answer:
        record = handle.record
        return {
            "init": [record.init_pid, record.init_start],
            "labels": as_json(handle.labels),
            "unseen": list(handle.unseen),
            "shown_at": record.shown_at,
            "workdir": self.desk.workdir(record),
            "identity": [record.device, record.inode],
            "folder": self.desk.met_at(handle.folder),
        }

    async def _ready(self, kernel: Kernel, peer: Peer) -> str | None:
        """As `Handle.ready`; then the sockets are the *peer*'s."""
        handle = kernel.handle
        if kernel.adopted:  # whoever heard PID 1's word is gone; what is there tells
            mistake: str | None = handle.meeting.mistake()
        else:
            async with asyncio.timeout(_READY_SECONDS):
                mistake = await handle.ready()
        if mistake == "":
            await off_loop(self.desk.hand_over, handle.folder, peer)
        return mistake


def _adopted(launcher: LocalLauncher, folder: RecordFolder, record: Record) -> Kernel | None:
    """That of *folder*, also where it has ended meanwhile, and its server wants to know how; None
    if it is somebody's, or nobody asks for it: a sweep tells of that one's end."""
    server = folder.open_asker()
    if server == -1 and has_ended(record):
        return None
    with contextlib.suppress(*UNREADABLE):
        handle = launcher.adopt(folder.path)
        if handle:
            # Of a server that has just ended, the kernel is about to.
            watched = at_its_end() if server == -1 else -1 if server is None else server
            return Kernel(of=record.uid, handle=handle, watched=watched, adopted=True)
    if server is not None and server >= 0:
        os.close(server)
    return None


def _shortened(record: Record) -> Record:
    """With the beginnings of what people call it, for a list, which has to have room for others."""
    return replace(
        record,
        kernel_id=record.kernel_id[:_MOST_LISTED],
        name=record.name[:_MOST_LISTED],
        notebook=record.notebook[:_MOST_LISTED],
    )


def _act(handle: LocalHandle, question: Question) -> None:
    match question.ask:
        case "signal":
            handle.signal(question.signal)
        case "kill":
            handle.kill()
        case "note":
            handle.note_activity(busy=question.busy)
        case "say":
            handle.say(question.text)


def _note_server(handle: LocalHandle, watched: int) -> None:
    """For the next broker: which process the kernel's server is, and so whether anybody may still
    ask how it has ended."""
    with contextlib.suppress(OSError):  # the kernel has ended, and its folder gone
        handle.folder.note_asker(pid_of(watched))


def _story(story: ExitStory | None) -> Answer | None:
    return None if story is None else as_json(story)


def _check_descriptors(wish: Wish, fds: Sequence[int]) -> None:
    if len(fds) != STREAMS + len(wish.sources):
        raise SpecError(
            attempt="start a kernel through the sandbox broker",
            answer=f"{len(fds)} descriptors came for {STREAMS + len(wish.sources)} places",
            remedy="This is a mistake of the program that asked.",
        )


def _name_of(wish: Wish) -> tuple[str, str]:
    """To be remembered, which a path as long as a wish is not."""
    program = sha256(wish.argv[0].encode(errors="surrogatepass")).hexdigest()
    return program, wish.labels.name


def _copies(fds: Sequence[int]) -> list[int]:
    """All, or OSError and none."""
    made: list[int] = []
    try:
        for fd in fds:
            made.append(os.dup(fd))
    except OSError:
        _close_apart(made)
        raise
    return made


def _close_apart(fds: list[int]) -> None:
    apart(partial(close_all, fds))


def _unheard(_: str) -> None:
    """Nobody is told."""


def _no_such(sandbox_id: str) -> LaunchError:
    return LaunchError(
        attempt=f"find the sandbox {sandbox_id}",
        answer="it has ended, or was never this user's",
        remedy="Start a new kernel.",
        step="ask-broker",
    )
