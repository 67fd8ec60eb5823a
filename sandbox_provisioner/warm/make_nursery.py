"""warm/make_nursery.py - in the launching process: makes a nursery, and waits until it is ready.

Called in the background after a cold start that a nursery could have served, and by ``jupyter
sandbox warm``. It belongs to nobody: any server of this user finds it, and it ends when idle.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import sandbox_provisioner
from sandbox_provisioner import orders
from sandbox_provisioner.contract import Labels, Stdio, Warmth, WarmUnavailable
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.facilities.environment.facts.image_files import OURS
from sandbox_provisioner.facilities.process.plan import least_available_bytes
from sandbox_provisioner.handle import LocalHandle, readable
from sandbox_provisioner.host import WorkdirFacts
from sandbox_provisioner.inside import wire
from sandbox_provisioner.launch import LocalLauncher, perform_whole
from sandbox_provisioner.ledger import Ledger, closed_if_it_fails, undone_if_it_fails
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.orders.variables import before_installs
from sandbox_provisioner.performer import WORD_SECONDS, Performer
from sandbox_provisioner.plan import HOME, LaunchRequest, Plan, Site
from sandbox_provisioner.records import BUILDING
from sandbox_provisioner.spec import Limits
from sandbox_provisioner.stem import stem
from sandbox_provisioner.story import ExitStory
from sandbox_provisioner.warm.found import SOCKET, Whose, call, find, link_of
from sandbox_provisioner.warm.keys import Command, bearable, key_of, made_of, of_no_notebook
from sandbox_provisioner.warm.why_cold import why_no_nursery

KIND = "nursery"
_READY_SECONDS = 180
_POLITE_SECONDS = 10.0
_OTHER_HOME = (
    "Not preloaded for a kernel whose work directory is the home directory, or whose command line "
    "has more than -f: {names}. Modules would find another home or shell than its own."
)
_ANSWER_BYTES = 1 << 16
_NAME_LENGTH = 256
# Of an error message; nursery.py sends no more.
_MOST_OF_ERROR = 500
# What a child touches before it joins its own group (page tables, above all) stays charged to the
# nursery as long as it lives: some 1.3 MB each.
_FORKS_BYTES = 4 << 30
_PACKAGE = os.path.dirname(os.path.abspath(sandbox_provisioner.__file__))
# What is appended to the path is taken from it again: a kernel shall find what it would find.
_BOOT = (
    "import sys; sys.path[:1] = [p for p in sys.path[:1] if p]; sys.path.append(sys.argv[1]); "
    "from sandbox_provisioner.nursery.main import main; sys.path.pop(); main(sys.argv[2:])"
)


async def make_nursery(
    launcher: LocalLauncher,
    request: LaunchRequest,
    labels: Labels,
    warmth: Warmth,
) -> LocalHandle | None:
    """Make the nursery for kernels such as *request*; None if there is one, or somebody makes it.

    Returns when it is ready. Raises SandboxError if it cannot be had, LaunchError with what it
    wrote if its imports fail; then nothing is left of it.
    """
    site, _ = await off_loop(launcher.survey_closed, request)  # a nursery is given none of it
    command, runtime = Command.of(request.argv), launcher.runtime()
    if command is None or why_no_nursery(request, site):
        return None
    made, preload = made_of(request, site, warmth.preload), bearable(request, site, warmth.preload)
    key, *others = (key_of(made, owner) for owner in warmth.owners)
    with _alone(runtime / f"{key}{BUILDING}") as alone:
        for known in (key, *others):
            if found := find(runtime, known, Whose.of(request, site)):
                found.channel.close()
                return None
        if not alone:
            return None
        own = _own_request(request, site, command, replace(warmth, preload=preload))
        if why := await off_loop(launcher.why_not_ahead, site, _chosen(own, request, site)):
            raise WarmUnavailable(why, never=True)
        handle = await _start(launcher, own, replace(labels, kind=KIND, notebook=""))
        async with closed_if_it_fails(handle):
            polite = warmth.owner and not warmth.waited_for
            with _giving_way(handle) if polite else contextlib.nullcontext():
                told = await _ready(handle)
            if warmth.preload != preload:
                launcher.warn(_OTHER_HOME.format(names=", ".join(warmth.preload)))
            for sentence in _left_out(told, preload):
                launcher.warn(sentence)
            _publish(handle, link_of(runtime, key))
        return handle


@contextlib.contextmanager
def _giving_way(handle: LocalHandle) -> Iterator[None]:
    """To the kernel that has just started, above all; but a busy machine may stay so for long."""
    handle.give_way(on=True)
    after = asyncio.get_running_loop().call_later(
        _POLITE_SECONDS, lambda: handle.give_way(on=False)
    )
    try:
        yield
    finally:
        after.cancel()
        handle.give_way(on=False)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether nobody else is in here for *path*."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _own_request(
    request: LaunchRequest, site: Site, command: Command, warmth: Warmth
) -> LaunchRequest:
    # A cap on CPU time would make starts slow, and the kernels have their own.
    asked = request.spec.limits
    limits = Limits(
        memory_bytes=asked.memory_bytes and asked.memory_bytes + _FORKS_BYTES,
        pids=asked.pids,
        by_default=asked.by_default,
    )
    if site.facts.caller.opened is not None:  # somebody else's: no more than one of their kernels
        limits = replace(limits, memory_bytes=asked.memory_bytes, cpu_cores=asked.cpu_cores)
    # Nobody speaks with anybody from there.
    network = replace(request.spec.network, allow=(), deny=())
    idle, lonely = warmth.idle_seconds, warmth.lonely_seconds
    patience = idle, idle if lonely is None else lonely, least_available_bytes()
    waits = (f"{number:.12g}" for number in patience)
    ours = OURS if site.root.is_own else os.path.dirname(_PACKAGE)
    program = site.files.program if site.root.is_own else command.program
    words = ("-c", _BOOT, ours, *waits, ",".join(warmth.preload), "")
    return replace(
        request,
        sandbox_id=uuid.uuid4().hex[:12],
        spec=replace(request.spec, volumes=(), limits=limits, network=network),
        argv=(program, *command.flags, *words),
        # As its kernels have them: its own caps are others, and libraries count threads by them.
        environment=of_no_notebook(before_installs(request, site)),
        cwd=HOME,
        connection_file=None,
        survive_server=not warmth.owner or warmth.watched >= 0,
        watched=warmth.watched,
        logged=(),
        extra_files=(*request.extra_files, _PACKAGE),
    )


def _chosen(own: LaunchRequest, request: LaunchRequest, site: Site) -> dict[str, str]:
    """The variables of a nursery that are as whoever asks for *request* has them."""
    theirs = request.environment, site.server_environment
    return {n: v for n, v in own.environment.items() if any(one.get(n) == v for one in theirs)}


async def _start(launcher: LocalLauncher, request: LaunchRequest, labels: Labels) -> LocalHandle:
    made = Ledger(launcher.runtime(), request, labels)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        # Its requests come through standard input.
        performer = Performer(Stdio(listener.fileno(), subprocess.DEVNULL, subprocess.DEVNULL))
        async with undone_if_it_fails() as undo:
            undo.push_async_callback(made.remove)
            undo.push_async_callback(performer.end)
            with ExitStack() as opened:
                await off_loop(performer.ask, stem)
                site, tree = await off_loop(launcher.look, request, opened)
                site = replace(site, workdir=WorkdirFacts.nowhere(), volumes=())
                site, plan = await off_loop(_prepare, made, site, listener)
                return await perform_whole(made, performer, site, plan, tree)


def _prepare(made: Ledger, site: Site, listener: socket.socket) -> tuple[Site, Plan]:
    """The record, and in its folder, which others remove with it, the socket for requests."""
    site = made.make_record(site)
    assert made.folder
    listener.bind(os.fspath(made.folder.path / SOCKET))
    listener.listen(64)
    return site, orders.compile_nursery(made.request, site)


async def _ready(handle: LocalHandle) -> Told:
    """Wait for its first answer; LaunchError with its last words if it ends before."""
    channel = call(handle.folder.path / SOCKET)
    told = b""
    if channel:
        with channel:
            channel.send(wire.message(wire.STATUS))
            answer = asyncio.ensure_future(readable(channel.fileno()))
            ending = asyncio.ensure_future(handle.wait())
            await asyncio.wait(
                (answer, ending), timeout=_READY_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            for task in (answer, ending):
                task.cancel()
            channel.setblocking(False)
            with contextlib.suppress(OSError):
                told = channel.recv(_ANSWER_BYTES)
    if told:
        return Told.of(told)
    story, ended = await _end_of(handle)
    raise LaunchError(
        attempt="make a nursery",
        answer=f"it ended with status {story.code}" if ended else "it was not ready in time",
        remedy="Kernels start cold meanwhile. See what it wrote:",
        step="wait-for-nursery",
        stderr_tail=story.stderr_tail,
    )


@dataclass(frozen=True, slots=True)
class Told:
    """A nursery's answer about the modules that it should preload: those that it *refused*, with
    the reasons, and those that *failed*, with their errors. Modules have run in it: it may say what
    it likes."""

    refused: Mapping[str, str]
    failed: Mapping[str, str]

    @classmethod
    def of(cls, answer: bytes) -> Told:
        """What *answer* means; LaunchError if it means nothing."""
        try:
            found = json.loads(answer)
            refused, failed = (_texts(found[kind]) for kind in ("refused", "failed"))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise LaunchError(
                attempt="make a nursery",
                answer="what it answered is not what a nursery answers",
                remedy="Kernels start cold meanwhile. Look at the modules of preload.",
                step="wait-for-nursery",
            ) from None
        return cls(refused, failed)


def _texts(found: Mapping[object, object]) -> dict[str, str]:
    return {str(name)[:_NAME_LENGTH]: str(why)[:_MOST_OF_ERROR] for name, why in found.items()}


async def _end_of(handle: LocalHandle) -> tuple[ExitStory, bool]:
    """How it ended, and whether by itself. Its socket closes before its init has written that down;
    one that only does not answer is asked to end, so that what it wrote is kept."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WORD_SECONDS):
            return await handle.wait(), True
    handle.signal(signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WORD_SECONDS):
            return await handle.wait(), False
    handle.kill()
    return await handle.wait(), False


def _left_out(told: Told, preload: tuple[str, ...]) -> Iterator[str]:
    """What a person who wrote *preload* has to know, once for each nursery."""
    for name in preload:
        if name in told.refused:
            yield f"{name} is not preloaded: {told.refused[name]}."
        elif name in told.failed:
            yield f"{name} is not preloaded: {told.failed[name]}"


def _publish(handle: LocalHandle, link: Path) -> None:
    folder = handle.folder.path
    new = folder / "link"
    new.symlink_to(f"{folder.name}/{SOCKET}")
    new.replace(link)
